"""Finding scores: which of the true findings a report states, on which side, where and how large.

A finding is found when type and side agree. Place and size are scored apart on those, so that a right finding in the wrong
lobe is one error and not two.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.phantoms.vocabulary import Side

SIZE_TOLERANCE = 0.25
SIZE_BANDS = (("below_10_mm", 0, 10), ("10_to_20_mm", 10, 20), ("above_20_mm", 20, 10_000))


@dataclass(frozen=True)
class Stated:
    """A finding as a truth or a report states it."""

    kind: str
    side: str = ""
    place: str = ""
    size_mm: float | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What counts for F1: (type, side)."""
        return self.kind, self.side


def stated(finding: Mapping[str, Any]) -> Stated:
    """A finding from its plain values in a manifest."""
    return Stated(finding["type"], finding.get("side") or "", finding.get("place") or "", finding.get("size_mm"))


@dataclass(frozen=True)
class CaseCounts:
    """What one report got right and wrong.

    `by_key` holds (true positive, false positive, false negative) of each (type, side); the others count matched pairs.
    """

    by_key: dict[tuple[str, str], tuple[int, int, int]]
    matched: tuple[tuple[Stated, Stated], ...]
    missed: tuple[Stated, ...]
    invented: tuple[Stated, ...]


def compare(truth: Sequence[Stated], said: Sequence[Stated]) -> CaseCounts:
    """Match stated to true findings by (type, side); among equals the pair nearest in size comes first."""
    pairs = [(i, j) for i, true in enumerate(truth) for j, other in enumerate(said) if true.key == other.key]
    pairs.sort(key=lambda pair: abs((truth[pair[0]].size_mm or 0) - (said[pair[1]].size_mm or 0)))
    chosen: dict[int, int] = {}
    for i, j in pairs:
        if i not in chosen and j not in chosen.values():
            chosen[i] = j
    matched = [(truth[i], said[j]) for i, j in sorted(chosen.items())]
    missed = [true for i, true in enumerate(truth) if i not in chosen]
    left = [other for j, other in enumerate(said) if j not in chosen.values()]
    counts: dict[tuple[str, str], tuple[int, int, int]] = {}
    for column, keys in enumerate(([t.key for t, _ in matched], [s.key for s in left], [t.key for t in missed])):
        for key, number in Counter(keys).items():
            before = list(counts.get(key, (0, 0, 0)))
            before[column] += number
            counts[key] = (before[0], before[1], before[2])
    return CaseCounts(counts, tuple(matched), tuple(missed), tuple(left))


def f1(true_positive: int, false_positive: int, false_negative: int) -> float:
    """F1; 0 when nothing was there to find and nothing was said.

    >>> f1(3, 1, 1)
    0.75
    """
    denominator = 2 * true_positive + false_positive + false_negative
    return 2 * true_positive / denominator if denominator else 0.0


def micro_f1(counts: Sequence[CaseCounts]) -> float:
    """F1 over all (type, side) of all cases."""
    totals = [0, 0, 0]
    for case in counts:
        for values in case.by_key.values():
            totals = [a + b for a, b in zip(totals, values, strict=True)]
    return f1(*totals)


def macro_f1(counts: Sequence[CaseCounts]) -> float:
    """Mean F1 over the types that occur in the truth, sides together."""
    per_kind = kind_f1(counts)
    return sum(per_kind.values()) / len(per_kind) if per_kind else 0.0


def kind_f1(counts: Sequence[CaseCounts]) -> dict[str, float]:
    """F1 of every type that occurs in the truth."""
    totals: dict[str, list[int]] = {}
    for case in counts:
        for (kind, _), values in case.by_key.items():
            totals[kind] = [a + b for a, b in zip(totals.get(kind, [0, 0, 0]), values, strict=True)]
    return {kind: f1(*values) for kind, values in sorted(totals.items()) if values[0] + values[2]}


def side_accuracy(counts: Sequence[CaseCounts]) -> float | None:
    """Of true sided findings whose type was stated, the share stated on the right side; None when there are none."""
    right = wrong = 0
    for case in counts:
        right += sum(1 for true, _ in case.matched if true.side != Side.NONE)
        invented = Counter(s.kind for s in case.invented)
        for true in case.missed:
            if true.side != Side.NONE and invented[true.kind] > 0:
                invented[true.kind] -= 1
                wrong += 1
    return right / (right + wrong) if right + wrong else None


def place_accuracy(counts: Sequence[CaseCounts]) -> float | None:
    """Of matched findings with a place, the share whose place is right; None when there are none."""
    pairs = [(true, other) for case in counts for true, other in case.matched if true.place]
    return sum(true.place == other.place for true, other in pairs) / len(pairs) if pairs else None


def size_accuracy(counts: Sequence[CaseCounts]) -> float | None:
    """Of matched findings with a size, the share stated within 25 %; None when there are none."""
    pairs = [(true.size_mm, other.size_mm) for case in counts for true, other in case.matched if true.size_mm]
    good = sum(1 for true, other in pairs if true and other and abs(other - true) <= SIZE_TOLERANCE * true)
    return good / len(pairs) if pairs else None


def recall_by_size(counts: Sequence[CaseCounts]) -> dict[str, float | None]:
    """Share of true findings that were found, by size; findings without a size are left out."""
    shares: dict[str, float | None] = {}
    for name, low, high in SIZE_BANDS:
        found = sum(1 for c in counts for true, _ in c.matched if true.size_mm and low <= true.size_mm < high)
        missed = sum(1 for c in counts for true in c.missed if true.size_mm and low <= true.size_mm < high)
        shares[name] = found / (found + missed) if found + missed else None
    return shares


def f1_by_size(counts: Sequence[CaseCounts]) -> dict[str, float | None]:
    """F1 over true findings of one size, by band; None for a band without any.

    An invented finding counts in the band of its stated size. One without a size could be of any: it counts in every band,
    if its type is one that has sizes.
    """
    sized = {true.kind for case in counts for true in (*case.missed, *(t for t, _ in case.matched)) if true.size_mm}
    bands: dict[str, float | None] = {}
    for name, low, high in SIZE_BANDS:
        found = sum(1 for c in counts for true, _ in c.matched if true.size_mm and low <= true.size_mm < high)
        missed = sum(1 for c in counts for true in c.missed if true.size_mm and low <= true.size_mm < high)
        invented = sum(
            1
            for case in counts
            for other in case.invented
            if (low <= other.size_mm < high if other.size_mm else other.kind in sized)
        )
        bands[name] = f1(found, invented, missed) if found + missed else None
    return bands


def false_positive_rate_on_normals(truths: Sequence[Sequence[Stated]], counts: Sequence[CaseCounts]) -> float | None:
    """Share of normal cases whose report states a finding; None when no case is normal."""
    normal = [case for truth, case in zip(truths, counts, strict=True) if not truth]
    return sum(1 for case in normal if case.invented) / len(normal) if normal else None
