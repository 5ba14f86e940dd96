"""Intervals and tests over cases: the percentile bootstrap and the paired randomisation test, seeded."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

RESAMPLES = 1000
PERMUTATIONS = 5000
LEVEL = 0.95

Item = TypeVar("Item")


def bootstrap_interval(
    cases: Sequence[Item],
    score: Callable[[Sequence[Item]], float | None],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float] | None:
    """95 % percentile interval of a score over cases drawn with replacement (Efron 1979); None when it is undefined."""
    if not cases:
        return None
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        drawn = [cases[i] for i in rng.integers(len(cases), size=len(cases))]
        value = score(drawn)
        if value is not None:
            values.append(value)
    if not values:
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def paired_randomisation(
    first: Sequence[Item],
    second: Sequence[Item],
    score: Callable[[Sequence[Item]], float | None],
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> tuple[float, float]:
    """Difference score(first) - score(second) and its two-sided p under swapping the systems case by case (Fisher 1935).

    ValueError when the two do not have the same number of cases.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} cases: a paired test needs the same cases twice")

    def difference(a: Sequence[Item], b: Sequence[Item]) -> float:
        return (score(a) or 0.0) - (score(b) or 0.0)

    observed = difference(first, second)
    rng = np.random.default_rng(seed)
    extreme = 0
    for _ in range(permutations):
        swap = rng.random(len(first)) < 0.5
        a = [y if s else x for x, y, s in zip(first, second, swap, strict=True)]
        b = [x if s else y for x, y, s in zip(first, second, swap, strict=True)]
        extreme += abs(difference(a, b)) >= abs(observed) - 1e-12
    # The observed assignment is one of the permutations, so p is never 0.
    return observed, (extreme + 1) / (permutations + 1)
