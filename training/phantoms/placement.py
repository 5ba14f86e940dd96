"""Where a lesion may lie, and what a radiologist calls the place."""

from collections.abc import Callable, Iterable

import numpy as np

from training.phantoms.shapes import Point, Shape, distance_at
from training.phantoms.skeleton import LEVELS
from training.phantoms.vocabulary import Side

Placed = tuple[Point, float]
"""Middle and radius of a lesion that others must not touch, mm of the reference body."""


def lobe(point: Point, side: Side) -> str:
    """Lobe of the lung that holds a point, by the major fissure and, on the right, the minor one.

    >>> lobe((-70.0, 60.0, 20.0), Side.RIGHT), lobe((60.0, -40.0, 120.0), Side.LEFT)
    ('lower lobe', 'upper lobe')
    """
    _, y, z = point
    if z < -20.0 + 1.64 * (y + 50.0):
        return "lower lobe"
    return "middle lobe" if side is Side.RIGHT and z < 70.0 else "upper lobe"


def liver_segment(point: Point) -> str:
    """Couinaud's segment of a point, by the planes of the hepatic veins and of the portal vein.

    >>> liver_segment((-90.0, 30.0, -40.0)), liver_segment((30.0, -50.0, -60.0))
    ('segment VII', 'segment III')
    """
    x, y, z = point
    if x > 5.0:
        return "segment II" if z > -42.0 else "segment III"
    if x > -30.0:
        return "segment IV"
    if y < -4.0:
        return "segment VIII" if z > -66.0 else "segment V"
    return "segment VII" if z > -70.0 else "segment VI"


def kidney_pole(height: float, middle: float, half_length: float) -> str:
    """Third of a kidney that a height lies in.

    >>> kidney_pole(-100.0, -140.0, 55.0)
    'upper pole'
    """
    along = (height - middle) / half_length
    if along > 0.34:
        return "upper pole"
    return "lower pole" if along < -0.34 else "interpolar region"


def levels_between(low: float, high: float) -> list[str]:
    """Vertebrae whose bodies lie wholly between two heights, from head to foot."""
    return [name for name, (z, height) in LEVELS.items() if z - height > low and z + height < high]


def inside(
    rng: np.random.Generator,
    organ: Shape,
    radius: float,
    taken: Iterable[Placed] = (),
    *,
    depth: float | None = None,
    keep_out: Iterable[Shape] = (),
    accept: Callable[[Point], bool] = lambda point: True,
    tries: int = 160,
) -> Point | None:
    """A random point of an organ at least `depth` under its surface (by default the lesion's radius and 2 mm more), or None.

    The lesion keeps 3 mm from the lesions already placed, and its middle stays out of the given solids.
    """
    wanted = radius + 2.0 if depth is None else depth
    (x0, y0, z0), (x1, y1, z1) = organ.bounds
    others, walls = list(taken), list(keep_out)
    points = rng.uniform((x0, y0, z0), (x1, y1, z1), size=(tries, 3))
    deep = organ.distance(points[:, 0], points[:, 1], points[:, 2]) <= -wanted
    for x, y, z in points[deep]:
        point = (float(x), float(y), float(z))
        near = any(
            (point[0] - o[0]) ** 2 + (point[1] - o[1]) ** 2 + (point[2] - o[2]) ** 2 < (radius + other + 3.0) ** 2
            for o, other in others
        )
        if not near and accept(point) and all(distance_at(wall, point) > radius for wall in walls):
            return point
    return None
