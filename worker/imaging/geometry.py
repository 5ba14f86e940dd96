"""Place slices on one regular grid in patient space, or say why they do not make one.

Positions are projected on the slices' common normal; instance numbers and the gantry tilt attribute are never trusted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from worker.core.errors import GeometryError
from worker.imaging.rules import ImagingRules
from worker.imaging.slices import Slice

Vector = NDArray[np.float64]

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_UNIT_TOLERANCE = 0.01
"""How far the two directions of Image Orientation may be from unit length and from a right angle."""
_SAME_STEP = 0.1
"""Steps that differ by less than this share count as the same nominal step."""
_ANOTHER_STEP = 1.5
"""A step this many times its neighbour, or more, is another nominal step and no jitter."""


@dataclass(frozen=True)
class Placement:
    """Where one source slice goes: its share in each target slice, and its shift on the target's canvas."""

    source: Slice
    repeats: tuple[Slice, ...]
    """Other slices at the very same position; they must hold the same values."""
    targets: tuple[tuple[int, float], ...]
    """(target slice, weight); weights of a target slice add up to 1 over all sources."""
    row_shift: float
    """Canvas row of the source's first row."""
    column_shift: float


@dataclass(frozen=True)
class Grid:
    """A regular grid and how the source slices fill it."""

    shape: tuple[int, int, int]
    """(slices, rows, columns)."""
    affine: NDArray[np.float64]
    """4x4, (slice, row, column, 1) to RAS millimetres; its three axes are orthogonal."""
    placements: tuple[Placement, ...]
    """Ordered along the slice axis."""
    repairs: tuple[str, ...]
    missing: int
    """Target slices that were never sent and are interpolated."""

    @property
    def peak_bytes(self) -> float:
        """Memory that building the volume takes at most, beside one slice a thread."""
        return 1.5 * 4 * math.prod(self.shape)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between slices, rows and columns."""
        slice_mm, row_mm, column_mm = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(slice_mm), float(row_mm), float(column_mm)


def slice_axes(pieces: Sequence[Slice]) -> tuple[Vector, Vector, Vector]:
    """Unit vectors (LPS) along which slices, rows and columns grow; slices grow to the left, back or head.

    Raises GeometryError when orientations are absent, not orthonormal or not common to the slices.
    """
    given = [piece.orientation for piece in pieces]
    if any(orientation is None for orientation in given):
        raise GeometryError("Slices carry no orientation (0020,0037). Send the series with its geometry.")
    table = np.array(sorted(orientation for orientation in given if orientation is not None), dtype=np.float64)
    if np.ptp(table, axis=0).max() > _UNIT_TOLERANCE:
        raise GeometryError(
            "Slices of one series have different orientations. Send each orientation as its own series."
        )
    column_axis, row_axis = np.split(table.mean(axis=0), 2)
    lengths = np.array([np.linalg.norm(column_axis), np.linalg.norm(row_axis)])
    if np.abs(lengths - 1).max() > _UNIT_TOLERANCE or abs(float(column_axis @ row_axis)) > _UNIT_TOLERANCE:
        raise GeometryError(
            "The orientation of the slices is not two unit vectors at a right angle. Correct (0020,0037) at the sender."
        )
    column_axis = column_axis / lengths[0]
    row_axis = row_axis - (row_axis @ column_axis) * column_axis
    row_axis = row_axis / np.linalg.norm(row_axis)
    normal = np.cross(column_axis, row_axis)
    if normal[np.argmax(np.abs(normal))] < 0:
        normal = -normal
    return normal, row_axis, column_axis


def _explain_turn(pieces: Sequence[Slice], row_mm: float, column_mm: float, rules: ImagingRules) -> tuple[str, ...]:
    """Say how far voxels stand from their place where the slices' orientations are not quite one; () where that is nothing.

    Raises GeometryError when it is too far.
    """
    table = np.array([piece.orientation for piece in pieces], dtype=np.float64)
    ends = np.repeat([pieces[0].pixels.columns * column_mm, pieces[0].pixels.rows * row_mm], 3)
    columns, rows = np.split((table - table.mean(axis=0)) * ends, 2, axis=1)
    off = float(max(np.linalg.norm(corner, axis=1).max() for corner in (columns, rows, columns + rows)))
    if off > rules.maximum_turn_mm:
        raise GeometryError(
            f"Slices of one scan are turned against each other: a common orientation would move their corners by up to "
            f"{off:.1f} mm. Correct (0020,0037) at the sender, or send each orientation as its own series."
        )
    if off <= rules.uniform_mm:
        return ()
    return (f"slices turned against each other were put in one orientation, which moved corners by up to {off:.1f} mm",)


def positions_mm(pieces: Sequence[Slice], axis: Vector) -> Vector:
    """Projection of every slice's position on the axis. Raises GeometryError for a slice without position."""
    if any(piece.position is None for piece in pieces):
        raise GeometryError("Slices carry no position (0020,0032). Send the series with its geometry.")
    return np.array([piece.position for piece in pieces], dtype=np.float64) @ axis


