"""NIfTI files to arrays and affines in this package's order, and back.

nibabel indexes (i, j, k); this package (slice, row, column) = (k, j, i), which is the file's own memory order, so nothing is
copied. Values keep the type they are stored in unless the header scales them. Compressed files are inflated by ISA-L, several
times as fast as by zlib.
"""

from pathlib import Path
from typing import Any, BinaryIO
from zlib import error as ZlibError

import nibabel
import numpy as np
from isal import igzip
from isal.isal_zlib import IsalError
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from mu2_model.errors import VolumeError
from mu2_model.volume_grid import Matrix

IJK_TO_KJI = [2, 1, 0, 3]
# What nibabel and the decompressors raise for a file that is cut off or damaged, in its header or behind it.
UNREADABLE: tuple[type[Exception], ...] = (  # type: ignore[assignment]
    ImageFileError,
    HeaderDataError,
    EOFError,
    OSError,
    ValueError,
    OverflowError,
    MemoryError,
    ZlibError,
    IsalError,
)
TRAILING_BYTES = READ_BYTES = 1 << 20


def load_nifti(path: Path | str) -> tuple[NDArray[Any], Matrix]:
    """The array (slice, row, column) and its affine to RAS millimetres; .nii and .nii.gz.

    Raises VolumeError for a file that is no NIfTI, is cut off or damaged, holds several volumes or has no orientation.
    """
    name = Path(path).name
    try:
        image: Any = nibabel.load(path)
        is_nifti = isinstance(image, nibabel.Nifti1Pair)
        array = read_voxels(image) if is_nifti else np.empty(0)
    except UNREADABLE as error:
        raise VolumeError(f"{name} is not a readable NIfTI file: {error}") from error
    if not is_nifti:
        raise VolumeError(f"{name} is a {type(image).__name__}, not a NIfTI file")
    array = array[..., 0] if array.ndim == 4 and array.shape[3] == 1 else array
    if array.ndim != 3:
        raise VolumeError(f"the NIfTI file holds an array of shape {array.shape}, not one volume")
    if not (image.header["qform_code"] or image.header["sform_code"]):
        raise VolumeError("the NIfTI file has neither qform nor sform: its left and right are unknown")
    return array.T, np.asarray(image.affine, dtype=np.float64)[:, IJK_TO_KJI]


def read_voxels(image: Any) -> NDArray[Any]:
    """The voxels of a nibabel image in its own order; float32 where the header scales them, else as they are stored."""
    stored, file = image.dataobj, Path(image.file_map["image"].filename)
    kind = np.float32 if stored.slope != 1 or stored.inter != 0 else None
    if file.suffix != ".gz":
        return np.asanyarray(stored, dtype=kind)
    with igzip.open(file) as stream:
        if kind is None:
            array = read_plain(stream, stored)
        else:
            spec = (stored.shape, stored.dtype, stored.offset, stored.slope, stored.inter)
            array = np.asanyarray(ArrayProxy(stream, spec), dtype=kind)
        # The checksum stands at the end: damaged voxels would go unseen without this.
        while stream.read(TRAILING_BYTES):
            pass
    return array


def read_plain(stream: BinaryIO, stored: Any) -> NDArray[Any]:
    """Voxels without scaling, inflated to where they stay: nibabel would copy them once more. EOFError when some lack."""
    stream.read(stored.offset)
    array = np.empty(stored.shape, stored.dtype, order="F")
    target = array.reshape(-1, order="F").view(np.uint8).data
    filled = 0
    while filled < len(target):
        count = stream.readinto(target[filled : filled + READ_BYTES])  # type: ignore[attr-defined]
        if not count:
            raise EOFError(f"{filled} of {len(target)} bytes of voxels")
        filled += count
    return array


def save_nifti(path: Path | str, array: NDArray[Any], affine: Matrix) -> None:
    """Write an array (slice, row, column) with its affine."""
    nibabel.save(nibabel.Nifti1Image(array.T, affine[:, IJK_TO_KJI]), path)
