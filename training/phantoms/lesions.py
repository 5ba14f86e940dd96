"""Paints the findings of a case over its organs."""

from collections.abc import Callable

import numpy as np

from training.phantoms.anatomy import AORTA, Painting, course, renal_sinus
from training.phantoms.case import Case
from training.phantoms.disease import air_level, fluid_level
from training.phantoms.shapes import (
    Capsule,
    Difference,
    Ellipsoid,
    Grown,
    HalfSpace,
    Intersection,
    Lobulated,
    Point,
    Shape,
    Slab,
    Union,
)
from training.phantoms.tissue import AIR
from training.phantoms.vocabulary import FINDING_LABELS, Finding, FindingType, Organ, Side

K = FindingType
LUNGS = {Side.RIGHT: Organ.LUNG_RIGHT, Side.LEFT: Organ.LUNG_LEFT}
BULLAE = {"mild": 70, "moderate": 170, "severe": 340}
PLAQUES = {"mild": 2, "moderate": 4, "severe": 8}


def radii(case: Case, size_mm: float, shape: Point = (1.0, 1.0, 1.0)) -> Point:
    """Half-widths in the reference body of a lesion that measures `size_mm` in the patient."""
    sx, sy, sz = case.habitus.build.scale
    return 0.5 * size_mm * shape[0] / sx, 0.5 * size_mm * shape[1] / sy, 0.5 * size_mm * shape[2] / sz


def _phase(rng: np.random.Generator) -> Point:
    return float(rng.random()), float(rng.random()), float(rng.random())


def _ball(painting: Painting, case: Case, finding: Finding, rng: np.random.Generator) -> Shape:
    """A lesion of the finding's size: cysts smooth, all else lobulated in proportion."""
    size = float(finding.size_mm or 0)
    solid = Ellipsoid(
        finding.center, radii(case, size, (1.0, float(rng.uniform(0.88, 1.0)), float(rng.uniform(0.88, 1.0))))
    )
    if finding.kind in (K.HEPATIC_CYST, K.RENAL_CYST):
        return solid
    bump = {K.LUNG_MASS: 0.06, K.CONSOLIDATION: 0.14}.get(finding.kind, 0.04) * size
    # Bumps as wide as the lesion leave an irregular outline; narrow ones would make a cogwheel of a large one.
    waves = 1.1 if finding.kind is K.CONSOLIDATION else 0.6
    return Lobulated(solid, bump, max(waves * size, 8.0), _phase(rng))


def _paint_ball(painting: Painting, case: Case, finding: Finding, rng: np.random.Generator) -> None:
    solid = _ball(painting, case, finding, rng)
    if finding.kind in (K.HEPATIC_CYST, K.HEPATIC_LESION):
        solid = Intersection((solid, Grown(painting.body.liver, -1.0)))
    painting.canvas.paint(solid, finding.hu, finding=FINDING_LABELS[finding.kind])


def _lung_opacity(painting: Painting, case: Case, finding: Finding, rng: np.random.Generator) -> None:
    lung = (LUNGS[finding.side], Organ.LUNG_VESSEL)
    solid = _ball(painting, case, finding, rng)
    label = FINDING_LABELS[finding.kind]
    if finding.kind is K.CONSOLIDATION:
        halo = Grown(solid, 6.0)
        painting.canvas.paint(halo, -560.0, only=lung)
    painting.canvas.paint(solid, finding.hu, finding=label, only=lung)
    if finding.kind is K.CONSOLIDATION:
        x, y, z = finding.center
        reach = 0.34 * (finding.size_mm or 0)
        for _ in range(3):
            dx, dy, dz = (float(value) for value in rng.uniform(-reach, reach, 3))
            bronchus = Capsule((x - dx, y - dy, z - dz), (x + dx, y + dy, z + dz), 1.8, 1.2)
            thin = min(1.0, 3.0 / float(painting.canvas.width_mm))
            painting.canvas.paint(bronchus, AIR + 80.0, strength=thin, only=lung)


def _atelectasis(painting: Painting, case: Case, finding: Finding, rng: np.random.Generator) -> None:
    length = float(finding.size_mm or 0)
    plate = Ellipsoid(finding.center, radii(case, length, (1.0, 0.6, 0.14)), lean=0.0)
    solid = Lobulated(plate, 1.5, 30.0, _phase(rng))
    only = (LUNGS[finding.side], Organ.LUNG_VESSEL)
    painting.canvas.paint(Grown(solid, 2.5), -500.0, only=only)
    painting.canvas.paint(solid, finding.hu, finding=FINDING_LABELS[finding.kind], only=only)


