"""Voxel labels of phantoms as targets for the patches of the vision tower.

Label maps lie on the grid of the volume; the model input lies on its own. Every labelled voxel is carried through the same
affine that the drafter uses for evidence, so crop and resampling need no second implementation.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mu2_model.volume_grid import VolumeGrid, apply_affine

FRACTION_SCALE = 255
# A cell that a finding only grazes is neither positive nor negative.
LEAST_FRACTION = 0.012
GRAZED_FRACTION = 0.003


@dataclass(frozen=True)
class LabelMaps:
    """Organ and finding labels of every voxel of a volume (slice, row, column); 0 is nothing."""

    organs: NDArray[np.uint8]
    findings: NDArray[np.uint8]


def read_label_maps(path: Path | str) -> LabelMaps:
    """The label maps of a phantom that `python -m training phantoms --format numpy` wrote."""
    with np.load(path) as stored:
        return LabelMaps(stored["organs"], stored["findings"])


def cell_fractions(
    labels: NDArray[np.uint8], classes: int, grid: VolumeGrid, patch: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """Share of every patch that each class fills, times 255: (chunks, patches, classes), class c in column c - 1.

    Patches are ordered (slice, row, column) in a chunk, as the tower orders them.
    """
    depth, height, width = grid.chunk_shape
    cells = (depth // patch[0], height // patch[1], width // patch[2])
    chunks = -(-grid.shape[0] // depth)
    voxels = np.argwhere(labels > 0)
    counts = np.zeros((chunks * cells[0], cells[1], cells[2], classes), dtype=np.float32)
    if len(voxels):
        to_model = np.linalg.inv(grid.to_source).astype(np.float64)
        model_index = np.rint(apply_affine(to_model, voxels.astype(np.float64))).astype(int)
        inside = ((model_index >= 0) & (model_index < np.asarray(grid.shape))).all(axis=1)
        cell = model_index[inside] // np.asarray(patch)
        column = labels[tuple(voxels[inside].T)].astype(int) - 1
        # A source voxel stands for as many model voxels as its volume holds.
        share = 1 / (abs(np.linalg.det(grid.to_source[:3, :3])) * patch[0] * patch[1] * patch[2])
        np.add.at(counts, (cell[:, 0], cell[:, 1], cell[:, 2], column), share)
    shaped = counts.reshape(chunks, cells[0] * cells[1] * cells[2], classes)
    # Rounded up, so that the smallest finding does not vanish.
    return np.ceil(np.minimum(shaped, 1) * FRACTION_SCALE).astype(np.uint8)
