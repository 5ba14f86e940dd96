"""Batches for SFT and DPO: unique volumes and questions, padded text, masks.

Prompts are written by the checkpoint's own processor. Nothing is cut in silence: a row longer than `max_length` is an error
that names it, raised before training by `check_lengths`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mu2_model import Mu2Processor
from training.errors import TrainingError
from training.token_cache import TokenCache
from training.volumes import VolumeCache, stack_volumes

IGNORED = -100


class LengthError(TrainingError, ValueError):
    """A prompt with its answer that is longer than the trainer's `max_length`."""


@dataclass(frozen=True)
class EncodedText:
    """Token ids of one row: the prompt with its image placeholders, and the answer with its end token."""

    prompt: list[int]
    answer: list[int]


def encode_row(processor: Mu2Processor, question: str, answer: str) -> EncodedText:
    """Tokenize one question and answer as the model will be asked and must reply."""
    tokenizer = processor.tokenizer
    special = processor.prompt_form == "published"
    prompt = tokenizer(processor.build_prompt(question), add_special_tokens=special)["input_ids"]
    reply = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return EncodedText(prompt, [*reply, tokenizer.eos_token_id])


def check_lengths(processor: Mu2Processor, rows: Sequence[tuple[str, str]], max_length: int) -> int:
    """The longest (question, answer) in tokens; LengthError when one would not fit."""
    longest = 0
    for number, (question, answer) in enumerate(rows):
        text = encode_row(processor, question, answer)
        longest = max(longest, len(text.prompt) + len(text.answer))
        if longest > max_length:
            raise LengthError(f"row {number} takes {longest} tokens, but max_length is {max_length}: raise it")
    return longest


@dataclass
class VolumeSource:
    """Where the image side of a batch comes from: preprocessed volumes, or stored tokens of a frozen tower."""

    volumes: VolumeCache
    tokens: TokenCache | None = None

    def stack(self, paths: list[str]) -> dict[str, Tensor]:
        """The unique volumes of a batch: `pixel_values` or `tower_tokens`, and `chunk_mask`."""
        if self.tokens is not None:
            return self.tokens.stack(paths)
        return stack_volumes([self.volumes.get(path) for path in paths])


@dataclass
class Mu2Collator:
    """What both collators share: the unique volumes and questions of a batch."""

    processor: Mu2Processor
    source: VolumeSource
    max_length: int = 1024
    pad_to_multiple_of: int = 1

    def image_side(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Unique volumes, unique (volume, question), and which prompt has which; prompts in order of the examples."""
        paths = list(dict.fromkeys(example["image"] for example in examples))
        asked = list(dict.fromkeys((example["image"], example["question"]) for example in examples))
        questions = [question.strip() for _, question in asked]
        text = self.processor.encode_text([self.processor.build_prompt(q) for q in questions], questions)
        return {
            **self.source.stack(paths),
            "question_ids": text["question_ids"],
            "question_attention_mask": text["question_attention_mask"],
            "question_volumes": torch.tensor([paths.index(path) for path, _ in asked]),
            "prompt_questions": torch.tensor([asked.index((e["image"], e["question"])) for e in examples]),
        }

    def text_side(self, rows: list[EncodedText]) -> tuple[dict[str, Tensor], Tensor]:
        """`input_ids` and `attention_mask` (B, S) padded on the right, and the mask (B, S) of the answers."""
        longest = max(len(row.prompt) + len(row.answer) for row in rows)
        if longest > self.max_length:
            raise LengthError(f"a row takes {longest} tokens, but max_length is {self.max_length}: raise it")
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        filler = self.processor.tokenizer.pad_token_id
        ids = torch.full((len(rows), width), filler if filler is not None else self.processor.tokenizer.eos_token_id)
        mask, answers = torch.zeros_like(ids), torch.zeros_like(ids)
        for index, row in enumerate(rows):
            start, stop = len(row.prompt), len(row.prompt) + len(row.answer)
            ids[index, :stop] = torch.tensor(row.prompt + row.answer)
            mask[index, :stop] = 1
            answers[index, start:stop] = 1
        return {"input_ids": ids, "attention_mask": mask}, answers


@dataclass
class SftCollator(Mu2Collator):
    """Examples {image, question, completion} to a batch with `labels` on the answers alone."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """One batch."""
        rows = [encode_row(self.processor, example["question"], example["completion"]) for example in examples]
        text, answers = self.text_side(rows)
        labels = text["input_ids"].masked_fill(answers == 0, IGNORED)
        return {**text, "labels": labels, **self.image_side(examples)}


@dataclass
class PreferenceCollator(Mu2Collator):
    """Examples {image, question, chosen, rejected} to 2 n prompts, chosen first, over n or fewer unique volumes.

    TRL's own collator loads and stacks every volume twice; here both answers of a pair index the same tensor, so policy and
    reference, chosen and rejected see one volume.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """One batch."""
        rows = [
            encode_row(self.processor, example["question"], example[side])
            for side in ("chosen", "rejected")
            for example in examples
        ]
        text, answers = self.text_side(rows)
        image = self.image_side(examples)
        image["prompt_questions"] = image["prompt_questions"].repeat(2)
        return {**text, "completion_mask": answers, **image}
