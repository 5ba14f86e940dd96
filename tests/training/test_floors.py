"""The floors: what can be said without looking, and from a histogram alone."""

import numpy as np
import pytest

from training import floors
from training.metrics.findings import Stated
from training.phantoms.disease import draw_case


def truths(first: int, count: int, *, full: bool) -> list[list[Stated]]:
    cases = (draw_case(first + number, full=full) for number in range(count))
    return [[Stated(f.kind.value, f.side.value, f.place, f.size_mm) for f in case.findings] for case in cases]


@pytest.mark.parametrize("full", [False, True], ids=["core", "full"])
def test_the_best_answer_without_an_image_stays_below_the_floor(full: bool) -> None:
    train, held_out = truths(0, 500, full=full), truths(700_000, 300, full=full)
    model = floors.fit_text_only(["report"] * len(train), train)
    assert 0.0 < floors.score(held_out, model.predict(["report"] * len(held_out))) < 0.6


def test_text_only_answers_each_question_with_what_is_frequent_for_it() -> None:
    model = floors.fit_text_only(["a", "a", "b"], [[Stated("ascites")], [Stated("ascites")], []])
    assert model.predict(["a", "b", "c"]) == [(("ascites", ""),), (), ()]


def test_logistic_regression_separates_what_a_line_separates() -> None:
    rng = np.random.default_rng(0)
    features = np.hstack([rng.normal(size=(300, 2)), np.ones((300, 1))])
    present = features[:, 0] - 0.5 * features[:, 1] > 0.2
    weights = floors.fit_logistic(features, present, ridge=0.1)
    assert ((features @ weights > 0) == present).mean() > 0.97


def test_histogram_model_finds_what_changes_the_histogram_and_not_its_side() -> None:
    rng = np.random.default_rng(1)
    volumes, known = [], []
    for number in range(160):
        volume = rng.normal(0.0, 20.0, size=4000)
        side = "left" if number % 4 == 1 else "right"
        if number % 2:
            volume[:400] = 900.0
        volumes.append(floors.histogram(volume.astype(np.int16)))
        known.append([Stated("renal_calculus", side)] if number % 2 else [])
    histograms = np.array(volumes)
    model = floors.fit_histogram_model(histograms[:120], known[:120])
    said = model.predict(histograms[120:])
    assert all(bool(keys) == bool(truth) for keys, truth in zip(said, known[120:], strict=True))
    assert floors.score(known[120:], said) < 0.75


def test_too_few_cases_are_refused() -> None:
    with pytest.raises(ValueError, match="8 cases or more"):
        floors.fit_histogram_model(np.zeros((3, len(floors.BIN_EDGES_HU) - 1)), [[], [], []])
