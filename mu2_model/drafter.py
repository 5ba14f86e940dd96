"""`ReportDrafter`: volumes and questions in, draft reports out, with times, confidence and repairs.

Stages: prepare (array to pixels), encode (vision tower, once per volume), generate (all drafts of the batch together), split
(sections and sentences). The drafter sees arrays and affines only, so nothing from headers or file names can leak into a draft.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from mu2_model.decoding import SETTINGS, Deadline, DecodeSettings, GenerationWatch, TokenLogProbabilities
from mu2_model.errors import CheckpointError, QuestionError
from mu2_model.image_processing_mu2 import PreparedVolume, Volume, collate
from mu2_model.modeling_mu2 import Mu2ForConditionalGeneration, Mu2ImageFeatures
from mu2_model.processing_mu2 import Mu2Processor
from mu2_model.report_text import SentenceSpan, split_report, strip_thinking

DEFAULT_NEW_TOKENS = 512
HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class DraftSentence:
    """One sentence: its section, its text and the mean log-probability of its tokens."""

    section: str
    text: str
    confidence: float


@dataclass(frozen=True)
class Draft:
    """One drafted report; `stage_seconds` are those of the whole batch it was drafted in."""

    sentences: tuple[DraftSentence, ...]
    text: str
    prompt_tokens: int
    generated_tokens: int
    truncated: bool
    repairs: list[str] = field(default_factory=list)
    stage_seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """Where a batch is: `done` of `total` volumes or tokens in a stage; `texts` holds the drafts so far."""

    stage: str
    done: int
    total: int
    texts: tuple[str, ...] = ()


class ReportDrafter:
    """A loaded checkpoint that drafts reports; load once, then call `draft` for every batch.

    Attributes: `model_name`, `model_version`, `untrained` (random weights: the text means nothing), `weights_hash`.
    """

    def __init__(self, model: Mu2ForConditionalGeneration, processor: Mu2Processor, folder: Path):
        self.model, self.processor, self.folder = model.eval(), processor, folder
        self.model_name = model.config.model_name
        self.model_version = model.config.model_version
        self.untrained = model.config.untrained

    @classmethod
    def from_pretrained(
        cls, path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | str = "auto"
    ) -> "ReportDrafter":
        """Load a checkpoint folder; `dtype` "auto" is the type it was stored in. CheckpointError when it is not one of ours."""
        folder = Path(path)
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"no config.json in the model folder {folder}")
        loaded: Any = Mu2ForConditionalGeneration.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        model, info = loaded
        broken = sorted({*info["missing_keys"], *info["unexpected_keys"], *(key[0] for key in info["mismatched_keys"])})
        if broken:
            raise CheckpointError(
                f"{len(broken)} tensors are missing, unexpected or mis-shaped, the first is {broken[0]}"
            )
        return cls(model.to(device), Mu2Processor.from_pretrained(folder), folder)

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
        progress: Callable[[Progress], None] | None = None,
    ) -> list[Draft]:
        """Draft a report for every volume under its question, `samples` each, in order of the volumes.

        `volumes` are (array in Hounsfield units (slice, row, column), affine 4x4 to RAS mm). The same array object under
        several questions is encoded once. `settings` is a name ("greedy", "published", "varied") or settings of your own.
        Raises VolumeError or QuestionError for input that cannot be drafted from, DeadlineExceededError when
        `deadline_seconds` pass, torch.OutOfMemoryError when the device runs out of memory; then nothing is returned.
        """
        if len(volumes) != len(questions) or not volumes:
            raise QuestionError(f"{len(volumes)} volumes, but {len(questions)} questions: one each is needed")
        if isinstance(settings, str):
            settings = SETTINGS[settings]
        if samples > 1 and not settings.sample:
            raise QuestionError("greedy decoding gives one draft; ask for several with settings='varied'")
        run = _Run(self, Deadline(deadline_seconds), progress)
        with torch.inference_mode():
            rows, prepared = run.prepare(volumes)
            text = {key: value.to(self.device) for key, value in run.encode_text(list(questions)).items()}
            features = run.encode(prepared, rows, text)
            ids, log_probabilities = run.generate(text, features, settings, samples, max_new_tokens)
        drafts = []
        for index in range(len(questions) * samples):
            repairs = list(prepared[rows[index // samples]].repairs)
            prompt_tokens = int(text["attention_mask"][index // samples].sum())
            drafts.append(run.split(ids[index], log_probabilities[index], prompt_tokens, repairs))
        return drafts


class _Run:
    """One batch on its way through the stages: the clock, the deadline and the listener are the same for all of them."""

    def __init__(self, drafter: ReportDrafter, deadline: Deadline, progress: Callable[[Progress], None] | None):
        self.model, self.processor, self.device = drafter.model, drafter.processor, drafter.device
        self.deadline, self.progress = deadline, progress
        self.seconds: dict[str, float] = {}

    def tell(self, stage: str, done: int, total: int, texts: tuple[str, ...] = ()) -> None:
        self.deadline.check()
        if self.progress is not None:
            self.progress(Progress(stage, done, total, texts))

    def prepare(self, volumes: Sequence[Volume]) -> tuple[list[int], list[PreparedVolume]]:
        """Prepare every array once; returns for every volume its row among the prepared ones."""
        start = time.perf_counter()
        row_of: dict[int, int] = {}
        prepared: list[PreparedVolume] = []
        rows = []
        for index, (array, affine) in enumerate(volumes):
            self.tell("prepare", index, len(volumes))
            if id(array) not in row_of:
                row_of[id(array)] = len(prepared)
                prepared.append(self.processor.image_processor.prepare(array, affine, device=self.device))
            rows.append(row_of[id(array)])
        self.seconds["prepare"] = time.perf_counter() - start
        return rows, prepared

    def encode_text(self, questions: list[str]) -> dict[str, Tensor]:
        prompts = [self.processor.build_prompt(question) for question in questions]
        return self.processor.encode_text(prompts, [question.strip() for question in questions])

    def encode(self, prepared: list[PreparedVolume], rows: list[int], text: dict[str, Tensor]) -> Mu2ImageFeatures:
        start = time.perf_counter()
        self.tell("encode", 0, len(prepared))
        pixels = collate(prepared)
        tokens = self.model.model.encode_chunks(pixels["pixel_values"], pixels["chunk_mask"])
        self.tell("encode", len(prepared), len(prepared))
        features = self.model.model.gather_tokens(
            tokens[rows], text["question_ids"], text["question_attention_mask"], pixels["chunk_mask"][rows]
        )
        self.seconds["encode"] = time.perf_counter() - start
        return features

    def generate(
        self,
        text: dict[str, Tensor],
        features: Mu2ImageFeatures,
        settings: DecodeSettings,
        samples: int,
        max_new_tokens: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Returns new token ids (drafts, tokens) and their log-probabilities, 0 after the end."""
        start = time.perf_counter()
        limit = max_new_tokens or self.model.generation_config.max_new_tokens or DEFAULT_NEW_TOKENS
        prompt_length = text["input_ids"].shape[1]
        record = TokenLogProbabilities()

        def on_token(ids: Tensor) -> None:
            record.after_token(ids)
            if self.progress is not None:
                new = ids[:, prompt_length:]
                texts = tuple(self.processor.tokenizer.batch_decode(new, skip_special_tokens=True))
                self.tell("generate", new.shape[1], limit, texts)

        seeded = torch.random.fork_rng(devices=self._random_devices()) if settings.sample else nullcontext()
        with seeded, self.model.lm_head.register_forward_hook(record.listen):
            if settings.sample:
                torch.manual_seed(settings.seed)
            ids = self.model.generate(
                input_ids=text["input_ids"],
                attention_mask=text["attention_mask"],
                mm_encoder_outputs={"image": features},
                max_new_tokens=limit,
                num_return_sequences=samples,
                eos_token_id=self.end_tokens(),
                pad_token_id=self.pad_token(),
                stopping_criteria=StoppingCriteriaList([GenerationWatch(self.deadline, on_token)]),
                **settings.arguments(),
            )
        self.seconds["generate"] = time.perf_counter() - start
        return ids[:, prompt_length:].cpu(), record.stacked().cpu()

    def _random_devices(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    def end_tokens(self) -> list[int]:
        """Every token that ends a draft: the checkpoint's and the tokenizer's."""
        stored = self.model.generation_config.eos_token_id
        ends = set(stored) if isinstance(stored, list) else {stored}
        return sorted(token for token in ends | {self.processor.tokenizer.eos_token_id} if token is not None)

    def pad_token(self) -> int:
        pad = self.processor.tokenizer.pad_token_id
        return self.end_tokens()[0] if pad is None else int(pad)

    def split(self, ids: Tensor, log_probabilities: Tensor, prompt_tokens: int, repairs: list[str]) -> Draft:
        start = time.perf_counter()
        ends = self.end_tokens()
        new_ids = ids.tolist()
        stops = [index for index, token in enumerate(new_ids) if token in ends]
        kept = new_ids[: stops[0]] if stops else new_ids
        raw, edges = self._decode_with_edges(kept)
        sentences = tuple(
            DraftSentence(span.section, span.text, _mean_over(span, edges, log_probabilities))
            for span in split_report(raw)
        )
        if not stops:
            repairs.append(f"the draft was cut after {len(kept)} tokens")
        self.seconds["split"] = self.seconds.get("split", 0.0) + time.perf_counter() - start
        text = raw[strip_thinking(raw) :].strip()
        return Draft(sentences, text, prompt_tokens, len(kept), not stops, repairs, self.seconds)

    def _decode_with_edges(self, ids: list[int]) -> tuple[str, list[int]]:
        """The text, and for every token where its characters end."""
        decode = self.processor.tokenizer.decode
        edges = [len(decode(ids[: count + 1], skip_special_tokens=True)) for count in range(len(ids))]
        return str(decode(ids, skip_special_tokens=True)), edges


def _mean_over(span: SentenceSpan, edges: list[int], log_probabilities: Tensor) -> float:
    """Mean log-probability of the tokens with a character in the sentence."""
    starts = [0, *edges[:-1]]
    inside = [
        i for i, (first, last) in enumerate(zip(starts, edges, strict=True)) if last > span.start and first < span.end
    ]
    return float(log_probabilities[inside].mean()) if inside else 0.0


def hash_weights(folder: Path) -> str:
    """SHA-256 of the folder's weights; CheckpointError when it holds none."""
    digests = []
    for file in sorted(folder.glob("*.safetensors")):
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(HASH_BLOCK_BYTES):
                digest.update(block)
        digests.append(digest)
    if not digests:
        raise CheckpointError(f"no *.safetensors file in the model folder {folder}")
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


__all__ = ["Draft", "DraftSentence", "Progress", "ReportDrafter"]