def _emphysema(painting: Painting, case: Case, finding: Finding, rng: np.random.Generator) -> None:
    label = FINDING_LABELS[finding.kind]
    for side, organ in LUNGS.items():
        lung = painting.body.lungs[side.value]
        (x0, y0, _), (x1, y1, z1) = lung.bounds
        for _ in range(BULLAE[finding.degree]):
            # Centrilobular emphysema is worst in the upper lobes.
            height = float(rng.triangular(-20.0, 170.0, z1))
            middle = (float(rng.uniform(x0, x1)), float(rng.uniform(y0, y1)), height)
            size = float(rng.uniform(4.0, 11.0))
            painting.canvas.paint(Ellipsoid(middle, (size, size, size)), finding.hu, finding=label, only=(organ,))


def _effusion(painting: Painting, case: Case, finding: Finding, rng: np.random.Generator) -> None:
    lung = painting.body.lungs[finding.side.value]
    canvas = painting.canvas
    behind = HalfSpace((0.0, -1.0, 0.18), -fluid_level(finding, case))
    fluid = Intersection((lung, behind))
    only = (LUNGS[finding.side], Organ.LUNG_VESSEL)
    canvas.paint(Grown(fluid, 4.0), -420.0, only=only)  # lung pressed together by the fluid
    canvas.paint(fluid, finding.hu, finding=FINDING_LABELS[finding.kind], only=only)
    # The edge voxels of lung and wall are half air: fluid reaches the wall, so none of them stays darker than fluid.
    reach = Intersection((Grown(lung, float(canvas.width_mm)), behind))
    where = canvas.window(reach.bounds)
    patch = canvas.hu[where]
    wet = reach.distance(canvas.x[where], canvas.y[where], canvas.z[where]) < 0.0
    patch[wet] = np.maximum(patch[wet], np.float32(finding.hu))


def _pneumothorax(painting: Painting, case: Case, finding: Finding, rng: np.random.Generator) -> None:
    lung = painting.body.lungs[finding.side.value]
    air = Intersection((lung, HalfSpace((0.0, 1.0, -0.19), air_level(finding, case))))
    only = (LUNGS[finding.side], Organ.LUNG_VESSEL)
    painting.canvas.paint(Grown(air, 2.5), -420.0, only=only)  # visceral pleura
    painting.canvas.paint(air, finding.hu, finding=FINDING_LABELS[finding.kind], only=only)


def _pericardial(painting: Painting, case: Case, finding: Finding, rng: np.random.Generator) -> None:
    heart = painting.body.heart
    thickness = float(finding.size_mm or 0) / case.mean_scale
    sac = Difference(Grown(heart, thickness), (heart,))
    above = Slab(2, heart.center[2] - heart.radii[2] - 6.0, heart.center[2] + 0.75 * heart.radii[2])
    only = (Organ.VISCERAL_FAT, Organ.LUNG_LEFT, Organ.LUNG_RIGHT, Organ.LUNG_VESSEL, Organ.HEART)
    painting.canvas.paint(Intersection((sac, above)), finding.hu, finding=FINDING_LABELS[finding.kind], only=only)


def _cardiomegaly(painting: Painting, case: Case, finding: Finding, rng: np.random.Generator) -> None:
    _mark(painting, painting.body.heart, finding, Organ.HEART)


def _splenomegaly(painting: Painting, case: Case, finding: Finding, rng: np.random.Generator) -> None:
    _mark(painting, painting.body.spleen, finding, Organ.SPLEEN)


def _steatosis(painting: Painting, case: Case, finding: Finding, rng: np.random.Generator) -> None:
    _mark(painting, painting.body.liver, finding, Organ.LIVER)


def _mark(painting: Painting, solid: Shape, finding: Finding, organ: Organ) -> None:
    """Label an organ that is itself the finding; its voxels are already painted."""
    where = painting.canvas.window(solid.bounds)
    labels = painting.canvas.findings[where]
    labels[(painting.canvas.organs[where] == organ) & (labels == 0)] = FINDING_LABELS[finding.kind]


def _coronary(painting: Painting, case: Case, finding: Finding, rng: np.random.Generator) -> None:
    cx, cy, cz = painting.body.heart.center
    rx, ry, rz = painting.body.heart.radii
    for _ in range(PLAQUES[finding.degree]):
        along = float(rng.uniform(-0.1, 0.7))
        surface = 0.93 * float(np.sqrt(1.0 - along * along))
        tip = float(rng.uniform(-0.2, 0.2))
        start = (cx + rx * (0.25 + tip), cy - ry * surface, cz + rz * (0.6 - along))
        end = (start[0] + float(rng.uniform(-3.0, 6.0)), start[1], start[2] - float(rng.uniform(3.0, 10.0)))
        painting.canvas.paint(Capsule(start, end, 2.4, 2.0), finding.hu, finding=FINDING_LABELS[finding.kind])


