"""Draws one case from a seed: body, scan and findings, all numbers and words, before any voxel exists."""

from dataclasses import dataclass, field

import numpy as np

from training.phantoms.body import NO_CHANGES, Body, Changes, Habitus, build_body
from training.phantoms.canvas import Build, Grid
from training.phantoms.shapes import Point
from training.phantoms.tissue import BY_PHASE, Phase, Tissue
from training.phantoms.vocabulary import Finding, FindingType, Region

CROPS: dict[str, tuple[float, float, tuple[Region, ...]]] = {
    "chest": (-82.0, 238.0, (Region.CHEST,)),
    "abdomen": (-236.0, 22.0, (Region.ABDOMEN,)),
    "pelvis": (-442.0, -198.0, (Region.PELVIS,)),
    "abdomen_pelvis": (-442.0, 22.0, (Region.ABDOMEN, Region.PELVIS)),
    "chest_abdomen": (-236.0, 238.0, (Region.CHEST, Region.ABDOMEN)),
    "whole": (-442.0, 238.0, (Region.CHEST, Region.ABDOMEN, Region.PELVIS)),
}
"""Part of the body that is scanned: lowest and highest height of the reference body (mm), and the regions it shows."""

CORE_CROPS = {"chest_abdomen": 0.7, "chest": 0.15, "abdomen": 0.15}
FULL_CROPS = {
    "whole": 0.3,
    "chest_abdomen": 0.15,
    "abdomen_pelvis": 0.25,
    "chest": 0.17,
    "abdomen": 0.08,
    "pelvis": 0.05,
}
CORE_GRID_MM, CORE_MATRIX = 4.0, 96
FULL_SLICES_MM = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
FULL_MATRIX = 256


@dataclass(frozen=True)
class Scan:
    """How the scanner saw the body."""

    crop: str
    phase: Phase
    noise_hu: float
    """Standard deviation in the middle of the field."""
    sharpness: float
    """0 is a soft kernel (coarse noise), 1 a sharp one (fine noise)."""
    table: bool
    grid: Grid

    @property
    def regions(self) -> tuple[Region, ...]:
        """Body regions that the scan covers, from head to foot."""
        return CROPS[self.crop][2]

    @property
    def span(self) -> tuple[float, float]:
        """Heights of the reference body that are scanned for certain, mm."""
        low, high, _ = CROPS[self.crop]
        return low, high


@dataclass(frozen=True)
class Case:
    """Everything that determines one phantom."""

    seed: int
    full: bool
    habitus: Habitus
    scan: Scan
    liver_hu: float
    changes: Changes = NO_CHANGES
    findings: tuple[Finding, ...] = field(default=())
    """Ordered from head to foot, as a report is read."""

    @property
    def body(self) -> Body:
        """Solids of this case's body."""
        return build_body(self.habitus, self.changes)

    @property
    def tissue(self) -> Tissue:
        """Hounsfield values of this case's phase of contrast."""
        return BY_PHASE[self.scan.phase]

    @property
    def mean_scale(self) -> float:
        """Patient mm per reference mm, over the three axes."""
        sx, sy, sz = self.habitus.build.scale
        return (sx + sy + sz) / 3.0

    def has(self, kind: FindingType) -> bool:
        """Whether a finding of the kind is present on either side."""
        return any(finding.kind is kind for finding in self.findings)


def pick(rng: np.random.Generator, weights: dict[str, float]) -> str:
    """One key, as often as its weight says."""
    shares = np.array(list(weights.values()))
    return list(weights)[int(rng.choice(len(shares), p=shares / shares.sum()))]


def draw_habitus(rng: np.random.Generator) -> Habitus:
    """A body of either sex within the usual range."""
    male = bool(rng.random() < 0.5)
    size = 1.02 if male else 0.95
    build = Build(
        scale=(
            size * float(rng.uniform(0.94, 1.06)),
            size * float(rng.uniform(0.94, 1.06)),
            size * float(rng.uniform(0.96, 1.04)),
        ),
        yaw=float(rng.uniform(-0.05, 0.05)),
        tilt=float(rng.uniform(-0.03, 0.03)),
        warp_mm=float(rng.uniform(1.0, 3.5)),
        phase=(float(rng.random()), float(rng.random()), float(rng.random())),
    )
    return Habitus(
        build=build,
        male=male,
        fat_mm=float(rng.triangular(5.0, 15.0, 34.0)),
        visceral=float(rng.uniform(0.96, 1.1)),
        heart_mm=float(rng.uniform(104.0, 122.0)),
        spleen_mm=float(rng.uniform(80.0, 108.0)),
        dome_mm=float(rng.uniform(4.0, 18.0)),
        kidney_mm=float(rng.uniform(98.0, 118.0)),
        bladder=float(rng.uniform(0.75, 1.2)),
    )


def scan_grid(crop: str, build: Build, middle: Point, slice_mm: float, pixel_mm: float, matrix: int) -> Grid:
    """The grid that covers a crop of a body with square slices around a middle (patient mm)."""
    low, high, _ = CROPS[crop]
    slices = int(np.ceil((high - low) * build.scale[2] / slice_mm))
    half = 0.5 * pixel_mm * (matrix - 1)
    origin = (round(middle[0] - half, 2), round(middle[1] - half, 2), round(low * build.scale[2] + middle[2], 2))
    return Grid(slices, matrix, matrix, slice_mm, pixel_mm, origin)


def draw_scan(rng: np.random.Generator, full: bool, build: Build) -> Scan:
    """Crop, phase, noise, kernel and grid; core has one grid of 4 mm and always contrast medium.

    Core's lesions differ from their organ by 40 HU and more, which fluid in an unenhanced kidney does not.
    """
    crop = pick(rng, FULL_CROPS if full else CORE_CROPS)
    if full:
        phase = Phase(pick(rng, {Phase.PORTAL.value: 0.5, Phase.NONE.value: 0.3, Phase.ARTERIAL.value: 0.2}))
        slice_mm = float(FULL_SLICES_MM[int(rng.integers(len(FULL_SLICES_MM)))])
        matrix, pixel_mm = FULL_MATRIX, round(float(rng.uniform(330.0, 450.0)) / FULL_MATRIX, 3)
    else:
        phase = Phase(pick(rng, {Phase.PORTAL.value: 0.75, Phase.ARTERIAL.value: 0.25}))
        slice_mm, matrix, pixel_mm = CORE_GRID_MM, CORE_MATRIX, CORE_GRID_MM
    middle = (float(rng.uniform(-10.0, 10.0)), float(rng.uniform(-6.0, 14.0)), float(rng.uniform(-6.0, 6.0)))
    return Scan(
        crop=crop,
        phase=phase,
        noise_hu=float(rng.uniform(10.0, 30.0)),
        sharpness=float(rng.uniform(0.0, 1.0)),
        table=bool(rng.random() < 0.9),
        grid=scan_grid(crop, build, middle, slice_mm, pixel_mm, matrix),
    )
