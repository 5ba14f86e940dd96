"""From a trained checkpoint to the one that ships: it tells other CTs, is small, and its card says what it knows."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from mu2_model.drafter import ReportDrafter
from mu2_model.novelty import FILE, Novelty
from tests.training.conftest import TINY, write_cases, write_volume
from training.data import MANIFEST, Case, ManifestError, write_manifest
from training.novelty import novelty, text
from training.ship import folder_bytes, ship
from training.volumes import read_volume

QUESTION = "Write the report of this CT."


@pytest.fixture(scope="module")
def bodies(cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of enough small volumes to know their like."""
    folder = tmp_path_factory.mktemp("bodies")
    made = write_cases(folder, cases[0], ["train"] * 24 + ["validation"] * 12, slices=(8, 12, 16))
    write_manifest([*made, replace(made[0], case_id="asked again", question="And the left side?")], folder / MANIFEST)
    return folder


@pytest.fixture(scope="module")
def phantom_model(world: Path, bodies: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The initial checkpoint of the world, as if it had been trained, with what it knows of the bodies."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(world / "init", folder, dirs_exist_ok=True)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, "trained_on": "phantoms"}))
    novelty(folder, [bodies], world / "cache", 1.0, threads=1)
    return folder


@pytest.fixture(scope="module")
def shipped(phantom_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("package") / "mu2-phantom"
    ship(phantom_model, out)
    return out


def test_another_phantom_is_like_the_training_data_and_noise_is_not(phantom_model: Path, tmp_path: Path) -> None:
    drafter = ReportDrafter.from_pretrained(phantom_model)
    write_volume(tmp_path / "new.npz", 16, 77, "left")
    hu, affine = read_volume(tmp_path / "new.npz")
    noise = np.random.default_rng(0).uniform(-1000, 1000, hu.shape).astype(np.float32)
    drafts = drafter.draft([(hu, affine), (noise, affine)], [QUESTION] * 2, max_new_tokens=2)
    assert [draft.unlike_training for draft in drafts] == [False, True]


def test_the_splits_keep_apart_and_every_volume_counts_once(phantom_model: Path) -> None:
    known = Novelty.load(phantom_model, TINY.vision_width)
    assert known is not None
    assert (known.fitted, known.calibrated, known.checked) == (24, 6, 6)
    assert text(known).startswith("fitted on 24 volumes; threshold from 6 others; ")


def test_data_without_a_validation_split_is_refused(world: Path, cases: list[Case], tmp_path: Path) -> None:
    manifest = write_manifest([case for case in cases if case.split == "train"], tmp_path / "manifest.jsonl")
    with pytest.raises(ManifestError, match="0 volumes of validation"):
        novelty(world / "init", [manifest], world / "cache")


def test_what_ships_is_bfloat16_drafts_alike_and_still_tells_noise(phantom_model: Path, shipped: Path) -> None:
    before, after = (ReportDrafter.from_pretrained(folder, dtype=torch.float32) for folder in (phantom_model, shipped))
    assert json.loads((shipped / "config.json").read_text())["dtype"] == "bfloat16"
    assert folder_bytes(shipped) < folder_bytes(phantom_model)
    noise = np.random.default_rng(0).uniform(-1000, 1000, (16, 40, 40)).astype(np.float32)
    scores = [
        drafter.draft([(noise, np.diag([4.0, 4.0, 4.0, 1.0]))], [QUESTION], max_new_tokens=2)[0].novelty
        for drafter in (before, after)
    ]
    assert scores[1] == pytest.approx(scores[0], rel=0.05)


def test_the_card_says_phantoms_only_and_how_other_cts_are_told(shipped: Path) -> None:
    card = (shipped / "README.md").read_text(encoding="utf-8")
    assert "PhantomCT phantoms only" in card and "never seen a patient" in card
    assert "24 training volumes" in card


def test_a_checkpoint_that_knows_nothing_or_tells_nothing_does_not_ship(
    world: Path, phantom_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(typer.BadParameter, match="phantoms alone"):
        ship(world / "init", tmp_path / "out")
    untold = tmp_path / "untold"
    shutil.copytree(phantom_model, untold, ignore=shutil.ignore_patterns(FILE))
    with pytest.raises(typer.BadParameter, match="training novelty"):
        ship(untold, tmp_path / "out")
    assert not (tmp_path / "out").exists()