def _aneurysm(painting: Painting, case: Case, finding: Finding, rng: np.random.Generator) -> None:
    x, y, z = finding.center
    label = FINDING_LABELS[finding.kind]
    long = (1.0, 1.0, 1.5)
    sac = Ellipsoid(finding.center, radii(case, float(finding.size_mm or 0), long))
    if finding.place == "infrarenal aorta":
        painting.canvas.paint(sac, 38.0, organ=Organ.AORTA, finding=label)  # thrombus
        lumen = Ellipsoid((x, y - 2.0, z), radii(case, 0.62 * float(finding.size_mm or 0), (1.0, 1.0, 2.2)))
        painting.canvas.paint(lumen, finding.hu, organ=Organ.AORTA, finding=label)
        for part in course(AORTA[-3:]):
            painting.canvas.paint(part, finding.hu, organ=Organ.AORTA)
        _calcify(painting, finding, case, rng)
    else:
        painting.canvas.paint(sac, finding.hu, organ=Organ.AORTA, finding=label)


def _calcify(painting: Painting, finding: Finding, case: Case, rng: np.random.Generator) -> None:
    x, y, z = finding.center
    rx, ry, _ = radii(case, float(finding.size_mm or 0))
    for _ in range(5):
        u = float(rng.uniform(-0.95, 0.95))
        v = float(np.sqrt(1.0 - u * u)) * (1.0 if rng.random() < 0.5 else -1.0)
        spot = (x + rx * u, y + ry * v, z + float(rng.uniform(-8.0, 8.0)))
        painting.canvas.paint(Ellipsoid(spot, (3.0, 3.0, 4.0)), 500.0, only=(Organ.AORTA,))


def _gallstones(painting: Painting, case: Case, finding: Finding, rng: np.random.Generator) -> None:
    x, y, z = finding.center
    label = FINDING_LABELS[finding.kind]
    size = float(finding.size_mm or 0)
    for number in range(4):
        part = size if number == 0 else size * float(rng.uniform(0.3, 0.7))
        shift = 0.0 if number == 0 else float(rng.uniform(-14.0, 14.0))
        stone = Ellipsoid((x + 0.3 * shift, y + 0.1 * shift, z + shift), radii(case, part))
        painting.canvas.paint(stone, finding.hu, finding=label, only=(Organ.GALLBLADDER,))


def _hydronephrosis(painting: Painting, case: Case, finding: Finding, rng: np.random.Generator) -> None:
    kidney = painting.body.kidneys[finding.side.value]
    sinus = renal_sinus(kidney)
    x, y, z = sinus.center
    organ = Organ.KIDNEY_LEFT if finding.side is Side.LEFT else Organ.KIDNEY_RIGHT
    across = radii(case, float(finding.size_mm or 0))
    outward = 1.0 if finding.side is Side.LEFT else -1.0
    pelvis = Ellipsoid(
        (x - outward * 4.0, y, z),
        (across[0] * 1.25, across[1], max(0.55 * kidney.radii[2], across[2])),
        lean=kidney.lean,
    )
    calyx = 0.62 * across[0]
    calyces: list[Shape] = [
        Capsule((x, y, z + rise), (x + outward * (8.0 + 0.2 * across[0]), y, z + 1.25 * rise), 0.6 * calyx, calyx)
        for rise in (-0.48 * kidney.radii[2], 0.0, 0.48 * kidney.radii[2])
    ]
    ureter = Capsule((x - outward * 14.0, y - 2.0, z - 8.0), (x - outward * 24.0, y - 6.0, z - 62.0), 5.0, 4.0)
    label = FINDING_LABELS[finding.kind]
    painting.canvas.paint(Union((pelvis, *calyces)), finding.hu, organ=organ, finding=label)
    painting.canvas.paint(ureter, finding.hu, finding=label, only=(Organ.VISCERAL_FAT, Organ.MUSCLE))


def _ascites(painting: Painting, case: Case, finding: Finding, rng: np.random.Generator) -> None:
    body = painting.body
    depth = float(finding.size_mm or 0) / case.mean_scale
    # Fluid gathers along the flanks and the diaphragm, pushing liver and spleen off the wall, and fills the pelvis.
    wall = Difference(body.cavity, (Grown(body.cavity, -depth),))
    front = HalfSpace((0.0, 1.0, 0.0), 46.0)
    flanks = Intersection((Slab(2, -330.0, 60.0), wall, Grown(body.diaphragm, -3.0), front))
    low = Intersection((Slab(2, -450.0, -300.0), body.cavity, Slab(2, -450.0, -335.0 + 1.4 * depth)))
    soft = (Organ.VISCERAL_FAT, Organ.LIVER, Organ.SPLEEN, Organ.STOMACH, Organ.SMALL_BOWEL)
    label = FINDING_LABELS[finding.kind]
    painting.canvas.paint(
        Intersection((Grown(flanks, 0.0), HalfSpace((0.0, -1.0, 0.0), 62.0))), finding.hu, finding=label, only=soft
    )
    painting.canvas.paint(low, finding.hu, finding=label, only=(Organ.VISCERAL_FAT,))


