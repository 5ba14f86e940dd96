"""Bones of the reference body as solids: ribs, spine, shoulder girdle, pelvis."""

from dataclasses import dataclass

import numpy as np

from training.phantoms.shapes import (
    Bounds,
    Capsule,
    Difference,
    Ellipsoid,
    Field,
    Intersection,
    Prism,
    Shape,
    Slab,
    Union,
)

LEVELS: dict[str, tuple[float, float]] = {
    **{f"T{number}": (216.0 - 24.6 * (number - 1), 19.0) for number in range(1, 13)},
    **{f"L{number}": (-55.0 - 33.0 * number, 25.0) for number in range(1, 6)},
}
"""Vertebra -> (height of its middle, height of its body), mm."""

SPINE_COURSE = (
    (-470.0, 92.0),
    (-360.0, 84.0),
    (-300.0, 66.0),
    (-250.0, 48.0),
    (-170.0, 40.0),
    (-90.0, 47.0),
    (0.0, 58.0),
    (100.0, 66.0),
    (180.0, 58.0),
    (240.0, 44.0),
)
"""(height, depth of the middle of the vertebral body), mm."""


def spine_y(height: float) -> float:
    """Depth of the vertebral body's middle at a height, mm."""
    heights, depths = zip(*SPINE_COURSE, strict=True)
    return float(np.interp(height, heights, depths))


def along_spine(half_width: float, half_depth: float, behind: float, low: float, high: float, x: float = 0.0) -> Prism:
    """A column that follows the spine, `behind` mm dorsal of the vertebral bodies."""
    heights = (low, *(z for z, _ in SPINE_COURSE if low < z < high), high)
    return Prism(tuple((z, half_width, half_depth, x, spine_y(z) + behind) for z in heights), squareness=0.4)


@dataclass(frozen=True)
class Fracture:
    """Wedge deformity of one vertebra: the share of its front height that is lost."""

    level: str
    loss: float


@dataclass(frozen=True)
class VertebralBodies:
    """Vertebral bodies T1 to L5 with the discs left out, one of them perhaps wedged."""

    fracture: Fracture | None = None
    shrink_mm: float = 0.0
    """Depth below the surface: the spongy inside of the bodies."""

    @property
    def bounds(self) -> Bounds:
        """Box that holds the solid."""
        return (-27.0, 20.0, -240.0), (27.0, 90.0, 232.0)

    def distance(self, x: Field, y: Field, z: Field) -> Field:
        """Distance to the nearest body."""
        heights, depths = (np.array(values) for values in zip(*SPINE_COURSE, strict=True))
        middle = np.interp(z, heights, depths).astype(z.dtype)
        radius = np.interp(z, np.array([-230.0, 220.0]), np.array([25.0, 14.0])).astype(z.dtype)
        u, v = x / radius, (y - middle) / (0.74 * radius)
        section = radius * (np.sqrt(u * u + v * v) - 1.0)
        forward = np.clip(0.5 - (y - middle) / (1.5 * radius), 0.0, 1.0)
        nearest = np.full(np.broadcast_shapes(x.shape, y.shape, z.shape), 1e3, dtype=z.dtype)
        for name, (center, height) in LEVELS.items():
            top = center + 0.5 * height
            if self.fracture is not None and self.fracture.level == name:
                top = top - self.fracture.loss * height * forward
            nearest = np.minimum(nearest, np.maximum(z - top, (center - 0.5 * height) - z))
        return np.maximum(section, nearest) + self.shrink_mm


@dataclass(frozen=True)
class Ribs:
    """Twelve pairs of ribs: oblique bands in a shell around the thoracic cavity, and the sternum."""

    cavity: Prism

    @property
    def bounds(self) -> Bounds:
        """Box that holds the solid."""
        return (-150.0, -115.0, -120.0), (150.0, 115.0, 232.0)

    def distance(self, x: Field, y: Field, z: Field) -> Field:
        """Distance to the nearest rib."""
        shell = np.abs(self.cavity.distance(x, y, z) - 5.0) - 3.6
        phase = z + 0.5 * (85.0 - y) + 0.22 * np.abs(x)
        first, spacing = LEVELS["T1"][0], 24.6
        offset = (first - phase) / spacing
        nearest = np.clip(np.floor(offset + 0.5), 0.0, 11.0)
        band = 0.85 * (spacing * np.abs(offset - nearest) - 5.8)
        margin = (-108.0 + 0.85 * np.maximum(55.0 - y, 0.0)) - z
        breast = np.maximum(np.abs(x) - 17.0, np.maximum(y + 40.0, np.abs(z - 95.0) - 78.0))
        return np.maximum(shell, np.minimum(np.maximum(band, margin), breast))


