"""Slices to a Hounsfield volume: `hu` float32 (slices, rows, columns) and an affine to RAS millimetres."""

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from worker.core.errors import GeometryError, InsufficientMemoryError, PixelDataError
from worker.imaging import geometry, pixels
from worker.imaging.geometry import Grid, Placement
from worker.imaging.rules import ImagingRules
from worker.imaging.slices import Slice
from worker.imaging.stacks import Stack

AIR_HU = -1024.0
"""Value of voxels that no slice covers (beside a sheared slice); they are marked as padding."""
_NOTHING = 1e-6
_BAND_ROWS = 32
_COARSE_HU = 2.5
_SPARSE = 1.5
"""Slices farther apart than this many times their thickness are sparse; of a scan that lost every second one, too."""


@dataclass(frozen=True, eq=False)
class Volume:
    """One volume of Hounsfield units in patient space.

    Values are as the scanner stored them, padding included; clipping belongs to the model's preprocessing.
    """

    hu: NDArray[np.float32]
    """(slices, rows, columns); slices grow to the head, back or left, whichever is nearest."""
    affine: NDArray[np.float64]
    """4x4: (slice, row, column, 1) to RAS millimetres (right, anterior, superior)."""
    padding: NDArray[np.bool_] | None
    """True where the scanner measured nothing; None when there is no such voxel."""
    repairs: tuple[str, ...] = ()
    """What was repaired, one sentence each."""
    regions: tuple[str, ...] = ()
    """Body regions it shows, from head to foot; () when nothing tells."""
    series_uid: str = ""
    series_number: int | None = None
    part: str = ""
    """Which part of a mixed series; empty for a whole one."""
    instance_uids: tuple[str, ...] = field(default=(), repr=False)
    """SOP Instance UIDs of the source slices along the slice axis."""

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between slices, rows and columns."""
        slice_mm, row_mm, column_mm = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(slice_mm), float(row_mm), float(column_mm)

    def compact_type(self) -> np.dtype[np.generic]:
        """int16 when the values lose nothing by it, else float32."""
        limits = np.iinfo(np.int16)
        for plane in self.hu:
            if plane.min() < limits.min or plane.max() > limits.max or (plane != np.rint(plane)).any():
                return np.dtype(np.float32)
        return np.dtype(np.int16)

    def planes(self, kind: np.dtype[np.generic]) -> Iterator[NDArray[np.generic]]:
        """The slices one by one in another type, so that a file is written without a second copy of the volume."""
        for plane in self.hu:
            yield np.ascontiguousarray(plane, dtype=kind)


def build_stack(stack: Stack, rules: ImagingRules) -> Volume:
    """Build the volume of a chosen stack, with what is known of its series.

    Raises what `build` raises.
    """
    volume = build(stack.slices, rules)
    repairs = (
        (*volume.repairs, "pixels were compressed with loss before they arrived") if stack.lossy else volume.repairs
    )
    return replace(
        volume,
        repairs=repairs,
        regions=stack.regions,
        series_uid=stack.header.series_uid,
        series_number=stack.header.series_number,
        part=stack.part,
    )


def build(slices: Sequence[Slice], rules: ImagingRules) -> Volume:
    """Decode slices of one stack into a volume; their order does not matter.

    Headers are there already; every slice's pixels are read once, in parallel, straight into the result.

    Raises GeometryError when the slices make no trustworthy volume, PixelDataError when one does not decode, copies differ
    or the values are not Hounsfield units, StoreUnavailableError when a file cannot be read, InsufficientMemoryError when
    this host is too small.
    """
    grid = geometry.plan(slices, rules)
    canvas = _painted(grid, rules)
    first = grid.placements[0].source
    repairs = list(grid.repairs)
    steps = {abs(placement.source.slope or 0.0) for placement in grid.placements}
    if max(steps) > _COARSE_HU:
        repairs.append(f"stored values are {max(steps):.0f} HU apart, so faint contrast is lost")
    apart = grid.spacing_mm[0]
    if first.thickness_mm and apart > _SPARSE * first.thickness_mm:
        repairs.append(
            f"slices {first.thickness_mm:g} mm thick every {apart:.1f} mm: the tissue between was not imaged"
        )
    return Volume(
        hu=canvas.hu,
        affine=grid.affine,
        padding=canvas.padding,
        repairs=tuple(repairs),
        instance_uids=tuple(placement.source.sop_instance_uid for placement in grid.placements),
    )


def _painted(grid: Grid, rules: ImagingRules) -> "_Canvas":
    """The grid with the values of its slices."""
    try:
        canvas = _Canvas(grid, rules)
        with ExitStack() as files:
            canvas.fill(files)
    except MemoryError:
        size = " x ".join(map(str, grid.shape))
        raise InsufficientMemoryError(
            f"A volume of {size} voxels takes up to {grid.peak_bytes / 1e9:.1f} GB, more than this host has free. "
            "Give the worker more memory or fewer tasks at a time."
        ) from None
    canvas.check_hounsfield()
    return canvas


class _Canvas:
    """The volume under construction; slices may be painted from several threads."""

    def __init__(self, grid: Grid, rules: ImagingRules) -> None:
        self.grid = grid
        self.rules = rules
        self.hu: NDArray[np.float32] = np.empty(grid.shape, dtype=np.float32)
        self.padding: NDArray[np.bool_] | None = None
        self._lowest = np.inf
        self._impossible = 0
        self._lock = threading.Lock()
        self._slice_locks = [threading.Lock() for _ in range(grid.shape[0])]
        self._painted: set[tuple[int, int]] = set()

    def fill(self, files: ExitStack) -> None:
        threads = self.rules.decode_threads or os.cpu_count() or 1
        opened = _Files(files)
        with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
            in_files_order = sorted(
                self.grid.placements, key=lambda placement: (placement.source.path, placement.source.frame)
            )
            futures = [pool.submit(self._paint, placement, opened) for placement in in_files_order]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def check_hounsfield(self) -> None:
        if np.isinf(self._lowest):
            raise PixelDataError("Every value is padding: nothing was measured. Check Rescale Slope and Intercept.")
        if self._lowest > self.rules.lowest_hu_at_most:
            raise PixelDataError(
                f"The lowest value is {self._lowest:.0f}: no air and no fat anywhere, so the values are not Hounsfield "
                "units. Check Rescale Slope and Intercept at the sender."
            )
        if self._impossible > self.rules.impossible_fraction * self.hu.size:
            raise PixelDataError(
                f"{self._impossible / self.hu.size:.0%} of the values are above {self.rules.highest_hu:.0f}, so they are not "
                "Hounsfield units. Check Pixel Representation (0028,0103) at the sender."
            )

    def _paint(self, placement: Placement, files: "_Files") -> None:
        """Decode one source slice and add its share to each target slice."""
        if not placement.targets and not placement.repeats:
            return
        source = placement.source
        stored = files.stored(source)
        for repeat in placement.repeats:
            if _rescale(repeat) != _rescale(source) or not np.array_equal(files.stored(repeat), stored):
                raise GeometryError(
                    "Two different images stand at one position and nothing tells which belongs there. "
                    "Send each as its own series."
                )
        moved = (
            placement.row_shift > _NOTHING or placement.column_shift > _NOTHING or stored.shape != self.grid.shape[1:]
        )
        if moved or len(placement.targets) > 1 or placement.targets[0][1] <= 1 - _NOTHING:
            self._paint_in_bands(placement, stored)
            return
        target = placement.targets[0][0]
        mask = self._convert(stored, source, self.hu[target])
        if mask is not None:
            self._mark(target, slice(None), mask)

    def _paint_in_bands(self, placement: Placement, stored: NDArray[np.generic]) -> None:
        """Paint a slice that moves or is shared out, a few rows at a time, so that no second slice of floats is needed."""
        height, columns = self.grid.shape[1:]
        for band, top in enumerate(range(0, height, _BAND_ROWS)):
            rows = slice(top, min(top + _BAND_ROWS, height))
            hu, mask = self._moved(placement, stored, rows, columns)
            for target, weight in placement.targets:
                self._add(target, band, rows, weight, hu)
                if mask.any():
                    self._mark(target, rows, mask)

    def _moved(
        self, placement: Placement, stored: NDArray[np.generic], rows: slice, columns: int
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Some rows of the canvas under a slice, moved by a part of a row and of a column: HU and where there are none.

        Interpolates linearly; beside the slice is air, and padding.
        """
        row_steps, row_part = _split_shift(placement.row_shift)
        column_steps, column_part = _split_shift(placement.column_shift)
        hu = np.full((rows.stop - rows.start, columns), AIR_HU, dtype=np.float32)
        mask = np.ones(hu.shape, dtype=np.bool_)
        before = 1 if row_part else 0  # a row between two needs the one before as well
        first, last = max(rows.start, row_steps + before), min(rows.stop, row_steps + stored.shape[0])
        if first < last:
            piece = stored[first - row_steps - before : last - row_steps]
            values: NDArray[np.float32] = np.empty(piece.shape, dtype=np.float32)
            holes = self._convert(piece, placement.source, values)
            for axis, part in ((0, row_part), (1, column_part)):
                values, holes = _between(values, holes, axis, part)
            left = column_steps + (1 if column_part else 0)
            place = slice(first - rows.start, last - rows.start), slice(left, left + values.shape[1])
            hu[place], mask[place] = values, False if holes is None else holes
        return hu, mask

    def _convert(
        self, stored: NDArray[np.generic], source: Slice, out: NDArray[np.float32]
    ) -> NDArray[np.bool_] | None:
        """Hounsfield units of stored values into `out`; returns where there are none, None when they are everywhere."""
        _to_hounsfield(stored, source, out)
        lowest = float(out.min())
        mask = _padded(stored, source, out, lowest, self.rules.padding_hu_at_most)
        self._note_range(source, out, lowest, mask)
        return mask

    def _note_range(
        self, source: Slice, hu: NDArray[np.float32], lowest: float, mask: NDArray[np.bool_] | None
    ) -> None:
        """Remember what one slice says about the unit of the values; padding says nothing."""
        if mask is not None:
            lowest = float(hu.min(where=~mask, initial=np.inf))
        slope, intercept = _rescale(source)
        highest_stored = 2 ** (source.pixels.bits_stored - source.pixels.signed)
        impossible = 0
        if abs(slope) * highest_stored + intercept > self.rules.highest_hu:
            above = hu > self.rules.highest_hu
            impossible = int(np.count_nonzero(above if mask is None else above & ~mask))
        with self._lock:
            self._lowest = min(self._lowest, lowest)
            self._impossible += impossible

    def _add(self, target: int, band: int, rows: slice, weight: float, hu: NDArray[np.float32]) -> None:
        """Add weighted rows; a target gets at most two shares, whose sum does not depend on their order."""
        share = hu if weight > 1 - _NOTHING else hu * np.float32(weight)
        with self._slice_locks[target]:
            if (target, band) in self._painted:
                self.hu[target, rows] += share
            else:
                self.hu[target, rows] = share
                self._painted.add((target, band))

    def _mark(self, target: int, rows: slice, mask: NDArray[np.bool_]) -> None:
        with self._lock:
            if self.padding is None:
                self.padding = np.zeros(self.grid.shape, dtype=np.bool_)
        with self._slice_locks[target]:
            self.padding[target, rows] |= mask


