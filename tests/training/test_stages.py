"""The stages as they run: resume after a kill, ln 2 at step 0, LoRA, provenance, plots."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mu2_model import Mu2ForConditionalGeneration, Mu2Processor
from mu2_model.configuration_mu2 import TrainedOn
from mu2_model.drafter import ReportDrafter
from training.collators import PreferenceCollator, VolumeSource
from training.data import Case, manifest_digest
from training.dpo import PreferencePair, train_dpo
from training.provenance import collect, learned_from, read_provenance
from training.run_config import load_config, trainer_arguments
from training.sft import LoraSettings, train_sft
from training.shared_encoding import share_encoding
from training.volumes import VolumeCache


@pytest.fixture(scope="module")
def source(world: Path, tmp_path_factory: pytest.TempPathFactory) -> VolumeSource:
    processor = Mu2Processor.from_pretrained(world / "init")
    return VolumeSource(VolumeCache(tmp_path_factory.mktemp("cache"), processor.image_processor))


def arguments(stage: str, out: Path, **changes: Any) -> Any:
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "save_steps": 1, "logging_steps": 1}
    settings |= {"report_to": "none", "disable_tqdm": True, "learning_rate": 1e-3, **changes}
    return trainer_arguments(stage, load_config("cpu"), out, **settings)


def run_sft(world: Path, cases: list[Case], source: VolumeSource, out: Path, **options: Any) -> Any:
    provenance = collect("sft", 0, cases[:4], {}, world / "init")
    changes = options.pop("changes", {})
    return train_sft("sft", world / "init", cases[:4], source, arguments("sft", out, **changes), provenance, **options)


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.fixture(scope="module")
def trained(world: Path, cases: list[Case], source: VolumeSource, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_sft(world, cases, source, tmp_path_factory.mktemp("sft"))


def test_a_killed_run_goes_on_to_the_same_loss_and_weights(
    world: Path, cases: list[Case], source: VolumeSource, trained: Any, tmp_path: Path
) -> None:
    run_sft(world, cases, source, tmp_path / "run", stop_after=2)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    resumed = run_sft(world, cases, source, tmp_path / "run")
    assert losses(resumed) == losses(trained)
    whole = load_file(Path(trained.args.output_dir) / "model.safetensors")
    again = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_sft_learns(trained: Any) -> None:
    assert losses(trained)[-1] < losses(trained)[0]


def test_the_result_is_a_folder_that_drafts_and_says_what_it_learned_from(trained: Any) -> None:
    drafter = ReportDrafter.from_pretrained(trained.args.output_dir)
    assert drafter.trained_on == "phantoms"


@pytest.mark.parametrize(
    ("sets", "before", "after"),
    [
        (["phantomct-core", "phantomct-full"], "nothing", "phantoms"),
        (["phantomct-core", "hospital"], "nothing", "patients"),
        (["hospital"], "phantoms", "patients"),
        (["phantomct-core"], "phantoms", "phantoms"),
        (["phantomct-core"], "patients", "patients"),
        (["phantomct-core", ""], "phantoms", "patients"),
        ([""], "phantoms", "patients"),
        ([""], "nothing", "patients"),
        ([], "phantoms", "phantoms"),
    ],
)
def test_a_model_that_learned_from_a_patient_is_never_said_to_know_phantoms_alone(
    cases: list[Case], sets: list[str], before: TrainedOn, after: TrainedOn
) -> None:
    assert learned_from([replace(cases[0], source=name) for name in sets], before) == after


def test_a_tower_that_learned_from_patients_makes_no_model_of_phantoms(
    world: Path, cases: list[Case], tmp_path: Path
) -> None:
    shutil.copytree(world / "init", tmp_path / "tower")
    of_patients = [replace(case, source="hospital") for case in cases]
    collect("contrast", 0, of_patients, {}, world / "init").write(tmp_path / "tower")
    assert collect("sft", 0, cases, {}, tmp_path / "tower").trained_on == "patients"


def test_every_checkpoint_says_what_made_it(trained: Any, cases: list[Case]) -> None:
    out = Path(trained.args.output_dir)
    for folder in (out, out / f"checkpoint-{trained.state.global_step}"):
        told = read_provenance(folder)
        assert told is not None
        assert told["stage"] == "sft"
        assert told["manifest_sha256"] == manifest_digest(cases[:4])
        assert {"torch", "trl"} <= set(told["versions"])


def test_the_card_lists_the_stage_and_the_limits(trained: Any) -> None:
    card = (Path(trained.args.output_dir) / "README.md").read_text()
    assert "| sft | 4 | 0 |" in card
    assert "nothing about patients" in card


def test_plots_show_loss_entropy_temperature_and_gates(trained: Any) -> None:
    names = {file.stem for file in (Path(trained.args.output_dir) / "plots").glob("*.png")}
    assert names == {"loss", "dts_entropy", "dts_temperature", "dmtp_gates"}


def test_align_leaves_tower_and_language_model_alone(
    world: Path, cases: list[Case], source: VolumeSource, tmp_path: Path
) -> None:
    provenance = collect("sft-align", 0, cases[:4], {}, world / "init")
    settings = arguments("sft-align", tmp_path, max_steps=3)
    train_sft("sft-align", world / "init", cases[:4], source, settings, provenance)
    before, after = load_file(world / "init" / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    moved = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"projector", "visual_tokenizer"}


def test_lora_ends_in_a_plain_folder_with_the_decoder_changed_and_the_head_not(
    world: Path, cases: list[Case], source: VolumeSource, tmp_path: Path
) -> None:
    run_sft(world, cases, source, tmp_path, lora=LoraSettings(rank=2), changes={"max_steps": 3})
    before, after = load_file(world / "init" / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(before) == set(after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("q_proj" in name for name in moved)
    assert any("visual_tokenizer" in name for name in moved)
    assert not any("embed_tokens" in name or "vision_tower" in name for name in moved)


@pytest.fixture(scope="module")
def preferences(cases: list[Case]) -> list[PreferencePair]:
    wrong = "FINDINGS: A nodule of 9 mm in the right lung. IMPRESSION: Nodule, right."
    return [PreferencePair(c.case_id, c.image, c.question, c.answer, wrong, 1.0, 0.0) for c in cases[:4]]


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)], ids=["reference copy", "adapters off"])
def test_dpo_begins_at_ln_2_and_widens_the_margin(
    world: Path, preferences: list[PreferencePair], source: VolumeSource, tmp_path: Path, lora: LoraSettings | None
) -> None:
    provenance = collect("dpo", 0, [], {}, world / "init")
    settings = arguments("dpo", tmp_path, num_train_epochs=4)
    trainer = train_dpo(world / "init", preferences, source, settings, provenance, lora=lora)
    rows = [row for row in trainer.state.log_history if "rewards/margins" in row]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["rewards/margins"] > rows[0]["rewards/margins"]
    assert (tmp_path / "plots" / "reward_margins.png").is_file()


def test_policy_and_reference_see_the_same_volume_tensor(
    world: Path, preferences: list[PreferencePair], source: VolumeSource
) -> None:
    seen: list[int] = []
    processor = Mu2Processor.from_pretrained(world / "init")
    models = [Mu2ForConditionalGeneration.from_pretrained(world / "init").eval() for _ in range(2)]
    for model in models:
        share_encoding(model)
        encode = model.model.encode_chunks

        def watch(pixels: torch.Tensor, mask: Any = None, encode: Any = encode) -> torch.Tensor:
            seen.append(pixels.data_ptr())
            return encode(pixels, mask)

        model.model.encode_chunks = watch
    rows = [
        {"image": p.image, "question": p.question, "chosen": p.chosen, "rejected": p.rejected} for p in preferences[:2]
    ]
    batch = PreferenceCollator(processor, source)(rows)
    batch.pop("completion_mask")
    with torch.no_grad():
        for model in models:
            model(**batch)
    assert seen == [batch["pixel_values"].data_ptr()] * 2


def test_history_of_stages_is_carried_on(trained: Any, cases: list[Case]) -> None:
    following = collect("dpo", 1, cases, {}, Path(trained.args.output_dir))
    assert [stage["stage"] for stage in following.before] == ["sft"]
    assert json.dumps(replace(following).before)
