"""The voxel grid that solids are painted on, and its coordinates in the reference body."""

from dataclasses import dataclass
from itertools import product
from math import ceil, floor

import numpy as np
from numpy.typing import NDArray

from training.phantoms.shapes import Bounds, Field, Grown, Point, Shape, wave


@dataclass(frozen=True)
class Grid:
    """A regular axial grid in patient space (LPS, mm)."""

    slices: int
    rows: int
    columns: int
    slice_mm: float
    pixel_mm: float
    origin: Point
    """Center of the first voxel of slice 0: (x, y, z)."""
    first_slice: int = 0
    """Number of the first slice that is on the grid; a part of a scan has the very coordinates of the whole."""

    @property
    def affine(self) -> NDArray[np.float64]:
        """4x4 from (slice, row, column, 1) to RAS millimetres."""
        x, y, z = self.origin
        return np.array(
            [
                [0.0, 0.0, -self.pixel_mm, -x],
                [0.0, -self.pixel_mm, 0.0, -y],
                [self.slice_mm, 0.0, 0.0, z],
                [0.0, 0.0, 0.0, 1.0],
            ]
        )


@dataclass(frozen=True)
class Build:
    """How one body differs from the reference: size, a small turn, and a smooth warp."""

    scale: Point
    """Patient mm per reference mm along x, y, z."""
    yaw: float
    """Turn about the long axis, as mm of y per mm of x."""
    tilt: float
    """Lean of the long axis to the side, as mm of x per mm of z."""
    warp_mm: float
    phase: Point

    def place(self, point: Point) -> Point:
        """Reference point to patient LPS, without the warp (which moves a point by a few mm).

        >>> Build((1.0, 1.0, 2.0), 0.0, 0.0, 0.0, (0.0, 0.0, 0.0)).place((1.0, 2.0, 3.0))
        (1.0, 2.0, 6.0)
        """
        x, y, z = (value * size for value, size in zip(point, self.scale, strict=True))
        # The inverse of `coordinates` to first order of the two small angles.
        return x - self.yaw * y + self.tilt * z, y + self.yaw * x, z

    def coordinates(self, grid: Grid) -> tuple[Field, Field, Field]:
        """Reference coordinates of every voxel, float32 arrays (slices, rows, columns)."""
        z = (grid.origin[2] + grid.slice_mm * (grid.first_slice + np.arange(grid.slices))).astype(np.float32)[
            :, None, None
        ]
        y = (grid.origin[1] + grid.pixel_mm * np.arange(grid.rows)).astype(np.float32)[None, :, None]
        x = (grid.origin[0] + grid.pixel_mm * np.arange(grid.columns)).astype(np.float32)[None, None, :]
        bend = np.float32(self.warp_mm)
        p, q, r = (np.float32(value) for value in self.phase)
        one = np.float32(1.0)
        xs = (x + np.float32(self.yaw) * y - np.float32(self.tilt) * z) / np.float32(self.scale[0])
        ys = (y - np.float32(self.yaw) * x) / np.float32(self.scale[1])
        zs = z / np.float32(self.scale[2])
        x_out = xs + bend * (wave(zs / np.float32(310.0) + p) + wave(ys / np.float32(270.0) + q))
        y_out = ys + bend * (wave(zs / np.float32(350.0) + q) + wave(x / np.float32(290.0) + r))
        z_out = zs + bend * (wave(x / np.float32(330.0) + p) + wave(y / np.float32(280.0) + r)) * one
        shape = (grid.slices, grid.rows, grid.columns)
        return (
            np.ascontiguousarray(np.broadcast_to(x_out, shape)),
            np.ascontiguousarray(np.broadcast_to(y_out, shape)),
            np.ascontiguousarray(np.broadcast_to(z_out, shape)),
        )