class _Files:
    """Opens each single-frame object for its one slice, and each multi-frame object once for all its frames."""

    def __init__(self, files: ExitStack) -> None:
        self._files = files
        self._shared: dict[Path, pixels.PixelFile] = {}
        self._lock = threading.Lock()

    def stored(self, piece: Slice) -> NDArray[np.generic]:
        """Stored values of a slice. Raises PixelDataError, StoreUnavailableError."""
        if piece.pixels.frames == 1:
            with pixels.PixelFile(piece.path, piece.pixels) as file:
                return pixels.stored_values(piece, file)
        with self._lock:
            if piece.path not in self._shared:
                self._shared[piece.path] = self._files.enter_context(pixels.PixelFile(piece.path, piece.pixels))
        return pixels.stored_values(piece, self._shared[piece.path])


def _rescale(piece: Slice) -> tuple[float, float]:
    """Slope and intercept. Raises PixelDataError when either is absent."""
    if piece.slope is None or piece.intercept is None:
        raise PixelDataError("A slice carries no Rescale Slope or Intercept; its unit is unknown. Send it with them.")
    return piece.slope, piece.intercept


def _to_hounsfield(stored: NDArray[np.generic], piece: Slice, out: NDArray[np.float32]) -> None:
    """Modality LUT of one slice (PS3.3 C.11.1): slope times stored value plus intercept."""
    slope, intercept = _rescale(piece)
    if slope == 1.0:
        np.add(stored, np.float32(intercept), out=out, dtype=np.float32, casting="unsafe")
    else:
        np.multiply(stored, np.float32(slope), out=out, dtype=np.float32, casting="unsafe")
        out += np.float32(intercept)


