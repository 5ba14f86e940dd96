"""How much memory a batch needs, estimated before it is started.

The estimate counts what is alive at the peak of each stage without gradients: weights, the vision tower's widest tensors, the
tokenizer's scores, the key-value cache, the logits. Attention scores are never materialised. It errs high.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from mu2_model.configuration_mu2 import Mu2Config
from mu2_model.errors import MemoryEstimateError

MEMINFO = Path("/proc/meminfo")
# Allocator fragments and kernels' workspaces, as a factor on activations.
SLACK = 1.3


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes: of the weights, and on top of them at the peak of a batch."""

    weights: int
    vision: int
    tokenizer: int
    generation: int

    @property
    def batch(self) -> int:
        """Bytes on top of the weights: stages do not overlap, so the largest counts."""
        return int(SLACK * max(self.vision, self.tokenizer, self.generation))

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.batch


def estimate_memory(
    config: Mu2Config,
    parameters: int,
    *,
    batch: int = 1,
    chunks: int = 8,
    prompt_tokens: int = 512,
    new_tokens: int = 512,
    samples: int = 1,
    bytes_per_value: int = 2,
) -> MemoryEstimate:
    """Estimate for `batch` volumes of `chunks` chunks, `samples` drafts each, at `bytes_per_value` (2 for bf16)."""
    vision, tokenizer, text = config.vision, config.tokenizer, config.get_text_config()
    voxels = vision.num_channels * vision.image_size[0] * vision.image_size[1] * vision.image_size[2]
    patches = vision.patch_grid[0] * vision.patch_grid[1] * vision.patch_grid[2]
    live = batch * chunks
    pixels = live * voxels * (4 + bytes_per_value)
    widest = live * patches * (vision.intermediate_size * 2 + vision.hidden_size * 6)
    tokens = live * config.tokens_per_chunk
    refined = tokens * config.hidden_size * 8
    scores = tokens * tokenizer.num_selected_tokens * 10
    visual = batch * tokenizer.num_selected_tokens * 2 * config.hidden_size * 6
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    sequences, length = batch * samples, prompt_tokens + new_tokens
    cache = 2 * text.num_hidden_layers * heads * head_width * sequences * length * bytes_per_value
    prefill = (
        sequences * prompt_tokens * (getattr(text, "intermediate_size", 4 * text.hidden_size) * 3) * bytes_per_value
    )
    logits = sequences * config.vocab_size * 12
    return MemoryEstimate(
        weights=parameters * bytes_per_value,
        vision=pixels + widest * bytes_per_value,
        tokenizer=pixels + (refined + visual) * bytes_per_value + scores,
        generation=cache + prefill + logits,
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on the device; None where that cannot be known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu" and MEMINFO.is_file():
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def check_memory(estimate: MemoryEstimate, device: torch.device, batch: int) -> None:
    """Raise MemoryEstimateError when the batch would not fit what is free beside the loaded weights."""
    free = free_memory(device)
    if free is not None and estimate.batch > free:
        raise MemoryEstimateError(
            f"a batch of {batch} needs about {estimate.batch / 1e9:.1f} GB beside the weights, but {free / 1e9:.1f} GB "
            f"are free on {device}: draft fewer volumes or samples at once"
        )
