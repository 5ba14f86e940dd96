"""Direct preference optimisation on TRL, with a reference model of its own and one volume tensor for all four sides.

At step 0 the policy equals the reference, so the loss is ln 2; a test holds that. Policy and reference, chosen and rejected
answer read the same `pixel_values`, which the collator loads once for each pair.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from mu2_model import Mu2ForConditionalGeneration, Mu2Processor
from training.checkpoints import ProvenanceCallback, save_trained, used_settings
from training.collators import PreferenceCollator, VolumeSource, check_lengths
from training.provenance import Provenance, rows_digest
from training.sft import FROZEN, LoraSettings, WatchedTrainer, last_checkpoint
from training.shared_encoding import freeze, share_encoding


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one question about one volume, the better one first, with the scores that said so.

    `source` is the set that the volume comes from, as in `training.data.Case`.
    """

    case_id: str
    image: str
    question: str
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    source: str = ""


class Mu2DpoTrainer(WatchedTrainer, DPOTrainer):  # type: ignore[misc]
    """TRL's trainer with the tokenizer watched."""


def dpo_dataset(pairs: Sequence[PreferencePair]) -> Dataset:
    """Rows {image, question, prompt, chosen, rejected}."""
    return Dataset.from_list(
        [
            {"image": p.image, "question": p.question, "prompt": p.question, "chosen": p.chosen, "rejected": p.rejected}
            for p in pairs
        ]
    )


def train_dpo(
    model_folder: Path,
    pairs: Sequence[PreferencePair],
    source: VolumeSource,
    arguments: DPOConfig,
    provenance: Provenance,
    lora: LoraSettings | None = None,
    frozen: tuple[str, ...] | None = None,
    stop_after: int | None = None,
) -> Mu2DpoTrainer:
    """Train a checkpoint on preference pairs into `arguments.output_dir`, resuming what is there.

    Without adapters the reference is a second copy of the checkpoint; with adapters it is the checkpoint without them.
    LengthError when an answer does not fit `max_length`; BegunOtherwiseError when the folder was begun with other pairs,
    settings or start.
    """
    model = Mu2ForConditionalGeneration.from_pretrained(model_folder, dtype="float32")
    processor = Mu2Processor.from_pretrained(model_folder)
    limit = arguments.max_length or 1024
    check_lengths(processor, [(p.question, text) for p in pairs for text in (p.chosen, p.rejected)], limit)
    parts = FROZEN["dpo"] if frozen is None else frozen
    if source.tokens is not None and "vision_tower" not in parts:
        parts = (*parts, "vision_tower")
    used = used_settings(arguments, parts, None if lora is None else asdict(lora), source.tokens is not None)
    provenance = provenance.with_settings(used | {"pairs_sha256": rows_digest(map(asdict, pairs))})
    provenance.begin(Path(str(arguments.output_dir)), write=arguments.process_index == 0)
    freeze(model, parts)
    encoding, _ = share_encoding(model)
    reference = None
    if lora is None:
        reference = Mu2ForConditionalGeneration.from_pretrained(model_folder, dtype="float32").eval()
        reference.requires_grad_(False)
        share_encoding(reference)
    trainer = Mu2DpoTrainer(
        model=model,
        ref_model=reference,
        args=arguments,
        data_collator=PreferenceCollator(processor, source, max_length=limit),
        train_dataset=dpo_dataset(pairs),
        processing_class=processor,
        peft_config=None if lora is None else lora.config(),
        callbacks=[ProvenanceCallback(provenance, stop_after)],
    )
    trainer.encoding = encoding
    trainer.train(resume_from_checkpoint=last_checkpoint(Path(str(arguments.output_dir))))
    if stop_after is None:
        save_trained(trainer, processor, provenance)
    return trainer
