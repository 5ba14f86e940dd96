"""The μ² tokenizer: a volume's tokens are refined, selected (DTS), pooled (DMTP) and gathered under the question.

Shape letters: B batch, C chunks, N pooled tokens of a chunk, K selected tokens, V visual tokens after pooling, Q queries,
T question tokens, H width, h heads. Equations: arXiv 2507.00316, section 2. Every place where the published design
is inert or collapses is a field of `Mu2TokenizerConfig`; both computations stand side by side here.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mu2_model.attention import MultiHeadAttention, ScaledLinear, split_heads
from mu2_model.configuration_mu2 import Mu2TokenizerConfig

INITIAL_MEAN_SHARE = 0.03
VARIANCE_FLOOR = 1e-6


@dataclass(frozen=True)
class TokenizerMaps:
    """What the tokenizer did with one batch: the weights evidence is made of and the figures training watches."""

    selection: Tensor  # (B, M, K) weight of every one of M = C·N tokens for every selected token
    gates: Tensor  # (B, scales) weight of every pooling scale
    aggregation: (
        Tensor | None
    )  # (B, h, Q, V) weight of every visual token for every query; only when maps are asked for


class SelfAttention(nn.Module):
    """Self-attention over the second axis; under the published quirk of plain attention, over the first axis."""

    def __init__(self, config: Mu2TokenizerConfig, width: int):
        super().__init__()
        self.over_first_axis = config.attention_over_first_axis
        self.attention = MultiHeadAttention(
            width, config.num_attention_heads, config.positions, config.max_relative_positions, config.residual_gain
        )

    def forward(self, x_BSH: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """Shape is kept."""
        if self.over_first_axis:
            x_SBH = x_BSH.transpose(0, 1)
            return self.attention(x_SBH, x_SBH).transpose(0, 1)
        return self.attention(x_BSH, x_BSH, mask_BS)


class RefinerLayer(GradientCheckpointingLayer):
    """Spatial attention over the tokens of a chunk, then temporal attention over the chunks at each position.

    Without residuals (published) each sublayer replaces the tokens by averages of themselves: at the start of training all
    tokens of a volume become the same vector.
    """

    def __init__(self, config: Mu2TokenizerConfig, width: int):
        super().__init__()
        self.residual = config.refiner_residual
        self.spatial_attention = SelfAttention(config, width)
        self.temporal_attention = SelfAttention(config, width)
        if self.residual:
            self.spatial_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
            self.temporal_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, x_BCNH: Tensor, chunk_mask_BC: Tensor | None = None) -> Tensor:
        """Shape is kept; masked chunks are attended to by nobody."""
        batch, chunks, tokens, _ = x_BCNH.shape
        x = x_BCNH.flatten(0, 1)
        mixed = self.spatial_attention(self.spatial_norm(x) if self.residual else x)
        x = x + mixed if self.residual else mixed
        x = x.unflatten(0, (batch, chunks)).transpose(1, 2).flatten(0, 1)
        mask = None if chunk_mask_BC is None else chunk_mask_BC.repeat_interleave(tokens, dim=0)
        mixed = self.temporal_attention(self.temporal_norm(x) if self.residual else x, mask)
        x = x + mixed if self.residual else mixed
        return x.unflatten(0, (batch, tokens)).transpose(1, 2)


class TokenStandardization(nn.Module):
    """Takes the mean of a volume's tokens off, scales what is left to unit RMS and adds a small learned share of the mean.

    All tokens of a volume share one large mean (patches are bright on average, GELU is positive on average). Attention,
    selections and queries are averages of tokens, so at the start of training the mean would be all that is left of them.
    """

    def __init__(self, width: int):
        super().__init__()
        self.mean_share = nn.Parameter(torch.full((width,), INITIAL_MEAN_SHARE))

    def forward(self, x_BCNH: Tensor, chunk_mask_BC: Tensor | None = None) -> Tensor:
        """Shape is kept; masked chunks do not count."""
        dtype = torch.promote_types(x_BCNH.dtype, torch.float32)
        x = x_BCNH.to(dtype)
        if chunk_mask_BC is None:
            weight_BC11 = x.new_full((*x.shape[:2], 1, 1), 1 / x.shape[1])
        else:
            live = chunk_mask_BC.to(dtype)
            weight_BC11 = (live / live.sum(dim=1, keepdim=True))[:, :, None, None]
        mean = (x.mean(dim=2, keepdim=True) * weight_BC11).sum(dim=1, keepdim=True)
        centred = x - mean
        power = (centred.square().mean(dim=(2, 3), keepdim=True) * weight_BC11).sum(dim=1, keepdim=True)
        # The floor keeps a volume of one value (air) from being noise at unit scale.
        floor = VARIANCE_FLOOR * mean.square().mean(dim=3, keepdim=True) + torch.finfo(dtype).tiny
        direction = mean * torch.rsqrt(mean.square().mean(dim=3, keepdim=True) + torch.finfo(dtype).tiny)
        return (centred * torch.rsqrt(power + floor) + self.mean_share * direction).to(x_BCNH.dtype)


class Refiner(nn.Module):
    """The stack of refiner layers; with residuals it ends in a LayerNorm."""

    def __init__(self, config: Mu2TokenizerConfig, width: int):
        super().__init__()
        self.standardize = TokenStandardization(width) if config.standardize_tokens else None
        self.layers = nn.ModuleList(RefinerLayer(config, width) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.refiner_residual else nn.Identity()

    def forward(self, x_BCNH: Tensor, chunk_mask_BC: Tensor | None = None) -> Tensor:
        """Shape is kept."""
        if self.standardize is not None:
            x_BCNH = self.standardize(x_BCNH, chunk_mask_BC)
        for layer in self.layers:
            x_BCNH = layer(x_BCNH, chunk_mask_BC)
        return self.norm(x_BCNH)


class TokenSelection(nn.Module):
    """DTS: K selections out of all tokens of a volume.

    Soft: S = x W + b, A = softmax(S / τ) over the tokens, selected = Aᵀ x; b is constant over the tokens and cancels.
    Hard: a score per token, the K highest are gathered in descending order, and no gradient reaches the scores. A volume with
    fewer tokens, which only skipping its empty chunks makes possible, is gathered whole, every token as often as any other.
    """

    def __init__(self, config: Mu2TokenizerConfig, width: int):
        super().__init__()
        self.soft = config.selection == "soft"
        self.count = config.num_selected_tokens
        self.repeats = config.mask_empty_chunks
        self.score = ScaledLinear(width, self.count if self.soft else 1, config.score_gain)
        self.initial_temperature = config.selection_temperature
        if self.soft and config.learnable_temperature:
            # One value, not a scalar: FSDP2 spreads no scalar parameter.
            self.log_temperature = nn.Parameter(torch.full((1,), math.log(config.selection_temperature)))

    def temperature(self) -> Tensor | float:
        """τ, learned or fixed."""
        return self.log_temperature.exp() if hasattr(self, "log_temperature") else self.initial_temperature

    def forward(self, x_BCNH: Tensor, chunk_mask_BC: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the selected tokens (B, K, H) and the weights (B, C·N, K) they were made with.

        Raises ValueError when the hard variant of the legacy preset is asked for more tokens than the volume has.
        """
        tokens = x_BCNH.shape[2]
        x_BMH = x_BCNH.flatten(1, 2)
        score_BMK = self.score(x_BMH)
        score_BMK = score_BMK.to(torch.promote_types(score_BMK.dtype, torch.float32))
        if self.soft:
            # Before masking: a learned τ under a score of -inf would get a gradient of inf times 0.
            score_BMK = score_BMK / self.temperature()
        if chunk_mask_BC is not None:
            mask_BM = chunk_mask_BC.repeat_interleave(tokens, dim=1)
            score_BMK = score_BMK.masked_fill(~mask_BM[..., None], float("-inf"))
        if self.soft:
            weight_BMK = torch.softmax(score_BMK, dim=1).to(x_BMH.dtype)
            return weight_BMK.transpose(1, 2) @ x_BMH, weight_BMK
        return self._gather(x_BMH, score_BMK.squeeze(-1))

    def _gather(self, x_BMH: Tensor, score_BM: Tensor) -> tuple[Tensor, Tensor]:
        live_B = torch.isfinite(score_BM).sum(dim=1)
        if not self.repeats and int(live_B.min()) < self.count:
            raise ValueError(f"hard selection of {self.count} tokens, but a volume has only {int(live_B.min())}")
        order_BM = score_BM.argsort(dim=1, descending=True)
        # Repeated in place, not at the end: pooling then still averages tokens of neighbouring rank.
        rank_K = torch.arange(self.count, device=score_BM.device)
        rank_BK = torch.where(live_B[:, None] < self.count, rank_K * live_B[:, None] // self.count, rank_K)
        index_BK = order_BM.gather(1, rank_BK)
        weight_BMK = F.one_hot(index_BK, x_BMH.shape[1]).transpose(1, 2).to(x_BMH.dtype)
        selected = x_BMH.gather(1, index_BK[..., None].expand(-1, -1, x_BMH.shape[2]))
        return selected, weight_BMK


class DynamicTokenPooling(nn.Module):
    """DMTP: average-pool the selected tokens at several scales and weigh the scales by a gate.

    The published gate applies one Linear(H, 1) to the mean of each scale. Average pooling keeps the mean, so all logits are
    equal and the gate is exactly 1 / scales with no gradient; one output per scale on that mean cures it.
    """

    def __init__(self, config: Mu2TokenizerConfig, width: int):
        super().__init__()
        self.scales = tuple(config.pooling_scales)
        self.gated = config.gated_pooling
        self.per_scale = config.gate_per_scale
        if self.gated:
            self.gate = nn.Linear(width, len(self.scales) if self.per_scale else 1)

    def forward(self, x_BKH: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the pooled tokens (B, V, H), V = Σ K / scale, and the gates (B, scales)."""
        pooled = [x_BKH.unflatten(1, (-1, scale)).mean(dim=2) for scale in self.scales]
        if not self.gated:
            return torch.cat(pooled, dim=1), x_BKH.new_ones(x_BKH.shape[0], len(self.scales))
        if self.per_scale:
            logits_BS = self.gate(x_BKH.mean(dim=1))
        else:
            logits_BS = torch.cat([self.gate(part.mean(dim=1)) for part in pooled], dim=1)
        gates_BS = torch.softmax(logits_BS, dim=1)
        weighted = [part * gates_BS[:, scale, None, None] for scale, part in enumerate(pooled)]
        return torch.cat(weighted, dim=1), gates_BS


class AggregatorLayer(GradientCheckpointingLayer):
    """Self-attention of the queries, then cross-attention to the visual tokens, then to the question.

    Each is added and followed by a LayerNorm.
    """

    def __init__(self, config: Mu2TokenizerConfig, width: int):
        super().__init__()
        self.self_attention = SelfAttention(config, width)
        heads, gain = config.num_attention_heads, config.residual_gain
        self.visual_attention = MultiHeadAttention(width, heads, output_gain=gain)
        self.question_attention = MultiHeadAttention(width, heads, output_gain=gain)
        self.self_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.visual_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.question_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(
        self, query_BQH: Tensor, visual_BVH: Tensor, question_BTH: Tensor, question_mask_BT: Tensor | None = None
    ) -> Tensor:
        """Returns the queries (B, Q, H)."""
        query_BQH = self.self_norm(query_BQH + self.self_attention(query_BQH))
        query_BQH = self.visual_norm(query_BQH + self.visual_attention(query_BQH, visual_BVH))
        read = self.question_attention(query_BQH, question_BTH, question_mask_BT)
        return self.question_norm(query_BQH + read)


class LinearAggregation(nn.Module):
    """softmax(q kᵀ / √d) applied, head by head, to the raw visual tokens: no value and no output projection."""

    def __init__(self, config: Mu2TokenizerConfig, width: int):
        super().__init__()
        self.heads = config.num_attention_heads
        self.query = ScaledLinear(width, width, config.aggregation_gain)
        self.key = ScaledLinear(width, width, config.aggregation_gain)
        if config.unused_projections:
            self.value = ScaledLinear(width, width)
            self.output = ScaledLinear(width, width)

    def forward(self, query_BQH: Tensor, key_BVH: Tensor, visual_BVH: Tensor) -> Tensor:
        """Returns (B, Q, H)."""
        query = split_heads(self.query(query_BQH), self.heads)
        key = split_heads(self.key(key_BVH), self.heads)
        value = split_heads(visual_BVH, self.heads)
        context = F.scaled_dot_product_attention(query, key, value)
        return context.transpose(1, 2).flatten(2)

    def weights(self, query_BQH: Tensor, key_BVH: Tensor) -> Tensor:
        """The attention weights (B, h, Q, V) that `forward` applies, for evidence."""
        query = split_heads(self.query(query_BQH), self.heads)
        key = split_heads(self.key(key_BVH), self.heads)
        return torch.softmax(query @ key.transpose(2, 3) / math.sqrt(query.shape[-1]), dim=-1)


class Aggregator(nn.Module):
    """The text-conditioned aggregator: Q learned queries read the visual tokens and the question, then gather."""

    def __init__(self, config: Mu2TokenizerConfig, width: int):
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, width))
        self.layers = nn.ModuleList(AggregatorLayer(config, width) for _ in range(config.num_layers))
        self.aggregation = LinearAggregation(config, width)
        self.key_norm: nn.Module = nn.Identity()
        self.question_norm: nn.Module = nn.Identity()
        if config.normalize_aggregator_inputs:
            self.key_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
            self.question_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(
        self,
        visual_BVH: Tensor,
        question_BTH: Tensor,
        question_mask_BT: Tensor | None = None,
        output_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the tokens for the language model (B, Q, H) and, on request, the weights they were gathered with."""
        key_BVH, question_BTH = self.key_norm(visual_BVH), self.question_norm(question_BTH)
        query_BQH = self.query_tokens.expand(visual_BVH.shape[0], -1, -1)
        for layer in self.layers:
            query_BQH = layer(query_BQH, key_BVH, question_BTH, question_mask_BT)
        weights = self.aggregation.weights(query_BQH, key_BVH) if output_weights else None
        return self.aggregation(query_BQH, key_BVH, visual_BVH), weights


class Mu2VisualTokenizer(nn.Module):
    """Refiner, DTS, DMTP and aggregator in the order of the paper's figure."""

    def __init__(self, config: Mu2TokenizerConfig, width: int):
        super().__init__()
        self.mask_chunks = config.mask_empty_chunks
        self.mask_question = config.mask_question_padding
        self.refiner = Refiner(config, width)
        self.selection = TokenSelection(config, width)
        self.pooling = DynamicTokenPooling(config, width)
        self.aggregator = Aggregator(config, width)

    def forward(
        self,
        x_BCNH: Tensor,
        question_BTH: Tensor,
        question_mask_BT: Tensor | None = None,
        chunk_mask_BC: Tensor | None = None,
        output_maps: bool = False,
    ) -> tuple[Tensor, Tensor, TokenizerMaps]:
        """Returns the tokens for the language model (B, Q, H), the visual tokens (B, V, H) and the maps."""
        chunk_mask_BC = chunk_mask_BC if self.mask_chunks else None
        question_mask_BT = question_mask_BT if self.mask_question else None
        refined = self.refiner(x_BCNH, chunk_mask_BC)
        selected, selection_BMK = self.selection(refined, chunk_mask_BC)
        visual_BVH, gates_BS = self.pooling(selected)
        tokens_BQH, weights = self.aggregator(visual_BVH, question_BTH, question_mask_BT, output_maps)
        return tokens_BQH, visual_BVH, TokenizerMaps(selection_BMK, gates_BS, weights)


def selection_entropy(selection_BMK: Tensor, chunk_mask_BC: Tensor | None = None) -> Tensor:
    """Mean entropy of the selection weights over the entropy of a uniform choice: 1 means that nothing is selected."""
    weight = selection_BMK.detach().float()
    entropy_BK = torch.special.entr(weight).sum(dim=1)
    live_B = torch.full((weight.shape[0],), weight.shape[1], device=weight.device, dtype=torch.float32)
    if chunk_mask_BC is not None:
        live_B = live_B * chunk_mask_BC.float().mean(dim=1)
    return (entropy_BK / live_B.log()[:, None]).mean()
