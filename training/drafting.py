"""Drafts for many cases, from volumes or from stored tower tokens, with failures kept as failures."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mu2_model import Mu2ForConditionalGeneration, Mu2Processor
from mu2_model.decoding import SETTINGS, DecodeSettings
from mu2_model.modeling_mu2 import Mu2ImageFeatures
from training.collators import VolumeSource
from training.data import Case
from training.errors import TrainingError
from training.shared_encoding import encode_shared
from training.volumes import BadVolumeError


class DraftsError(TrainingError):
    """A file of drafts does not belong to the cases."""


@dataclass(frozen=True)
class DraftedCase:
    """The drafts of one case; an empty text is a failed generation and `failure` says why."""

    case: Case
    texts: tuple[str, ...]
    failure: str = ""


class Drafter:
    """A checkpoint folder that drafts cases of a manifest in batches, `samples` drafts each."""

    def __init__(
        self,
        folder: Path,
        source: Callable[[Mu2ForConditionalGeneration, Mu2Processor], VolumeSource],
        settings: DecodeSettings | None = None,
        samples: int = 1,
        batch_size: int = 16,
        max_new_tokens: int | None = None,
        device: str = "cpu",
    ):
        # As the worker loads it: half precision is for accelerators.
        dtype = "float32" if device == "cpu" else "auto"
        self.model = Mu2ForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval().to(device)
        self.processor = Mu2Processor.from_pretrained(folder)
        self.source = source(self.model, self.processor)
        self.settings = settings or SETTINGS["greedy"]
        self.samples, self.batch_size = samples, batch_size
        self.max_new_tokens = max_new_tokens

    def draft(self, cases: Sequence[Case]) -> Iterator[DraftedCase]:
        """Drafts in the order of the cases; a volume that cannot be read gives a failure, not another case."""
        torch.manual_seed(self.settings.seed)
        for start in range(0, len(cases), self.batch_size):
            batch = list(cases[start : start + self.batch_size])
            failures = self._unreadable(batch)
            readable = [case for case in batch if case.case_id not in failures]
            texts = iter(self._generate(readable) if readable else [])
            for case in batch:
                if case.case_id in failures:
                    yield DraftedCase(case, ("",) * self.samples, failures[case.case_id])
                else:
                    drafts = next(texts)
                    yield DraftedCase(case, drafts, "" if all(drafts) else "no end within the limit")

    def _unreadable(self, cases: list[Case]) -> dict[str, str]:
        failures = {}
        for case in cases:
            try:
                self.source.stack([case.image])
            except BadVolumeError as error:
                failures[case.case_id] = str(error)
        return failures

    @torch.inference_mode()
    def _generate(self, cases: list[Case]) -> list[tuple[str, ...]]:
        questions = [case.question.strip() for case in cases]
        prompts = [self.processor.build_prompt(question) for question in questions]
        device = self.model.device
        text = {key: value.to(device) for key, value in self.processor.encode_text(prompts, questions).items()}
        paths = list(dict.fromkeys(case.image for case in cases))
        inputs = {key: value.to(device) for key, value in self.source.stack(paths).items()}
        inputs["question_ids"] = text["question_ids"]
        inputs["question_attention_mask"] = text["question_attention_mask"]
        inputs["question_volumes"] = torch.tensor([paths.index(case.image) for case in cases], device=device)
        features = encode_shared(self.model.model, inputs)
        tokenizer = self.processor.tokenizer
        ids = self.model.generate(
            input_ids=text["input_ids"],
            attention_mask=text["attention_mask"],
            mm_encoder_outputs={"image": Mu2ImageFeatures(pooler_output=features.pooler_output)},
            num_return_sequences=self.samples,
            max_new_tokens=self.max_new_tokens or self.model.generation_config.max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **self.settings.arguments(),
        )[:, text["input_ids"].shape[1] :]
        drafts = [self._text(row) for row in ids.tolist()]
        return [tuple(drafts[i : i + self.samples]) for i in range(0, len(drafts), self.samples)]

    def _text(self, ids: list[int]) -> str:
        tokenizer = self.processor.tokenizer
        # A draft without its end was cut: it counts as failed, since nobody would send half a report.
        if tokenizer.eos_token_id not in ids:
            return ""
        return str(tokenizer.decode(ids[: ids.index(tokenizer.eos_token_id)], skip_special_tokens=True)).strip()


def write_drafts(drafted: Sequence[DraftedCase], path: Path) -> None:
    """One case a line: its id, its drafts, its failure."""
    lines = []
    for row in drafted:
        told = {key: value for key, value in asdict(row).items() if key != "case"}
        lines.append(json.dumps({"case_id": row.case.case_id, **told}, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_drafts(path: Path, cases: Sequence[Case]) -> list[DraftedCase]:
    """Stored drafts beside their cases; DraftsError when they are of other cases."""
    # Not splitlines: a draft may hold other ends of lines, such as U+2028, which JSON does not escape.
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    if [row["case_id"] for row in rows] != [case.case_id for case in cases]:
        raise DraftsError(f"{path} holds drafts of other cases than the manifest: draft them again")
    return [DraftedCase(case, tuple(row["texts"]), row["failure"]) for case, row in zip(cases, rows, strict=True)]
