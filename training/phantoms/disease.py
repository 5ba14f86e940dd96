"""Draws the findings of a case: which, on which side, where, how large, how dense."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from training.phantoms import placement
from training.phantoms.anatomy import AORTA, renal_sinus
from training.phantoms.body import Body, Changes, build_body
from training.phantoms.case import Case, draw_habitus, draw_scan, pick
from training.phantoms.placement import Placed
from training.phantoms.prevalence import (
    BOTH_SIDES,
    COUNTS,
    CROWDED_COUNTS,
    DEGREES,
    FRACTURE_LOSS,
    NORMAL_SHARE,
    REGIONS,
    SIDED,
    SIZES,
    WEIGHTS,
)
from training.phantoms.shapes import Grown, HalfSpace, Intersection, Point, Shape
from training.phantoms.skeleton import LEVELS, Fracture, spine_y
from training.phantoms.vocabulary import CORE, Finding, FindingType, Region, Side

K = FindingType


@dataclass
class Draft:
    """A case while its findings are drawn."""

    rng: np.random.Generator
    case: Case
    body: Body
    taken: list[Placed] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def size(self, kind: FindingType) -> int:
        """A size in mm; small ones are as likely as large ones by ratio, as lesions are."""
        low, high = SIZES[kind][1 if self.case.full else 0]
        return round(low * (high / low) ** float(self.rng.random()))

    def radius(self, size_mm: float) -> float:
        """Half a patient's size in mm of the reference body."""
        return 0.5 * size_mm / self.case.mean_scale

    def contrast(self) -> float:
        """How far a solid lesion of liver or pancreas differs from its organ, HU."""
        return float(self.rng.uniform(15.0 if self.case.full else 40.0, 80.0))

    def point(
        self,
        organ: Shape,
        radius: float,
        *,
        depth: float | None = None,
        accept: Callable[[Point], bool] = lambda p: True,
    ) -> Point | None:
        """A free place for a lesion in an organ, which is then taken."""
        point = placement.inside(self.rng, organ, radius, self.taken, depth=depth, accept=accept)
        if point is not None:
            self.taken.append((point, radius))
        return point


def lung_space(draft: Draft, side: Side) -> Shape:
    """The lung of a side as far as neither fluid nor free air has taken it."""
    parts: list[Shape] = [draft.body.lungs[side.value]]
    for finding in draft.findings:
        if finding.side is side and finding.kind is K.PLEURAL_EFFUSION:
            parts.append(Grown(HalfSpace((0.0, 1.0, -0.18), fluid_level(finding, draft.case)), -4.0))
        if finding.side is side and finding.kind is K.PNEUMOTHORAX:
            parts.append(Grown(HalfSpace((0.0, -1.0, 0.19), -air_level(finding, draft.case)), -4.0))
    return Intersection(tuple(parts)) if len(parts) > 1 else parts[0]


def fluid_level(finding: Finding, case: Case) -> float:
    """Offset of the plane y - 0.18 z above which (to the back) an effusion lies.

    The deepest fluid is at the base, where the back wall is 95 mm behind the axis; the plane rises with height as a
    meniscus does.
    """
    return 95.0 + 0.18 * 25.0 - (finding.size_mm or 0) / case.habitus.build.scale[1]


def air_level(finding: Finding, case: Case) -> float:
    """Offset of the plane y - 0.19 z before which a pneumothorax lies.

    The plane leans as the front wall does, and stands so that the deepest air before it has the finding's size.
    """
    return -93.0 - 0.19 * 20.0 + (finding.size_mm or 0) / case.habitus.build.scale[1]


def _lung_lesion(draft: Draft, kind: FindingType, side: Side) -> Finding | None:
    size = draft.size(kind)
    radius = draft.radius(size)
    depth = radius + 2.0 if kind is not K.CONSOLIDATION else min(radius, 16.0)
    low, high = draft.case.scan.span
    point = draft.point(
        lung_space(draft, side), radius, depth=depth, accept=lambda p: low + radius < p[2] < high - radius
    )
    if point is None:
        return None
    hu = {K.LUNG_NODULE: 35.0, K.LUNG_MASS: 42.0}.get(kind, 25.0)
    return Finding(kind, side, placement.lobe(point, side), size, hu=hu, center=point)


def _atelectasis(draft: Draft, kind: FindingType, side: Side) -> Finding | None:
    size = draft.size(kind)
    point = draft.point(
        lung_space(draft, side), 14.0, depth=10.0, accept=lambda p: -35.0 < p[2] < 20.0 and p[1] > -20.0
    )
    if point is None:
        return None
    return Finding(kind, side, placement.lobe(point, side), size, hu=20.0, center=point)


