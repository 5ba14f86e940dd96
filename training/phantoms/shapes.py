"""Solids described by their signed distance, in millimetres of the reference body.

Coordinates are DICOM's patient axes: x to the patient's left, y to the back, z to the head. Every distance is built from
operations that IEEE 754 rounds exactly (+, -, x, /, sqrt, floor, comparisons), so a voxel has the same value on any machine;
that is why waves here are parabolas and not `np.sin`, whose last bit depends on the processor.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Field = NDArray[Any]
"""Floating-point array of any shape that broadcasts with its fellows."""
Point = tuple[float, float, float]
Bounds = tuple[Point, Point]
"""Lowest and highest corner of a box that holds the solid, mm."""


class Shape(Protocol):
    """A solid: negative distance inside, positive outside, mm."""

    @property
    def bounds(self) -> Bounds:
        """Box that holds the solid."""

    def distance(self, x: Field, y: Field, z: Field) -> Field:
        """Approximate signed distance to the surface, exact in sign."""


def wave(phase: Field) -> Field:
    """Sine of 2*pi*phase within 6 %, by exactly rounded operations.

    >>> wave(np.array([0.0, 0.25, 1.0, 1.75])).tolist()
    [0.0, 1.0, 0.0, -1.0]
    """
    turn = phase - np.floor(phase + 0.5)
    return 16.0 * turn * (0.5 - np.abs(turn))


def distance_at(shape: Shape, point: Point) -> float:
    """Distance of one point, mm."""
    x, y, z = (np.array([value]) for value in point)
    return float(shape.distance(x, y, z)[0])


def around(center: Point, radii: Point) -> Bounds:
    """Box of the given half-widths about a center."""
    return (
        (center[0] - radii[0], center[1] - radii[1], center[2] - radii[2]),
        (center[0] + radii[0], center[1] + radii[1], center[2] + radii[2]),
    )


def enclosing(*boxes: Bounds) -> Bounds:
    """Smallest box that holds all of them."""
    lows = tuple(min(box[0][axis] for box in boxes) for axis in range(3))
    highs = tuple(max(box[1][axis] for box in boxes) for axis in range(3))
    return (lows[0], lows[1], lows[2]), (highs[0], highs[1], highs[2])


@dataclass(frozen=True)
class Ellipsoid:
    """Ellipsoid with axes along the body's; `lean` shifts x (mm per mm of height), as kidneys and spleen lean."""

    center: Point
    radii: Point
    lean: float = 0.0

    @property
    def bounds(self) -> Bounds:
        """Box that holds the solid."""
        extra = abs(self.lean) * self.radii[2]
        return around(self.center, (self.radii[0] + extra, self.radii[1], self.radii[2]))

    def distance(self, x: Field, y: Field, z: Field) -> Field:
        """Distance by |p/r| (|p/r| - 1) / |p/r²|, exact on the surface."""
        dz = z - self.center[2]
        dx = x - self.center[0] - self.lean * dz
        dy = y - self.center[1]
        rx, ry, rz = self.radii
        u, v, w = dx / rx, dy / ry, dz / rz
        nearness = np.sqrt(u * u + v * v + w * w)
        gradient = np.sqrt((u / rx) * (u / rx) + (v / ry) * (v / ry) + (w / rz) * (w / rz))
        return nearness * (nearness - 1.0) / np.maximum(gradient, 1e-6)


@dataclass(frozen=True)
class Capsule:
    """Rounded cylinder from one point to another whose radius changes evenly."""

    start: Point
    end: Point
    start_radius: float
    end_radius: float

    @property
    def bounds(self) -> Bounds:
        """Box that holds the solid."""
        a, b = self.start_radius, self.end_radius
        return enclosing(around(self.start, (a, a, a)), around(self.end, (b, b, b)))

    def distance(self, x: Field, y: Field, z: Field) -> Field:
        """Distance to the axis less the radius there."""
        ax, ay, az = self.start
        bx, by, bz = self.end[0] - ax, self.end[1] - ay, self.end[2] - az
        px, py, pz = x - ax, y - ay, z - az
        length2 = max(bx * bx + by * by + bz * bz, 1e-6)
        along = np.clip((px * bx + py * by + pz * bz) / length2, 0.0, 1.0)
        dx, dy, dz = px - along * bx, py - along * by, pz - along * bz
        radius = self.start_radius + along * (self.end_radius - self.start_radius)
        return np.sqrt(dx * dx + dy * dy + dz * dz) - radius