def _bladder_stone(painting: Painting, case: Case, finding: Finding, rng: np.random.Generator) -> None:
    stone = Ellipsoid(finding.center, radii(case, float(finding.size_mm or 0), (1.0, 0.85, 0.85)))
    painting.canvas.paint(stone, finding.hu, finding=FINDING_LABELS[finding.kind])


def _fracture(painting: Painting, case: Case, finding: Finding, rng: np.random.Generator) -> None:
    x, y, z = finding.center
    where = painting.canvas.window(((x - 26.0, y - 20.0, z - 13.0), (x + 26.0, y + 20.0, z + 13.0)))
    canvas = painting.canvas
    inside = (np.abs(canvas.z[where] - np.float32(z)) < 14.0) & (np.abs(canvas.x[where]) < 25.0)
    inside &= np.abs(canvas.y[where] - np.float32(y)) < 19.0
    # Trabeculae that are pressed together make the broken body denser than its neighbours.
    spongy = inside & (canvas.organs[where] == Organ.BONE) & (canvas.hu[where] < 260.0)
    canvas.hu[where][spongy] += np.float32(90.0)
    canvas.findings[where][inside & (canvas.organs[where] == Organ.BONE)] = FINDING_LABELS[finding.kind]


def _lytic(painting: Painting, case: Case, finding: Finding, rng: np.random.Generator) -> None:
    hole = Lobulated(Ellipsoid(finding.center, radii(case, float(finding.size_mm or 0))), 0.8, 9.0, _phase(rng))
    painting.canvas.paint(hole, finding.hu, finding=FINDING_LABELS[finding.kind], only=(Organ.BONE,))


def _nodes(painting: Painting, case: Case, finding: Finding, rng: np.random.Generator) -> None:
    x, y, z = finding.center
    size = float(finding.size_mm or 0)
    label = FINDING_LABELS[finding.kind]
    kept = (Organ.VISCERAL_FAT, Organ.MUSCLE, Organ.SMALL_BOWEL, Organ.LUNG_LEFT, Organ.LUNG_RIGHT, Organ.VEIN)
    for number in range(5):
        part = size if number == 0 else size * float(rng.uniform(0.5, 0.9))
        dx, dy, dz = (0.0, 0.0, 0.0) if number == 0 else tuple(float(v) for v in rng.uniform(-0.9, 0.9, 3) * size)
        node = Ellipsoid((x + 0.6 * dx, y + 0.4 * dy, z + 1.6 * dz), radii(case, part, (1.0, 1.15, 1.35)))
        painting.canvas.paint(node, finding.hu, finding=label, only=kept)


PAINTED: dict[FindingType, Callable[[Painting, Case, Finding, np.random.Generator], None]] = {
    K.STEATOSIS: _steatosis,
    K.CARDIOMEGALY: _cardiomegaly,
    K.SPLENOMEGALY: _splenomegaly,
    K.VERTEBRAL_FRACTURE: _fracture,
    K.EMPHYSEMA: _emphysema,
    K.CONSOLIDATION: _lung_opacity,
    K.LUNG_MASS: _lung_opacity,
    K.LUNG_NODULE: _lung_opacity,
    K.ATELECTASIS: _atelectasis,
    K.PLEURAL_EFFUSION: _effusion,
    K.PNEUMOTHORAX: _pneumothorax,
    K.PERICARDIAL_EFFUSION: _pericardial,
    K.AORTIC_ANEURYSM: _aneurysm,
    K.ASCITES: _ascites,
    K.HEPATIC_CYST: _paint_ball,
    K.HEPATIC_LESION: _paint_ball,
    K.PANCREATIC_MASS: _paint_ball,
    K.GALLSTONES: _gallstones,
    K.HYDRONEPHROSIS: _hydronephrosis,
    K.RENAL_CYST: _paint_ball,
    K.RENAL_CALCULUS: _paint_ball,
    K.BLADDER_STONE: _bladder_stone,
    K.CORONARY_CALCIFICATION: _coronary,
    K.LYTIC_LESION: _lytic,
    K.LYMPHADENOPATHY: _nodes,
}
"""How each kind is painted, in this order, so that the small is never covered by the large."""


def paint_findings(painting: Painting, case: Case) -> None:
    """All findings of a case."""
    for kind, paint in PAINTED.items():
        for finding in case.findings:
            if finding.kind is kind:
                stream = 50 + 2 * FINDING_LABELS[kind] + int(finding.side is Side.LEFT)
                paint(painting, case, finding, painting.rng(stream))
