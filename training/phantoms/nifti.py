"""Writes a phantom's volumes as NIfTI the way dcm2niix stores an axial series: (column, row upwards, slice), RAS millimetres."""

import gzip
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray

from training.phantoms.canvas import Grid


def nifti_affine(grid: Grid) -> NDArray[np.float64]:
    """4x4 from (column, row counted from the back, slice, 1) to RAS millimetres."""
    x, y, z = grid.origin
    back = y + grid.pixel_mm * (grid.rows - 1)
    return np.array(
        [
            [-grid.pixel_mm, 0.0, 0.0, -x],
            [0.0, grid.pixel_mm, 0.0, -back],
            [0.0, 0.0, grid.slice_mm, z],
            [0.0, 0.0, 0.0, 1.0],
        ]
    )


def write_nifti(volume: NDArray[np.int16] | NDArray[np.uint8], grid: Grid, path: Path) -> None:
    """Write a volume (slices, rows, columns) as `.nii.gz`; the same bytes every time, no time stamp."""
    data = np.transpose(volume, (2, 1, 0))[:, ::-1, :]
    image = nibabel.Nifti1Image(np.asfortranarray(data), nifti_affine(grid), dtype=volume.dtype)
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(image.affine, code=1)
    image.set_qform(image.affine, code=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Level 1: noise does not compress better at the default, which takes five times as long.
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
