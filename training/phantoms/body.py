"""The reference body as solids in millimetres, varied by habitus and by the findings that change an organ's size.

Heights count from the top of the right dome of the diaphragm. Sizes are of an adult of middle height; `Build` scales them.
"""

from dataclasses import dataclass

from training.phantoms.canvas import Build
from training.phantoms.shapes import (
    Capsule,
    Diaphragm,
    Difference,
    Ellipsoid,
    Grown,
    Intersection,
    Prism,
    Shape,
    Slab,
    Union,
)
from training.phantoms.skeleton import Fracture, along_spine, spine_y

NORMAL_SPLEEN_MM = 98.0
"""Craniocaudal length of the reference body's spleen: the middle of the normal range."""

CAVITY = (
    (-450.0, 55.0, 45.0, 0.0, 8.0),
    (-390.0, 78.0, 66.0, 0.0, 6.0),
    (-330.0, 104.0, 72.0, 0.0, 0.0),
    (-260.0, 116.0, 74.0, 0.0, -8.0),
    (-180.0, 121.0, 80.0, 0.0, -6.0),
    (-100.0, 126.0, 88.0, 0.0, 0.0),
    (-40.0, 131.0, 92.0, 0.0, 4.0),
    (20.0, 130.0, 91.0, 0.0, 4.0),
    (80.0, 124.0, 86.0, 0.0, 5.0),
    (130.0, 112.0, 77.0, 0.0, 10.0),
    (175.0, 92.0, 62.0, 0.0, 16.0),
    (210.0, 66.0, 46.0, 0.0, 22.0),
    (236.0, 30.0, 24.0, 0.0, 28.0),
    (246.0, 6.0, 6.0, 0.0, 30.0),
)
"""Inside of the chest and abdominal wall: (z, half-width, half-depth, x, y)."""

TRUNK = (
    (-480.0, 176.0, 100.0, 0.0, 10.0),
    (-400.0, 176.0, 106.0, 0.0, 10.0),
    (-320.0, 158.0, 102.0, 0.0, 8.0),
    (-230.0, 139.0, 100.0, 0.0, 4.0),
    (-140.0, 138.0, 104.0, 0.0, 2.0),
    (-40.0, 146.0, 109.0, 0.0, 4.0),
    (60.0, 150.0, 108.0, 0.0, 3.0),
    (130.0, 156.0, 104.0, 0.0, 8.0),
    (185.0, 172.0, 92.0, 0.0, 14.0),
    (222.0, 160.0, 78.0, 0.0, 20.0),
    (262.0, 72.0, 62.0, 0.0, 24.0),
    (320.0, 60.0, 60.0, 0.0, 22.0),
)
"""Outside of the muscles, without the fat under the skin."""


@dataclass(frozen=True)
class Habitus:
    """What makes one body differ from another before any disease."""

    build: Build
    male: bool
    fat_mm: float
    """Thickness of the fat under the skin at the side."""
    visceral: float
    """Fullness of the abdominal cavity, 1 is middle."""
    heart_mm: float
    spleen_mm: float
    dome_mm: float
    """How much higher than the left the right dome stands."""
    kidney_mm: float
    """Length of the kidneys."""
    bladder: float
    """Filling of the bladder, 1 is middle."""


@dataclass(frozen=True)
class Body:
    """Solids of one body; the painter draws them and lesions are placed in them."""

    trunk: Prism
    """Outside of the muscles; the skin lies `habitus.fat_mm` farther out."""
    cavity: Prism
    diaphragm: Diaphragm
    lungs: dict[str, Shape]
    kidneys: dict[str, Ellipsoid]
    heart: Ellipsoid
    liver: Shape
    spleen: Shape
    stomach: Ellipsoid
    gallbladder: Ellipsoid
    pancreas: Shape
    bladder: Ellipsoid
    fracture: Fracture | None


@dataclass(frozen=True)
class Changes:
    """Sizes that findings change, in millimetres of the reference body; None leaves the habitus's own."""

    heart_mm: float | None = None
    spleen_mm: float | None = None
    fracture: Fracture | None = None


def _heart(width_mm: float, dome_z: float) -> Ellipsoid:
    # A larger heart grows to the left and downwards onto the diaphragm, hardly to the right.
    half = 0.5 * width_mm
    return Ellipsoid(
        (-38.0 + half, -36.0, dome_z + 0.82 * half - 4.0), (half, min(0.74 * half, 56.0), 0.82 * half), lean=-0.12
    )


