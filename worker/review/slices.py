"""Slices of the volume that the model saw: read from the store without loading it, compressed once, kept in memory.

A plane is sent as gzip-compressed little-endian int16 Hounsfield units and windowed in the browser. Planes are cut after
the axes were put in the order that readers know: patient right on the left of the picture, front at the top.
"""

import json
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from isal import igzip
from numpy.lib import format as npy
from numpy.typing import NDArray

from worker.core.errors import InvalidObjectError, NotFoundError, StoreUnavailableError

PLANES = ("axial", "coronal", "sagittal")
COMPRESSION_LEVEL = 1  # of igzip: a quarter of a slice's time on the wire; higher levels gain 2 %
OPEN_VOLUMES = 64
_OBLIQUE_COSINE = 0.99  # about 8 degrees


@dataclass(frozen=True, eq=False)
class OpenVolume:
    """A stored volume mapped into memory, its axes in reading order: foot to head, front to back, right to left."""

    hu: NDArray[Any]  # (slices, rows, columns), int16 or float32, a view of the file
    spacing_mm: tuple[float, float, float]
    affine: NDArray[np.float64]  # 4x4 of the view: (slice, row, column, 1) to RAS millimetres
    oblique: bool  # an axis lies more than a few degrees off the patient's
    regions: tuple[str, ...]  # of the body
    repairs: tuple[str, ...]  # what was mended in the geometry

    def count(self, plane: str) -> int:
        """How many planes there are."""
        return int(self.hu.shape[PLANES.index(plane)])

    def plane(self, plane: str, index: int) -> NDArray[np.int16]:
        """One plane as rows and columns, head or front at the top; raises `NotFoundError` beyond the volume."""
        if not 0 <= index < self.count(plane):
            raise NotFoundError("the volume has no such slice")
        if plane == "axial":
            cut = self.hu[index]
        elif plane == "coronal":
            cut = self.hu[::-1, index, :]
        else:
            cut = self.hu[::-1, :, index]
        if cut.dtype != np.int16:
            limits = np.iinfo(np.int16)
            cut = np.clip(np.rint(cut), limits.min, limits.max)
        return np.ascontiguousarray(cut, dtype="<i2")

    def describe(self) -> dict[str, Any]:
        """What the viewer needs to know: of each plane size, spacing in millimetres and letters at the four edges; repairs."""
        depth, rows, columns = self.hu.shape
        z, y, x = self.spacing_mm
        edges = {"axial": "ALPR", "coronal": "HLFR", "sagittal": "HPFA"}
        sizes = {
            "axial": (depth, rows, columns, y, x),
            "coronal": (rows, depth, columns, z, x),
            "sagittal": (columns, depth, rows, z, y),
        }
        return {
            "planes": {
                plane: dict(zip(("count", "rows", "columns", "row_mm", "column_mm"), size, strict=True))
                | {"edges": list(edges[plane])}
                for plane, size in sizes.items()
            },
            "oblique": self.oblique,
            "repairs": list(self.repairs),
            # RAS millimetres (x, y, z, 1) times this is the index of the axial slice.
            "axial_of_ras": [float(value) for value in np.linalg.inv(self.affine)[0]],
        }


def open_volume(path: Path) -> OpenVolume:
    """Maps a volume that `worker.imaging.stored` saved; raises `StoreUnavailableError` or `InvalidObjectError`."""
    try:
        modified = path.stat().st_mtime_ns
    except OSError as error:
        raise StoreUnavailableError("the volume is not in the store any more; requeue the study") from error
    return _open(str(path), modified)


@lru_cache(maxsize=OPEN_VOLUMES)
def _open(path: str, _modified: int) -> OpenVolume:
    try:
        with zipfile.ZipFile(path) as archive:
            hu = _map(path, archive, "hu.npy")
            with archive.open("affine.npy") as file:
                affine = npy.read_array(file, allow_pickle=False)
            with archive.open("facts.npy") as file:
                facts = json.loads(npy.read_array(file, allow_pickle=False).tobytes())
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        raise InvalidObjectError("the stored volume is damaged; requeue the study") from error
    except OSError as error:
        raise StoreUnavailableError(f"the volume cannot be read: {error.strerror or 'input error'}") from error
    return _in_reading_order(hu, affine, facts)