class Canvas:
    """Hounsfield values and labels of one phantom while it is painted, soft-edged by one voxel."""

    def __init__(self, grid: Grid, build: Build) -> None:
        self.grid = grid
        self.build = build
        self.x, self.y, self.z = build.coordinates(grid)
        shape = self.x.shape
        self.hu = np.full(shape, -1000.0, dtype=np.float32)
        self.organs = np.zeros(shape, dtype=np.uint8)
        self.findings = np.zeros(shape, dtype=np.uint8)
        self.width_mm = np.float32((2.0 * grid.pixel_mm + grid.slice_mm) / 3.0)

    def window(self, bounds: Bounds) -> tuple[slice, slice, slice]:
        """Index ranges that hold a box of the reference body; empty where the grid does not reach it."""
        # The warp moves a point by at most twice its size along each axis; the edge is one voxel wide.
        slack = 2.2 * self.build.warp_mm + 0.6 * float(self.width_mm) + 2.0
        corners = [self.build.place((x, y, z)) for x, y, z in product(*zip(*bounds, strict=True))]
        starts = [min(corner[axis] for corner in corners) - slack for axis in range(3)]
        stops = [max(corner[axis] for corner in corners) + slack for axis in range(3)]
        steps = (self.grid.pixel_mm, self.grid.pixel_mm, self.grid.slice_mm)
        counts = (self.grid.columns, self.grid.rows, self.grid.slices)
        skipped = (0, 0, self.grid.first_slice)
        ranges = []
        for axis in range(3):
            first = floor((starts[axis] - self.grid.origin[axis]) / steps[axis]) - skipped[axis]
            last = ceil((stops[axis] - self.grid.origin[axis]) / steps[axis]) + 1 - skipped[axis]
            ranges.append(slice(min(max(first, 0), counts[axis]), min(max(last, 0), counts[axis])))
        return ranges[2], ranges[1], ranges[0]

    def paint(
        self,
        shape: Shape,
        hu: "float | Field",
        *,
        organ: int | None = None,
        finding: int | None = None,
        strength: float = 1.0,
        only: tuple[int, ...] | None = None,
    ) -> int:
        """Fill a solid with a value (or a field over the canvas); returns how many voxels are more than half inside.

        `strength` below 1 stands for a solid thinner than a voxel. `only` keeps the paint to voxels of those organs.
        """
        return self.paint_layers(shape, ((0.0, hu, organ),), finding=finding, strength=strength, only=only)

    def paint_layers(
        self,
        shape: Shape,
        layers: tuple[tuple[float, "float | Field", int | None], ...],
        *,
        finding: int | None = None,
        strength: float = 1.0,
        only: tuple[int, ...] | None = None,
    ) -> int:
        """Fill a solid from the outside inwards with layers (margin mm, value, organ); the distance is computed once.

        A margin widens the solid, a negative one shrinks it. Returns how many voxels are in the last layer.
        """
        where = self.window(Grown(shape, max(margin for margin, _, _ in layers)).bounds)
        patch = self.hu[where]
        if patch.size == 0:
            return 0
        distance = shape.distance(self.x[where], self.y[where], self.z[where])
        distance /= -self.width_mm
        organs = self.organs[where]
        allowed: Field | None = None
        if only is not None:
            listed = np.zeros(256, dtype=np.float32)
            listed[list(only)] = strength
            allowed = listed[organs]
        elif strength != 1.0:
            allowed = np.array(strength, dtype=np.float32)
        inside = None
        for margin, hu, organ in layers:
            share = distance + np.float32(0.5 + margin / float(self.width_mm))
            np.clip(share, 0.0, 1.0, out=share)
            if allowed is not None:
                share *= allowed
            value = np.float32(hu) if isinstance(hu, int | float) else hu[where]
            inside = share > 0.5
            share *= value - patch
            patch += share
            if organ is not None:
                organs[inside] = organ
        if inside is None:
            return 0
        if finding is not None:
            self.findings[where][inside] = finding
        return int(np.count_nonzero(inside))
