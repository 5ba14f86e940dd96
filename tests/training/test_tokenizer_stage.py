"""The tokenizer stage: structured truth as targets, learned on toy tokens, resumed to the same weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file
from torch import Tensor

from mu2_model import Mu2ForConditionalGeneration, Mu2Processor
from training import pipeline
from training.collators import Mu2Collator, VolumeSource
from training.data import Case
from training.tokenizer_stage import (
    LEAST_CASES,
    TokenizerSettings,
    TokenizerTraining,
    choose_keys,
    targets_of,
)
from training.volumes import VolumeCache

SETTINGS = TokenizerSettings(steps=6, batch_size=4, learning_rate=3e-3, score_every=3)
LEFT, RIGHT = ("lung_nodule", "left", ""), ("lung_nodule", "right", "")


class Tokens:
    """Stored tower tokens of a scan: one of eight boxes says on which side its nodule is."""

    def __init__(self, width: int, sides: dict[str, str]):
        rng = np.random.default_rng(0)
        signs = {"left": rng.normal(size=width), "right": rng.normal(size=width)}
        self.of = {}
        for image, side in sides.items():
            tokens = rng.normal(size=(2, 4, width))
            tokens[rng.integers(2), rng.integers(4)] += 6 * signs[side]
            self.of[image] = torch.from_numpy(tokens.astype(np.float32))

    def stack(self, paths: list[str]) -> dict[str, Tensor]:
        return {
            "tower_tokens": torch.stack([self.of[path] for path in paths]),
            "chunk_mask": torch.ones(len(paths), 2, dtype=torch.bool),
        }


@pytest.fixture(scope="module")
def many(cases: list[Case]) -> list[Case]:
    """Forty scans with a nodule on one side."""
    made = []
    for number in range(40):
        side = "left" if number % 2 else "right"
        finding = {"type": "lung_nodule", "side": side, "place": "upper lobe", "size_mm": 10 + number}
        made.append(replace(cases[0], case_id=str(number), image=f"{number}", findings=(finding,)))
    return made


@pytest.fixture
def source(world: Path, many: list[Case]) -> VolumeSource:
    processor = Mu2Processor.from_pretrained(world / "init")
    model = Mu2ForConditionalGeneration.from_pretrained(world / "init")
    sides = {case.image: str((case.findings or ())[0]["side"]) for case in many}
    tokens = Tokens(model.config.vision.hidden_size, sides)
    return VolumeSource(VolumeCache(world / "cache", processor.image_processor), tokens)  # type: ignore[arg-type]


def test_a_finding_sets_itself_and_its_place_and_teaches_its_size_there_alone(many: list[Case]) -> None:
    keys = choose_keys(many)
    assert keys == [LEFT, (*LEFT[:2], "upper lobe"), RIGHT, (*RIGHT[:2], "upper lobe")]
    targets = targets_of(many[:2], keys)
    assert targets.present.tolist() == targets.sized.tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert targets.log_size[0, 2].exp() * 20 == pytest.approx(10)
    assert choose_keys(many[: LEAST_CASES - 1]) == []


def test_the_tokenizer_learns_what_lies_in_one_token(
    world: Path, many: list[Case], source: VolumeSource, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, steps=150, batch_size=16)
    training = TokenizerTraining(world / "init", tmp_path, settings, choose_keys(many))
    collate = Mu2Collator(training.processor, source)
    for _ in range(settings.steps):
        training.one_step(many[:30], collate)
    assert training.score(many[30:], collate)["finding_micro_f1"] > 0.8


def test_projector_and_tokenizer_move_and_nothing_else(
    world: Path, many: list[Case], source: VolumeSource, tmp_path: Path
) -> None:
    training = TokenizerTraining(world / "init", tmp_path, SETTINGS, choose_keys(many))
    training.run(many[:30], many[30:], source, Progress(disable=True))
    before, after = load_file(world / "init" / pipeline.WEIGHTS), load_file(tmp_path / pipeline.WEIGHTS)
    moved = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"projector", "visual_tokenizer"}


def test_a_killed_run_goes_on_to_the_same_weights(
    world: Path, many: list[Case], source: VolumeSource, tmp_path: Path
) -> None:
    def run(folder: Path, stop_at: int | None = None) -> None:
        training = TokenizerTraining(world / "init", folder, SETTINGS, choose_keys(many))
        training.run(many[:30], many[30:], source, Progress(disable=True), stop_at)

    run(tmp_path / "whole")
    run(tmp_path / "killed", stop_at=3)
    run(tmp_path / "killed")
    whole, resumed = (load_file(tmp_path / name / pipeline.WEIGHTS) for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
