"""How much memory a checkpoint and a batch need, estimated before they are loaded and started.

The estimate counts what is alive at the peak of each stage: weights, the vision tower's widest tensors, the tokenizer's scores,
the key-value cache, the logits. Drafting keeps no gradients and materialises no attention of the language model; evidence does
the second and best slices the first, so each has an estimate of its own. It errs high.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mu2_model.configuration_mu2 import Mu2Config
from mu2_model.errors import MemoryEstimateError
from mu2_model.stored_weights import stored_tensors

MEMINFO = Path("/proc/meminfo")
# What a container may use, and uses: cgroup v2, absent outside one.
CGROUP = Path("/sys/fs/cgroup")
# Allocator fragments and kernels' workspaces, as a factor on activations.
SLACK = 1.3
# Values of a layer's width, and of its MLP's, that a transformer layer keeps for a gradient, with copies in float32.
KEPT_PER_WIDTH, KEPT_PER_INNER = 20, 5


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes: of the weights, and on top of them at the peak of a batch; `evidence` is 0 when none is asked for."""

    weights: int
    vision: int
    tokenizer: int
    generation: int
    evidence: int = 0

    @property
    def batch(self) -> int:
        """Bytes on top of the weights: stages do not overlap, so the largest counts."""
        return int(SLACK * max(self.vision, self.tokenizer, self.generation, self.evidence))

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
    evidence: bool = False,
) -> MemoryEstimate:
    """Estimate for `batch` volumes of `chunks` chunks, `samples` drafts each, at `bytes_per_value` (2 for bf16).

    `evidence` is made for one draft after the other, of `new_tokens` tokens at most.
    """
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
    estimate = MemoryEstimate(
        weights=parameters * bytes_per_value,
        vision=pixels + widest * bytes_per_value,
        tokenizer=pixels + (refined + visual) * bytes_per_value + scores,
        generation=cache + prefill + logits,
    )
    if not evidence:
        return estimate
    looked = _evidence_bytes(config, chunks, prompt_tokens, new_tokens, bytes_per_value)
    # The pixels of the batch stay while its drafts are explained.
    return replace(estimate, evidence=pixels + looked)


def _evidence_bytes(config: Mu2Config, chunks: int, prompt_tokens: int, draft_tokens: int, value_bytes: int) -> int:
    """Bytes that explaining one draft takes: all attention of the language model at once, or a run over changed pixels."""
    tokenizer, text, vision = config.tokenizer, config.get_text_config(), config.vision
    length, heads = prompt_tokens + draft_tokens, text.num_attention_heads
    # Every layer's weights are returned together; one layer's are scores and a float32 softmax besides.
    attention = heads * length**2 * (text.num_hidden_layers * value_bytes + 8 + value_bytes)
    logits = draft_tokens * config.vocab_size * (8 + 2 * value_bytes)
    voxels = vision.num_channels * math.prod(vision.image_size)
    tokens = chunks * config.tokens_per_chunk
    patches = chunks * math.prod(vision.patch_grid)
    visual = 2 * tokenizer.num_selected_tokens
    maps = (value_bytes + 4) * (
        tokens * tokenizer.num_selected_tokens + tokenizer.num_attention_heads * tokenizer.num_query_tokens * visual
    )
    maps += 8 * tokenizer.num_query_tokens * patches
    one = estimate_memory(config, 0, chunks=chunks, prompt_tokens=length, new_tokens=0, bytes_per_value=value_bytes)
    # The volume as it is, and blanked.
    changed = 2 * 4 * chunks * voxels
    return maps + changed + max(one.vision, one.tokenizer, one.generation + attention, one.generation + logits)


