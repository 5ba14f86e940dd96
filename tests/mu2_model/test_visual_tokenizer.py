"""The parts of the visual tokenizer against their equations."""

import pytest
import torch

from mu2_model.attention import MultiHeadAttention, relative_bias, rotate
from mu2_model.configuration_mu2 import Mu2TokenizerConfig
from mu2_model.visual_tokenizer import DynamicTokenPooling, TokenSelection, selection_entropy


def test_selection_by_one_matmul_equals_the_loop_over_selections() -> None:
    torch.manual_seed(0)
    selection = TokenSelection(Mu2TokenizerConfig(num_selected_tokens=16), 24)
    tokens = torch.randn(2, 3, 10, 24)
    selected, weights = selection(tokens)
    flat = tokens.flatten(1, 2)
    scores = flat @ selection.score.weight.T + selection.score.bias
    for k in range(16):
        weight = torch.softmax(scores[:, :, k] / selection.temperature(), dim=1)
        assert torch.allclose(weights[:, :, k], weight, atol=1e-6)
        assert torch.allclose(selected[:, k], (weight[:, :, None] * flat).sum(dim=1), atol=1e-5)


def test_hard_selection_gathers_the_best_tokens_in_descending_order() -> None:
    torch.manual_seed(0)
    selection = TokenSelection(Mu2TokenizerConfig(num_selected_tokens=4, selection="hard"), 8)
    tokens = torch.randn(1, 2, 6, 8)
    selected, weights = selection(tokens)
    order = selection.score(tokens.flatten(1, 2)).squeeze().argsort(descending=True)[:4]
    assert torch.equal(selected[0], tokens.flatten(1, 2)[0, order])
    assert torch.equal(weights.transpose(1, 2) @ tokens.flatten(1, 2), selected)


def test_hard_selection_gathers_a_short_volume_whole_whatever_it_is_batched_with() -> None:
    selection = TokenSelection(Mu2TokenizerConfig(num_selected_tokens=8, selection="hard"), 8)
    tokens = torch.randn(2, 2, 6, 8)
    selected, weights = selection(tokens, torch.tensor([[True, False], [True, True]]))
    order = selection.score(tokens[0, 0]).squeeze(-1).argsort(descending=True)
    assert torch.equal(selected[0], tokens[0, 0][order][[0, 0, 1, 2, 3, 3, 4, 5]])
    assert torch.equal(weights.transpose(1, 2) @ tokens.flatten(1, 2), selected)
    alone, _ = selection(tokens[:1, :1])
    assert torch.equal(alone[0], selected[0])


def test_hard_selection_of_more_tokens_than_there_are_is_refused_as_published() -> None:
    config = Mu2TokenizerConfig(num_selected_tokens=8, selection="hard", mask_empty_chunks=False)
    selection = TokenSelection(config, 8)
    with pytest.raises(ValueError, match="8 tokens, but a volume has only 6"):
        selection(torch.randn(1, 2, 6, 8), torch.tensor([[True, False]]))


def test_masked_chunks_are_never_selected() -> None:
    selection = TokenSelection(Mu2TokenizerConfig(num_selected_tokens=4), 8)
    _, weights = selection(torch.randn(1, 3, 5, 8), torch.tensor([[True, False, True]]))
    assert weights[0, 5:10].abs().max() == 0


def test_relative_bias_equals_a_naive_gather() -> None:
    table = torch.randn(2 * 7 - 1, 3)
    bias = relative_bias(table, 5)
    for i in range(5):
        for j in range(5):
            assert torch.equal(bias[:, i, j], table[j - i + 6])


def test_relative_bias_beyond_its_table_is_refused() -> None:
    with pytest.raises(ValueError, match="reaches only 7"):
        relative_bias(torch.randn(13, 3), 8)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    scores = rotate(query.expand(1, 1, 9, 8)) @ rotate(key.expand(1, 1, 9, 8)).transpose(2, 3)
    for distance in range(-8, 9):
        diagonal = torch.diagonal(scores[0, 0], offset=distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal))


def test_attention_equals_materialised_scores() -> None:
    torch.manual_seed(0)
    attention = MultiHeadAttention(16, 4, "relative", 8).double()
    with torch.no_grad():
        attention.relative_bias.normal_()
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    q, k, v = (layer(x).view(2, 6, 4, 4).transpose(1, 2) for layer in (attention.query, attention.key, attention.value))
    scores = q @ k.transpose(2, 3) / 2 + relative_bias(attention.relative_bias, 6)
    context = torch.softmax(scores.masked_fill(~mask[:, None, None, :], -torch.inf), dim=-1) @ v
    expected = attention.output(context.transpose(1, 2).reshape(2, 6, 16))
    assert torch.allclose(attention(x, x, mask), expected)


def test_pooling_keeps_every_scale_and_weighs_it_by_its_gate() -> None:
    torch.manual_seed(0)
    pooling = DynamicTokenPooling(Mu2TokenizerConfig(num_selected_tokens=8), 6)
    tokens = torch.randn(2, 8, 6)
    pooled, gates = pooling(tokens)
    assert pooled.shape == (2, 14, 6)
    assert torch.allclose(gates.sum(dim=1), torch.ones(2))
    assert torch.allclose(pooled[:, 8], gates[:, 1, None] * tokens[:, :2].mean(dim=1), atol=1e-6)


def test_entropy_is_one_for_a_uniform_choice_and_zero_for_one_token() -> None:
    uniform = torch.full((2, 12, 3), 1 / 12)
    single = torch.zeros(2, 12, 3)
    single[:, 4] = 1
    assert float(selection_entropy(uniform)) == pytest.approx(1, abs=1e-6)
    assert float(selection_entropy(single)) == 0


def test_entropy_counts_live_tokens_only() -> None:
    weights = torch.zeros(1, 12, 3)
    weights[:, :6] = 1 / 6
    assert float(selection_entropy(weights, torch.tensor([[True, False]]))) == pytest.approx(1, abs=1e-6)
