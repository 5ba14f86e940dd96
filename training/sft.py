"""Supervised fine-tuning on TRL: `sft-align` teaches projector and μ² tokenizer, `sft` everything or LoRA on the decoder.

One process or many: `accelerate launch` starts this module on every device, and a run that was killed goes on from its last
checkpoint with the same data order, random state and schedule.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig, SFTTrainer

from mu2_model import Mu2ForConditionalGeneration, Mu2Processor
from training.checkpoints import ProvenanceCallback, save_trained, used_settings
from training.collators import SftCollator, VolumeSource, check_lengths
from training.data import Case
from training.provenance import FILE, Provenance
from training.shared_encoding import SharedEncoding, freeze, share_encoding

FROZEN = {"sft-align": ("vision_tower", "language_model"), "sft": (), "dpo": ()}
"""Parts that a stage leaves as they are."""
LORA_TARGETS = r"model\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
WHOLE_UNDER_LORA = ["projector", "visual_tokenizer"]
"""Parts that learn in full beside the adapters: they start from nothing, an adapter has nothing to adapt."""


@dataclass(frozen=True)
class LoraSettings:
    """Rank and scale of the decoder's adapters; never on `lm_head`, whose adapter TRL would not train."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0

    def config(self) -> LoraConfig:
        """As PEFT takes it."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=LORA_TARGETS,
            modules_to_save=WHOLE_UNDER_LORA,
        )


def sft_dataset(cases: Sequence[Case]) -> Dataset:
    """Rows {image, question, prompt, completion}; volumes stay on disk until a batch asks for them."""
    return Dataset.from_list(
        [{"image": c.image, "question": c.question, "prompt": c.question, "completion": c.answer} for c in cases]
    )


class WatchedTrainer:
    """Adds the tokenizer's figures (selection entropy, temperature, gates) to whatever a TRL trainer logs."""

    encoding: SharedEncoding
    model: Any

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the figures of the last training batch."""
        if self.model.training:
            logs.update(self.encoding.figures())
        super().log(logs, start_time)  # type: ignore[misc]


class Mu2SftTrainer(WatchedTrainer, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with the tokenizer watched."""


def train_sft(
    stage: str,
    model_folder: Path,
    cases: Sequence[Case],
    source: VolumeSource,
    arguments: SFTConfig,
    provenance: Provenance,
    held_out: Sequence[Case] = (),
    lora: LoraSettings | None = None,
    frozen: tuple[str, ...] | None = None,
    stop_after: int | None = None,
) -> Mu2SftTrainer:
    """Train a checkpoint folder by one of the SFT stages into `arguments.output_dir`, resuming what is there.

    With stored tower tokens in `source` the vision tower is frozen. `stop_after` ends the run at that step as a kill
    would, with the schedule of the whole run. LengthError when a row does not fit `max_length`; BegunOtherwiseError when
    the folder was begun with other data, settings or start.
    """
    model = Mu2ForConditionalGeneration.from_pretrained(model_folder, dtype="float32")
    processor = Mu2Processor.from_pretrained(model_folder)
    check_lengths(processor, [(c.question, c.answer) for c in [*cases, *held_out]], arguments.max_length or 1024)
    parts = FROZEN[stage] if frozen is None else frozen
    if source.tokens is not None and "vision_tower" not in parts:
        parts = (*parts, "vision_tower")
    adapters = None if lora is None else asdict(lora)
    provenance = provenance.with_settings(used_settings(arguments, parts, adapters, source.tokens is not None))
    provenance.begin(Path(str(arguments.output_dir)), write=arguments.process_index == 0)
    freeze(model, parts)
    encoding, _ = share_encoding(model)
    trainer = Mu2SftTrainer(
        model=model,
        args=arguments,
        data_collator=SftCollator(processor, source, max_length=arguments.max_length or 1024),
        train_dataset=sft_dataset(cases),
        eval_dataset=sft_dataset(held_out) if held_out else None,
        processing_class=processor,
        peft_config=None if lora is None else lora.config(),
        callbacks=[ProvenanceCallback(provenance, stop_after)],
    )
    trainer.encoding = encoding
    trainer.train(resume_from_checkpoint=last_checkpoint(Path(str(arguments.output_dir))))
    if stop_after is None:
        save_trained(trainer, processor, provenance)
    return trainer


def last_checkpoint(out: Path) -> str | None:
    """The newest complete checkpoint of a run, or None when it has none.

    A kill while one is written leaves a folder without the provenance, which is written last.
    """
    complete = [folder for folder in out.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (folder / FILE).is_file()]
    newest = max(complete, key=lambda folder: int(folder.name.rsplit("-", 1)[1]), default=None)
    return None if newest is None else str(newest)