def plan(pieces: Sequence[Slice], rules: ImagingRules) -> Grid:
    """Work out the regular grid of a stack of slices of one size and orientation.

    Raises GeometryError when the slices do not make a volume that can be trusted.
    """
    if len(pieces) < 2:
        raise GeometryError("One slice is no volume. Send the whole series and requeue the study.")
    axis, row_axis, column_axis = slice_axes(pieces)
    row_mm, column_mm = _common_spacing(pieces)
    ordered = _order(pieces, axis)
    kept, repeats = _fold_repeats(ordered, axis, rules.same_position_mm)
    if len(kept) < 2:
        raise GeometryError(
            "All slices stand at one position. Correct Image Position (Patient) (0020,0032) at the sender."
        )
    depths = positions_mm(kept, axis)
    layout = _layout(depths, rules)
    corners = np.array([piece.position for piece in kept], dtype=np.float64)
    offsets = corners - corners[0] - np.outer(depths - depths[0], axis)
    in_plane = np.stack([offsets @ row_axis, offsets @ column_axis], axis=1)
    repairs = [*_explain_turn(kept, row_mm, column_mm, rules), *layout.repairs]
    if np.abs(in_plane).max() <= rules.uniform_mm:
        in_plane = np.zeros_like(in_plane)
    else:
        repairs.insert(0, _explain_shift(in_plane, depths - depths[0], rules))
    shifts = in_plane / (row_mm, column_mm)
    low = np.floor(shifts.min(axis=0) + 1e-6)
    high = np.ceil(shifts.max(axis=0) - 1e-6)
    extra_rows, extra_columns = (high - low).astype(int)
    if repeats:
        repairs.append(f"{sum(map(len, repeats.values()))} slices sent more than once were used once")
    origin = corners[0] + low[0] * row_mm * row_axis + low[1] * column_mm * column_axis
    affine = np.eye(4)
    affine[:3] = np.stack([axis * layout.step_mm, row_axis * row_mm, column_axis * column_mm, origin], axis=1)
    placements = tuple(
        Placement(piece, repeats.get(index, ()), layout.targets[index], *map(float, shifts[index] - low))
        for index, piece in enumerate(kept)
    )
    pixels = kept[0].pixels
    shape = (layout.count, pixels.rows + int(extra_rows), pixels.columns + int(extra_columns))
    if math.prod(shape) > rules.maximum_voxels:
        raise GeometryError(
            f"The volume would have {' x '.join(map(str, shape))} voxels, more than a scan has. "
            "Correct the matrix and positions of the slices at the sender."
        )
    return Grid(
        shape=shape,
        affine=_LPS_TO_RAS @ affine,
        placements=placements,
        repairs=tuple(repairs),
        missing=layout.missing,
    )


def _common_spacing(pieces: Sequence[Slice]) -> tuple[float, float]:
    spacings = {piece.spacing for piece in pieces}
    if None in spacings:
        raise GeometryError("Slices carry no Pixel Spacing (0028,0030). Send the series with its geometry.")
    table = np.array(sorted(spacing for spacing in spacings if spacing is not None))
    if table.min() <= 0:
        raise GeometryError("The Pixel Spacing of the slices is not above 0. Correct (0028,0030) at the sender.")
    if np.ptp(table, axis=0).max() > 1e-3 * table.min():
        raise GeometryError("Slices of one series have different pixel spacings. Send each as its own series.")
    if len({(piece.pixels.rows, piece.pixels.columns) for piece in pieces}) > 1:
        raise GeometryError("Slices of one series have different matrices. Send each as its own series.")
    return float(table[0, 0]), float(table[0, 1])


