"""The recipe of the shipped checkpoint: what starts from what, what is kept, and what happens when DPO has nothing to learn.

Stages are stood in for by what they leave behind; each is tested for real beside its own module.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mu2_model.novelty import FILE
from training import commands, evaluation_commands, phantom_model, tokenizer_stage
from training.phantoms.generate import Split
from training.pipeline import WEIGHTS

COUNTS = {"train": 8, "crowded": 9, "validation": 10, "held_out": 11}
STAGES = (
    (phantom_model, "make_sets", None),
    (commands, "init", WEIGHTS),
    (commands, "vision", WEIGHTS),
    (phantom_model, "readout_command", ""),
    (commands, "sft_command", WEIGHTS),
    (tokenizer_stage, "tokenizer", WEIGHTS),
    (evaluation_commands, "preferences", ""),
    (commands, "dpo", WEIGHTS),
    (phantom_model, "novelty", FILE),
    (evaluation_commands, "evaluate_command", None),
)
"""Module, function, and the file in its folder that it leaves; empty when its --out is the file, None for none."""

Call = tuple[str, dict[str, Any]]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Call]]:
    """Runs the recipe in one folder and tells what it asked of its stages, with the options by their names."""
    calls: list[Call] = []

    def stand_in(name: str, stage: Callable[..., None], left: str | None) -> Callable[..., None]:
        def note(*positional: Any, **options: Any) -> None:
            given = inspect.signature(stage).bind(*positional, **options).arguments
            calls.append((name, given))
            if left is not None:
                file = given["out" if "out" in given else "model"] / left
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()

        return note

    for module, name, left in STAGES:
        monkeypatch.setattr(module, name, stand_in(name, getattr(module, name), left))

    def run(pairs: int = 1) -> list[Call]:
        monkeypatch.setattr(phantom_model, "read_pairs", lambda file: ["a pair"] * pairs)
        calls.clear()
        phantom_model.mu2_phantom(tmp_path, **COUNTS)  # type: ignore[arg-type]
        return list(calls)

    return run


def trained(calls: list[Call]) -> list[tuple[str, str]]:
    """(start, result) of every stage that starts from a checkpoint and writes another."""
    return [
        (given["model"].name, given["out"].name)
        for name, given in calls
        if {"model", "out"} <= set(given) and name != "evaluate_command"
    ]


def test_every_stage_starts_from_what_the_one_before_left(made: Callable[..., list[Call]]) -> None:
    assert trained(made()) == [
        ("init", "vision"),
        ("vision", "readout.json"),
        ("vision", "words"),
        ("words", "tokenizer"),
        ("tokenizer", "reader"),
        ("reader", "sft"),
        ("sft", "pairs.jsonl"),
        ("sft", "dpo"),
    ]


def test_the_held_out_set_is_scored_and_nothing_else_sees_it(made: Callable[..., list[Call]]) -> None:
    *before, (name, scored) = made()
    assert name == "evaluate_command"
    assert [folder.name for folder in scored["data"]] == ["held_out"]
    assert [folder.name for folder in scored["model"]] == ["dpo", "sft"]
    learned = {folder.name for _, given in before for key in ("data", "train") for folder in given.get(key, [])}
    assert learned == {"train", "crowded", "validation"}


def test_sets_have_the_sizes_that_were_asked_for_and_no_seed_twice(made: Callable[..., list[Call]]) -> None:
    sets = made()[0][1]["sets"]
    assert {wanted.name: wanted.count for wanted in sets} == COUNTS
    assert len({wanted.seed for wanted in sets}) == len(sets)
    assert [wanted.name for wanted in sets if wanted.crowded] == ["crowded"]
    assert all(wanted.plain == (wanted.split is Split.TRAIN) for wanted in sets)


def test_a_recipe_that_is_done_trains_nothing_again(made: Callable[..., list[Call]]) -> None:
    made()
    assert [name for name, _ in made()] == ["make_sets", "evaluate_command"]


def test_without_a_pair_sft_alone_is_scored_and_told_what_is_ordinary(made: Callable[..., list[Call]]) -> None:
    calls = made(pairs=0)
    assert "dpo" not in dict(calls)
    assert dict(calls)["novelty"]["model"].name == "sft"
    assert [folder.name for folder in calls[-1][1]["model"]] == ["sft"]