def slices_bytes(
    config: Mu2Config, *, chunks: int, prompt_tokens: int, draft_tokens: int, sentences: int, value_bytes: int
) -> int:
    """Bytes that the best slices of one draft take: what the gradient from its words back to the tokens must remember.

    The graph of the language model, the head and the visual tokenizer, and a gradient for every sentence.
    """
    tokenizer, text = config.tokenizer, config.get_text_config()
    length, tokens = prompt_tokens + draft_tokens, chunks * config.tokens_per_chunk
    inner = getattr(text, "intermediate_size", 4 * text.hidden_size)
    layer = length * (KEPT_PER_WIDTH * text.hidden_size + KEPT_PER_INNER * inner)
    logits = draft_tokens * config.vocab_size * (8 + 2 * value_bytes)
    visual, queries = 2 * tokenizer.num_selected_tokens, tokenizer.num_query_tokens
    refiner = 2 * KEPT_PER_WIDTH * tokenizer.num_layers * tokens * config.hidden_size
    aggregator = tokenizer.num_layers * config.hidden_size * (3 * KEPT_PER_WIDTH * queries + 4 * (visual + length))
    selection = tokens * tokenizer.num_selected_tokens * (12 + value_bytes) + 6 * visual * config.hidden_size
    graph = value_bytes * (text.num_hidden_layers * layer + refiner + aggregator + selection) + logits
    return int(SLACK * (graph + (sentences + 3) * tokens * config.hidden_size * value_bytes))


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on the device; None where that cannot be known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu" or not MEMINFO.is_file():
        return None
    available = next(line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
    machine = int(available.split()[1]) * 1024
    container = _free_in_container()
    return machine if container is None else min(machine, container)


def _free_in_container() -> int | None:
    """Bytes below the limit of this process's container, counting cached files as free; None without a limit."""
    limit = CGROUP / "memory.max"
    if not limit.is_file() or (most := limit.read_text().strip()) == "max":
        return None
    used = int((CGROUP / "memory.current").read_text())
    facts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    return max(0, int(most) - used + int(facts.get("inactive_file", 0)))


def check_weights_fit(folder: Path, value_bytes: int | None, device: torch.device) -> None:
    """Raise MemoryEstimateError when a checkpoint's weights would not fit the free memory.

    `value_bytes` is the size of a value once loaded; None: as stored. They pass through the host's memory on the way to
    another device, so both are asked. The activations of a batch are asked for when there is one.
    """
    needed = weight_bytes(folder, value_bytes)
    for place in dict.fromkeys((torch.device("cpu"), device)):
        free = free_memory(place)
        if free is not None and needed > free:
            raise MemoryEstimateError(
                f"the weights in {folder} need {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free on {place}: free "
                "memory, load them in a smaller dtype, or take a smaller checkpoint"
            )


def weight_bytes(folder: Path, value_bytes: int | None = None) -> int:
    """Bytes of a folder's safetensors, as stored or at `value_bytes` each; CheckpointError for a file that is damaged."""
    stored = stored_tensors(folder)
    if value_bytes is None:
        return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    return sum(math.prod(tensor.shape) for tensor in stored.values()) * value_bytes


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed; torch has a class of its own for that on a GPU alone."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def fits(needed_bytes: int, device: torch.device) -> bool:
    """Whether so many bytes are free on the device; True where that cannot be known."""
    free = free_memory(device)
    return free is None or needed_bytes <= free


def check_memory(estimate: MemoryEstimate, device: torch.device, batch: int) -> None:
    """Raise MemoryEstimateError when the batch would not fit what is free beside the loaded weights."""
    free = free_memory(device)
    if free is None or estimate.batch <= free:
        return
    without = replace(estimate, evidence=0).batch
    advice = "draft fewer volumes or samples at once"
    if without <= free:
        advice = f"ask without evidence ({without / 1e9:.1f} GB), or for fewer tokens"
    raise MemoryEstimateError(
        f"a batch of {batch} needs about {estimate.batch / 1e9:.1f} GB beside the weights, but {free / 1e9:.1f} GB "
        f"are free on {device}: {advice}"
    )