def _pleural(draft: Draft, kind: FindingType, side: Side) -> Finding:
    size = draft.size(kind)
    return Finding(kind, side, "", size, hu=9.0 if kind is K.PLEURAL_EFFUSION else -1000.0)


def _sized(hu: float) -> Callable[[Draft, FindingType, Side], Finding]:
    def draw(draft: Draft, kind: FindingType, side: Side) -> Finding:
        return Finding(kind, side, "", draft.size(kind), hu=hu)

    return draw


def _graded(draft: Draft, kind: FindingType, side: Side) -> Finding:
    hu = {K.EMPHYSEMA: -965.0, K.CORONARY_CALCIFICATION: 480.0}.get(kind, draft.case.liver_hu)
    return Finding(kind, side, "", None, degree=DEGREES[int(draft.rng.integers(3))], hu=hu)


def _hepatic(draft: Draft, kind: FindingType, side: Side) -> Finding | None:
    size = draft.size(kind)
    radius = draft.radius(size)
    point = draft.point(draft.body.liver, radius, depth=min(radius + 2.0, 24.0))
    if point is None:
        return None
    place = placement.liver_segment(point)
    if kind is K.HEPATIC_CYST:
        return Finding(kind, side, place, size, hu=float(draft.rng.uniform(0.0, 12.0)), center=point)
    dark = draft.case.full and draft.rng.random() < 0.6
    hu = draft.case.liver_hu + draft.contrast() * (-1.0 if dark else 1.0)
    return Finding(kind, side, place, size, "hypodense" if dark else "hyperdense", hu=hu, center=point)


def _renal_cyst(draft: Draft, kind: FindingType, side: Side) -> Finding | None:
    kidney = draft.body.kidneys[side.value]
    size = draft.size(kind)
    radius = draft.radius(size)
    outward = 1.0 if side is Side.LEFT else -1.0
    point = draft.point(kidney, 0.6 * radius, depth=2.0, accept=lambda p: outward * (p[0] - kidney.center[0]) > 4.0)
    if point is None:
        return None
    middle = (point[0] + outward * 0.45 * radius, point[1], point[2])
    place = placement.kidney_pole(middle[2], kidney.center[2], kidney.radii[2])
    return Finding(kind, side, place, size, hu=float(draft.rng.uniform(0.0, 14.0)), center=middle)


def _renal_calculus(draft: Draft, kind: FindingType, side: Side) -> Finding | None:
    kidney = draft.body.kidneys[side.value]
    size = draft.size(kind)
    sinus = Grown(renal_sinus(kidney), 3.0)
    point = draft.point(sinus, 0.5 * draft.radius(size), depth=2.0)
    if point is None:
        return None
    place = placement.kidney_pole(point[2], kidney.center[2], 0.72 * kidney.radii[2])
    return Finding(kind, side, place, size, hu=float(draft.rng.uniform(450.0, 1200.0)), center=point)


def _hydronephrosis(draft: Draft, kind: FindingType, side: Side) -> Finding:
    sinus = renal_sinus(draft.body.kidneys[side.value])
    return Finding(kind, side, "", draft.size(kind), hu=8.0, center=sinus.center)


def _gallstones(draft: Draft, kind: FindingType, side: Side) -> Finding:
    x, y, z = draft.body.gallbladder.center
    middle = (x, y + 5.0, z - float(draft.rng.uniform(0.0, 8.0)))
    return Finding(kind, side, "", draft.size(kind), hu=float(draft.rng.uniform(120.0, 500.0)), center=middle)


def _pancreatic(draft: Draft, kind: FindingType, side: Side) -> Finding | None:
    size = draft.size(kind)
    point = draft.point(draft.body.pancreas, draft.radius(size), depth=5.0)
    if point is None:
        return None
    place = "head" if point[0] < -8.0 else ("body" if point[0] < 46.0 else "tail")
    # Never darker than water: without contrast medium the organ itself has little to lose.
    hu = max(draft.case.tissue.pancreas - draft.contrast(), 5.0)
    return Finding(kind, side, place, size, hu=hu, center=point)


