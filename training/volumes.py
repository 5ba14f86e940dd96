"""From a file on disk to model input, once: a lazy reader and a cache of preprocessed volumes.

The cache is a folder of memory-mapped arrays named by the hash of the file's bytes and of the preprocessing, so a changed
file or setting never meets an old entry, and data-loader workers share pages instead of copying.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mu2_model import Mu2ImageProcessor
from mu2_model.errors import VolumeError
from mu2_model.image_processing_mu2 import Volume
from mu2_model.nifti import load_nifti
from training.data import file_digest
from training.errors import TrainingError

STORED_DTYPE = np.float16
"""Pixels lie in [0, 1]; half precision keeps them to 0.0005, a quarter of a grey level of a 400 HU window."""


class BadVolumeError(TrainingError, ValueError):
    """A file that no model input can be made from; the message says which and why."""


def read_volume(path: Path | str) -> Volume:
    """A NIfTI file, or a phantom's .npz, as (array (slice, row, column) in HU, affine to RAS mm); else BadVolumeError.

    Integer files without scaling keep their type, so a 512 x 512 x 300 volume is 150 MB and not 600.
    """
    _require_file(Path(path))
    if Path(path).suffix == ".npz":
        return _read_phantom(Path(path))
    try:
        return load_nifti(path)
    except VolumeError as error:
        raise BadVolumeError(str(error)) from error


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise BadVolumeError(
            f"{path.name} is a folder: training reads NIfTI files and the .npz of phantoms, so convert a folder of DICOM "
            "files by `mu2 volume DIR OUT.nii.gz`, or make phantoms with `--format numpy`"
        )
    if not path.is_file():
        raise BadVolumeError(f"{path.name} is not there")


def _read_phantom(path: Path) -> Volume:
    try:
        with np.load(path) as stored:
            return stored["hu"], stored["affine"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise BadVolumeError(f"{path.name} cannot be read as a phantom: {error}") from error


@dataclass(frozen=True)
class CachedVolume:
    """One preprocessed volume: pixels (C, channels, D, H, W) as stored, how many chunks hold slices, what was repaired."""

    pixels: NDArray[Any]
    live_chunks: int
    repairs: tuple[str, ...]


@dataclass(frozen=True)
class Preparation:
    """What filling the cache came to: files now there, and every bad file with its reason."""

    ready: int
    bad: dict[str, str]

    def text(self) -> str:
        """The report to read."""
        lines = [f"{self.ready} volumes ready, {len(self.bad)} bad"]
        return "\n".join(lines + [f"{Path(path).name}: {reason}" for path, reason in self.bad.items()])


class VolumeCache:
    """Preprocessed volumes on disk, made when first asked for."""

    def __init__(self, folder: Path | str, processor: Mu2ImageProcessor):
        self.folder, self.processor = Path(folder), processor
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in sorted(processor.to_dict().items()) if not k.startswith("_")}
        self.settings_digest = hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()
        self._known: dict[tuple[str, int, int], str] = {}

    def key(self, path: Path | str) -> str:
        """Name of a file's entry; a file is hashed once for each size and time of change."""
        stat = Path(path).stat()
        identity = (str(path), stat.st_size, stat.st_mtime_ns)
        if identity not in self._known:
            content = file_digest(Path(path))
            self._known[identity] = hashlib.sha256((content + self.settings_digest).encode()).hexdigest()[:40]
        return self._known[identity]

    def get(self, path: Path | str) -> CachedVolume:
        """The entry of a file, made if it is not there; BadVolumeError when none can be made."""
        _require_file(Path(path))
        entry = self.folder / f"{self.key(path)}.npy"
        if not entry.is_file():
            self._make(path, entry)
        told = json.loads(entry.with_suffix(".json").read_text(encoding="utf-8"))
        return CachedVolume(np.load(entry, mmap_mode="r"), told["live_chunks"], tuple(told["repairs"]))

    def _make(self, path: Path | str, entry: Path) -> None:
        array, affine = read_volume(path)
        try:
            prepared = self.processor.prepare(array, affine)
        except VolumeError as error:
            raise BadVolumeError(f"{Path(path).name}: {error}") from error
        told = {"live_chunks": int(prepared.chunk_mask.sum()), "repairs": list(prepared.repairs)}
        partial = entry.with_suffix(f".{os.getpid()}.partial")
        with partial.open("wb") as stream:
            np.save(stream, prepared.pixel_values.numpy().astype(STORED_DTYPE))
        # The array appears last: an entry is complete or absent, also when two workers make it at once.
        note = entry.with_suffix(f".{os.getpid()}.note")
        note.write_text(json.dumps(told), encoding="utf-8")
        note.replace(entry.with_suffix(".json"))
        partial.replace(entry)

    def prepare(self, paths: Iterable[str]) -> Preparation:
        """Fill the cache; bad files are reported and counted, never left out in silence or replaced by another case."""
        ready, bad = 0, {}
        for path in dict.fromkeys(paths):
            try:
                self.get(path)
                ready += 1
            except BadVolumeError as error:
                bad[path] = str(error)
        return Preparation(ready, bad)


def stack_volumes(volumes: list[CachedVolume]) -> dict[str, Tensor]:
    """`pixel_values` (V, C, channels, D, H, W) in float32 and `chunk_mask` (V, C), shorter volumes padded by empty chunks."""
    longest = max(volume.pixels.shape[0] for volume in volumes)
    pixels = torch.zeros(len(volumes), longest, *volumes[0].pixels.shape[1:])
    mask = torch.zeros(len(volumes), longest, dtype=torch.bool)
    for row, volume in enumerate(volumes):
        chunks = volume.pixels.shape[0]
        # A read-only map has no writable tensor; the assignment copies it once, straight into the batch.
        pixels[row, :chunks] = torch.from_numpy(np.asarray(volume.pixels, dtype=np.float32))
        mask[row, : volume.live_chunks] = True
    return {"pixel_values": pixels, "chunk_mask": mask}
