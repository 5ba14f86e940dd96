"""Where the model looked for one sentence: a coarse heat volume in patient space, stored beside the model input."""

import json
import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from worker.core.errors import InvalidObjectError, StoreUnavailableError

PLANE_SIZE = 128
"""Rows and columns of a cut: as coarse as the patches that the heat is made of, and quick to send."""


@dataclass(frozen=True, eq=False)
class Heat:
    """Non-negative heat on a grid of patches; only its proportions mean something."""

    heat: NDArray[np.float32]
    """(slices, rows, columns) of patches."""
    affine: NDArray[np.float64]
    """4x4: (slice, row, column, 1) of a patch's centre to RAS millimetres."""
    faithfulness: float
    """Drop of the sentence's log-probability when the hottest patches are masked, over that of random ones."""
    volume: int = 1
    """Number of the study's volume that it belongs to, from 1."""

    def strongest_plane(self, affine: NDArray[np.float64], count: int) -> int:
        """The index along the first axis of another grid (4x4 to RAS, `count` planes) that holds most heat."""
        hottest = np.unravel_index(int(np.argmax(self.heat)), self.heat.shape)
        point = self.affine @ np.array([*hottest, 1.0])
        index = np.linalg.solve(affine, point)[0]
        return int(np.clip(np.rint(index), 0, count - 1))

    def plane(self, affine: NDArray[np.float64], index: int, shape: tuple[int, int]) -> NDArray[np.uint8]:
        """Heat on one plane of another grid, trilinear, 0 to 255 over the whole volume: (128, 128)."""
        rows, columns = (np.linspace(0, n - 1, PLANE_SIZE) for n in shape)
        grid = np.stack(
            [np.full((PLANE_SIZE, PLANE_SIZE), float(index)), *np.meshgrid(rows, columns, indexing="ij")], axis=-1
        )
        patient = grid @ affine[:3, :3].T + affine[:3, 3]
        patch = (patient - self.affine[:3, 3]) @ np.linalg.inv(self.affine[:3, :3]).T
        peak = float(self.heat.max())
        values = _trilinear(self.heat, patch) / (peak or 1.0)
        return np.asarray(np.clip(np.rint(values * 255), 0, 255), dtype=np.uint8)


def save(heat: Heat, path: Path | str) -> None:
    """Writes a heat volume, whole or not at all; raises `StoreUnavailableError`."""
    path = Path(path)
    facts = json.dumps({"faithfulness": heat.faithfulness, "volume": heat.volume}).encode()
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".heat-", delete=False) as file:
            np.savez_compressed(
                file,
                allow_pickle=False,
                heat=heat.heat.astype(np.float32),
                affine=heat.affine,
                facts=np.frombuffer(facts, dtype=np.uint8),
            )
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).replace(path)
    except OSError as error:
        raise StoreUnavailableError.of("the evidence cannot be written", error) from error


def load(path: Path | str) -> Heat:
    """Reads what `save` wrote; raises `StoreUnavailableError` or `InvalidObjectError`."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            facts = json.loads(archive["facts"].tobytes())
            return Heat(archive["heat"], archive["affine"], float(facts["faithfulness"]), int(facts["volume"]))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InvalidObjectError("the stored evidence is damaged; ask for it again") from error
    except OSError as error:
        raise StoreUnavailableError(f"the evidence cannot be read: {error.strerror or 'input error'}") from error


def _trilinear(heat: NDArray[np.float32], index: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values at fractional indices; 0 more than half a patch outside."""
    size = np.array(heat.shape)
    inside = np.all((index >= -0.5) & (index <= size - 0.5), axis=-1)
    place = np.clip(index, 0, size - 1)
    low = np.minimum(place.astype(int), np.maximum(size - 2, 0))
    part = place - low
    total = np.zeros(index.shape[:-1])
    for corner in np.ndindex(2, 2, 2):
        at = np.minimum(low + corner, size - 1)
        weight = np.prod(np.where(np.array(corner) == 1, part, 1 - part), axis=-1)
        total += weight * heat[at[..., 0], at[..., 1], at[..., 2]]
    return np.where(inside, total, 0.0)