def _aneurysm(draft: Draft, kind: FindingType, side: Side) -> Finding:
    sites = []
    if Region.CHEST in draft.case.scan.regions:
        sites.append(("ascending aorta", AORTA[1][:3]))
    if Region.ABDOMEN in draft.case.scan.regions:
        sites.append(("infrarenal aorta", (7.0, 12.0, -176.0)))
    place, middle = sites[int(draft.rng.integers(len(sites)))]
    return Finding(kind, side, place, draft.size(kind), hu=draft.case.tissue.aorta, center=middle)


def _bladder_stone(draft: Draft, kind: FindingType, side: Side) -> Finding:
    size = draft.size(kind)
    x, y, z = draft.body.bladder.center
    low = y + draft.body.bladder.radii[1] - 4.0 - draft.radius(size)
    middle = (x + float(draft.rng.uniform(-10.0, 10.0)), low, z)
    return Finding(kind, side, "", size, hu=float(draft.rng.uniform(500.0, 1100.0)), center=middle)


def _fracture(draft: Draft, kind: FindingType, side: Side) -> Finding | None:
    if draft.case.changes.fracture is None:
        return None
    fracture = draft.case.changes.fracture
    degree = next(name for name, (_, most) in FRACTURE_LOSS.items() if fracture.loss <= most + 0.005)
    z = LEVELS[fracture.level][0]
    return Finding(kind, side, fracture.level, None, degree=degree, hu=250.0, center=(0.0, spine_y(z), z))


def _lytic(draft: Draft, kind: FindingType, side: Side) -> Finding | None:
    size = draft.size(kind)
    broken = draft.case.changes.fracture
    levels = [level for level in _levels(draft.case) if broken is None or level != broken.level]
    if not levels or (Region.PELVIS in draft.case.scan.regions and draft.rng.random() < 0.4):
        if Region.PELVIS not in draft.case.scan.regions:
            return None
        hip = Side.LEFT if draft.rng.random() < 0.5 else Side.RIGHT
        x = 91.0 if hip is Side.LEFT else -91.0
        return Finding(kind, side, f"{hip} ilium", size, hu=45.0, center=(x, 42.0, -285.0))
    level = levels[int(draft.rng.integers(len(levels)))]
    z = LEVELS[level][0]
    return Finding(kind, side, level, size, hu=45.0, center=(float(draft.rng.uniform(-6.0, 6.0)), spine_y(z), z))


def _nodes(draft: Draft, kind: FindingType, side: Side) -> Finding:
    stations: list[tuple[Region, str, Point]] = [
        (Region.CHEST, "mediastinal", (-22.0, 2.0, 146.0)),
        (Region.ABDOMEN, "retroperitoneal", (27.0, 18.0, -172.0)),
        (Region.PELVIS, "pelvic", (-62.0, 2.0, -340.0)),
    ]
    seen = [station for station in stations if station[0] in draft.case.scan.regions]
    _, place, middle = seen[int(draft.rng.integers(len(seen)))]
    return Finding(kind, side, place, draft.size(kind), hu=draft.case.tissue.muscle + 15.0, center=middle)


DRAWN: dict[FindingType, Callable[[Draft, FindingType, Side], Finding | None]] = {
    K.VERTEBRAL_FRACTURE: _fracture,
    K.CARDIOMEGALY: _sized(0.0),
    K.SPLENOMEGALY: _sized(0.0),
    K.STEATOSIS: _graded,
    K.PLEURAL_EFFUSION: _pleural,
    K.PNEUMOTHORAX: _pleural,
    K.PERICARDIAL_EFFUSION: _sized(12.0),
    K.EMPHYSEMA: _graded,
    K.CORONARY_CALCIFICATION: _graded,
    K.ASCITES: _sized(7.0),
    K.HYDRONEPHROSIS: _hydronephrosis,
    K.AORTIC_ANEURYSM: _aneurysm,
    K.CONSOLIDATION: _lung_lesion,
    K.LUNG_MASS: _lung_lesion,
    K.LUNG_NODULE: _lung_lesion,
    K.ATELECTASIS: _atelectasis,
    K.HEPATIC_LESION: _hepatic,
    K.HEPATIC_CYST: _hepatic,
    K.PANCREATIC_MASS: _pancreatic,
    K.GALLSTONES: _gallstones,
    K.RENAL_CALCULUS: _renal_calculus,
    K.RENAL_CYST: _renal_cyst,
    K.BLADDER_STONE: _bladder_stone,
    K.LYTIC_LESION: _lytic,
    K.LYMPHADENOPATHY: _nodes,
}
"""How each kind is drawn, in this order: what takes room first, the small last."""