def _order(pieces: Sequence[Slice], axis: Vector) -> list[Slice]:
    depths = positions_mm(pieces, axis)
    keys = [
        (float(depth), piece.sop_instance_uid, piece.frame, str(piece.path))
        for depth, piece in zip(depths, pieces, strict=True)
    ]
    return [pieces[index] for index in sorted(range(len(pieces)), key=keys.__getitem__)]


def _fold_repeats(
    ordered: Sequence[Slice], axis: Vector, same_mm: float
) -> tuple[list[Slice], dict[int, tuple[Slice, ...]]]:
    """One slice a position, and by its index the others that stand there."""
    kept: list[Slice] = []
    repeats: dict[int, tuple[Slice, ...]] = {}
    depths = positions_mm(ordered, axis)
    last = -math.inf
    for piece, depth in zip(ordered, depths, strict=True):
        if depth - last < same_mm:
            if math.dist(piece.position or (), kept[-1].position or ()) > 1.0:
                raise GeometryError("Two slices lie side by side in one plane. Send each part as its own series.")
            index = len(kept) - 1
            repeats[index] = (*repeats.get(index, ()), piece)
        else:
            kept.append(piece)
            last = depth
    return kept, repeats


@dataclass(frozen=True)
class _Layout:
    """Targets along the slice axis: how many, how far apart, and each source's share in them."""

    step_mm: float
    count: int
    targets: tuple[tuple[tuple[int, float], ...], ...]
    repairs: tuple[str, ...]
    missing: int


def _layout(depths: Vector, rules: ImagingRules) -> _Layout:
    """Spread depths (ascending, distinct) on a regular grid. Raises GeometryError when a gap is too wide."""
    steps = np.diff(depths)
    extent = float(depths[-1] - depths[0])
    count = len(depths)
    even = depths[0] + np.arange(count) * extent / (count - 1)
    widest = float(steps.max())
    if np.abs(depths - even).max() <= rules.uniform_mm:
        if widest > rules.maximum_gap_mm:
            raise GeometryError(
                f"The slices are {widest:.1f} mm apart; at most {rules.maximum_gap_mm:g} mm leave no tissue unseen. "
                "Send a reconstruction with closer slices."
            )
        return _Layout(extent / (count - 1), count, tuple(((i, 1.0),) for i in range(count)), (), 0)
    multiples = _multiples(depths, rules.uniform_mm)
    if multiples is not None:
        return _fill(depths, multiples, rules)
    if widest > rules.maximum_gap_mm:
        raise GeometryError(
            f"The slices are unevenly spaced with a gap of {widest:.1f} mm; at most {rules.maximum_gap_mm:g} mm is "
            "interpolated. Send the missing slices and requeue the study."
        )
    if _alternates(steps):
        raise GeometryError(
            f"The distance between slices goes back and forth from {steps.min():.2f} to {widest:.2f} mm, as when two scans "
            "are mixed. Send each as its own series."
        )
    step = _smallest_common_step(steps)
    count = max(2, round(extent / step) + 1)
    step = extent / (count - 1)
    sentence = f"slices {steps.min():.2f} to {widest:.2f} mm apart were resampled to {count} slices {step:.2f} mm apart"
    return _Layout(step, count, _shares(depths, step, count), (sentence,), 0)


def _multiples(depths: Vector, tolerance_mm: float) -> NDArray[np.int64] | None:
    """Whole numbers of steps from the first slice, when all gaps are whole multiples of the most usual step; else None."""
    steps = np.diff(depths)
    median = float(np.median(steps))
    usual = steps[np.abs(steps - median) <= _SAME_STEP * median]
    if len(usual) * 2 < len(steps):
        return None
    whole = np.round((depths - depths[0]) / float(usual.mean())).astype(np.int64)
    if whole[-1] <= 0 or np.diff(whole).min() < 1:
        return None
    step = (depths[-1] - depths[0]) / whole[-1]
    return whole if np.abs(depths - depths[0] - whole * step).max() <= tolerance_mm else None


