"""Image–text contrast on toy volumes: the loss falls, held-out retrieval beats chance, a killed run goes on alike."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from rich.progress import Progress
from safetensors.torch import load_file
from typer.testing import CliRunner

from mu2_model import Mu2ForConditionalGeneration
from tests.training.conftest import write_volume
from training.contrast import (
    HEAD_FILE,
    ContrastModel,
    ContrastSettings,
    ContrastTraining,
    ReportData,
    contrast,
    equal_words,
    retrieval,
    train_contrast,
)
from training.data import Case, write_manifest
from training.volumes import VolumeCache

SETTINGS = ContrastSettings(steps=40, batch_size=8, learning_rate=3e-3, score_every=40, save_every=10)
TRAIN, HELD_OUT = 20, 12
SIDES = ("left", "right")
MM_OF_SLICES = {8: 8, 20: 10}
"""What tells short volumes from long ones, in words that the vocabulary of `world` holds."""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Volumes that differ in the side of a ball and in length, and reports that say so."""
    folder = tmp_path_factory.mktemp("reports")
    cases = []
    for number in range(TRAIN + HELD_OUT):
        side, slices = SIDES[number % 2], list(MM_OF_SLICES)[number // 2 % 2]
        image = folder / f"{number}.npz"
        write_volume(image, slices, 100 + number, side)
        text = f"A nodule of {MM_OF_SLICES[slices]} mm in the {side} lung."
        split = "train" if number < TRAIN else "validation"
        cases.append(Case(str(number), str(image), "?", text, split, str(number), str(number)))
    return cases


def data(training: ContrastTraining, cases: list[Case], split: str, world: Path) -> ReportData:
    cache = VolumeCache(world / "cache", training.processor.image_processor)
    return ReportData([case for case in cases if case.split == split], cache, training.processor)


@pytest.fixture(scope="module")
def trained(world: Path, reports: list[Case], tmp_path_factory: pytest.TempPathFactory) -> ContrastTraining:
    out = tmp_path_factory.mktemp("contrast")
    settings = replace(SETTINGS, score_every=20)
    return train_contrast(world / "init", reports, world / "cache", out, settings, Progress(disable=True))


def test_the_loss_falls_and_held_out_volumes_find_their_reports(trained: ContrastTraining) -> None:
    first, last = trained.history[0], trained.history[-1]
    assert last["loss"] < 0.7 * math.log(SETTINGS.batch_size) and last["loss"] < first["loss"]
    assert last["recall_1"] > 2 * last["chance_1"]
    assert last["cases"] == HELD_OUT


def test_only_the_tower_of_the_checkpoint_has_moved(trained: ContrastTraining, world: Path) -> None:
    before, after = load_file(world / "init" / "model.safetensors"), load_file(trained.out / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("model.vision_tower.") for name in moved)
    assert not any(name.startswith("tower") for name in load_file(trained.out / HEAD_FILE))


def test_a_run_that_was_stopped_ends_with_the_weights_of_one_that_was_not(
    world: Path, reports: list[Case], tmp_path: Path
) -> None:
    settings = replace(SETTINGS, steps=4, save_every=2, score_every=4)

    def run(name: str, stop_at: int | None = None) -> dict[str, torch.Tensor]:
        training = ContrastTraining(world / "init", tmp_path / name, settings)
        splits = [data(training, reports, split, world) for split in ("train", "validation")]
        training.run(splits[0], splits[1], Progress(disable=True), stop_at)
        return {name: value.clone() for name, value in training.model.state_dict().items()}

    run("stopped", stop_at=2)
    stopped, whole = run("stopped"), run("whole")
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)


def test_empty_chunks_change_nothing(world: Path) -> None:
    model = ContrastModel(Mu2ForConditionalGeneration.from_pretrained(world / "init")).eval()
    torch.nn.init.normal_(model.query)
    pixels = torch.rand(1, 2, *chunk_shape(model))
    padded = torch.cat([pixels, torch.zeros_like(pixels)], dim=1)
    alone = model.embed_volumes(pixels, torch.tensor([[True, True]]))
    torch.testing.assert_close(alone, model.embed_volumes(padded, torch.tensor([[True, True, False, False]])))


def chunk_shape(model: ContrastModel) -> tuple[int, ...]:
    return (model.tower.num_channels, *model.tower.image_size)


def test_reports_in_equal_words_are_all_right_answers(world: Path) -> None:
    model = ContrastModel(Mu2ForConditionalGeneration.from_pretrained(world / "init"))
    vectors = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), dim=-1)
    same = equal_words(["Normal chest.", "Normal  chest.", "A nodule."])
    assert same.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    # Two of three rows have two right answers: what is left of the loss is not knowing which.
    loss = float(model.loss(vectors, vectors, same.float()).detach())
    assert loss == pytest.approx(2 / 3 * math.log(2), abs=1e-3)
    assert retrieval(vectors, vectors, same).recall_1 == 1.0
    assert retrieval(vectors, vectors, same).chance_1 == pytest.approx(5 / 9)
    assert retrieval(vectors, vectors.roll(1, dims=1), same).recall_1 == 0.0


def test_a_split_without_volumes_is_an_error_that_says_so(world: Path, reports: list[Case], tmp_path: Path) -> None:
    training = [case for case in reports if case.split == "train"]
    with pytest.raises(ValueError, match="validation"):
        train_contrast(world / "init", training, world / "cache", tmp_path, SETTINGS, Progress(disable=True))


def test_the_command_leaves_a_checkpoint_with_its_provenance(world: Path, reports: list[Case], tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(contrast)
    manifest = write_manifest(reports, tmp_path / "manifest.jsonl")
    named = {"model": world / "init", "data": manifest, "out": tmp_path / "out", "cache": world / "cache"}
    arguments = [str(word) for name, value in named.items() for word in (f"--{name}", value)]
    result = CliRunner().invoke(app, [*arguments, "--steps", "1", "--batch", "4", "--threads", "1"])
    assert result.exit_code == 0, result.output
    assert '"stage": "contrast"' in (tmp_path / "out" / "training_run.json").read_text()
