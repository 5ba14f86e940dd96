"""`ReportDrafter`: volumes and questions in, draft reports out, with times, confidence and repairs.

Stages: prepare (array to pixels), encode (vision tower, once per volume), generate (all drafts of the batch together), split
(sections and sentences). The drafter sees arrays and affines only, so nothing from headers or file names can leak into a draft.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from mu2_model.checkpoint_folder import hash_weights, read_config, read_processor, value_bytes
from mu2_model.decoding import Deadline, DecodeSettings, decode_settings
from mu2_model.draft import Draft, DraftSentence, Progress
from mu2_model.drafting_stages import DraftingStages
from mu2_model.errors import CheckpointError, DeviceError, QuestionError
from mu2_model.evidence import explain
from mu2_model.image_processing_mu2 import Volume
from mu2_model.memory import check_memory, check_weights_fit, estimate_memory
from mu2_model.modeling_mu2 import Mu2ForConditionalGeneration
from mu2_model.novelty import Novelty
from mu2_model.processing_mu2 import Mu2Processor
from mu2_model.stored_weights import check_stored


class ReportDrafter:
    """A loaded checkpoint that drafts reports; load once, then call `draft` for every batch.

    Attributes: `model_name`, `model_version`, `weights_hash`, `trained_on` ("nothing": random weights, "phantoms" or
    "patients"), `novelty` (what tells volumes unlike the training data; None for a checkpoint without).
    """

    def __init__(
        self, model: Mu2ForConditionalGeneration, processor: Mu2Processor, folder: Path, static_cache: bool = False
    ):
        self.model, self.processor, self.folder, self.static_cache = model.eval(), processor, folder, static_cache
        self.model_name = model.config.model_name
        self.model_version = model.config.model_version
        self.trained_on = model.config.trained_on
        self.novelty = Novelty.load(folder, model.config.vision.hidden_size)

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = "auto",
        *,
        static_cache: bool = False,
        quantize: Literal["int8"] | None = None,
    ) -> "ReportDrafter":
        """Load a checkpoint folder; `dtype` "auto" is the type it was stored in.

        `static_cache` decodes with a cache of fixed size, which transformers compiles on a GPU: slower to begin, faster per
        token. `quantize="int8"` stores the language model's weights in 8 bits (needs torchao). Raises CheckpointError when
        the folder is not a checkpoint of this package, DeviceError when there is no such device, MemoryEstimateError before
        weights are read that would not fit.
        """
        folder = Path(path)
        if quantize not in (None, "int8"):
            raise CheckpointError(f"quantize is None or 'int8', not {quantize!r}")
        # Whatever is missing is told before minutes are spent on reading weights.
        to_int8 = int8_quantizer() if quantize == "int8" else None
        device = usable_device(device)
        config = read_config(folder)
        processor = read_processor(folder, config)
        check_stored(folder, config)
        check_weights_fit(folder, value_bytes(dtype), device)
        try:
            loaded: Any = Mu2ForConditionalGeneration.from_pretrained(
                folder, config=config, dtype=dtype, output_loading_info=True
            )
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"the weights in {folder} cannot be read: {error}") from error
        model, info = loaded
        # Only for decoders whose stored names transformers changes: all others were compared before.
        broken = sorted({*info["missing_keys"], *info["unexpected_keys"]})
        if broken:
            raise CheckpointError(
                f"{len(broken)} tensors of the language model are missing or unexpected, the first is {broken[0]}"
            )
        model.to(device)
        if to_int8 is not None:
            to_int8(model.model.language_model)
        return cls(model, processor, folder, static_cache)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 of the weights file, or of the files' digests in order of their names when there are several."""
        return hash_weights(self.folder)

    def warm_up(self) -> None:
        """Run the whole model once on an empty volume, so that the first draft is not slower than the others."""
        image = self.processor.image_processor
        channels, size = image.num_channels, image.size
        pixels = torch.zeros(1, 1, channels, image.chunk_slices, size, size, device=self.device)
        text = self.processor.encode_text([self.processor.build_prompt("Describe")], ["Describe"]).items()
        with torch.inference_mode():
            self.model.generate(
                pixel_values=pixels,
                max_new_tokens=2,
                do_sample=False,
                **{key: value.to(self.device) for key, value in text},
            )

    def draft(
        self,
        volumes: Sequence[Volume],
        questions: Sequence[str],
        *,
        deadline_seconds: float | None = None,
        max_new_tokens: int | None = None,
        settings: DecodeSettings | str = "greedy",
        samples: int = 1,
        evidence: bool = False,
        best_slices: bool = False,
        progress: Callable[[Progress], None] | None = None,
    ) -> list[Draft]:
        """Draft a report for every volume under its question, `samples` each, in order of the volumes.

        `volumes` are (array in Hounsfield units (slice, row, column), affine 4x4 to RAS mm). The same array object under
        several questions is encoded once. `settings` is a name ("greedy", "published", "varied") or settings of your own.
        `evidence` adds to every draft where the model looked for each sentence; it costs several runs of the vision tower.
        `best_slices` adds the slice that each sentence leans on most; it costs one gradient a sentence.
        Raises VolumeError or QuestionError for input that cannot be drafted from, DeadlineExceededError when
        `deadline_seconds` pass, MemoryEstimateError for a batch that would not fit, torch.OutOfMemoryError when the device runs
        out of memory all the same; then nothing is returned.
        """
        if len(volumes) != len(questions) or not volumes:
            raise QuestionError(f"{len(volumes)} volumes, but {len(questions)} questions: one each is needed")
        settings = decode_settings(settings)
        if samples < 1 or (max_new_tokens is not None and max_new_tokens < 1):
            raise QuestionError(f"{samples} samples of {max_new_tokens} tokens: at least one of each is needed")
        if samples > 1 and not settings.sample:
            raise QuestionError("greedy decoding gives one draft; ask for several with settings='varied'")
        if self._prompts_differ(questions):
            arguments: dict[str, Any] = {
                "max_new_tokens": max_new_tokens,
                "settings": settings,
                "samples": samples,
                "evidence": evidence,
                "best_slices": best_slices,
            }
            deadline = Deadline(deadline_seconds)
            return [
                draft
                for pair in zip(volumes, questions, strict=True)
                for draft in self.draft(
                    [pair[0]],
                    [pair[1]],
                    deadline_seconds=deadline.remaining(),
                    progress=progress,
                    **arguments,
                )
            ]
        deadline = Deadline(deadline_seconds)
        run = DraftingStages(self.model, self.processor, deadline, progress, self.static_cache, self.novelty)
        with torch.inference_mode():
            rows, prepared = run.prepare(volumes)
            text = {key: value.to(self.device) for key, value in run.encode_text(list(questions)).items()}
            run.check_memory(prepared, text, samples, max_new_tokens, evidence)
            features = run.encode(prepared, rows, text)
            ids, log_probabilities = run.generate(text, features, settings, samples, max_new_tokens)
        drafts = []
        for index in range(len(questions) * samples):
            row = rows[index // samples]
            prompt_tokens = int(text["attention_mask"][index // samples].sum())
            made = run.split(ids[index], log_probabilities[index], prompt_tokens, list(prepared[row].repairs))
            if best_slices:
                its_text = {key: value[index // samples][None] for key, value in text.items()}
                made = run.find_slices(made, prepared[row], row, its_text)
            drafts.append(replace(made, novelty=run.novelties[row] if run.novelties else None))
        if evidence:
            drafts = [self.explain(volumes[i // samples], questions[i // samples], d) for i, d in enumerate(drafts)]
        return drafts

    def _prompts_differ(self, questions: Sequence[str]) -> bool:
        """Whether published prompts are of different length: fixed positions cannot be padded, so each goes alone."""
        if self.model.config.image_placement != "second_position" or len(questions) == 1:
            return False
        prompts = [self.processor.build_prompt(question) for question in questions]
        text = self.processor.encode_text(prompts, [question.strip() for question in questions])
        return not bool(text["attention_mask"].all())

    def explain(self, volume: Volume, question: str, draft: Draft) -> Draft:
        """The draft with `evidence`, one entry per sentence; volume and question as it was drafted from.

        Raises MemoryEstimateError when evidence would not fit.
        """
        prepared = self.processor.image_processor.prepare(*volume, device=self.device)
        text = self.processor.encode_text([self.processor.build_prompt(question)], [question.strip()])
        ranges = [sentence.token_range for sentence in draft.sentences]
        if not ranges:
            return replace(draft, evidence=())
        estimate = estimate_memory(
            self.model.config,
            0,
            chunks=len(prepared.chunk_mask),
            prompt_tokens=text["input_ids"].shape[1],
            new_tokens=len(draft.token_ids),
            bytes_per_value=self.model.dtype.itemsize,
            evidence=True,
        )
        check_memory(estimate, self.device, 1)
        with torch.inference_mode():
            on_device = {key: value.to(self.device) for key, value in text.items()}
            made = explain(self.model, prepared, on_device, torch.tensor(draft.token_ids), ranges)
        return replace(draft, evidence=tuple(made))


def usable_device(device: torch.device | str) -> torch.device:
    """The device by its name; DeviceError when there is no such name or no such GPU, or nothing here runs on it."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(f"{device!r} is no device: cpu, cuda or cuda:N") from error
    if found.type not in ("cpu", "cuda"):
        raise DeviceError(f"nothing is drafted on {str(found)!r}: name cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise DeviceError(f"torch finds {count} GPUs, so no {str(found)!r}: name cpu, or install torch for this GPU")
    return found


def int8_quantizer() -> Callable[[nn.Module], None]:
    """What stores the weights of a module's linear layers in 8 bits; CheckpointError without torchao."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise CheckpointError("int8 needs the package torchao: pip install torchao") from error
    return lambda module: quantize_(module, Int8WeightOnlyConfig())


__all__ = ["Draft", "DraftSentence", "Progress", "ReportDrafter"]