def _liver(cavity: Prism, diaphragm: Diaphragm) -> Shape:
    right = Ellipsoid((-74.0, 4.0, -72.0), (76.0, 84.0, 92.0), lean=0.1)
    left = Ellipsoid((6.0, -46.0, -46.0), (72.0, 38.0, 42.0), lean=0.2)
    under = Grown(diaphragm, -3.0)
    wall = Grown(cavity, -2.0)
    inside = Intersection((Union((right, left)), wall, under))
    hilum = Ellipsoid((-12.0, 22.0, -75.0), (34.0, 40.0, 46.0))
    kidney_bed = Ellipsoid((-58.0, 52.0, -142.0), (38.0, 38.0, 60.0), lean=0.12)
    return Difference(inside, (hilum, kidney_bed))


def _spleen(length_mm: float, cavity: Prism, diaphragm: Diaphragm) -> Shape:
    half = 0.5 * length_mm
    swollen = length_mm / NORMAL_SPLEEN_MM
    # The top stays under the dome; a longer spleen reaches downwards and inwards.
    blob = Ellipsoid(
        (96.0 - 8.0 * (swollen - 1.0), 32.0, -12.0 - half), (27.0 * swollen**0.6, 46.0 * swollen**0.3, half), lean=0.1
    )
    return Intersection((blob, Grown(cavity, -3.0), Grown(diaphragm, -3.0)))


def _pancreas() -> Shape:
    course = (
        (-30.0, 0.0, -140.0),
        (-14.0, -12.0, -118.0),
        (14.0, -14.0, -108.0),
        (44.0, 0.0, -98.0),
        (74.0, 22.0, -84.0),
    )
    radii = (14.0, 11.0, 9.5, 10.5, 9.0)
    return Union(tuple(Capsule(course[n], course[n + 1], radii[n], radii[n + 1]) for n in range(len(course) - 1)))


NO_CHANGES = Changes()


def build_body(habitus: Habitus, changes: Changes = NO_CHANGES) -> Body:
    """Solids of a body of the given habitus with the given changes."""
    belly = habitus.visceral
    cavity = Prism(
        tuple((z, a * (belly if z < -60 else 1.0), b * (belly if z < -60 else 1.0), x, y) for z, a, b, x, y in CAVITY),
        squareness=0.35,
    )
    trunk = tuple(
        (z, a * (belly if z < -60 else 1.0), b * (belly if z < -60 else 1.0), x, y) for z, a, b, x, y in TRUNK
    )
    diaphragm = Diaphragm(((-64.0, -8.0, 0.0), (66.0, -6.0, -habitus.dome_mm)))
    heart = _heart(changes.heart_mm or habitus.heart_mm, -habitus.dome_mm)
    mediastinum = Prism(
        (
            (-120.0, 30.0, 66.0, 0.0, 22.0),
            (0.0, 27.0, 64.0, 0.0, 22.0),
            (90.0, 27.0, 64.0, 0.0, 18.0),
            (140.0, 31.0, 62.0, 0.0, 18.0),
            (200.0, 33.0, 44.0, 0.0, 20.0),
            (250.0, 26.0, 34.0, 0.0, 24.0),
        )
    )
    holes = (mediastinum, Grown(heart, 3.0), diaphragm, along_spine(27.0, 24.0, 6.0, -130.0, 260.0))
    lungs: dict[str, Shape] = {
        "right": Difference(Intersection((Slab(0, -200.0, -3.0), cavity, Slab(2, -95.0, 250.0))), holes),
        "left": Difference(Intersection((Slab(0, 3.0, 200.0), cavity, Slab(2, -95.0, 250.0))), holes),
    }
    length = 0.5 * habitus.kidney_mm
    kidneys = {
        "right": Ellipsoid((-61.0, spine_y(-140.0) + 6.0, -142.0), (27.0, 27.0, length), lean=0.16),
        "left": Ellipsoid((61.0, spine_y(-130.0) + 6.0, -130.0), (27.0, 27.0, length), lean=-0.16),
    }
    full = habitus.bladder
    return Body(
        trunk=Prism(trunk, squareness=0.8),
        cavity=cavity,
        diaphragm=diaphragm,
        lungs=lungs,
        kidneys=kidneys,
        heart=heart,
        liver=_liver(cavity, diaphragm),
        spleen=_spleen(changes.spleen_mm or habitus.spleen_mm, cavity, diaphragm),
        stomach=Ellipsoid((48.0, -30.0, -62.0), (38.0, 36.0, 52.0), lean=0.35),
        gallbladder=Ellipsoid((-46.0, -44.0, -124.0), (15.0, 17.0, 27.0), lean=0.2),
        pancreas=_pancreas(),
        bladder=Ellipsoid((0.0, -14.0, -392.0 + 8.0 * full), (38.0 * full, 32.0 * full, 27.0 * full)),
        fracture=changes.fracture,
    )
