"""From a case to voxels: the Hounsfield volume and its dense labels."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.phantoms import scanner
from training.phantoms.anatomy import Painting, paint_anatomy
from training.phantoms.canvas import Canvas, Grid
from training.phantoms.case import Case
from training.phantoms.disease import draw_case
from training.phantoms.lesions import paint_findings
from training.phantoms.vocabulary import Finding, Organ

SLAB_VOXELS = 2_500_000
"""Voxels painted at once: bounds the memory of a phantom of any size to about 200 MB."""


@dataclass(frozen=True)
class Labels:
    """Dense truth, one value a voxel, (slices, rows, columns) uint8."""

    organs: NDArray[np.uint8]
    """Values of `Organ`."""
    findings: NDArray[np.uint8]
    """Values of `FINDING_LABELS`; 0 where there is none."""


@dataclass(frozen=True)
class Phantom:
    """One synthetic CT with its truth."""

    case: Case
    hu: NDArray[np.int16]
    """Hounsfield units (slices, rows, columns), the lowest slice first."""
    labels: Labels

    @property
    def affine(self) -> NDArray[np.float64]:
        """4x4 from (slice, row, column, 1) to RAS millimetres."""
        return self.case.scan.grid.affine

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings, from head to foot."""
        return self.case.findings


def oversampling(grid: Grid) -> int:
    """Thin slices painted for each slice, so that a thick slice averages what it crosses."""
    return 3 if grid.slice_mm > 2.2 * grid.pixel_mm else 1


def _slab(case: Case, first: int, count: int) -> tuple[NDArray[np.int16], Labels]:
    grid = case.scan.grid
    times = oversampling(grid)
    thin = grid.slice_mm / times
    lowest = (grid.origin[0], grid.origin[1], grid.origin[2] - 0.5 * (times - 1) * thin)
    part = Grid(count * times, grid.rows, grid.columns, thin, grid.pixel_mm, lowest, first * times)
    canvas = Canvas(part, case.habitus.build)
    painting = Painting(canvas, case.body, case.habitus, case.tissue, case.seed)
    paint_anatomy(painting, case.liver_hu)
    paint_findings(painting, case)
    hu, organs, findings = canvas.hu, canvas.organs, canvas.findings
    if times > 1:
        shape = (count, times, grid.rows, grid.columns)
        stacked = hu.reshape(shape)
        hu = (stacked[:, 0] + stacked[:, 1] + stacked[:, 2]) / np.float32(times)
        organs = organs.reshape(shape)[:, times // 2].copy()
        findings = findings.reshape(shape)[:, times // 2].copy()
    if case.scan.table:
        scanner.add_table(hu, case)
    scanner.add_noise(hu, organs == Organ.AIR, case, first)
    return scanner.whole_units(hu), Labels(organs, findings)


def render(case: Case, slices: range | None = None) -> Phantom:
    """Paint a case, or some of its slices (a range of step 1), which are the same as those of the whole volume.

    Raises ValueError when the range leaves the scan.
    """
    grid = case.scan.grid
    wanted = range(grid.slices) if slices is None else slices
    if wanted.step != 1 or not 0 <= wanted.start < wanted.stop <= grid.slices:
        raise ValueError(f"slices must be a range of step 1 within 0 to {grid.slices}, not {wanted}")
    each = max(1, SLAB_VOXELS // (grid.rows * grid.columns * oversampling(grid)))
    parts = [_slab(case, first, min(each, wanted.stop - first)) for first in range(wanted.start, wanted.stop, each)]
    return Phantom(
        case,
        np.concatenate([hu for hu, _ in parts]),
        Labels(
            np.concatenate([labels.organs for _, labels in parts]),
            np.concatenate([labels.findings for _, labels in parts]),
        ),
    )


def make_phantom(seed: int, *, full: bool = False, crowded: bool = False) -> Phantom:
    """The phantom of a seed; the same bytes on every machine. `crowded` as of `draw_case`.

    Raises ValueError for a negative seed.
    """
    return render(draw_case(seed, full=full, crowded=crowded))
