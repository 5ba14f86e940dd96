"""Saving what a trainer made: provenance in every checkpoint, and at the end a plain `from_pretrained` folder with a card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mu2_model import Mu2ForConditionalGeneration, Mu2Processor
from training.model_card import write_card
from training.plots import plot_history
from training.provenance import Provenance

USED = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "lr_scheduler_type",
    "warmup_steps",
    "max_grad_norm",
    "optim",
    "bf16",
    "fp16",
    "max_length",
    "seed",
    "data_seed",
    "beta",
    "loss_type",
)
"""Arguments of a trainer that decide what is learned; `beta` is of DPO alone."""


def used_settings(
    arguments: Any, frozen: Sequence[str], lora: dict[str, Any] | None, cached_tokens: bool
) -> dict[str, Any]:
    """The settings that a trainer runs with, by the trainer's own names, as a checkpoint stores them."""
    told = arguments.to_dict()
    used = {name: told[name] for name in USED if name in told}
    parts = {"frozen": sorted(frozen), "lora": lora, "cached_tokens": cached_tokens}
    return used | parts | {"processes": arguments.world_size}


class ProvenanceCallback(TrainerCallback):  # type: ignore[misc]
    """Writes the provenance into every checkpoint; `stop_after` ends the run early, for tests of resuming."""

    def __init__(self, provenance: Provenance, stop_after: int | None = None):
        self.provenance, self.stop_after = provenance, stop_after

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After a checkpoint was written."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            self.provenance.write(folder)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After a step."""
        if self.stop_after is not None and state.global_step >= self.stop_after:
            control.should_training_stop = True


def save_trained(trainer: Any, processor: Mu2Processor, provenance: Provenance) -> Path:
    """Write the trained model as a folder that `ReportDrafter` loads, with card, provenance and plots.

    Adapters are merged, so nobody needs PEFT to draft.
    """
    folder = Path(str(trainer.args.output_dir))
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return folder
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        model, state = model.merge_and_unload(), None
    assert isinstance(model, Mu2ForConditionalGeneration)
    if state is not None and model.config.tie_word_embeddings:
        # FSDP gathers a tied head beside the embeddings it is tied to.
        for tied in model._tied_weights_keys:
            state.pop(tied, None)
    model.config.trained_on = provenance.trained_on
    model.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)
    provenance.write(folder)
    plot_history(trainer.state.log_history, folder / "plots")
    write_card(folder)
    return folder
