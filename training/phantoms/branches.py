"""Branching vessels and bowel loops, grown from random numbers and kept inside their organ."""

import numpy as np

from training.phantoms.shapes import Capsule, Point, Shape


def _step(rng: np.random.Generator, start: Point, toward: Point, share: float, jitter_mm: float) -> Point:
    jitter = [float(value) for value in rng.uniform(-jitter_mm, jitter_mm, 3)]
    moved = [a + share * (b - a) + j for a, b, j in zip(start, toward, jitter, strict=True)]
    return moved[0], moved[1], moved[2]


def tree(
    rng: np.random.Generator, organ: Shape, root: Point, radius_mm: float, *, reach: int, targets: int
) -> list[Capsule]:
    """Capsules from a root towards random points of an organ, each path thinning and splitting on the way.

    `reach` is the number of steps of a path, `targets` the number of points drawn; those outside of the organ are left out.
    A step may leave the organ: paint it only there.
    """
    goals = rng.uniform(*organ.bounds, size=(targets, 3))
    reached = organ.distance(goals[:, 0], goals[:, 1], goals[:, 2]) < -3.0
    vessels: list[Capsule] = []
    tips = [(root, radius_mm)]
    for x, y, z in goals[reached]:
        goal = (float(x), float(y), float(z))
        start, radius = tips[int(rng.integers(0, max(1, len(tips) // 2)))]
        for number in range(reach):
            end = _step(rng, start, goal, 1.0 / (reach - number + 0.5), 5.0)
            thinner = max(0.8 * radius, 1.0)
            vessels.append(Capsule(start, end, radius, thinner))
            tips.append((end, thinner))
            start, radius = end, thinner
    return vessels


def loops(rng: np.random.Generator, low: Point, high: Point, count: int, radius_mm: float) -> list[Capsule]:
    """A wandering tube inside a box: small bowel."""
    point = tuple(float(rng.uniform(a, b)) for a, b in zip(low, high, strict=True))
    tubes: list[Capsule] = []
    for _ in range(count):
        step = rng.uniform(-38.0, 38.0, 3)
        step[2] *= 0.5
        end = tuple(float(min(max(p + s, a), b)) for p, s, a, b in zip(point, step, low, high, strict=True))
        radius = radius_mm * float(rng.uniform(0.8, 1.2))
        tubes.append(Capsule((point[0], point[1], point[2]), (end[0], end[1], end[2]), radius, radius))
        point = end
    return tubes
