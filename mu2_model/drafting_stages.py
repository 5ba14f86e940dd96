"""The stages of drafting one batch: prepare, encode, generate, split; `ReportDrafter` calls them in this order."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from mu2_model.decoding import Deadline, DecodeSettings, GenerationWatch, TokenLogProbabilities
from mu2_model.draft import Draft, DraftSentence, Progress
from mu2_model.errors import QuestionError
from mu2_model.evidence_slice import Point, best_slices
from mu2_model.image_processing_mu2 import PreparedVolume, Volume, as_pair, collate
from mu2_model.memory import check_memory, estimate_memory, fits, is_out_of_memory, slices_bytes
from mu2_model.modeling_mu2 import Mu2ForConditionalGeneration, Mu2ImageFeatures
from mu2_model.novelty import Novelty, PooledTokens
from mu2_model.processing_mu2 import Mu2Processor
from mu2_model.report_text import opens_thinking, split_report, strip_thinking

DEFAULT_NEW_TOKENS = 512


class DraftingStages:
    """One batch on its way through the stages: the clock, the deadline and the listener are the same for all of them."""

    def __init__(
        self,
        model: Mu2ForConditionalGeneration,
        processor: Mu2Processor,
        deadline: Deadline,
        progress: Callable[[Progress], None] | None,
        static_cache: bool = False,
        novelty: Novelty | None = None,
    ):
        self.model, self.processor, self.device = model, processor, model.device
        self.deadline, self.progress, self.static_cache = deadline, progress, static_cache
        self.novelty = novelty
        self.novelties: list[float] = []  # of every prepared volume, once they are encoded
        self.encoded: tuple[Tensor, Tensor] | None = (
            None  # tokens (V, C, N, H) of the volumes and their chunk mask (V, C)
        )
        self.thinking = False  # whether the prompts end in an open thinking block, which the chat template decides
        self.seconds: dict[str, float] = {}

    def tell(self, stage: str, done: int, total: int, texts: tuple[str, ...] = ()) -> None:
        """Check the deadline and report progress."""
        self.deadline.check()
        if self.progress is not None:
            self.progress(Progress(stage, done, total, texts))

    def prepare(self, volumes: Sequence[Volume]) -> tuple[list[int], list[PreparedVolume]]:
        """Prepare every array once; returns for every volume its row among the prepared ones."""
        start = time.perf_counter()
        row_of: dict[tuple[int, bytes], int] = {}
        prepared: list[PreparedVolume] = []
        rows = []
        for index, volume in enumerate(volumes):
            self.tell("prepare", index, len(volumes))
            array, affine = as_pair(volume)
            same = (id(array), np.asarray(affine).tobytes())
            if same not in row_of:
                row_of[same] = len(prepared)
                prepared.append(self.processor.image_processor.prepare(array, affine, device=self.device))
            rows.append(row_of[same])
        self.seconds["prepare"] = time.perf_counter() - start
        return rows, prepared

    def encode_text(self, questions: list[str]) -> dict[str, Tensor]:
        """Prompts and questions as tensors."""
        prompts = [self.processor.build_prompt(question) for question in questions]
        self.thinking = opens_thinking(prompts[0])
        return self.processor.encode_text(prompts, [question.strip() for question in questions])

    def encode(self, prepared: list[PreparedVolume], rows: list[int], text: dict[str, Tensor]) -> Mu2ImageFeatures:
        """Run the vision tower once per prepared volume, and the tokenizer once per question."""
        start = time.perf_counter()
        self.tell("encode", 0, len(prepared))
        pixels = collate(prepared)
        tokens = self.encode_chunks(pixels["pixel_values"], pixels["chunk_mask"])
        self.encoded = tokens, pixels["chunk_mask"]
        self.tell("encode", len(prepared), len(prepared))
        features = self.model.model.gather_tokens(
            tokens[rows], text["question_ids"], text["question_attention_mask"], pixels["chunk_mask"][rows]
        )
        self.seconds["encode"] = time.perf_counter() - start
        return features

    def encode_chunks(self, pixel_values: Tensor, chunk_mask: Tensor) -> Tensor:
        """Volumes to tokens (V, C, N, H); where the checkpoint knows its training data, also how unlike it each volume is."""
        inner = self.model.model
        if self.novelty is None:
            return inner.encode_chunks(pixel_values, chunk_mask)
        pooled = PooledTokens()
        with inner.projector.fc1.register_forward_pre_hook(pooled.listen):
            tokens = inner.encode_chunks(pixel_values, chunk_mask)
        self.novelties = [self.novelty.score(volume) for volume in pooled.of_volumes(chunk_mask)]
        return tokens

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
        limit = self.token_limit(max_new_tokens, text["input_ids"].shape[1])
        prompt_length = text["input_ids"].shape[1]
        record = TokenLogProbabilities()

        def on_token(ids: Tensor) -> None:
            record.after_token(ids)
            if self.progress is not None:
                new = ids[:, prompt_length:]
                texts = tuple(self.processor.tokenizer.batch_decode(new, skip_special_tokens=True))
                self.tell("generate", new.shape[1], limit, texts)

        seeded = torch.random.fork_rng(devices=self._random_devices()) if settings.sample else nullcontext()
        # The mixin types its own self too narrowly for a subclass.
        model: Any = self.model
        cache: dict[str, Any] = {"cache_implementation": "static"} if self.static_cache else {}
        with seeded, self.model.lm_head.register_forward_hook(record.listen):
            if settings.sample:
                torch.manual_seed(settings.seed)
            ids = model.generate(
                input_ids=text["input_ids"],
                attention_mask=text["attention_mask"],
                mm_encoder_outputs={"image": features},
                max_new_tokens=limit,
                num_return_sequences=samples,
                eos_token_id=self.end_tokens(),
                pad_token_id=self.pad_token(),
                stopping_criteria=StoppingCriteriaList([GenerationWatch(self.deadline, on_token)]),
                **cache,
                **settings.arguments(),
            )
        self.seconds["generate"] = time.perf_counter() - start
        return ids[:, prompt_length:].cpu(), record.stacked().cpu()

    def token_limit(self, max_new_tokens: int | None, prompt_tokens: int) -> int:
        """How many tokens a draft may have: as asked, as the checkpoint says or the default, and as the context has room.

        Raises QuestionError when the prompt leaves no room; a draft that meets the limit says that it was cut.
        """
        wanted = max_new_tokens or self.model.generation_config.max_new_tokens or DEFAULT_NEW_TOKENS
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is None:
            return int(wanted)
        if prompt_tokens >= context:
            raise QuestionError(f"a prompt of {prompt_tokens} tokens leaves no room in a context of {context}")
        return int(min(wanted, context - prompt_tokens))

    def check_memory(
        self,
        prepared: list[PreparedVolume],
        text: dict[str, Tensor],
        samples: int,
        max_new_tokens: int | None,
        evidence: bool = False,
    ) -> None:
        """Raise MemoryEstimateError before a batch that would not fit."""
        batch = len(text["input_ids"])
        estimate = estimate_memory(
            self.model.config,
            0,
            batch=batch,
            chunks=max(len(volume.chunk_mask) for volume in prepared),
            prompt_tokens=text["input_ids"].shape[1],
            new_tokens=self.token_limit(max_new_tokens, text["input_ids"].shape[1]),
            samples=samples,
            bytes_per_value=self.model.dtype.itemsize,
            evidence=evidence,
        )
        check_memory(estimate, self.device, batch * samples)

    def _random_devices(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    def end_tokens(self) -> list[int]:
        """Every token that ends a draft: the checkpoint's and the tokenizer's."""
        stored = self.model.generation_config.eos_token_id
        ends = set(stored) if isinstance(stored, list) else {stored}
        return sorted(token for token in ends | {self.processor.tokenizer.eos_token_id} if token is not None)

    def pad_token(self) -> int:
        """The token that fills rows which have ended."""
        pad = self.processor.tokenizer.pad_token_id
        return self.end_tokens()[0] if pad is None else int(pad)

    def split(self, ids: Tensor, log_probabilities: Tensor, prompt_tokens: int, repairs: list[str]) -> Draft:
        """One row of new tokens to a draft; `repairs` are those of its volume."""
        start = time.perf_counter()
        ends = self.end_tokens()
        new_ids = ids.tolist()
        stops = [index for index, token in enumerate(new_ids) if token in ends]
        kept = new_ids[: stops[0]] if stops else new_ids
        raw, edges = self._decode_with_edges(kept)
        sentences = []
        for span in split_report(raw, self.thinking):
            first, last = token_range(span.start, span.end, edges)
            with_text = [index for index in range(first, last) if edges[index] > (edges[index - 1] if index else 0)]
            confidence = float(log_probabilities[with_text].mean()) if with_text else 0.0
            sentences.append(DraftSentence(span.section, span.text, confidence, (first, last)))
        if not stops:
            repairs.append(f"the draft was cut after {len(kept)} tokens")
        self.seconds["split"] = self.seconds.get("split", 0.0) + time.perf_counter() - start
        return Draft(
            sentences=tuple(sentences),
            text=raw[strip_thinking(raw, self.thinking) :].strip(),
            prompt_tokens=prompt_tokens,
            generated_tokens=len(kept),
            truncated=not stops,
            repairs=repairs,
            stage_seconds=self.seconds,
            token_ids=tuple(kept),
        )

    def find_slices(self, draft: Draft, volume: PreparedVolume, row: int, text: dict[str, Tensor]) -> Draft:
        """The draft of one encoded volume with the best slice of every sentence; `text` is its one row of the prompts.

        A link is not worth a draft: without the memory or the time for it there is none. The memory is estimated first,
        because a host out of memory raises nothing: it kills.
        """
        start = time.perf_counter()
        found: list[Point | None] = [None] * len(draft.sentences)
        if self.encoded is not None and draft.sentences:
            tokens, mask = self.encoded
            ranges, ids = [sentence.token_range for sentence in draft.sentences], torch.tensor(draft.token_ids)
            needed = slices_bytes(
                self.model.config,
                chunks=len(mask[row]),
                prompt_tokens=text["input_ids"].shape[1],
                draft_tokens=len(ids),
                sentences=len(ranges),
                value_bytes=self.model.dtype.itemsize,
            )
            if fits(needed, self.device):
                try:
                    found = best_slices(
                        self.model, tokens[row], mask[row], volume.grid, text, ids, ranges, self.deadline.has_passed
                    )
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
        self.seconds["slices"] = self.seconds.get("slices", 0.0) + time.perf_counter() - start
        return replace(draft, best_slices=tuple(found))

    def _decode_with_edges(self, ids: list[int]) -> tuple[str, list[int]]:
        """The text, and for every token where its characters end."""
        decode = self.processor.tokenizer.decode
        edges = [len(decode(ids[: count + 1], skip_special_tokens=True)) for count in range(len(ids))]
        return str(decode(ids, skip_special_tokens=True)), edges


def token_range(start: int, end: int, edges: list[int]) -> tuple[int, int]:
    """The tokens [first, last) with a character in [start, end); `edges` says where each token's characters end."""
    inside = [i for i, edge in enumerate(edges) if edge > start and (edges[i - 1] if i else 0) < end]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)
