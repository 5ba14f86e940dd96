"""What an ablation says: each arm's mean over its seeds with an interval, and paired tests between arms.

A case is one item with all its seeds, so that intervals and tests know that three seeds of 500 cases are not 1,500 cases.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from training import tables
from training.evaluate import SCORES, Evaluation, ScoredCase
from training.metrics.statistics import bootstrap_interval, paired_randomisation

KEYS = (*tables.TABLE_2_KEYS, "finding_micro_f1", "finding_macro_f1", "normal_false_positive_rate")
TESTED = ("finding_micro_f1", "green", "rouge1")
COMPARED = (
    ("+RPE", "baseline"),
    ("+DTS", "baseline"),
    ("+DMTP", "baseline"),
    ("full", "baseline"),
    ("full", "legacy"),
    ("+DPO", "full"),
)
"""Arms of which the first should beat the second."""
RESAMPLES = 300
PERMUTATIONS = 1000

Seeds = tuple[ScoredCase, ...]
"""One case, as each seed drafted it."""


def over_seeds(name: str) -> Callable[[Sequence[Seeds]], float | None]:
    """A score as its mean over the seeds."""

    def mean(items: Sequence[Seeds]) -> float | None:
        values = [SCORES[name](cases) for cases in zip(*items, strict=True)]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    return mean


def by_case(runs: Sequence[Evaluation]) -> list[Seeds]:
    """The cases of an arm with all their seeds; ValueError when the seeds were scored on different cases."""
    items = list(zip(*(run.cases for run in runs), strict=True))
    if any(len({case.case_id for case in seeds}) > 1 for seeds in items):
        raise ValueError("the seeds of an arm were scored on different cases")
    return items


def arm_row(arm: str, runs: Sequence[Evaluation], figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An arm's scores: mean over seeds, 95 % interval over cases, and each seed's own."""
    items = by_case(runs)
    row: dict[str, Any] = {"name": arm, "seeds": len(runs), "cases": len(items), "intervals": {}, "per_seed": {}}
    for key in KEYS:
        values = [run[key] for run in figures if run.get(key) is not None]
        row[key] = sum(values) / len(values) if values else None
        row["per_seed"][key] = values
        interval = bootstrap_interval(items, over_seeds(key), RESAMPLES) if key in SCORES else None
        if interval is not None:
            row["intervals"][key] = interval
    row["floors"] = list(figures[0].get("floors", ()))
    row["floors_missing"] = figures[0].get("floors_missing")
    return row


def compare_arms(runs: Mapping[str, Sequence[Evaluation]]) -> list[dict[str, Any]]:
    """Paired randomisation tests of the arms that are there, on the seeds that both have."""
    tests = []
    for first, second in COMPARED:
        if first not in runs or second not in runs:
            continue
        seeds = min(len(runs[first]), len(runs[second]))
        items = [by_case(runs[arm][:seeds]) for arm in (first, second)]
        for score in TESTED:
            difference, p = paired_randomisation(items[0], items[1], over_seeds(score), PERMUTATIONS)
            tests.append(
                {"first": first, "second": second, "score": score, "seeds": seeds, "difference": difference, "p": p}
            )
    return tests


def report(command: str, rows: Sequence[Mapping[str, Any]], tests: Sequence[Mapping[str, Any]]) -> str:
    """The ablation as Markdown: the table beside the publication's, then what beats what."""
    seeds = ", ".join(f"{row['name']} {row['seeds']}" for row in rows)
    compared = [
        [
            f"{test['first']} − {test['second']}",
            test["score"],
            str(test["seeds"]),
            f"{test['difference']:+.3f}",
            f"{test['p']:.3f}",
        ]
        for test in tests
    ]
    parts = [f"`{command}`", f"Mean over seeds (95 % interval over cases); seeds: {seeds}.", tables.table_2(rows)]
    if compared:
        parts.append(tables.markdown(["arms", "score", "seeds", "difference", "p"], compared))
    return "\n\n".join(parts) + "\n"
