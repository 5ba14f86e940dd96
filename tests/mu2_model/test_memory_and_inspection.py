"""Estimates, refusals before an out-of-memory, and what can be said about a checkpoint without loading it."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from mu2_model import memory
from mu2_model.configuration_mu2 import Mu2Config
from mu2_model.drafter import ReportDrafter
from mu2_model.errors import CheckpointError, MemoryEstimateError
from mu2_model.inspection import count_parameters, model_info
from mu2_model.memory import check_memory, estimate_memory, free_memory
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


def test_unknown_free_memory_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MEMINFO", Path("/nowhere"))
    assert free_memory(torch.device("cpu")) is None
    check_memory(estimate_memory(Mu2Config(text_config=LlamaConfig()), 0, batch=10**6), torch.device("cpu"), 10**6)


def test_info_is_json_with_hash_and_parts(tmp_path: Path) -> None:
    info = json.loads(json.dumps(model_info(make_untrained(tmp_path), batch=4)))
    assert info["weights_sha256"] == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert info["trained_on"] == "nothing" and info["preset"] == "corrected"
    assert info["memory_bytes"]["peak"] > info["memory_bytes"]["weights"] == 4 * info["parameters"]["total"]


def test_info_about_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        model_info(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "u2llama"}')
    with pytest.raises(CheckpointError, match="convert published weights first"):
        model_info(tmp_path)


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
