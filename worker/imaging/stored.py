"""Keep a volume on disk as the model's input: one file, written whole or not at all."""

import json
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from worker.core.errors import InvalidObjectError, StoreUnavailableError
from worker.imaging.volume import Volume

FORMAT = 1


def save(volume: Volume, path: Path | str) -> None:
    """Write a volume as an uncompressed .npz, durable and atomic; `load` gives back the same values.

    Hounsfield units that are whole numbers, as nearly all are, take two bytes a voxel, others four.

    Raises StoreUnavailableError when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    facts = {
        "format": FORMAT,
        "repairs": volume.repairs,
        "regions": volume.regions,
        "series_uid": volume.series_uid,
        "series_number": volume.series_number,
        "part": volume.part,
        "instance_uids": volume.instance_uids,
    }
    arrays: dict[str, NDArray[np.generic]] = {
        "affine": volume.affine,
        "facts": np.frombuffer(json.dumps(facts).encode("utf-8"), dtype=np.uint8),
    }
    if volume.padding is not None:
        arrays["padding"] = np.packbits(volume.padding)
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".volume-", delete=False) as file:
            try:
                with zipfile.ZipFile(file, "w") as archive:
                    _write_hu(volume, archive)
                    for name, array in arrays.items():
                        with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                            npy.write_array(member, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink()
                raise
        _sync_folder(path.parent)
    except OSError as error:
        raise StoreUnavailableError.of("the volume cannot be written", error) from error


def _write_hu(volume: Volume, archive: zipfile.ZipFile) -> None:
    kind = volume.compact_type()
    with archive.open("hu.npy", "w", force_zip64=True) as member:
        facts = {"descr": npy.dtype_to_descr(kind), "fortran_order": False, "shape": volume.hu.shape}
        npy.write_array_header_1_0(member, facts)
        for plane in volume.planes(kind):
            member.write(plane.data)


def load(path: Path | str) -> Volume:
    """Read a volume that `save` wrote.

    Raises StoreUnavailableError when the file is not there, InvalidObjectError when it is not one of ours.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            facts = json.loads(archive["facts"].tobytes())
            hu = archive["hu"].astype(np.float32, copy=False)
            affine = archive["affine"]
            padding = None
            if "padding" in archive:
                padding = np.unpackbits(archive["padding"], count=hu.size).view(np.bool_).reshape(hu.shape)
        if facts["format"] != FORMAT:
            raise InvalidObjectError("The stored volume has another format. Requeue the study.")
        return Volume(
            hu=hu,
            affine=affine,
            padding=padding,
            repairs=tuple(facts["repairs"]),
            regions=tuple(facts["regions"]),
            series_uid=facts["series_uid"],
            series_number=facts["series_number"],
            part=facts["part"],
            instance_uids=tuple(facts["instance_uids"]),
        )
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InvalidObjectError("The stored volume is damaged. Requeue the study.") from error
    except OSError as error:
        raise StoreUnavailableError(f"The volume cannot be read: {error.strerror or 'input error'}.") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
