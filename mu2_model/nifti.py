"""NIfTI files to arrays and affines in this package's order, and back.

nibabel indexes (i, j, k); this package (slice, row, column) = (k, j, i), which is the file's own memory order, so nothing is
copied. Values keep the type they are stored in unless the header scales them.
"""

from pathlib import Path
from typing import Any
from zlib import error as ZlibError

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from numpy.typing import NDArray

from mu2_model.errors import VolumeError
from mu2_model.volume_grid import Matrix

IJK_TO_KJI = [2, 1, 0, 3]


def load_nifti(path: Path | str) -> tuple[NDArray[Any], Matrix]:
    """The array (slice, row, column) and its affine to RAS millimetres; .nii and .nii.gz.

    Raises VolumeError for a file that is no NIfTI, is cut off, holds several volumes or has no orientation.
    """
    try:
        image: Any = nibabel.load(path)
        scaled = image.dataobj.slope != 1 or image.dataobj.inter != 0
        array = np.asanyarray(image.dataobj, dtype=np.float32) if scaled else np.asanyarray(image.dataobj)
    except (ImageFileError, EOFError, OSError, ValueError, ZlibError) as error:
        raise VolumeError(f"{Path(path).name} is not a readable NIfTI file: {error}") from error
    array = array[..., 0] if array.ndim == 4 and array.shape[3] == 1 else array
    if array.ndim != 3:
        raise VolumeError(f"the NIfTI file holds an array of shape {array.shape}, not one volume")
    if not (image.header["qform_code"] or image.header["sform_code"]):
        raise VolumeError("the NIfTI file has neither qform nor sform: its left and right are unknown")
    return array.T, np.asarray(image.affine, dtype=np.float64)[:, IJK_TO_KJI]


def save_nifti(path: Path | str, array: NDArray[Any], affine: Matrix) -> None:
    """Write an array (slice, row, column) with its affine."""
    nibabel.save(nibabel.Nifti1Image(array.T, affine[:, IJK_TO_KJI]), path)
