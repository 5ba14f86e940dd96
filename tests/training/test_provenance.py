"""A run folder holds what its run was begun with, and never goes on with something else."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from mu2_model import Mu2Processor
from training import commands
from training.collators import VolumeSource
from training.data import Case
from training.dpo import PreferencePair, train_dpo
from training.provenance import FILE, BegunOtherwiseError, Provenance, collect, read_provenance, rows_digest
from training.recipes import RECIPES, make_initial
from training.run_config import load_config, trainer_arguments
from training.sft import LoraSettings, train_sft
from training.volumes import VolumeCache


@pytest.fixture
def begun(world: Path, cases: list[Case], tmp_path: Path) -> Provenance:
    """The record of a run that was begun in `tmp_path / "run"`."""
    record = collect("sft", 0, cases, {"learning_rate": 1e-3, "lora": None}, world / "init")
    record.begin(tmp_path / "run")
    return record


def test_a_run_goes_on_with_what_it_was_begun_with(begun: Provenance, tmp_path: Path) -> None:
    begun.begin(tmp_path / "run")
    moved = begun.with_settings({"data": ["elsewhere/train"]})
    moved.begin(tmp_path / "run")
    assert read_provenance(tmp_path / "run") == json.loads(json.dumps(asdict(moved)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"stage": "sft-align"}, "stage"),
        ({"seed": 1}, "seed"),
        ({"settings": {"learning_rate": 5e-3, "lora": None}}, "setting learning_rate"),
        ({"settings": {"learning_rate": 1e-3, "lora": {"rank": 2}}}, "setting lora"),
    ],
)
def test_a_folder_that_was_begun_otherwise_is_refused_and_keeps_its_record(
    begun: Provenance, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(BegunOtherwiseError, match=f"{named}: .* choose another --out"):
        replace(begun, **change).begin(tmp_path / "run")
    assert read_provenance(tmp_path / "run") == json.loads(json.dumps(asdict(begun)))


def test_other_truth_in_the_same_words_is_other_data(
    begun: Provenance, world: Path, cases: list[Case], tmp_path: Path
) -> None:
    relabelled = [replace(cases[0], findings=()), *cases[1:]]
    with pytest.raises(BegunOtherwiseError, match="rows_sha256"):
        collect("sft", 0, relabelled, begun.settings, world / "init").begin(tmp_path / "run")


def test_another_checkpoint_to_start_from_is_refused(begun: Provenance, cases: list[Case], tmp_path: Path) -> None:
    make_initial(RECIPES["smoke"], cases, tmp_path / "other")
    with pytest.raises(BegunOtherwiseError, match="start_sha256"):
        collect("sft", 0, cases, begun.settings, tmp_path / "other").begin(tmp_path / "run")


def test_a_run_of_an_older_record_goes_on_but_not_with_other_data(
    begun: Provenance, world: Path, cases: list[Case], tmp_path: Path
) -> None:
    old = asdict(begun) | {"settings": {"bf16": False, "lr": 1e-3}}
    del old["rows_sha256"], old["start_sha256"]
    checkpoint = tmp_path / "old" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / FILE).write_text(json.dumps(old))
    with pytest.raises(BegunOtherwiseError, match="manifest_sha256"):
        collect("sft", 0, cases[:3], begun.settings, world / "init").begin(tmp_path / "old")
    begun.begin(tmp_path / "old")
    assert read_provenance(tmp_path / "old") is not None


def test_the_rejected_side_of_a_pair_is_part_of_its_digest(cases: list[Case]) -> None:
    pair = PreferencePair("c", "v.npz", "?", "right", "left", 1.0, 0.0)
    assert rows_digest([asdict(pair)]) == rows_digest([asdict(replace(pair, image="/elsewhere/v.npz"))])
    assert rows_digest([asdict(pair)]) != rows_digest([asdict(replace(pair, rejected="both"))])


@pytest.fixture
def source(world: Path, tmp_path: Path) -> VolumeSource:
    return VolumeSource(VolumeCache(tmp_path / "cache", Mu2Processor.from_pretrained(world / "init").image_processor))


def test_a_stopped_sft_stage_is_not_taken_up_with_other_settings_and_says_those_it_ran_with(
    world: Path, cases: list[Case], source: VolumeSource, tmp_path: Path
) -> None:
    def run(rate: float, lora: LoraSettings | None = None) -> None:
        told = {"max_steps": 2, "save_steps": 1, "report_to": "none", "disable_tqdm": True, "learning_rate": rate}
        arguments = trainer_arguments("sft", load_config("cpu"), tmp_path / "run", **told)
        record = collect("sft", 0, cases[:4], {}, world / "init")
        train_sft("sft", world / "init", cases[:4], source, arguments, record, lora=lora, stop_after=1)

    run(1e-3)
    for rate, lora in ((5e-3, None), (1e-3, LoraSettings(rank=2))):
        with pytest.raises(BegunOtherwiseError):
            run(rate, lora)
    told = read_provenance(tmp_path / "run" / "checkpoint-1")
    assert told is not None
    wanted = {"learning_rate": 1e-3, "max_steps": 2, "per_device_train_batch_size": 8, "lora": None, "frozen": []}
    assert {key: told["settings"][key] for key in wanted} == wanted


def test_a_stopped_dpo_stage_is_not_taken_up_with_other_pairs(
    world: Path, cases: list[Case], source: VolumeSource, tmp_path: Path
) -> None:
    pairs = [PreferencePair(c.case_id, c.image, c.question, c.answer, "No nodule.", 1.0, 0.0) for c in cases[:2]]
    told = {
        "max_steps": 2,
        "save_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
    }
    arguments = trainer_arguments("dpo", load_config("cpu"), tmp_path / "run", **told)
    record = collect("dpo", 0, cases[:2], {}, world / "init")
    train_dpo(world / "init", pairs, source, arguments, record, stop_after=1)
    others = [replace(pair, rejected="No nodule at all.") for pair in pairs]
    with pytest.raises(BegunOtherwiseError, match="pairs_sha256"):
        train_dpo(world / "init", others, source, arguments, record, stop_after=1)


def test_a_tower_begun_with_one_rate_is_not_taught_on_with_another(world: Path, tmp_path: Path) -> None:
    def teach(rate: float) -> None:
        commands.vision(world / "init", [world], tmp_path / "run", tmp_path / "cache", steps=1, batch=2, lr=rate)

    teach(1e-3)
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(BegunOtherwiseError, match=r"setting learning_rate: 0\.001 then, 0\.01 now"):
        teach(1e-2)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
