"""Paints the organs of a body on a canvas, from the outside inwards, so that the later organ wins a voxel."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from training.phantoms import branches, skeleton
from training.phantoms.body import Body, Habitus
from training.phantoms.canvas import Canvas
from training.phantoms.shapes import (
    Capsule,
    Ellipsoid,
    Grown,
    Intersection,
    Shape,
    Slab,
    Union,
    wave,
)
from training.phantoms.tissue import AIR, BILE, CORD, CORTICAL_BONE, DISC, FAT, LUNG, SPONGY_BONE, URINE, Tissue
from training.phantoms.vocabulary import Organ

AORTA = (
    (-6.0, -26.0, 78.0, 15.0),
    (-18.0, -32.0, 118.0, 15.5),
    (-14.0, -14.0, 152.0, 14.5),
    (6.0, 14.0, 164.0, 13.5),
    (20.0, 34.0, 146.0, 13.0),
    (22.0, 42.0, 110.0, 12.5),
    (18.0, 38.0, 20.0, 12.0),
    (10.0, 26.0, -60.0, 11.0),
    (8.0, 14.0, -150.0, 9.5),
    (6.0, 18.0, -225.0, 8.5),
)
"""Course of the aorta from valve to bifurcation: (x, y, z, radius), mm."""

COLON = (
    (-92.0, 12.0, -300.0),
    (-100.0, 16.0, -230.0),
    (-98.0, 10.0, -165.0),
    (-70.0, -52.0, -158.0),
    (0.0, -66.0, -178.0),
    (72.0, -52.0, -150.0),
    (100.0, 14.0, -116.0),
    (104.0, 22.0, -200.0),
    (98.0, 18.0, -285.0),
    (66.0, 0.0, -325.0),
    (24.0, 24.0, -345.0),
    (0.0, 46.0, -378.0),
    (0.0, 52.0, -430.0),
)


@dataclass(frozen=True)
class Painting:
    """What the organs are painted with: canvas, solids, values, and how the aorta and liver differ."""

    canvas: Canvas
    body: Body
    habitus: Habitus
    tissue: Tissue
    seed: int

    def rng(self, stream: int) -> np.random.Generator:
        """Random numbers of one organ system, so that one system's draw never moves another's."""
        return np.random.default_rng([self.seed, stream])


def course(points: tuple[tuple[float, float, float, float], ...]) -> list[Capsule]:
    """A vessel along (x, y, z, radius)."""
    return [Capsule(a[:3], b[:3], a[3], b[3]) for a, b in pairwise(points)]


def paint_wall(painting: Painting) -> None:
    """Skin, fat, muscles and the fat of the cavity."""
    canvas, body = painting.canvas, painting.body
    fat_mm = painting.habitus.fat_mm
    layers = (
        (fat_mm, 15.0, Organ.SKIN_FAT),
        (fat_mm - 2.0, FAT, Organ.SKIN_FAT),
        (0.0, painting.tissue.muscle, Organ.MUSCLE),
    )
    canvas.paint_layers(body.trunk, layers)
    canvas.paint(body.cavity, FAT + 4.0, organ=Organ.VISCERAL_FAT)
    back = Intersection((skeleton.along_spine(56.0, 28.0, 40.0, -470.0, 250.0), body.trunk))
    canvas.paint(back, painting.tissue.muscle - 6.0, organ=Organ.MUSCLE)
    for sign in (-1.0, 1.0):
        psoas = Union(
            (
                Capsule((sign * 26.0, 42.0, -75.0), (sign * 42.0, 34.0, -190.0), 5.0, 18.0),
                Capsule((sign * 42.0, 34.0, -190.0), (sign * 66.0, 0.0, -340.0), 18.0, 19.0),
                Capsule((sign * 66.0, 0.0, -340.0), (sign * 86.0, -24.0, -400.0), 19.0, 13.0),
            )
        )
        canvas.paint(psoas, painting.tissue.muscle, organ=Organ.MUSCLE)
        for pad in (
            Ellipsoid((sign * 128.0, 14.0, 140.0), (13.0, 34.0, 62.0)),  # armpit
            Ellipsoid((sign * 118.0, -52.0, 60.0), (22.0, 12.0, 70.0), lean=-sign * 0.1),  # under the pectoral muscle
            Ellipsoid((sign * 96.0, 78.0, 40.0), (40.0, 5.0, 150.0), lean=sign * 0.1),  # under the shoulder blade
            Ellipsoid((sign * 96.0, 62.0, -330.0), (46.0, 5.0, 70.0)),  # between the gluteal muscles
            Ellipsoid((sign * 60.0, 68.0, -395.0), (18.0, 22.0, 50.0)),  # ischiorectal fossa
            Ellipsoid((sign * 92.0, -60.0, -400.0), (44.0, 14.0, 55.0)),  # groin
        ):
            canvas.paint(pad, FAT, organ=Organ.VISCERAL_FAT, only=(Organ.MUSCLE,))


def paint_bones(painting: Painting) -> None:
    """Ribs, sternum, shoulder girdle, spine with canal, pelvis."""
    canvas, body = painting.canvas, painting.body
    ribs = skeleton.Ribs(body.cavity)
    canvas.paint(ribs, 0.62 * CORTICAL_BONE, organ=Organ.BONE)
    for bone in (*skeleton.shoulder_girdle(), *skeleton.pelvic_bones()):
        canvas.paint_layers(bone, ((0.0, 0.8 * CORTICAL_BONE, Organ.BONE), (-3.0, SPONGY_BONE + 40.0, Organ.BONE)))
    column = skeleton.along_spine(17.5, 13.0, 0.0, -235.0, 226.0)
    canvas.paint(column, DISC, organ=Organ.MUSCLE)
    canvas.paint(skeleton.arches(), 0.75 * CORTICAL_BONE, organ=Organ.BONE)
    bodies = skeleton.VertebralBodies(body.fracture)
    canvas.paint_layers(bodies, ((0.0, 0.75 * CORTICAL_BONE, Organ.BONE), (-2.6, SPONGY_BONE, Organ.BONE)))
    canal = skeleton.along_spine(9.5, 7.5, 22.0, -330.0, 260.0)
    canvas.paint(canal, CORD, organ=Organ.SPINAL_CANAL)


def paint_lungs(painting: Painting) -> None:
    """Lungs with a gradient to the back, their vessels and the airways."""
    canvas, body = painting.canvas, painting.body
    rng = painting.rng(1)
    density = (
        LUNG + float(rng.uniform(-25.0, 25.0)) + np.float32(0.32) * canvas.y + np.float32(9.0) * wave(canvas.z / 37.0)
    )
    airways: list[Capsule] = [Capsule((0.0, 22.0, 300.0), (0.0, 22.0, 142.0), 8.5, 8.5)]
    for name, sign, organ in (("right", -1.0, Organ.LUNG_RIGHT), ("left", 1.0, Organ.LUNG_LEFT)):
        lung = body.lungs[name]
        canvas.paint(lung, density, organ=organ)
        hilum = (sign * 34.0, 14.0, 112.0)
        for vessel in branches.tree(rng, lung, hilum, 7.5, reach=6, targets=110):
            thin = min(1.0, (2.0 * vessel.end_radius / float(canvas.width_mm)) ** 1.5)
            canvas.paint(
                vessel,
                min(painting.tissue.vein, 90.0),
                organ=Organ.LUNG_VESSEL,
                strength=thin,
                only=(organ, Organ.LUNG_VESSEL),
            )
        airways.append(Capsule((0.0, 22.0, 142.0), (sign * 32.0, 20.0, 112.0), 7.0, 5.5))
        airways.append(Capsule((sign * 32.0, 20.0, 112.0), (sign * 48.0, 24.0, 80.0), 5.0, 3.5))
        airways.append(Capsule((sign * 32.0, 20.0, 112.0), (sign * 52.0, 14.0, 140.0), 4.0, 3.0))
    for airway in airways:
        canvas.paint_layers(airway, ((1.8, 20.0, None), (0.0, AIR, Organ.AIRWAY)))


def paint_heart(painting: Painting) -> None:
    """Heart with chambers, pericardial fat, and the great vessels of the chest."""
    canvas, heart, tissue = painting.canvas, painting.body.heart, painting.tissue
    cx, cy, cz = heart.center
    rx, ry, rz = heart.radii
    canvas.paint(Grown(heart, 3.0), FAT + 10.0, organ=Organ.VISCERAL_FAT)
    canvas.paint(heart, tissue.myocardium, organ=Organ.HEART)
    chambers = (
        Ellipsoid((cx + 0.36 * rx, cy + 0.1 * ry, cz - 0.18 * rz), (0.42 * rx, 0.52 * ry, 0.55 * rz)),  # left ventricle
        Ellipsoid((cx - 0.05 * rx, cy - 0.5 * ry, cz - 0.2 * rz), (0.5 * rx, 0.36 * ry, 0.55 * rz)),  # right ventricle
        Ellipsoid((cx - 0.62 * rx, cy - 0.05 * ry, cz + 0.12 * rz), (0.3 * rx, 0.42 * ry, 0.5 * rz)),  # right atrium
        Ellipsoid((cx - 0.02 * rx, cy + 0.55 * ry, cz + 0.3 * rz), (0.48 * rx, 0.34 * ry, 0.36 * rz)),  # left atrium
    )
    for chamber in chambers:
        canvas.paint(chamber, tissue.cardiac_blood, organ=Organ.HEART, only=(Organ.HEART,))
    top = cz + 0.8 * rz
    trunk = [
        Capsule((cx - 0.1 * rx + 16.0, -34.0, top - 12.0), (10.0, -10.0, 128.0), 14.0, 12.0),
        Capsule((10.0, -10.0, 128.0), (-36.0, 8.0, 118.0), 11.0, 8.0),
        Capsule((10.0, -8.0, 128.0), (38.0, 16.0, 124.0), 11.0, 8.0),
    ]
    for vessel in trunk:
        canvas.paint(vessel, tissue.cardiac_blood, organ=Organ.VEIN)
    cava = ((-34.0, -14.0, 96.0, 9.0), (-32.0, -12.0, 170.0, 8.5), (-46.0, -8.0, 215.0, 7.0))
    arms = ((-32.0, -14.0, 172.0, 7.0), (40.0, -18.0, 204.0, 6.0))
    lower = (
        (-24.0, 6.0, 14.0, 11.0),
        (-24.0, 22.0, -60.0, 12.0),
        (-18.0, 20.0, -150.0, 11.0),
        (-14.0, 24.0, -228.0, 10.0),
    )
    legs = [
        ((-14.0, 24.0, -228.0, 9.0), (s * 48.0, 32.0, -300.0, 7.5), (s * 62.0, -24.0, -400.0, 7.5)) for s in (-1.0, 1.0)
    ]
    for vein in (cava, arms, lower, *legs):
        for part in course(vein):
            canvas.paint(part, tissue.vein, organ=Organ.VEIN)
    canvas.paint(
        Union(
            (
                Capsule((4.0, 32.0, 250.0), (8.0, 34.0, 20.0), 6.5, 7.0),
                Capsule((8.0, 34.0, 20.0), (30.0, 2.0, -25.0), 7.0, 9.0),
            )
        ),
        tissue.bowel_wall - 10.0,
        organ=Organ.ESOPHAGUS,
    )


def paint_aorta(painting: Painting) -> None:
    """Aorta, its arch branches and the pelvic arteries."""
    canvas, tissue = painting.canvas, painting.tissue
    parts = course(AORTA)
    for sign in (-1.0, 1.0):
        parts += course(((6.0, 18.0, -225.0, 6.5), (sign * 40.0, 26.0, -290.0, 5.5), (sign * 68.0, -34.0, -405.0, 5.0)))
        parts.append(Capsule((10.0, 20.0, -112.0), (sign * 44.0, 46.0, -132.0), 3.4, 2.8))
    parts += course(((-14.0, -12.0, 155.0, 6.0), (-30.0, -2.0, 205.0, 5.0), (-34.0, 0.0, 260.0, 4.0)))
    parts += course(((12.0, 14.0, 160.0, 5.0), (28.0, 10.0, 205.0, 4.5), (30.0, 8.0, 260.0, 4.0)))
    parts += course(((9.0, 10.0, -95.0, 4.0), (6.0, -12.0, -140.0, 4.0), (2.0, -24.0, -240.0, 3.0)))
    for part in parts:
        canvas.paint(part, tissue.aorta, organ=Organ.AORTA)


def paint_upper_abdomen(painting: Painting, liver_hu: float) -> None:
    """Liver with vessels, gallbladder, spleen, stomach, pancreas and kidneys."""
    canvas, body, tissue = painting.canvas, painting.body, painting.tissue
    rng = painting.rng(2)
    food = float(rng.uniform(8.0, 60.0))
    canvas.paint_layers(body.stomach, ((0.0, tissue.bowel_wall, Organ.STOMACH), (-4.0, food, Organ.STOMACH)))
    level = body.stomach.center[1] - float(rng.uniform(4.0, 24.0))
    canvas.paint(Intersection((Grown(body.stomach, -4.0), Slab(1, -200.0, level))), AIR + 20.0, organ=Organ.STOMACH)
    canvas.paint(body.liver, liver_hu, organ=Organ.LIVER)
    contrast = tissue.hepatic_vessel - tissue.liver
    for root, radius in (((-22.0, -2.0, -72.0), 6.0), ((-22.0, 8.0, -22.0), 5.0)):
        for vessel in branches.tree(rng, body.liver, root, radius, reach=4, targets=22):
            thin = min(1.0, 2.0 * vessel.end_radius / float(canvas.width_mm))
            canvas.paint(vessel, liver_hu + contrast, strength=thin, only=(Organ.LIVER,))
    canvas.paint(body.spleen, tissue.spleen, organ=Organ.SPLEEN)
    canvas.paint(body.pancreas, tissue.pancreas, organ=Organ.PANCREAS)
    splenic = course(((-20.0, 2.0, -104.0, 5.0), (30.0, 12.0, -102.0, 4.5), (76.0, 30.0, -78.0, 4.0)))
    portal = course(
        ((-16.0, 2.0, -112.0, 6.5), (-30.0, 0.0, -72.0, 6.5), (-14.0, -4.0, -112.0, 5.0), (-6.0, -24.0, -220.0, 4.0))
    )
    for part in (*splenic, *portal[:1], *portal[2:]):
        canvas.paint(part, tissue.hepatic_vessel, organ=Organ.VEIN)
    canvas.paint(body.gallbladder, BILE, organ=Organ.GALLBLADDER)
    for name, organ in (("right", Organ.KIDNEY_RIGHT), ("left", Organ.KIDNEY_LEFT)):
        kidney = body.kidneys[name]
        canvas.paint(
            Grown(kidney, 7.0), FAT, organ=Organ.VISCERAL_FAT, only=(Organ.LIVER, Organ.VISCERAL_FAT, Organ.MUSCLE)
        )
        canvas.paint_layers(kidney, ((0.0, tissue.renal_cortex, organ), (-7.0, tissue.renal_medulla, organ)))
        canvas.paint(renal_sinus(kidney), FAT + 30.0, organ=organ)


def renal_sinus(kidney: Ellipsoid) -> Ellipsoid:
    """Fat and collecting system in the middle of a kidney, open towards the spine."""
    x, y, z = kidney.center
    inward = -1.0 if x > 0 else 1.0
    return Ellipsoid((x + inward * 10.0, y - 4.0, z), (15.0, 9.0, 0.5 * kidney.radii[2]), lean=kidney.lean)


def paint_bowel(painting: Painting) -> None:
    """Colon with gas and stool, small bowel, duodenum."""
    canvas, tissue = painting.canvas, painting.tissue
    rng = painting.rng(3)
    inside = (Organ.VISCERAL_FAT, Organ.COLON, Organ.SMALL_BOWEL)
    coils = [
        tube
        for top in (-150.0, -190.0, -230.0, -270.0, -310.0)
        for tube in branches.loops(rng, (-84.0, -62.0, top - 40.0), (84.0, 6.0, top), 16, 12.0)
    ]
    for tube in coils:
        filling = AIR + 60.0 if rng.random() < 0.1 else float(rng.uniform(5.0, 45.0))
        canvas.paint_layers(tube, ((0.0, tissue.bowel_wall, Organ.SMALL_BOWEL), (-3.0, filling, None)), only=inside)
    duodenum = course(
        ((-44.0, -14.0, -118.0, 11.0), (-48.0, 6.0, -165.0, 11.0), (0.0, 2.0, -172.0, 10.0), (34.0, -6.0, -150.0, 10.0))
    )
    for part in duodenum:
        canvas.paint(part, tissue.bowel_wall - 15.0, organ=Organ.SMALL_BOWEL, only=inside)
    mixed = np.float32(10.0) + np.float32(40.0) * wave(canvas.z / 17.0 + canvas.x / 31.0) * wave(
        canvas.x / 13.0 + canvas.y / 19.0
    )
    for start, end in pairwise(COLON):
        radius = float(rng.uniform(15.0, 21.0))
        tube = Capsule(start, end, radius, radius)
        canvas.paint_layers(tube, ((0.0, tissue.bowel_wall, Organ.COLON), (-3.0, mixed, None)), only=inside)
        if rng.random() < 0.6:
            front = Slab(1, -300.0, 0.5 * (start[1] + end[1]) - float(rng.uniform(-4.0, 8.0)))
            canvas.paint(Intersection((Grown(tube, -3.5), front)), AIR + 50.0, only=(Organ.COLON,))


def paint_pelvis(painting: Painting) -> None:
    """Bladder and the organs behind and below it."""
    canvas, tissue = painting.canvas, painting.tissue
    if painting.habitus.male:
        organs: tuple[Shape, ...] = (
            Ellipsoid((0.0, 2.0, -428.0), (23.0, 18.0, 18.0)),
            Ellipsoid((0.0, 24.0, -404.0), (32.0, 8.0, 9.0)),
        )
    else:
        organs = (
            Ellipsoid((0.0, 18.0, -372.0), (26.0, 22.0, 30.0)),
            Ellipsoid((38.0, 16.0, -360.0), (14.0, 11.0, 13.0)),
        )
    for organ in organs:
        canvas.paint(organ, tissue.muscle + 8.0, organ=Organ.PELVIC_ORGANS)
    layers = ((0.0, tissue.bowel_wall - 10.0, Organ.BLADDER), (-3.0, URINE, Organ.BLADDER))
    canvas.paint_layers(painting.body.bladder, layers)


def paint_anatomy(painting: Painting, liver_hu: float) -> None:
    """All organs, in the order in which they cover each other."""
    paint_wall(painting)
    paint_pelvis(painting)
    paint_bowel(painting)
    paint_upper_abdomen(painting, liver_hu)
    paint_lungs(painting)
    paint_bones(painting)
    paint_heart(painting)
    paint_aorta(painting)