def _padded(
    stored: NDArray[np.generic], piece: Slice, hu: NDArray[np.float32], lowest: float, limit_hu: float
) -> NDArray[np.bool_] | None:
    """Voxels without data: Pixel Padding Value (PS3.3 C.7.5.1.1.2), or lower than any tissue; None when there are none."""
    mask: NDArray[np.bool_] | None = None
    if piece.padding is not None:
        low, high = piece.padding
        mask = stored == low if low == high else np.greater_equal(stored, low) & np.less_equal(stored, high)
    if lowest <= limit_hu:
        below = hu <= limit_hu
        mask = below if mask is None else mask | below
    return mask if mask is not None and mask.any() else None


def _split_shift(shift: float) -> tuple[int, float]:
    """Whole steps of a shift, and the part of one that is left."""
    steps = int(np.floor(shift + _NOTHING))
    part = shift - steps
    return steps, part if part > _NOTHING else 0.0


def _between(
    hu: NDArray[np.float32], padding: NDArray[np.bool_] | None, axis: int, part: float
) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
    """Values a part of a step before each voxel but the first along an axis; padding where either neighbour is."""
    if not part:
        return hu, padding
    before, after = (slice(None),) * axis + (slice(None, -1),), (slice(None),) * axis + (slice(1, None),)
    share = np.float32(part)
    return hu[before] * share + hu[after] * (1 - share), None if padding is None else padding[before] | padding[after]
