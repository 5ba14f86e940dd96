"""Estimates, refusals before an out-of-memory, and what can be said about a checkpoint without loading it."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from mu2_model import drafting_stages, memory
from mu2_model.configuration_mu2 import Mu2Config
from mu2_model.drafter import ReportDrafter
from mu2_model.drafting_stages import DraftingStages
from mu2_model.errors import CheckpointError, DeviceError, MemoryEstimateError
from mu2_model.inspection import count_parameters, model_info
from mu2_model.memory import check_memory, check_weights_fit, estimate_memory, free_memory, slices_bytes
from mu2_model.modeling_mu2 import Mu2ForConditionalGeneration
from mu2_model.untrained import make_untrained
from tests.mu2_model.small_models import build, small_config
from tests.mu2_model.test_image_processing import affine, body


def test_parameters_are_counted_by_part() -> None:
    config = small_config()
    counts = count_parameters(config)
    assert counts["total"] == sum(parameter.numel() for parameter in build(config).parameters())


def test_the_published_sizes_are_met() -> None:
    llama = LlamaConfig(
        vocab_size=128260, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    qwen = Qwen3Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    first, second = (count_parameters(Mu2Config.legacy(text)) for text in (llama, qwen))
    assert first["vision_tower"] == pytest.approx(87.4e6, rel=0.01)
    assert first["projector"] == pytest.approx(5.8e6, rel=0.01)
    assert first["visual_tokenizer"] == pytest.approx(355e6, rel=0.01)
    assert first["total"] == pytest.approx(1.68e9, rel=0.01)
    assert second["total"] == pytest.approx(2.17e9, rel=0.01)


def test_the_estimate_grows_with_batch_samples_and_length() -> None:
    config = Mu2Config(text_config=LlamaConfig())
    base = estimate_memory(config, 10**9).batch
    assert estimate_memory(config, 10**9, batch=2).batch > base
    assert estimate_memory(config, 10**9, samples=16, new_tokens=4096).batch > base
    assert estimate_memory(config, 10**9, chunks=2).batch < base
    assert estimate_memory(config, 10**9).weights == 2 * 10**9


def test_a_batch_that_does_not_fit_is_refused_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = ReportDrafter.from_pretrained(make_untrained(tmp_path))
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    with pytest.raises(MemoryEstimateError, match="draft fewer volumes"):
        drafter.draft([(body(), affine())], ["Describe the findings."])


def test_evidence_needs_memory_for_the_square_of_the_length() -> None:
    config = Mu2Config(text_config=LlamaConfig())
    short, long = (
        estimate_memory(config, 0, prompt_tokens=300, new_tokens=n, evidence=True).evidence for n in (2000, 4000)
    )
    assert long > 3 * short
    # All layers' attention is returned at once: layers x heads x (prompt + draft) squared x bytes of a value.
    assert long > 32 * 32 * 4300**2 * 2
    assert estimate_memory(config, 0, prompt_tokens=300, new_tokens=4000).evidence == 0


def test_evidence_that_does_not_fit_is_refused_before_anything_is_drafted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = ReportDrafter.from_pretrained(make_untrained(tmp_path))
    asked = [(body(), affine())], ["Describe the findings."]
    needs = {"chunks": 1, "prompt_tokens": 80, "new_tokens": 120, "bytes_per_value": 4}
    enough = estimate_memory(drafter.model.config, 0, **needs).batch
    assert enough < estimate_memory(drafter.model.config, 0, evidence=True, **needs).batch
    monkeypatch.setattr(memory, "free_memory", lambda device: enough)
    assert drafter.draft(*asked, max_new_tokens=60)[0].generated_tokens > 0
    monkeypatch.setattr(DraftingStages, "generate", lambda *_: pytest.fail("was drafted"))
    with pytest.raises(MemoryEstimateError, match="ask without evidence"):
        drafter.draft(*asked, max_new_tokens=60, evidence=True)


def test_evidence_of_a_finished_draft_is_refused_when_it_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = ReportDrafter.from_pretrained(make_untrained(tmp_path))
    volume, question = (body(), affine()), "Describe the findings."
    (draft,) = drafter.draft([volume], [question], max_new_tokens=8)
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    with pytest.raises(MemoryEstimateError, match="beside the weights"):
        drafter.explain(volume, question, draft)


def test_a_draft_has_no_best_slices_where_their_gradients_would_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = ReportDrafter.from_pretrained(make_untrained(tmp_path))
    asked = [(body(), affine())], ["Describe the findings."]
    (found,) = drafter.draft(*asked, max_new_tokens=8, best_slices=True)
    assert found.best_slices is not None and any(found.best_slices)
    monkeypatch.setattr(drafting_stages, "slices_bytes", lambda *_, **__: 1 << 60)
    (without,) = drafter.draft(*asked, max_new_tokens=8, best_slices=True)
    assert without.text == found.text and without.best_slices == (None,) * len(found.sentences)


def test_a_draft_outlives_an_allocation_for_its_best_slices_that_fails_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = ReportDrafter.from_pretrained(make_untrained(tmp_path))
    asked = [(body(), affine())], ["Describe the findings."]
    # More than any machine has: torch's own error, at once.
    monkeypatch.setattr(drafting_stages, "best_slices", lambda *_: torch.empty(1 << 58))
    (draft,) = drafter.draft(*asked, max_new_tokens=8, best_slices=True)
    assert draft.text and draft.best_slices == (None,) * len(draft.sentences)
    monkeypatch.setattr(drafting_stages, "best_slices", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        drafter.draft(*asked, max_new_tokens=8, best_slices=True)


def test_the_memory_of_best_slices_grows_with_the_draft_and_its_sentences() -> None:
    config = Mu2Config(text_config=LlamaConfig())
    given = {"chunks": 8, "prompt_tokens": 300, "draft_tokens": 500, "sentences": 5, "value_bytes": 2}
    base = slices_bytes(config, **given)
    for name in given:
        assert slices_bytes(config, **{**given, name: 2 * given[name]}) > base


def test_unknown_free_memory_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MEMINFO", Path("/nowhere"))
    assert free_memory(torch.device("cpu")) is None
    check_memory(estimate_memory(Mu2Config(text_config=LlamaConfig()), 0, batch=10**6), torch.device("cpu"), 10**6)


def write_container(folder: Path, limit: str) -> Path:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text("900\n")
    (folder / "memory.stat").write_text("anon 500\ninactive_file 300\n")
    return folder


def test_the_limit_of_a_container_counts_with_its_cached_files_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = free_memory(torch.device("cpu"))
    assert machine is not None and machine > 10**6
    monkeypatch.setattr(memory, "CGROUP", write_container(tmp_path, "1000"))
    assert free_memory(torch.device("cpu")) == 400
    monkeypatch.setattr(memory, "CGROUP", write_container(tmp_path, "max"))
    assert (free_memory(torch.device("cpu")) or 0) > 10**6


def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_untrained(tmp_path)
    stored = (tmp_path / "model.safetensors").stat().st_size
    monkeypatch.setattr(memory, "free_memory", lambda device: stored - 1)
    monkeypatch.setattr(Mu2ForConditionalGeneration, "from_pretrained", lambda *_, **__: pytest.fail("was read"))
    with pytest.raises(MemoryEstimateError, match=r"the weights in .* need .* smaller dtype"):
        ReportDrafter.from_pretrained(tmp_path)


def test_weights_are_counted_in_the_dtype_they_are_loaded_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_untrained(tmp_path)
    stored = (tmp_path / "model.safetensors").stat().st_size
    monkeypatch.setattr(memory, "free_memory", lambda device: int(0.6 * stored))
    check_weights_fit(tmp_path, 2, torch.device("cpu"))
    with pytest.raises(MemoryEstimateError):
        check_weights_fit(tmp_path, 4, torch.device("cpu"))


def test_info_says_what_is_free(tmp_path: Path) -> None:
    free = model_info(make_untrained(tmp_path))["memory_bytes"]["free"]
    assert free["cpu"] > 10**6


def test_info_is_json_with_hash_and_parts(tmp_path: Path) -> None:
    info = json.loads(json.dumps(model_info(make_untrained(tmp_path), batch=4)))
    assert info["weights_sha256"] == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert info["trained_on"] == "nothing" and info["preset"] == "corrected"
    assert info["memory_bytes"]["peak_with_evidence"] >= info["memory_bytes"]["peak"]
    assert info["memory_bytes"]["peak"] > info["memory_bytes"]["weights"] == 4 * info["parameters"]["total"]


def test_info_estimates_the_longest_volume_of_the_processor(tmp_path: Path) -> None:
    make_untrained(tmp_path)
    before = model_info(tmp_path)["memory_bytes"]
    file = tmp_path / "processor_config.json"
    file.write_text(file.read_text().replace('"max_slices": 64', '"max_slices": 640'))
    after = model_info(tmp_path)["memory_bytes"]
    assert (before["chunks"], after["chunks"]) == (4, 40)
    assert after["peak"] > before["peak"] and after["weights"] == before["weights"]
    file.write_text("{")
    with pytest.raises(CheckpointError, match="processor's config"):
        model_info(tmp_path)


def test_info_names_the_type_that_is_stored_and_the_one_that_is_loaded(tmp_path: Path) -> None:
    info = model_info(make_untrained(tmp_path), dtype="bfloat16")
    assert (info["stored_dtype"], info["memory_bytes"]["dtype"]) == ("float32", "bfloat16")
    assert info["memory_bytes"]["weights"] == 2 * info["parameters"]["total"]


def test_info_about_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        model_info(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "u2llama"}')
    with pytest.raises(CheckpointError, match="convert published weights first"):
        model_info(tmp_path)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_checkpoint_file_that_is_cut_off_is_refused_by_its_folder(name: str, tmp_path: Path) -> None:
    make_untrained(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        ReportDrafter.from_pretrained(tmp_path)
    if name in ("config.json", "model.safetensors"):
        with pytest.raises(CheckpointError, match=str(tmp_path)):
            model_info(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_checkpoint_without_one_of_its_files_is_refused(name: str, tmp_path: Path) -> None:
    (make_untrained(tmp_path) / name).unlink()
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        ReportDrafter.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"num_image_tokens": 16', '"num_image_tokens": 12', "visual tokens: .* makes 12, but the model takes 16"),
        ('"size": 64', '"size": 32', "voxels of a chunk"),
        ('"form": "hounsfield"', '"form": "published"', "channels: .* makes 1, but the model takes 3"),
    ],
)
def test_a_processor_of_another_model_is_refused_when_loading(old: str, new: str, message: str, tmp_path: Path) -> None:
    file = make_untrained(tmp_path) / "processor_config.json"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(CheckpointError, match=message):
        ReportDrafter.from_pretrained(tmp_path)


def set_config(folder: Path, section: str, value: object) -> None:
    stored = json.loads((folder / "config.json").read_text())
    changed = {**stored[section], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps({**stored, section: changed}))


def refusals(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a drafter and `model_info` say about a folder that neither may take; nothing is loaded."""
    monkeypatch.setattr(Mu2ForConditionalGeneration, "from_pretrained", lambda *_, **__: pytest.fail("was loaded"))
    messages = []
    for take in (ReportDrafter.from_pretrained, model_info):
        with pytest.raises(CheckpointError) as error:
            take(folder)
        messages.append(str(error.value))
    return messages


