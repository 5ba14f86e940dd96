"""Resampling as one matrix per axis: CPU and GPU do the same arithmetic, and the way back is known exactly.

A row of such a matrix reaches a few neighbouring values only, so it is kept as dense blocks along its diagonal: what is zero is
neither stored nor multiplied.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Tall enough for a fast product, short enough that a block holds few zeros.
BLOCK_ROWS = 32


@dataclass(frozen=True)
class Block:
    """Rows of a resampling matrix with the source values that any of them reaches."""

    rows: slice
    source: slice
    weights: Tensor  # (rows, source)


class Resampling:
    """A resampling matrix (count, source) cut into blocks.

    `reach` is the part of the source that any weight reaches; sources given to the methods are that part alone.
    """

    def __init__(self, weights: Tensor, device: torch.device | str = "cpu"):
        self.count = weights.shape[0]
        self.reach = used_columns(weights)
        weights = weights[:, self.reach].to(device)
        self.blocks = [
            Block(slice(first, first + BLOCK_ROWS), used, weights[first : first + BLOCK_ROWS, used].contiguous())
            for first in range(0, self.count, BLOCK_ROWS)
            for used in [used_columns(weights[first : first + BLOCK_ROWS])]
        ]

    def rows(self, planes: Tensor) -> Tensor:
        """Planes (slices, source, columns) to (slices, count, columns)."""
        out = planes.new_empty(planes.shape[0], self.count, planes.shape[2])
        for block in self.blocks:
            out[:, block.rows] = block.weights @ planes[:, block.source]
        return out

    def columns(self, planes: Tensor, out: Tensor | None = None) -> Tensor:
        """Planes (slices, rows, source) to (slices, rows, count), written into `out` when it is given."""
        out = planes.new_empty(*planes.shape[:2], self.count) if out is None else out
        lines = planes.flatten(0, 1)
        for block in self.blocks:
            made = lines[:, block.source] @ block.weights.T
            out[:, :, block.rows] = made.view(*planes.shape[:2], -1)
        return out


def used_columns(weights: Tensor) -> slice:
    """The source values, first to last, that any weight (count, source) reaches."""
    used = (weights != 0).any(dim=0).nonzero().squeeze(1)
    return slice(int(used[0]), int(used[-1]) + 1)


def triangle_weights(source: int, count: int, step: float, start: float) -> Tensor:
    """Matrix (count, source) that samples `source` values at start + (i + 1/2) step - 1/2 by linear interpolation.

    Where the step is longer than one value the triangle is widened to it, so that nothing is skipped (anti-aliasing).
    """
    centre = start + (torch.arange(count, dtype=torch.float64) + 0.5) * step - 0.5
    distance = (torch.arange(source, dtype=torch.float64)[None, :] - centre.clamp(0, source - 1)[:, None]).abs()
    weight = (1 - distance / max(step, 1.0)).clamp(min=0)
    return (weight / weight.sum(dim=1, keepdim=True)).float()


def corner_weights(source: int, count: int) -> Tensor:
    """Matrix (count, source) of the published resize along one axis.

    Gaussian blur of σ = (source / count - 1) / 2 with zeros outside, then linear interpolation with the corners aligned.
    """
    position = torch.linspace(0, source - 1, count, dtype=torch.float64) if count > 1 else torch.zeros(1).double()
    index = torch.arange(source, dtype=torch.float64)
    linear = (1 - (index[None, :] - position[:, None]).abs()).clamp(min=0)
    sigma = max(0.0, (source / count - 1) / 2)
    if sigma == 0:
        return linear.float()
    reach = int(max(4 * sigma, 0.5) + 0.5)
    offset = index[None, :] - index[:, None]
    scale = 1 / (sigma * math.sqrt(2))
    blur = 0.5 * (torch.erf(scale * (offset + 0.5)) - torch.erf(scale * (offset - 0.5)))
    return (linear @ blur.masked_fill(offset.abs() > reach, 0)).float()
