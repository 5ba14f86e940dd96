"""Intervals and tests of an ablation: a case counts once, however many seeds drafted it."""

from typing import Any

import pytest

from training.ablation_report import arm_row, by_case, compare_arms, report
from training.evaluate import Evaluation, Options, evaluate
from training.metrics.findings import Stated

EFFUSION = Stated("pleural_effusion", "left")


def drafted(right: int, cases: int = 40) -> Evaluation:
    """An evaluation whose first `right` drafts name the effusion that every case has."""
    references = [(str(number), "Left effusion.", [EFFUSION]) for number in range(cases)]
    candidates = ["Left effusion." if number < right else "Clear." for number in range(cases)]
    options = Options(read=lambda text: [EFFUSION] if "effusion" in text else [])
    return evaluate("arm", references, candidates, options)


def figures(run: Evaluation) -> dict[str, Any]:
    return run.figures("command", 20)


def test_the_mean_of_seeds_lies_in_its_interval_and_each_seed_is_told() -> None:
    runs = [drafted(20), drafted(30)]
    row = arm_row("full", runs, [figures(run) for run in runs])
    low, high = row["intervals"]["finding_micro_f1"]
    assert (row["seeds"], row["cases"]) == (2, 40)
    assert low < row["finding_micro_f1"] < high
    assert row["per_seed"]["finding_micro_f1"] == [figures(run)["finding_micro_f1"] for run in runs]


def test_three_seeds_of_the_same_drafts_narrow_no_interval() -> None:
    once, thrice = (arm_row("full", [drafted(20)] * n, [figures(drafted(20))] * n) for n in (1, 3))
    assert once["intervals"]["rouge1"] == pytest.approx(thrice["intervals"]["rouge1"])


def test_a_better_arm_beats_and_an_equal_one_does_not() -> None:
    tests = compare_arms({"baseline": [drafted(10)], "full": [drafted(30)], "legacy": [drafted(30)]})
    p = {(test["first"], test["second"]): test["p"] for test in tests if test["score"] == "finding_micro_f1"}
    assert p[("full", "baseline")] < 0.01
    assert p[("full", "legacy")] == 1.0


def test_seeds_of_different_cases_are_refused() -> None:
    other = evaluate("arm", [("x", "Clear.", [])], ["Clear."], Options(read=lambda text: []))
    with pytest.raises(ValueError, match="different cases"):
        by_case([drafted(1, 1), other])


def test_the_report_names_seeds_tests_and_the_publication() -> None:
    runs = {"baseline": [drafted(10)], "full": [drafted(30)]}
    rows = [arm_row(arm, run, [figures(run[0])]) for arm, run in runs.items()]
    told = report("python -m training ablate", rows, compare_arms(runs))
    assert "seeds: baseline 1, full 1" in told
    assert "full − baseline" in told
    assert "published (AMOS-MM)" in told