def _levels(case: Case) -> list[str]:
    low, high = case.scan.span
    return [level for level in placement.levels_between(low, min(high, 110.0)) if level != "L5"]


def _changes(rng: np.random.Generator, case: Case, draft: Draft, kinds: set[FindingType]) -> Changes:
    scale = case.habitus.build.scale
    fracture = None
    levels = _levels(case)
    if K.VERTEBRAL_FRACTURE in kinds and levels:
        low, high = FRACTURE_LOSS[DEGREES[int(rng.integers(0 if case.full else 1, 3))]]
        fracture = Fracture(levels[int(rng.integers(len(levels)))], round(float(rng.uniform(low, high)), 2))
    return Changes(
        heart_mm=draft.size(K.CARDIOMEGALY) / scale[0] if K.CARDIOMEGALY in kinds else None,
        spleen_mm=draft.size(K.SPLENOMEGALY) / scale[2] if K.SPLENOMEGALY in kinds else None,
        fracture=fracture,
    )


def _chosen(rng: np.random.Generator, case: Case, counts: dict[str, float]) -> list[tuple[FindingType, Side]]:
    kinds = [kind for kind in (FindingType if case.full else CORE) if set(REGIONS[kind]) & set(case.scan.regions)]
    wanted = int(pick(rng, counts))
    chosen: list[tuple[FindingType, Side]] = []
    while kinds and len(chosen) < wanted:
        weights = {kind.value: WEIGHTS[kind] for kind in kinds}
        kind = FindingType(pick(rng, weights))
        kinds.remove(kind)
        if kind not in SIDED:
            chosen.append((kind, Side.NONE))
        elif len(chosen) + 2 <= wanted and rng.random() < BOTH_SIDES:
            chosen += [(kind, Side.RIGHT), (kind, Side.LEFT)]
        else:
            chosen.append((kind, Side.LEFT if rng.random() < 0.5 else Side.RIGHT))
    return chosen


def _liver_hu(rng: np.random.Generator, case: Case, chosen: list[tuple[FindingType, Side]]) -> float:
    drop = float(rng.uniform(32.0, 52.0)) if any(kind is K.STEATOSIS for kind, _ in chosen) else 0.0
    return case.tissue.liver + float(rng.uniform(-6.0, 8.0)) - drop


def draw_case(seed: int, *, full: bool = False, crowded: bool = False) -> Case:
    """The case of a seed; the same on every machine. `crowded` is no part of the benchmark: never normal, many findings.

    Raises ValueError for a negative seed.
    """
    if seed < 0:
        raise ValueError(f"a phantom's seed must be 0 or more, not {seed}")
    rng = np.random.default_rng([seed, 100 + int(full)])
    habitus = draw_habitus(rng)
    case = Case(seed, full, habitus, draw_scan(rng, full, habitus.build), liver_hu=0.0)
    normal = not crowded and rng.random() < NORMAL_SHARE
    chosen = [] if normal else _chosen(rng, case, CROWDED_COUNTS if crowded else COUNTS)
    case = replace(case, liver_hu=_liver_hu(rng, case, chosen))
    return with_findings(case, rng, chosen)


def with_findings(case: Case, rng: np.random.Generator, chosen: list[tuple[FindingType, Side]]) -> Case:
    """The case with the chosen findings drawn and placed; one that finds no room is left out."""
    draft = Draft(rng, case, build_body(case.habitus))
    changes = _changes(rng, case, draft, {kind for kind, _ in chosen})
    draft.case = replace(case, changes=changes)
    draft.body = draft.case.body
    for kind, draw in DRAWN.items():
        for side in [side for other, side in chosen if other is kind]:
            finding = draw(draft, kind, side)
            if finding is not None:
                draft.findings.append(_measured(draft.case, finding))
    order = list(FindingType)
    findings = sorted(draft.findings, key=lambda finding: (order.index(finding.kind), finding.side is Side.LEFT))
    return replace(draft.case, findings=tuple(findings))


def _measured(case: Case, finding: Finding) -> Finding:
    """The finding with the size that its organ was given."""
    sx, _, sz = case.habitus.build.scale
    if finding.kind is K.CARDIOMEGALY and case.changes.heart_mm is not None:
        return replace(finding, size_mm=round(case.changes.heart_mm * sx), center=case.body.heart.center)
    if finding.kind is K.SPLENOMEGALY and case.changes.spleen_mm is not None:
        return replace(finding, size_mm=round(case.changes.spleen_mm * sz), hu=case.tissue.spleen)
    return finding
