"""Write a volume as NIfTI-1, the form that research tools read."""

import gzip
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO

import nibabel

from worker.core.errors import StoreUnavailableError
from worker.imaging.volume import Volume


def write(volume: Volume, path: Path | str) -> None:
    """Write `.nii` or `.nii.gz`; NIfTI's axes are (column, row, slice), so the affine's first and third columns swap.

    Whole Hounsfield units are stored as int16, others as float32. No text about the patient is written.

    Raises StoreUnavailableError when the file cannot be written, ValueError for another ending.
    """
    path = Path(path)
    ending = _ending(path)
    kind = volume.compact_type()
    affine = volume.affine[:, [2, 1, 0, 3]]
    header = nibabel.Nifti1Header()
    header.set_data_dtype(kind)
    header.set_data_shape(volume.hu.shape[::-1])
    header.set_slope_inter(1.0, 0.0)
    header.set_xyzt_units("mm")
    header.set_qform(affine, code=1)
    header.set_sform(affine, code=1)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".nifti-") as folder:
            unfinished = Path(folder) / "volume"
            with unfinished.open("wb") as plain, _compressed(plain, ending) as file:
                header.write_to(file)
                for plane in volume.planes(kind):
                    file.write(plane.data)
            unfinished.replace(path)
    except OSError as error:
        raise StoreUnavailableError(f"The NIfTI file cannot be written: {error.strerror or 'output error'}.") from error


def _compressed(plain: BinaryIO, ending: str) -> AbstractContextManager[BinaryIO | gzip.GzipFile]:
    """The stream to write to; neither its name nor a time gets into it, so that equal volumes are equal files."""
    if ending == ".nii":
        return nullcontext(plain)
    return gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=plain, mtime=0)


def numbered(path: Path, number: int) -> Path:
    """The name of one of several volumes written to `path`: `ct.nii.gz` becomes `ct_2.nii.gz`.

    Raises ValueError for another ending.
    """
    ending = _ending(path)
    return path.with_name(f"{path.name.removesuffix(ending)}_{number}{ending}")


def _ending(path: Path) -> str:
    for ending in (".nii.gz", ".nii"):
        if path.name.endswith(ending):
            return ending
    raise ValueError("the name of a NIfTI file ends in .nii or .nii.gz")