@dataclass(frozen=True)
class Prism:
    """Solid whose axial section is a superellipse that changes with height, given by (z, half-width, half-depth, x, y)."""

    profile: tuple[tuple[float, float, float, float, float], ...]
    squareness: float = 0.0
    """0 is an ellipse, towards 1.5 the section gets corners."""
    capped: bool = True
    """False lets the solid go on beyond its first and last section."""

    @property
    def bounds(self) -> Bounds:
        """Box that holds the solid."""
        boxes = [around((x, y, z), (a, b, 0.0)) for z, a, b, x, y in self.profile]
        box = enclosing(*boxes)
        if self.capped:
            return box
        return (box[0][0], box[0][1], -1e4), (box[1][0], box[1][1], 1e4)

    def distance(self, x: Field, y: Field, z: Field) -> Field:
        """Distance along the ray from the section's middle, which is exact in sign."""
        heights = np.array([section[0] for section in self.profile])
        # A table of half millimetres is read many times faster than np.interp interpolates a whole volume.
        table = np.arange(heights.min(), heights.max() + 1.0, 0.5)
        step = ((z - np.float32(table[0])) * np.float32(2.0)).astype(np.int32)
        np.clip(step, 0, len(table) - 1, out=step)

        def at(column: int) -> Field:
            values = [section[column] for section in self.profile]
            if values.count(values[0]) == len(values):
                return np.array(values[0], dtype=z.dtype)
            return np.asarray(np.interp(table, heights, values).astype(z.dtype)[step])

        dx, dy = x - at(3), y - at(4)
        u, v = dx / at(1), dy / at(2)
        u *= u
        v *= v
        nearness = u * v
        nearness *= -self.squareness
        u += v
        u *= u
        nearness += u  # u² + v² + (2 - squareness) u v
        np.sqrt(nearness, out=nearness)
        np.sqrt(nearness, out=nearness)
        dx *= dx
        dy *= dy
        dx = dx + dy
        np.sqrt(dx, out=dx)
        section = dx - dx / np.maximum(nearness, 0.05)
        if not self.capped:
            return section
        return np.maximum(section, np.maximum(z - float(heights.max()), float(heights.min()) - z))


@dataclass(frozen=True)
class Union:
    """All that is in any part."""

    parts: tuple[Shape, ...]

    @property
    def bounds(self) -> Bounds:
        """Box that holds the solid."""
        return enclosing(*(part.bounds for part in self.parts))

    def distance(self, x: Field, y: Field, z: Field) -> Field:
        """Smallest distance to a part."""
        nearest = self.parts[0].distance(x, y, z)
        for part in self.parts[1:]:
            nearest = np.minimum(nearest, part.distance(x, y, z))
        return nearest


@dataclass(frozen=True)
class Intersection:
    """What is in every part."""

    parts: tuple[Shape, ...]

    @property
    def bounds(self) -> Bounds:
        """Box that holds the solid."""
        lows = tuple(max(part.bounds[0][axis] for part in self.parts) for axis in range(3))
        highs = tuple(min(part.bounds[1][axis] for part in self.parts) for axis in range(3))
        return (lows[0], lows[1], lows[2]), (highs[0], highs[1], highs[2])

    def distance(self, x: Field, y: Field, z: Field) -> Field:
        """Largest distance to a part."""
        farthest = self.parts[0].distance(x, y, z)
        for part in self.parts[1:]:
            farthest = np.maximum(farthest, part.distance(x, y, z))
        return farthest


@dataclass(frozen=True)
class Difference:
    """A solid with others, widened by `gap_mm`, taken away."""

    solid: Shape
    holes: tuple[Shape, ...]
    gap_mm: float = 0.0

    @property
    def bounds(self) -> Bounds:
        """Box that holds the solid."""
        return self.solid.bounds

    def distance(self, x: Field, y: Field, z: Field) -> Field:
        """Distance to the solid, or out of the nearest hole."""
        farthest = self.solid.distance(x, y, z)
        for hole in self.holes:
            farthest = np.maximum(farthest, self.gap_mm - hole.distance(x, y, z))
        return farthest