def _fill(depths: Vector, multiples: NDArray[np.int64], rules: ImagingRules) -> _Layout:
    """A regular series with slices missing. Raises GeometryError when too many are."""
    count = int(multiples[-1]) + 1
    step = float(depths[-1] - depths[0]) / (count - 1)
    missing = count - len(depths)
    longest = int(np.diff(multiples).max())
    if (
        longest - 1 > rules.maximum_missing_in_a_row
        or longest * step > rules.maximum_gap_mm
        or missing > rules.maximum_missing_fraction * count
    ):
        raise GeometryError(
            f"{missing} of {count} slices are missing, up to {longest - 1} in a row ({longest * step:.1f} mm). "
            "Send the missing slices and requeue the study."
        )
    sentence = f"{missing} missing of {count} slices were interpolated, up to {longest - 1} in a row"
    return _Layout(step, count, _shares(depths[0] + multiples * step, step, count), (sentence,), missing)


def _shares(depths: Vector, step: float, count: int) -> tuple[tuple[tuple[int, float], ...], ...]:
    """Linear interpolation seen from the sources: for each, its (target, weight) pairs."""
    places = (depths - depths[0]) / step
    shares: list[list[tuple[int, float]]] = [[] for _ in depths]
    for target in range(count):
        upper = int(np.searchsorted(places, target - 1e-6))
        upper = min(upper, len(places) - 1)
        if abs(places[upper] - target) <= 1e-6 or upper == 0:
            shares[upper].append((target, 1.0))
            continue
        lower = upper - 1
        weight = float((target - places[lower]) / (places[upper] - places[lower]))
        shares[lower].append((target, 1.0 - weight))
        shares[upper].append((target, weight))
    return tuple(map(tuple, shares))


def _alternates(steps: Vector) -> bool:
    """Whether steps change again and again, as when the slices of two scans lie between each other.

    A scan with thin slices in one part and thick ones in another changes its step once or twice.
    """
    ratios = steps[1:] / steps[:-1]
    changes = int(np.count_nonzero(np.maximum(ratios, 1 / ratios) > _ANOTHER_STEP))
    return changes > max(3, len(steps) / 8)


def _smallest_common_step(steps: Vector) -> float:
    """Smallest step that at least a tenth of the gaps (and two of them) share; the median when none does."""
    enough = max(2, math.ceil(len(steps) / 10))
    for step in np.sort(steps):
        same = steps[np.abs(steps - step) <= _SAME_STEP * step]
        if len(same) >= enough:
            return float(same.mean())
    return float(np.median(steps))


def _explain_shift(in_plane: Vector, depths: Vector, rules: ImagingRules) -> str:
    """Name the in-plane shift of the slices. Raises GeometryError when it is more than a gantry tilt can be."""
    slope = (depths @ in_plane) / float(depths @ depths)
    angle = math.degrees(math.atan(float(np.linalg.norm(slope))))
    off_line = float(np.abs(in_plane - np.outer(depths, slope)).max())
    steepest = math.degrees(
        math.atan(float((np.linalg.norm(np.diff(in_plane, axis=0), axis=1) / np.diff(depths)).max()))
    )
    straight = off_line <= rules.uniform_mm
    if straight and angle > rules.maximum_tilt_degrees:
        raise GeometryError(
            f"The slices step {angle:.0f} degrees away from their normal; at most {rules.maximum_tilt_degrees:g} can be a "
            "gantry tilt. Correct Image Position (Patient) (0020,0032) at the sender."
        )
    if straight:
        return f"gantry tilt of {angle:.1f} degrees was sheared straight"
    if steepest > rules.maximum_tilt_degrees:
        raise GeometryError(
            f"The image centre jumps sideways between neighbouring slices (up to {off_line:.1f} mm off a straight line). "
            "Send each part as its own series."
        )
    return f"slices shifted sideways by up to {off_line:.1f} mm were aligned by their positions"
