"""What the default corrects, one test each; every check is also run on the legacy preset, where it must fail."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mu2_model.configuration_mu2 import Mu2Config
from mu2_model.modeling_mu2 import Mu2ForConditionalGeneration
from tests.mu2_model.small_models import build, inputs, llama, small_config, small_legacy


def stable_rank(tokens: Tensor) -> float:
    """‖X‖²_F / ‖X‖²_2: how many directions a set of tokens really has."""
    values = torch.linalg.svdvals(tokens.double())
    return float(values.square().sum() / values[0].square())


def wide(preset: Callable[..., Mu2Config]) -> Mu2ForConditionalGeneration:
    return build(preset(llama(256), num_query_tokens=64, num_selected_tokens=128))


def encode(model: Mu2ForConditionalGeneration, given: dict[str, Tensor], **changed: Tensor) -> Tensor:
    names = ("pixel_values", "question_ids", "question_attention_mask", "chunk_mask")
    with torch.no_grad():
        chosen = {name: tensor for name, tensor in {**given, **changed}.items() if name in names}
        return model.get_image_features(**chosen).pooler_output


def tokens_have_many_directions_at_the_start(preset: Callable[..., Mu2Config]) -> bool:
    return stable_rank(encode(wide(preset), inputs(chunks=8))[0]) > 8


def different_volumes_give_clearly_different_tokens(preset: Callable[..., Mu2Config]) -> bool:
    first, second = encode(wide(preset), inputs(chunks=8))
    return float((first - second).norm() / first.norm()) > 0.5


def selection_is_not_an_average_at_the_start(preset: Callable[..., Mu2Config]) -> bool:
    given = inputs(chunks=8)
    with torch.no_grad():
        features = wide(preset).get_image_features(given["pixel_values"], given["question_ids"], output_maps=True)
    return float(features.selection_entropy) < 0.9


def padding_of_the_question_changes_nothing(preset: Callable[..., Mu2Config]) -> bool:
    model, given = build(preset()), inputs()
    with torch.no_grad():
        # At the published start no token depends on anything; larger weights let the question through.
        for parameter in model.model.visual_tokenizer.parameters():
            parameter.mul_(3)
        model.get_input_embeddings().weight.mul_(30)
    question = given["question_ids"]
    padded = torch.cat((question, torch.zeros(2, 40, dtype=torch.long)), dim=1)
    mask = torch.cat((torch.ones_like(question), torch.zeros(2, 40, dtype=torch.long)), dim=1)
    plain = encode(model, given)
    difference = encode(model, given, question_ids=padded, question_attention_mask=mask) - plain
    return float(difference.norm() / (plain - plain.mean(dim=1, keepdim=True)).norm()) < 1e-4


def empty_chunks_change_nothing(preset: Callable[..., Mu2Config]) -> bool:
    model, given = build(preset()), inputs(chunks=3)
    pixels = given["pixel_values"]
    padded = torch.cat((pixels, torch.zeros(2, 5, *pixels.shape[2:])), dim=1)
    mask = torch.arange(8).expand(2, 8) < 3
    plain = encode(model, given)
    return torch.allclose(plain, encode(model, given, pixel_values=padded, chunk_mask=mask), atol=1e-5)


def the_gate_moves_with_the_input_and_gets_a_gradient(preset: Callable[..., Mu2Config]) -> bool:
    model, given = build(preset()), inputs()
    features = model.get_image_features(given["pixel_values"], given["question_ids"], output_maps=True)
    features.pooler_output.square().sum().backward()
    gates = features.gate_weights
    gradient = model.model.visual_tokenizer.pooling.gate.weight.grad
    return bool((gates[0] - gates[1]).abs().max() > 1e-4) and float(gradient.abs().max()) > 1e-6


def every_stored_parameter_is_used(preset: Callable[..., Mu2Config]) -> bool:
    model = build(preset()).train()
    model(**inputs(answer=4), labels=inputs(answer=4)["input_ids"]).loss.backward()
    return [name for name, p in model.named_parameters() if p.grad is None] == []


def a_left_padded_prompt_gives_the_same_text_as_alone(preset: Callable[..., Mu2Config]) -> bool:
    model, given = build(preset()), inputs()
    ids, mask = given["input_ids"], given["attention_mask"]
    padded = {
        **given,
        "input_ids": torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), dim=1),
        "attention_mask": torch.cat((torch.zeros(2, 3, dtype=torch.long), mask), dim=1),
    }
    with torch.no_grad():
        return torch.allclose(model(**given).logits[:, -1], model(**padded).logits[:, -1], atol=1e-4)


CORRECTIONS = [
    tokens_have_many_directions_at_the_start,
    different_volumes_give_clearly_different_tokens,
    selection_is_not_an_average_at_the_start,
    padding_of_the_question_changes_nothing,
    empty_chunks_change_nothing,
    the_gate_moves_with_the_input_and_gets_a_gradient,
    every_stored_parameter_is_used,
    a_left_padded_prompt_gives_the_same_text_as_alone,
]


@pytest.mark.parametrize("holds", CORRECTIONS)
def test_the_default_holds(holds: Callable[[Callable[..., Mu2Config]], bool]) -> None:
    assert holds(small_config)


@pytest.mark.parametrize("holds", CORRECTIONS)
def test_the_published_design_does_not_hold(holds: Callable[[Callable[..., Mu2Config]], bool]) -> None:
    assert not holds(small_legacy)