@dataclass(frozen=True)
class Grown:
    """A solid widened (or, with a negative margin, shrunk) evenly."""

    solid: Shape
    margin_mm: float

    @property
    def bounds(self) -> Bounds:
        """Box that holds the solid."""
        low, high = self.solid.bounds
        m = max(self.margin_mm, 0.0)
        return (low[0] - m, low[1] - m, low[2] - m), (high[0] + m, high[1] + m, high[2] + m)

    def distance(self, x: Field, y: Field, z: Field) -> Field:
        """Distance less the margin."""
        return self.solid.distance(x, y, z) - self.margin_mm


@dataclass(frozen=True)
class Lobulated:
    """A solid with a surface of smooth bumps, so that no lesion is a perfect ball."""

    solid: Shape
    bump_mm: float
    wavelength_mm: float
    phase: Point

    @property
    def bounds(self) -> Bounds:
        """Box that holds the solid."""
        return Grown(self.solid, 2.0 * self.bump_mm).bounds

    def distance(self, x: Field, y: Field, z: Field) -> Field:
        """Distance moved by up to 1.5 times the bump."""
        k = 1.0 / self.wavelength_mm
        px, py, pz = self.phase
        bumps = wave(x * k + px) * wave((y + 0.4 * z) * k + py) + wave((y - 0.5 * x) * k + pz) * wave(z * k + px)
        fine = wave(x * (2.3 * k) + y * (0.7 * k) + pz) * wave(z * (2.3 * k) - y * (1.1 * k) + py)
        return self.solid.distance(x, y, z) + self.bump_mm * (0.6 * bumps + 0.4 * fine)


@dataclass(frozen=True)
class Slab:
    """What lies within limits of one axis (0 x, 1 y, 2 z)."""

    axis: int
    low: float
    high: float

    @property
    def bounds(self) -> Bounds:
        """Box that holds the solid."""
        low, high = [-1e4] * 3, [1e4] * 3
        low[self.axis], high[self.axis] = self.low, self.high
        return (low[0], low[1], low[2]), (high[0], high[1], high[2])

    def distance(self, x: Field, y: Field, z: Field) -> Field:
        """Distance to the nearer face; broadcast to the full shape."""
        along = (x, y, z)[self.axis]
        return np.maximum(self.low - along, along - self.high)


@dataclass(frozen=True)
class HalfSpace:
    """What lies behind the plane nx x + ny y + nz z = offset, seen along the normal (which need not have length 1)."""

    normal: Point
    offset: float

    @property
    def bounds(self) -> Bounds:
        """All space."""
        return (-1e4, -1e4, -1e4), (1e4, 1e4, 1e4)

    def distance(self, x: Field, y: Field, z: Field) -> Field:
        """Height over the plane."""
        nx, ny, nz = self.normal
        return nx * x + ny * y + nz * z - self.offset


@dataclass(frozen=True)
class Diaphragm:
    """All that is below the two domes: (x, y, z of the top) each, falling off as a paraboloid of `reach_mm`."""

    domes: tuple[Point, ...]
    reach_mm: float = 92.0
    fall_mm: float = 62.0

    @property
    def bounds(self) -> Bounds:
        """Box that holds the solid."""
        return (-1e4, -1e4, -1e4), (1e4, 1e4, max(dome[2] for dome in self.domes))

    def height(self, x: Field, y: Field) -> Field:
        """Height of the surface over a place, mm."""
        surface = None
        for dome_x, dome_y, top in self.domes:
            u, v = (x - dome_x) / self.reach_mm, (y - dome_y) / self.reach_mm
            # The front of the diaphragm is attached higher than the back: the fall forwards is half.
            v = np.where(v < 0.0, v * 0.7, v)
            dome = top - self.fall_mm * (u * u + v * v)
            surface = dome if surface is None else np.maximum(surface, dome)
        if surface is None:
            raise ValueError("a diaphragm needs at least one dome")
        return surface

    def distance(self, x: Field, y: Field, z: Field) -> Field:
        """Height over the surface, shortened because the surface slopes."""
        return 0.8 * (z - self.height(x, y))
