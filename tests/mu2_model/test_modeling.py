"""The whole model: transformers' conventions, batches, caches, ablations and language models."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
)

from mu2_model.configuration_mu2 import ABLATIONS, Mu2Config
from mu2_model.modeling_mu2 import Mu2ForConditionalGeneration, Mu2Model
from tests.mu2_model.small_models import (
    IMAGE_TOKEN,
    QUERIES,
    TOKENIZER,
    VISION,
    VOCABULARY,
    build,
    inputs,
    llama,
    small_config,
    small_legacy,
)

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
LANGUAGE_MODELS = {
    "llama": llama(),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "phi3": Phi3Config(**SIZES, max_position_embeddings=256, original_max_position_embeddings=256),
}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_saved_model_loads_to_the_same_logits_through_the_auto_classes(name: str, tmp_path: Path) -> None:
    model, given = build(small_config(LANGUAGE_MODELS[name])), inputs()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, Mu2ForConditionalGeneration) and not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded(**given).logits, model(**given).logits)


def test_the_config_survives_json_with_every_field(tmp_path: Path) -> None:
    config = small_legacy(positions="none", attention_over_first_axis=True)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, Mu2Config)
    assert loaded.tokenizer.to_dict() == config.tokenizer.to_dict()
    assert loaded.vision.to_dict() == config.vision.to_dict()
    assert (loaded.preset, loaded.image_placement, loaded.image_token_id) == ("legacy", "second_position", IMAGE_TOKEN)


def test_a_tied_head_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    text = llama()
    text.tie_word_embeddings = True
    build(small_config(text)).save_pretrained(tmp_path)
    loaded = Mu2ForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_the_inner_model_takes_every_keyword_and_returns_hidden_states() -> None:
    model, given = build(small_config()), inputs()
    inner = AutoModel.from_config(model.config)
    assert isinstance(inner, Mu2Model) and model.base_model is model.model
    with torch.no_grad():
        hidden = model.model(**given).last_hidden_state
        assert torch.equal(model.lm_head(hidden), model(**given).logits)


def test_weights_made_on_the_meta_device_get_their_values_when_loading(tmp_path: Path) -> None:
    model = build(small_config())
    state = model.state_dict()
    name = "model.visual_tokenizer.selection.log_temperature"
    model.save_pretrained(tmp_path, state_dict={key: value for key, value in state.items() if key != name})
    loaded, info = Mu2ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {name}
    assert torch.equal(loaded.state_dict()[name], state[name])


def test_a_batch_generates_what_each_volume_generates_alone() -> None:
    model = build(small_config())
    given = inputs(batch=3)
    short = [row[: len(row) - cut] for row, cut in zip(given["input_ids"], (0, 2, 4), strict=True)]
    width = max(len(row) for row in short)
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for index, row in enumerate(short):
        ids[index, width - len(row) :], mask[index, width - len(row) :] = row, 1
    together = model.generate(**{**given, "input_ids": ids, "attention_mask": mask}, max_new_tokens=6, do_sample=False)
    for index, row in enumerate(short):
        alone = model.generate(
            pixel_values=given["pixel_values"][index, None],
            question_ids=given["question_ids"][index, None],
            input_ids=row[None],
            attention_mask=torch.ones_like(row)[None],
            max_new_tokens=6,
            do_sample=False,
        )
        assert together[index, width:].tolist() == alone[0, len(row) :].tolist()


def test_volumes_of_different_length_in_one_batch_are_encoded_as_alone() -> None:
    model, given = build(small_config()), inputs(batch=2, chunks=4)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    with torch.no_grad():
        both = model.get_image_features(given["pixel_values"], given["question_ids"], chunk_mask=mask).pooler_output
        alone = model.get_image_features(given["pixel_values"][1:, :2], given["question_ids"][1:]).pooler_output
    assert torch.allclose(both[1:], alone, atol=1e-5)


def test_empty_chunks_never_reach_the_vision_tower() -> None:
    model, given = build(small_config()), inputs(batch=2, chunks=4)
    seen = []
    model.model.vision_tower.register_forward_hook(lambda module, arguments, output: seen.append(len(output)))
    mask = torch.tensor([[True, True, False, False], [True, False, False, False]])
    with torch.no_grad():
        model.get_image_features(given["pixel_values"], given["question_ids"], chunk_mask=mask)
    assert seen == [3]


def test_generation_with_and_without_cache_agree() -> None:
    model, given = build(small_config()), inputs()
    texts = [model.generate(**given, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*texts)


def test_a_static_cache_generates_the_same() -> None:
    model, given = build(small_config()), inputs()
    plain = model.generate(**given, max_new_tokens=6, do_sample=False)
    static = model.generate(
        **given, max_new_tokens=6, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(plain, static)


def test_eager_attention_and_sdpa_agree() -> None:
    model, given = build(small_config()), inputs()
    with torch.no_grad():
        fast = model(**given).logits
        model.set_attn_implementation("eager")
        assert torch.allclose(model(**given).logits, fast, atol=1e-5)


def test_samples_share_one_encoding() -> None:
    model, given = build(small_config()), inputs()
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    features = model.get_image_features(given["pixel_values"], given["question_ids"])
    text = {name: given[name] for name in ("input_ids", "attention_mask")}
    drafts = model.generate(
        **text, mm_encoder_outputs={"image": features}, max_new_tokens=4, do_sample=True, num_return_sequences=5
    )
    assert len(drafts) == 10 and len(calls) == 1


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_trains_one_step(name: str) -> None:
    config = Mu2Config.ablation(
        name, vision_config=VISION, tokenizer_config=TOKENIZER, text_config=llama(), image_token_id=IMAGE_TOKEN
    )
    model = build(config).train()
    given = inputs(answer=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        loss = model(**given, labels=given["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[1] < losses[0]
    assert (config.tokenizer.positions, config.tokenizer.selection, config.tokenizer.gated_pooling) == {
        "baseline": ("none", "hard", False),
        "+RPE": ("relative", "hard", False),
        "+DTS": ("none", "soft", False),
        "+DMTP": ("none", "hard", True),
        "full": ("relative", "soft", True),
    }[name]


def test_a_gradient_reaches_every_parameter_but_key_and_selection_biases() -> None:
    model, given = build(small_config()).train(), inputs(answer=5)
    model(**given, labels=given["input_ids"]).loss.backward()
    largest = {name: float(p.grad.abs().max()) for name, p in model.named_parameters() if p.grad is not None}
    without = sorted({name for name, _ in model.named_parameters()} - largest.keys())
    still = [name for name, value in largest.items() if value < 1e-9]
    assert without == []
    assert [name for name in still if not name.endswith((".key.bias", "selection.score.bias"))] == []


def test_training_reports_selection_entropy_and_gates() -> None:
    model, given = build(small_config()).train(), inputs(answer=5)
    output = model(**given, labels=given["input_ids"])
    assert 0 < float(output.selection_entropy) < 1
    assert output.gate_weights.shape == (2, 3)


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    given = inputs(answer=5)
    gradients = []
    for checkpointing in (False, True):
        model = build(small_config()).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**given, labels=given["input_ids"]).loss.backward()
        gradients.append(model.model.visual_tokenizer.aggregator.query_tokens.grad)
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_full_precision(dtype: torch.dtype) -> None:
    model, given = build(small_config()), inputs()
    with torch.no_grad():
        full = model(**given).logits
        half = model.to(dtype)(**given).logits.float()
    assert float((half - full).norm() / full.norm()) < 0.05


def test_placeholders_that_do_not_match_name_both_counts() -> None:
    model, given = build(small_config()), inputs()
    given["input_ids"][0, 3] = 5
    with pytest.raises(ValueError, match=rf"\[{QUERIES - 1}, {QUERIES}\] image placeholders.*{QUERIES} visual tokens"):
        model(**given)


def test_pixels_without_a_question_are_refused() -> None:
    given = inputs()
    del given["question_ids"]
    with pytest.raises(ValueError, match="question_ids"):
        build(small_config())(**given)


@pytest.mark.parametrize(
    ("volumes", "questions", "prompts", "told"),
    [
        (2, 2, 1, "2 encoded volumes, but 1 prompts"),
        (1, 1, 2, "1 encoded volumes, but 2 prompts"),
        (2, 1, 2, "2 volumes, but 1 rows of question_ids"),
        (1, 2, 2, "1 volumes, but 2 rows of question_ids"),
    ],
)
@pytest.mark.parametrize("config", [small_config, small_legacy])
def test_volumes_questions_and_prompts_that_are_not_as_many_are_refused(
    config: Callable[[], Mu2Config], volumes: int, questions: int, prompts: int, told: str
) -> None:
    given = inputs(chunks=1)
    with torch.no_grad(), pytest.raises(ValueError, match=told):
        build(config())(
            input_ids=given["input_ids"][:prompts],
            pixel_values=given["pixel_values"][:volumes],
            question_ids=given["question_ids"][:questions],
        )


def test_a_mask_of_other_rows_than_its_volumes_is_refused() -> None:
    given = inputs(chunks=2)
    masks = {"question_attention_mask": torch.ones(1, 6), "chunk_mask": torch.tensor([[True, False]])}
    for name, mask in masks.items():
        with torch.no_grad(), pytest.raises(ValueError, match=f"2 volumes, but 1 rows of {name}"):
            build(small_config()).get_image_features(given["pixel_values"], given["question_ids"], **{name: mask})


def test_placeholders_without_a_volume_are_refused_and_text_alone_is_not() -> None:
    model, given = build(small_config()), inputs(chunks=1)
    with torch.no_grad():
        for ask in (model, model.generate):
            with pytest.raises(ValueError, match="no volume was given"):
                ask(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
        assert model(input_ids=given["question_ids"]).logits.shape[:2] == given["question_ids"].shape


def test_a_volume_without_a_live_chunk_is_refused() -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="without a live chunk"):
        build(small_config())(**inputs(), chunk_mask=mask)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"vision_config": {**VISION, "image_size": (8, 32, 30)}}, "multiple of patch_size"),
        ({"tokenizer_config": {**TOKENIZER, "num_attention_heads": 5}}, "not a multiple of 5"),
        ({"tokenizer_config": {**TOKENIZER, "max_relative_positions": 8}}, "max_relative_positions >= 32"),
        ({"tokenizer_config": {**TOKENIZER, "num_selected_tokens": 30}}, "pooling scale 4"),
        ({"tokenizer_config": {**TOKENIZER, "projector_grid": (2, 2, 2)}}, "does not hold the 256 patches"),
    ],
)
def test_an_impossible_config_says_what_is_wrong(wrong: dict, message: str) -> None:
    fields = {"vision_config": VISION, "tokenizer_config": TOKENIZER, "text_config": llama(), **wrong}
    with pytest.raises(ValueError, match=message):
        Mu2Config(**fields)


def test_an_unknown_ablation_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="baseline, "):
        Mu2Config.ablation("more")


def test_any_decoder_with_its_own_names_works() -> None:
    from transformers import GPT2Config

    text: PreTrainedConfig = GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=VOCABULARY, tie_word_embeddings=True)
    model, given = build(small_config(text)), inputs()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert (
        model.generate(**given, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1]
        == given["input_ids"].shape[1] + 3
    )
