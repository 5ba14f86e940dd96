"""Config files of the stages: how processes are launched, what the trainer is told, what a device holds.

A file has three parts: `launch` is a config of `accelerate launch`, `training` holds arguments of TRL's SFTConfig or DPOConfig,
`hardware` says what a device offers. `check` builds the arguments and estimates memory before an hour is spent waiting.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.modeling_utils import PreTrainedModel
from trl import DPOConfig, SFTConfig

from mu2_model import Mu2Config, Mu2ForConditionalGeneration
from training.errors import TrainingError
from training.recipes import STAGES
from training.sft import LORA_TARGETS

GIB = 1 << 30
CONFIG_FOLDER = Path(__file__).parent / "configs"
SECTIONS = {"launch", "training", "hardware"}
HEADROOM = 0.9
"""Share of a device that an estimate may fill: the allocator's own losses take the rest."""
LAYER_BYTES_PER_TOKEN_AND_WIDTH = 34
"""Bytes a transformer layer keeps for its backward pass, per token and unit of width, in 16 bit (Korthikanti 2022, eq. 2)."""


class ConfigError(TrainingError, ValueError):
    """A config file that cannot be used; the message names the key."""


@dataclass(frozen=True)
class RunConfig:
    """One config file."""

    path: Path
    launch: dict[str, Any]
    training: dict[str, Any]
    hardware: dict[str, Any] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        """Processes over all machines."""
        return int(self.launch.get("num_processes", 1))

    @property
    def strategy(self) -> str:
        """How the model is spread: "single", "ddp", "fsdp2" or "zero2"."""
        kind = str(self.launch.get("distributed_type", "NO"))
        if kind == "FSDP":
            return "fsdp2"
        if kind == "DEEPSPEED":
            return f"zero{self.launch['deepspeed_config']['zero_stage']}"
        return "ddp" if self.processes > 1 else "single"


def find_config(name: str) -> Path:
    """A config file by path, or by the name of one that ships (`cpu`, `gpu`, `a100x4_fsdp2`, ...)."""
    path = Path(name)
    shipped = CONFIG_FOLDER / f"{name}.yaml"
    if not path.is_file() and not shipped.is_file():
        names = ", ".join(sorted(file.stem for file in CONFIG_FOLDER.glob("*.yaml")))
        raise ConfigError(f"no config file {name}; shipped are {names}")
    return path if path.is_file() else shipped


def load_config(name: str) -> RunConfig:
    """Read a config file; ConfigError for a section that is not known or not a mapping."""
    path = find_config(name)
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    strange = set(content) - SECTIONS
    if strange:
        raise ConfigError(f"{path.name}: unknown sections {sorted(strange)}; there are {sorted(SECTIONS)}")
    parts = {section: content.get(section) or {} for section in SECTIONS}
    for section, value in parts.items():
        if not isinstance(value, dict):
            raise ConfigError(f"{path.name}: {section} is not a mapping")
    return RunConfig(path, **parts)


def trainer_arguments(stage: str, config: RunConfig, out: Path, **overrides: Any) -> SFTConfig | DPOConfig:
    """The TRL arguments of a stage: its defaults, then the file, then `overrides` that are not None.

    ConfigError for a key that TRL does not know.
    """
    defaults = STAGES[stage]
    values: dict[str, Any] = {
        "output_dir": str(out),
        "learning_rate": defaults.learning_rate,
        "num_train_epochs": defaults.epochs,
        "lr_scheduler_type": defaults.schedule,
        "warmup_steps": defaults.warmup_ratio,
        "per_device_train_batch_size": defaults.batch_size,
        "per_device_eval_batch_size": defaults.batch_size,
        "weight_decay": defaults.weight_decay,
        "save_strategy": "steps",
        "save_steps": 0.1,
        "save_total_limit": 2,
        "logging_steps": 10,
        # Collators need every column, and text is never cut by the trainer (see collators.check_lengths).
        "remove_unused_columns": False,
        "report_to": "tensorboard",
        "seed": 0,
    }
    if stage == "dpo":
        values["beta"] = defaults.beta
    values |= config.training | {key: value for key, value in overrides.items() if value is not None}
    try:
        return DPOConfig(**values) if stage == "dpo" else SFTConfig(**values)
    except TypeError as error:
        raise ConfigError(f"{config.path.name}, section training: {error}") from error