@pytest.mark.parametrize("text", [None, "llama"])
def test_a_config_without_a_language_model_is_refused_before_anything_is_allocated(
    text: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_config(make_untrained(tmp_path), "text_config", text)
    assert all("text_config is missing" in message for message in refusals(tmp_path, monkeypatch))


@pytest.mark.parametrize(
    ("section", "changed", "told"),
    [
        ("text_config", {"intermediate_size": 64}, "mis-shaped tensor: model.language_model.layers.0.mlp"),
        ("text_config", {"num_hidden_layers": 3}, "missing tensor: model.language_model.layers.2."),
        ("vision_config", {"num_hidden_layers": 1}, "unexpected tensor: model.vision_tower.blocks.1."),
    ],
)
def test_weights_of_another_config_are_refused_by_the_tensor_before_anything_is_allocated(
    section: str, changed: dict[str, int], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_config(make_untrained(tmp_path), section, changed)
    assert all(told in message for message in refusals(tmp_path, monkeypatch))


@pytest.mark.parametrize("changed", [{"num_hidden_layers": "two"}, {"num_attention_heads": 0}, {"hidden_act": "foo"}])
def test_a_config_that_no_model_has_is_refused(
    changed: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_config(make_untrained(tmp_path), "text_config", changed)
    assert all("config.json" in message for message in refusals(tmp_path, monkeypatch))


def test_a_decoder_whose_experts_are_stored_apart_is_loaded(tmp_path: Path) -> None:
    text = Qwen3MoeConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(make_untrained(tmp_path))), hidden_size=64, head_dim=16,
        moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    stored = Mu2Config.from_pretrained(tmp_path)
    config = Mu2Config(**{**stored.to_dict(), "text_config": text.to_dict()})
    Mu2ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert ReportDrafter.from_pretrained(tmp_path).model.config.get_text_config().model_type == "qwen3_moe"


@pytest.mark.parametrize("device", ["cuda:99", "banana", "mps", "meta"])
def test_a_device_that_is_not_there_is_refused_by_name(device: str, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=f"'{device}'"):
        ReportDrafter.from_pretrained(make_untrained(tmp_path), device)


@pytest.mark.parametrize("wrong", [{"dtype": "int4"}, {"dtype": torch.int64}, {"quantize": "int4"}])
def test_a_type_of_weights_nobody_knows_is_refused(wrong: dict, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="int"):
        ReportDrafter.from_pretrained(make_untrained(tmp_path), **wrong)


def test_eight_bit_weights_without_torchao_are_refused_before_any_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    monkeypatch.setattr(Mu2ForConditionalGeneration, "from_pretrained", lambda *_, **__: pytest.fail("was read"))
    with pytest.raises(CheckpointError, match="pip install torchao"):
        ReportDrafter.from_pretrained(make_untrained(tmp_path), quantize="int8")


def test_eight_bit_weights_draft_and_are_smaller(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="int8 is an option that needs torchao")
    make_untrained(tmp_path)
    full, small = ReportDrafter.from_pretrained(tmp_path), ReportDrafter.from_pretrained(tmp_path, quantize="int8")
    weight = small.model.model.language_model.layers[0].mlp.up_proj.weight
    assert type(weight) is not torch.nn.Parameter and "Int8" in repr(type(weight.data)) + repr(weight)
    confidences = [
        drafter.draft([(body(), affine())], ["Describe the findings."], max_new_tokens=1)[0].sentences[0].confidence
        for drafter in (full, small)
    ]
    assert confidences[0] == pytest.approx(confidences[1], abs=0.05)
