"""The legacy preset computes what was published, in float64, through the converter and stage by stage."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mu2_model.convert_weights import convert_checkpoint
from mu2_model.modeling_mu2 import Mu2ForConditionalGeneration
from tests.mu2_model.published_reference import Published, Reference, write_checkpoint

VARIANTS = {
    "llama, relative": Published(),
    "qwen3, rotary": Published(family="u2Qwen3", attention="rope"),
    "llama, plain attention over the first axis": Published(attention="mha"),
    "qwen3, hard selection": Published(family="u2Qwen3", soft=False),
    "llama, no gate": Published(gated=False),
    "llama, one scale": Published(multi_scale=False, gated=False),
    "llama, image_size stored with the slices last": Published(image_size=(16, 16, 8)),
}
# Softmax does not see what is constant over its axis, and the last aggregation never uses two of its projections.
DEAD = ("key.bias", "selection.score.bias", "pooling.gate", "aggregation.value", "aggregation.output")


def inputs(published: Published, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(2, published.chunks, *published.chunk, generator=generator, dtype=torch.float64)
    question = torch.randint(4, published.vocabulary, (2, 5), generator=generator)
    placeholders = torch.full((2, published.queries), 3)
    return pixels, question, torch.cat((placeholders, question), dim=1)


def ours_by_stage(
    model: Mu2ForConditionalGeneration, pixels: Tensor, question: Tensor, ids: Tensor
) -> dict[str, Tensor]:
    inner = model.model
    with torch.no_grad():
        vision = inner.vision_tower(pixels.flatten(0, 1)[:, None])
        projected = inner.encode_chunks(pixels[:, :, None])
        refined = inner.visual_tokenizer.refiner(projected)
        selected, _ = inner.visual_tokenizer.selection(refined)
        features = inner.get_image_features(pixels[:, :, None], question)
        logits = model(input_ids=ids, pixel_values=pixels[:, :, None], question_ids=question).logits
    return {
        "vision": vision,
        "projected": projected,
        "refined": refined,
        "selected": selected,
        "visual": features.last_hidden_state,
        "tokens": features.pooler_output,
        "logits": logits,
    }


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """‖ours - theirs‖ / ‖theirs - mean over tokens‖, so that a flattened stage cannot hide an error."""
    spread = theirs - theirs.mean(dim=-2, keepdim=True)
    return float((ours - theirs).norm() / spread.norm())


def converted(folder: Path, published: Published, tensors: dict[str, Tensor]) -> Mu2ForConditionalGeneration:
    write_checkpoint(folder / "published", published, tensors)
    convert_checkpoint(folder / "published", folder / "ours")
    return Mu2ForConditionalGeneration.from_pretrained(folder / "ours", dtype=torch.float64).eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_stage_equals_the_published_computation(name: str, tmp_path: Path) -> None:
    published = VARIANTS[name]
    tensors = published.tensors()
    theirs = Reference(published, tensors).stages(*inputs(published))
    ours = ours_by_stage(converted(tmp_path, published, tensors), *inputs(published))
    assert {stage: relative_error(ours[stage], theirs[stage]) < 1e-6 for stage in theirs} == dict.fromkeys(theirs, True)


@pytest.mark.parametrize("name", ["llama, relative", "qwen3, rotary", "llama, plain attention over the first axis"])
def test_every_live_tensor_and_the_question_move_the_logits(name: str, tmp_path: Path) -> None:
    published = replace(VARIANTS[name], layers=1, vision_layers=1)
    model = converted(tmp_path, published, published.tensors())
    pixels, question, ids = inputs(published)
    arguments = {"input_ids": ids, "pixel_values": pixels[:, :, None], "question_ids": question}
    with torch.no_grad():
        base = model(**arguments).logits
        other_question = model(**{**arguments, "question_ids": (question + 1) % published.vocabulary}).logits
        still = []
        for parameter_name, parameter in model.named_parameters():
            kept = parameter.clone()
            parameter.mul_(1.3).add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
            if relative_error(model(**arguments).logits, base) < 1e-5:
                still.append(parameter_name)
            parameter.copy_(kept)
    assert relative_error(other_question, base) > 1e-3
    dead = DEAD
    if published.attention == "mha":
        # Every sample starts from the same queries, so attention across samples chooses between equal vectors.
        first = "aggregator.layers.0.self_attention.attention"
        dead = (*DEAD, f"{first}.query", f"{first}.key")
    assert [tensor for tensor in still if not any(part in tensor for part in dead)] == []


def test_a_key_bias_lives_only_under_rotary_positions(tmp_path: Path) -> None:
    published = VARIANTS["qwen3, rotary"]
    model = converted(tmp_path, published, published.tensors())
    pixels, question, _ = inputs(published)
    bias = model.model.visual_tokenizer.refiner.layers[0].spatial_attention.attention.key.bias
    with torch.no_grad():
        before = model.get_image_features(pixels[:, :, None], question).pooler_output
        bias.add_(1.0)
        after = model.get_image_features(pixels[:, :, None], question).pooler_output
    assert relative_error(after, before) > 1e-3


def test_the_first_prompt_token_stays_and_the_next_ones_are_replaced_whatever_they_are(tmp_path: Path) -> None:
    published = VARIANTS["llama, relative"]
    model = converted(tmp_path, published, published.tensors())
    pixels, question, ids = inputs(published)
    other = ids.clone()
    other[:, 1 : published.queries + 1] = 7
    with torch.no_grad():
        arguments = {"pixel_values": pixels[:, :, None], "question_ids": question}
        assert torch.equal(model(input_ids=ids, **arguments).logits, model(input_ids=other, **arguments).logits)