def arguments_to_check(stage: str, config: RunConfig, out: Path, **overrides: Any) -> SFTConfig | DPOConfig:
    """`trainer_arguments` on a machine that lacks the devices, such as a login node, for looking at them."""
    if not torch.cuda.is_available():
        overrides |= {"bf16": False, "use_cpu": True}
    return trainer_arguments(stage, config, out, **overrides)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device: what is there all the time, and what a step adds."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.reference + self.activations

    def text(self, available: float | None) -> str:
        """The estimate to read; `available` in GiB."""
        names = ("weights", "gradients", "optimizer", "reference", "activations")
        parts = ", ".join(f"{name} {getattr(self, name) / GIB:.2f}" for name in names if getattr(self, name))
        line = f"memory per device: {self.total / GIB:.2f} GiB ({parts})"
        if available is None:
            return line
        verdict = "fits" if self.total <= HEADROOM * available * GIB else "DOES NOT FIT"
        return f"{line}; {verdict} into {available:g} GiB with {100 * (1 - HEADROOM):.0f} % left free"


def parameter_counts(config: Mu2Config, frozen: tuple[str, ...]) -> tuple[int, int]:
    """All parameters of a config and those that learn, counted without making a weight."""
    with torch.device("meta"):
        model = Mu2ForConditionalGeneration(config)
    still = {id(p) for part in frozen for p in model.model.get_submodule(part).parameters()}
    everything: list[Any] = list(PreTrainedModel.parameters(model))
    return sum(p.numel() for p in everything), sum(p.numel() for p in everything if id(p) not in still)


def adapter_parameters(config: Mu2Config, rank: int) -> int:
    """Parameters of LoRA adapters of this rank on the decoder's projections, as `LoraSettings` places them."""
    with torch.device("meta"):
        model = Mu2ForConditionalGeneration(config)
    adapted = [part for name, part in model.named_modules() if re.fullmatch(LORA_TARGETS, name)]
    return sum(rank * (part.in_features + part.out_features) for part in adapted)


def estimate_memory(
    config: Mu2Config,
    run: RunConfig,
    arguments: SFTConfig | DPOConfig,
    frozen: tuple[str, ...] = (),
    lora_rank: int | None = None,
    max_slices: int = 256,
) -> MemoryEstimate:
    """Bytes per device of AdamW training: 4-byte weights, gradients and two moments, spread as the strategy says.

    DeepSpeed's ZeRO-2 keeps 16-bit weights on every device beside a spread 4-byte copy; FSDP2 spreads all. Activations are
    those of checkpointed layers plus one layer in full, for the longest prompt and a volume of `max_slices` (the longest that
    the checkpoint's image processor makes), and the logits over the vocabulary with their gradient; a frozen tower keeps
    none. With LoRA the model without its adapters is the reference, so there is no second one.
    """
    if lora_rank is not None:
        frozen = ("vision_tower", "language_model")
    total, learning = parameter_counts(config, frozen)
    if lora_rank is not None:
        adapters = adapter_parameters(config, lora_rank)
        total, learning = total + adapters, learning + adapters
    processes, strategy = run.processes, run.strategy
    spread = processes if strategy in ("fsdp2", "zero2", "zero3") else 1
    weights = 4 * total // spread
    if strategy == "zero2":
        weights = 2 * total + 4 * learning // spread
    prompts = 2 if isinstance(arguments, DPOConfig) else 1
    reference = 0
    if isinstance(arguments, DPOConfig) and lora_rank is None:
        reference = 4 * total // (processes if strategy == "fsdp2" else 1)
    gradients = 4 * learning // spread
    chunks = math.ceil(max_slices / config.vision.image_size[0])
    activations = _activations(config, arguments, prompts, chunks, "vision_tower" not in frozen)
    return MemoryEstimate(weights, gradients, 8 * learning // spread, reference, activations)


def _activations(
    config: Mu2Config, arguments: SFTConfig | DPOConfig, prompts: int, chunks: int, tower_learns: bool
) -> int:
    batch = arguments.per_device_train_batch_size
    text: Any = config.text_config
    length = arguments.max_length or 1024
    grid = config.vision.patch_grid
    # (rows, tokens of a row, width, layers) of every stack of layers.
    stacks = [
        (batch * prompts, length, config.hidden_size, text.num_hidden_layers),
        (batch, chunks * config.tokens_per_chunk, config.hidden_size, config.tokenizer.num_layers),
    ]
    if tower_learns:
        stacks.append((batch * chunks, math.prod(grid), config.vision.hidden_size, config.vision.num_hidden_layers))
    checkpointed = bool(arguments.activation_checkpointing)
    # Logits in single precision and their gradient: with a vocabulary of 152,000 words more than all layers keep.
    bytes_all = 2 * 4 * batch * prompts * length * text.vocab_size
    for rows, tokens, width, layers in stacks:
        whole_layer = rows * tokens * width * LAYER_BYTES_PER_TOKEN_AND_WIDTH
        bytes_all += rows * tokens * width * 2 * layers + whole_layer if checkpointed else whole_layer * layers
    return bytes_all
