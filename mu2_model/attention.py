"""Multi-head attention of the visual tokenizer: plain, with a relative bias (RPE), or rotary.

Shape letters: B batch, S queries, T keys, H width, h heads, d width of a head.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Positions = Literal["relative", "rotary", "none"]
ROTARY_BASE = 10_000.0


def relative_bias(table_Ph: Tensor, length: int) -> Tensor:
    """Bias (h, S, S) to add to the scores of `length` positions: entry (i, j) is the table's row j - i + (P - 1) / 2."""
    centre = (table_Ph.shape[0] - 1) // 2
    if length > centre + 1:
        raise ValueError(f"{length} positions, but the relative table reaches only {centre + 1}")
    position = torch.arange(length, device=table_Ph.device)
    offset_SS = position[None, :] - position[:, None] + centre
    return table_Ph[offset_SS].permute(2, 0, 1)


def rotate(x_BhSd: Tensor) -> Tensor:
    """Rotary position embedding with halves rotated, positions counted from 0."""
    half = x_BhSd.shape[-1] // 2
    # Angles in at least float32: bfloat16 cannot tell neighbouring positions apart beyond 256.
    dtype = torch.promote_types(x_BhSd.dtype, torch.float32)
    exponent = torch.arange(half, device=x_BhSd.device, dtype=dtype) / half
    position = torch.arange(x_BhSd.shape[-2], device=x_BhSd.device, dtype=dtype)
    angle_Sf = position[:, None] * ROTARY_BASE**-exponent
    cos, sin = angle_Sf.cos().to(x_BhSd.dtype), angle_Sf.sin().to(x_BhSd.dtype)
    first, second = x_BhSd.split(half, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class ScaledLinear(nn.Linear):
    """A linear map whose weights start normal with standard deviation gain / √inputs, so that width does not matter."""

    def __init__(self, inputs: int, outputs: int, gain: float = 1.0):
        # Set before the parameters exist: transformers asks for it when it gives them their values.
        self.initial_std = gain / math.sqrt(inputs)
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        """Values as described; zero bias."""
        nn.init.normal_(self.weight, std=self.initial_std)
        nn.init.zeros_(self.bias)


class MultiHeadAttention(nn.Module):
    """softmax(q kᵀ / √d + bias) v per head, then an output projection.

    `positions` is meant for self-attention; cross-attention uses "none". `output_gain` scales the output projection's
    initial values.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        positions: Positions = "none",
        max_relative_positions: int = 512,
        output_gain: float = 1.0,
    ):
        super().__init__()
        self.heads, self.positions = heads, positions
        self.query = ScaledLinear(width, width)
        self.key = ScaledLinear(width, width)
        self.value = ScaledLinear(width, width)
        self.output = ScaledLinear(width, width, output_gain)
        if positions == "relative":
            self.relative_bias = nn.Parameter(torch.zeros(2 * max_relative_positions - 1, heads))

    def forward(self, query_BSH: Tensor, memory_BTH: Tensor, memory_mask_BT: Tensor | None = None) -> Tensor:
        """Attend from each query to the memory; masked (False) memory positions have no weight. Returns (B, S, H)."""
        query = split_heads(self.query(query_BSH), self.heads)
        key = split_heads(self.key(memory_BTH), self.heads)
        value = split_heads(self.value(memory_BTH), self.heads)
        if self.positions == "rotary":
            query, key = rotate(query), rotate(key)
        bias = self._score_bias(query, memory_mask_BT)
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.output(merge_heads(context))

    def _score_bias(self, query_BhSd: Tensor, memory_mask_BT: Tensor | None) -> Tensor | None:
        mask = None if memory_mask_BT is None else memory_mask_BT[:, None, None, :]
        if self.positions != "relative":
            return mask
        bias = relative_bias(self.relative_bias, query_BhSd.shape[2])[None].to(query_BhSd.dtype)
        return bias if mask is None else bias.masked_fill(~mask, float("-inf"))


def split_heads(x_BSH: Tensor, heads: int) -> Tensor:
    """(B, S, H) to (B, h, S, d)."""
    batch, length, width = x_BSH.shape
    return x_BSH.view(batch, length, heads, width // heads).transpose(1, 2)


def merge_heads(x_BhSd: Tensor) -> Tensor:
    """(B, h, S, d) to (B, S, H)."""
    batch, heads, length, depth = x_BhSd.shape
    return x_BhSd.transpose(1, 2).reshape(batch, length, heads * depth)