def arches() -> Shape:
    """Laminae, spinous and transverse processes of every vertebra."""
    parts: list[Shape] = []
    for name, (center, height) in LEVELS.items():
        y = spine_y(center)
        reach = 30.0 if name.startswith("L") else 26.0
        lean = 4.0 if name.startswith("L") else 16.0
        parts.append(Capsule((0.0, y + 34.0, center - 2.0), (0.0, y + 52.0, center - lean), 4.0, 3.0))
        for sign in (-1.0, 1.0):
            lamina = (sign * 13.0, y + 22.0, center)
            parts.append(Capsule((sign * 13.0, y + 10.0, center + 3.0), lamina, 5.0, 5.0))
            parts.append(Capsule(lamina, (0.0, y + 34.0, center - 2.0), 4.0, 4.0))
            parts.append(Capsule(lamina, (sign * reach, y + 25.0, center), 4.0, 3.0))
            facet = center - 0.55 * height
            parts.append(Capsule(lamina, (sign * 13.0, y + 24.0, facet), 4.0, 4.0))
    return Union(tuple(parts))


def shoulder_girdle() -> tuple[Shape, ...]:
    """Clavicles, shoulder blades and humeral heads."""
    bones: list[Shape] = []
    for sign in (-1.0, 1.0):
        bones.append(Capsule((sign * 16.0, -42.0, 196.0), (sign * 128.0, 5.0, 224.0), 6.5, 5.5))
        bones.append(Capsule((sign * 88.0, 96.0, 84.0), (sign * 128.0, 58.0, 200.0), 3.0, 6.5))
        bones.append(Capsule((sign * 98.0, 90.0, 92.0), (sign * 104.0, 86.0, 200.0), 3.5, 4.5))
        bones.append(Ellipsoid((sign * 155.0, 25.0, 212.0), (22.0, 22.0, 24.0)))
    return tuple(bones)


def pelvic_bones() -> tuple[Shape, ...]:
    """Iliac wings, sacrum, acetabula, pubis, ischia and femoral heads."""
    bones: list[Shape] = []
    sacrum = Prism(
        ((-385.0, 14.0, 7.0, 0.0, 92.0), (-320.0, 34.0, 15.0, 0.0, 82.0), (-250.0, 52.0, 24.0, 0.0, 62.0)),
        squareness=0.3,
    )
    bones.append(sacrum)
    wing = Ellipsoid((0.0, 12.0, -305.0), (128.0, 84.0, 112.0))
    inner = Ellipsoid((0.0, 12.0, -305.0), (118.0, 75.0, 112.0))
    for sign in (-1.0, 1.0):
        half = Slab(0, 40.0, 140.0) if sign > 0 else Slab(0, -140.0, -40.0)
        wing_part = Intersection((wing, half, Slab(1, -32.0, 90.0), Slab(2, -352.0, -212.0)))
        bones.append(Difference(wing_part, (inner,)))
        head = (sign * 90.0, 8.0, -392.0)
        cup = Intersection((Ellipsoid(head, (35.0, 35.0, 35.0)), Slab(2, -405.0, -345.0)))
        bones.append(Difference(cup, (Ellipsoid(head, (26.5, 26.5, 26.5)),)))
        bones.append(Ellipsoid(head, (23.5, 23.5, 23.5)))
        bones.append(Capsule((sign * 8.0, -42.0, -428.0), (sign * 66.0, -18.0, -398.0), 8.0, 9.0))
        bones.append(Capsule((sign * 74.0, 42.0, -395.0), (sign * 62.0, 55.0, -440.0), 12.0, 13.0))
        bones.append(Capsule(head, (sign * 140.0, 12.0, -425.0), 16.0, 20.0))
    return tuple(bones)
