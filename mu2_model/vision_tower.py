"""The 3D vision transformer (ViT-B/3D) that turns a chunk of slices into patch tokens, and the projector behind it.

Owned rather than taken from MONAI, whose blocks grew cross-attention keys that strict loading of published weights refuses.
Shape letters: L live chunks, P patches of a chunk, N pooled tokens of a chunk, W vision width, H language-model width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mu2_model.attention import merge_heads
from mu2_model.configuration_mu2 import Mu2Config, Mu2VisionConfig


class VisionBlock(GradientCheckpointingLayer):
    """A pre-norm transformer block: attention without bias on q, k, v, then a two-layer MLP with exact GELU."""

    def __init__(self, config: Mu2VisionConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_LPW: Tensor) -> Tensor:
        """One block; shape is kept."""
        chunks, patches, width = x_LPW.shape
        qkv = self.qkv(self.norm1(x_LPW)).view(chunks, patches, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        x_LPW = x_LPW + self.output(merge_heads(F.scaled_dot_product_attention(query, key, value)))
        return x_LPW + self.fc2(F.gelu(self.fc1(self.norm2(x_LPW))))


class PatchEmbedding(nn.Linear):
    """Cuts a chunk into patches and embeds each by one matrix, as published."""

    def __init__(self, config: Mu2VisionConfig):
        super().__init__(config.num_channels * math.prod(config.patch_size), config.hidden_size)
        self.patch_size = tuple(config.patch_size)

    def forward(self, chunks: Tensor) -> Tensor:
        """(L, channels, D, H, W) to (L, P, W)."""
        return super().forward(patchify(chunks, self.patch_size))


class ConvolutionStem(nn.Module):
    """3×3×3 convolutions that halve the axes until a voxel stands for a patch (Xiao et al. 2021, arXiv 2106.14881).

    One matrix over a patch must know a small lesion at each of its places anew; a convolution knows it at all of them. Every
    level but the first, where voxels are many, refines what it has by a second convolution with a residual.
    """

    def __init__(self, config: Mu2VisionConfig):
        super().__init__()
        widths = list(config.stem_channels)
        halvings = [patch.bit_length() - 1 for patch in config.patch_size]
        self.reductions, self.refinements = nn.ModuleList(), nn.ModuleList()
        for level, (taken, given) in enumerate(zip([config.num_channels, *widths], widths, strict=False)):
            # An axis with fewer halvings than levels is halved in the first ones, where voxels are most.
            depth, rows, columns = (2 if level < count else 1 for count in halvings)
            self.reductions.append(convolution(taken, given, (depth, rows, columns)))
            if level:
                self.refinements.append(convolution(given, given, (1, 1, 1)))

    def forward(self, chunks: Tensor) -> Tensor:
        """(L, channels, D, H, W) to (L, P, W)."""
        return self.tokens(self.levels(chunks))

    def levels(self, chunks: Tensor) -> list[Tensor]:
        """The maps (L, w, d, h, w) after every level, the finest first."""
        # Channels last: half the time on a CPU, and the flattening to tokens is free.
        maps = [self.reductions[0](chunks.contiguous(memory_format=torch.channels_last_3d))]
        for reduce, refine in zip(list(self.reductions)[1:], self.refinements, strict=True):
            x = reduce(maps[-1])
            maps.append(x + refine(x))
        return maps

    def tokens(self, maps: list[Tensor]) -> Tensor:
        """The last level as tokens (L, P, W)."""
        return maps[-1].flatten(2).transpose(1, 2)


def convolution(taken: int, given: int, stride: tuple[int, int, int]) -> nn.Sequential:
    """Convolution, group norm and GELU, eight channels a group."""
    return nn.Sequential(
        nn.Conv3d(taken, given, kernel_size=3, stride=stride, padding=1),
        nn.GroupNorm(max(1, given // 8), given),
        nn.GELU(),
    )


class Mu2VisionTower(nn.Module):
    """Patch embedding, learned positions, CLS token, pre-norm blocks and a final LayerNorm; the CLS token is dropped."""

    def __init__(self, config: Mu2VisionConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.image_size = tuple(config.image_size)
        self.patch_embedding = ConvolutionStem(config) if config.stem_channels else PatchEmbedding(config)
        patches = math.prod(config.patch_grid)
        self.position_embedding = nn.Parameter(torch.zeros(1, patches, config.hidden_size))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, chunks: Tensor) -> Tensor:
        """(L, channels, slices, rows, columns) to patch tokens (L, P, W), ordered (slice, row, column)."""
        if tuple(chunks.shape[-3:]) != self.image_size:
            raise ValueError(f"chunks of {tuple(chunks.shape[-3:])} voxels, but the tower takes {self.image_size}")
        return self.attend(self.patch_embedding(chunks))

    def attend(self, x_LPW: Tensor) -> Tensor:
        """What follows the embedding; shape is kept."""
        x_LPW = x_LPW + self.position_embedding
        x_LPW = torch.cat((self.cls_token.expand(x_LPW.shape[0], -1, -1), x_LPW), dim=1)
        for block in self.blocks:
            x_LPW = block(x_LPW)
        return self.norm(x_LPW)[:, 1:]


def patchify(chunks: Tensor, patch_size: tuple[int, ...]) -> Tensor:
    """Cut chunks (L, c, D, H, W) into vectors (L, P, p1·p2·p3·c), voxels ordered (p1 p2 p3 c)."""
    count, channels, *size = chunks.shape
    (p1, p2, p3), (d, h, w) = patch_size, [axis // patch for axis, patch in zip(size, patch_size, strict=True)]
    patches = chunks.reshape(count, channels, d, p1, h, p2, w, p3).permute(0, 2, 4, 6, 3, 5, 7, 1)
    return patches.reshape(count, d * h * w, p1 * p2 * p3 * channels)


class Mu2Projector(nn.Module):
    """Average-pool the patch grid, then Linear, GELU, Linear to the width of the language model."""

    def __init__(self, config: Mu2Config):
        super().__init__()
        self.grid = config.projector_grid
        self.pooling_size = config.tokenizer.projector_pooling_size
        self.fc1 = nn.Linear(config.vision.hidden_size, config.hidden_size)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_LPW: Tensor) -> Tensor:
        """(L, P, W) to (L, N, H)."""
        return self.project(self.pool(x_LPW))

    def pool(self, x_LPW: Tensor) -> Tensor:
        """The part before the first weight: (L, P, W) to (L, N, W)."""
        # A mean over views, since avg_pool3d knows no half precision on CPUs.
        return patch_boxes(x_LPW, self.grid, self.pooling_size).mean(dim=2)

    def project(self, x: Tensor) -> Tensor:
        """The part with weights: (..., N, W) to (..., N, H)."""
        return self.fc2(F.gelu(self.fc1(x)))


def patch_boxes(x_LPW: Tensor, grid: tuple[int, int, int], size: int) -> Tensor:
    """Group patches (L, P, W) of a grid (slices, rows, columns) into boxes of size³: (L, N, size³, W)."""
    depth, height, width = (axis // size for axis in grid)
    boxes = x_LPW.reshape(-1, depth, size, height, size, width, size, x_LPW.shape[-1])
    return boxes.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, depth * height * width, size**3, x_LPW.shape[-1])