def _map(path: str, archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """A member of an uncompressed archive as an array over the file itself."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError("the volume is compressed")
    with archive.open(name) as member:
        version = npy.read_magic(member)
        header = npy.read_array_header_1_0(member) if version == (1, 0) else npy.read_array_header_2_0(member)
        shape, fortran, dtype = header
        offset = member.tell()
    with Path(path).open("rb") as file:
        file.seek(info.header_offset + 26)  # lengths of name and extra field in the local header (APPNOTE 4.3.7)
        name_length, extra_length = np.frombuffer(file.read(4), dtype="<u2")
    start = info.header_offset + 30 + int(name_length) + int(extra_length) + offset
    return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape, order="F" if fortran else "C")


def _in_reading_order(hu: NDArray[Any], affine: NDArray[np.float64], facts: Mapping[str, Any]) -> OpenVolume:
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    wanted = ((2, 1), (1, -1), (0, -1))  # head, back, left along growing indices; RAS counts right and front
    axes: list[int] = []
    flips: list[bool] = []
    for ras, sign in wanted:
        free = [axis for axis in range(3) if axis not in axes]
        axis = max(free, key=lambda a: abs(directions[ras, a]))
        axes.append(axis)
        flips.append(directions[ras, axis] * sign < 0)
    turned = np.zeros((4, 4))
    turned[:3, 3], turned[3, 3] = affine[:3, 3], 1.0
    for new, (axis, flip) in enumerate(zip(axes, flips, strict=True)):
        step = affine[:3, axis]
        turned[:3, new] = -step if flip else step
        if flip:
            turned[:3, 3] += step * (hu.shape[axis] - 1)
    view = np.transpose(hu, axes)[tuple(slice(None, None, -1) if flip else slice(None) for flip in flips)]
    slice_mm, row_mm, column_mm = np.linalg.norm(turned[:3, :3], axis=0)
    aligned = min(abs(directions[ras, axis]) for (ras, _), axis in zip(wanted, axes, strict=True))
    return OpenVolume(
        view,
        (float(slice_mm), float(row_mm), float(column_mm)),
        turned,
        bool(aligned < _OBLIQUE_COSINE),
        tuple(facts["regions"]),
        tuple(facts["repairs"]),
    )


class SliceCache:
    """Compressed planes, the least recently read ones dropped beyond a size; safe for threads."""

    def __init__(self, megabytes: int) -> None:
        self._limit = megabytes * 1024 * 1024
        self._planes: OrderedDict[tuple[str, str, int], bytes] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def peek(self, path: Path, plane: str, index: int) -> bytes | None:
        """A plane that is in memory already."""
        key = (str(path), plane, index)
        with self._lock:
            found = self._planes.get(key)
            if found is not None:
                self._planes.move_to_end(key)
            return found

    def get(self, path: Path, plane: str, index: int) -> bytes:
        """A plane as gzip bytes; raises as `open_volume` and `OpenVolume.plane`."""
        found = self.peek(path, plane, index)
        if found is not None:
            return found
        key = (str(path), plane, index)
        made = igzip.compress(open_volume(path).plane(plane, index).tobytes(), COMPRESSION_LEVEL)
        with self._lock:
            if key not in self._planes:
                self._planes[key] = made
                self._size += len(made)
            while self._size > self._limit:
                self._size -= len(self._planes.popitem(last=False)[1])
        return made


class Looks:
    """What was allowed a moment ago: (session's cookie, study, volume) to the volume's file.

    An account that another process closes, or a role that it changes, reaches slices at most `SECONDS` later; what this
    page does itself (log out, lock, close an account) ends them at once, by `forget`.
    """

    SECONDS = 3.0
    MOST = 4096

    def __init__(self) -> None:
        self._until: dict[tuple[str, str, int], tuple[float, Path]] = {}
        self._lock = threading.Lock()

    def get(self, cookie: str, study_id: str, number: int) -> Path | None:
        """The file, when the same was allowed a moment ago."""
        found = self._until.get((cookie, study_id, number))
        return found[1] if found is not None and found[0] > time.monotonic() else None

    def put(self, cookie: str, study_id: str, number: int, path: Path) -> None:
        """Notes that this was allowed."""
        with self._lock:
            if len(self._until) >= self.MOST:
                self._until.clear()
            self._until[(cookie, study_id, number)] = (time.monotonic() + self.SECONDS, path)

    def forget(self) -> None:
        """Forgets everything: somebody lost a right."""
        with self._lock:
            self._until.clear()
