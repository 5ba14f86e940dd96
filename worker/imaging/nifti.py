"""Write a volume as NIfTI-1, the form that research tools read."""

import tempfile
from pathlib import Path

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
    array = volume.compact_hu().transpose(2, 1, 0)
    affine = volume.affine[:, [2, 1, 0, 3]]
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".nifti-") as folder:
            unfinished = Path(folder) / f"volume{ending}"
            nibabel.save(image, unfinished)
            unfinished.replace(path)
    except OSError as error:
        raise StoreUnavailableError(f"The NIfTI file cannot be written: {error.strerror or 'output error'}.") from error


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
