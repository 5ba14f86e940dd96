"""GREEN (Ostmeier et al. 2024): a judge reads reference and candidate and lists errors and matched findings.

score = matched / (matched + significant errors), 0 when nothing matched. The prompt is the published one, taken from the
package `radeval`, never retyped. Three judges give the answer: a model folder, an OpenAI-compatible endpoint, or structured
truth of phantoms. An answer that cannot be parsed is None and is counted as such.
"""

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.endpoint import Endpoint
from training.errors import TrainingError
from training.metrics.findings import SIZE_TOLERANCE, Stated, compare

SIGNIFICANT, INSIGNIFICANT, MATCHED = (
    "Clinically Significant Errors",
    "Clinically Insignificant Errors",
    "Matched Findings",
)
ERROR_KINDS = (
    "False report of a finding in the candidate",
    "Missing a finding present in the reference",
    "Misidentification of a finding's anatomic location/position",
    "Misassessment of the severity of a finding",
    "Mentioning a comparison that isn't in the reference",
    "Omitting a comparison detailing a change from a prior study",
)
LETTERS = "abcdef"
ANSWER_TOKENS = 2048
MARKUP = re.compile(r"\*+|`+|^[ \t]*#+[ \t]*", re.MULTILINE)
"""Bold, code and headings of chat models."""
KIND = re.compile(r"^[ \t•-]*(?:\(([a-f1-6])\)|([a-f])[.)])[ \t]*(.*)", re.IGNORECASE | re.MULTILINE)
"""A line about one kind of error; some judges number the kinds (1) to (6)."""
NEXT_KIND = re.compile(r"(?<=[.;,\d])[ \t]+(?=\([a-f]\)[^()\n]*:)", re.IGNORECASE)
COUNT = re.compile(r"[^:\n]*:[ \t]*(\d+)\b(?!\s*(?:mm|cm|[x×])|[.,]\d)", re.IGNORECASE)
NO_ERROR = re.compile(r"[^:\n]*:[ \t]*(?:no(?!\.?\s*\d)|none(?!\s+of)|n/a)\b", re.IGNORECASE)
NONE = re.compile(r"(?:no|none(?!\s+of)|n/a)\b(?!.*\b(?:but|except|however|apart)\b)", re.IGNORECASE | re.DOTALL)
LISTED = re.compile(r"^[ \t]*\(?(\d+)[.)]", re.MULTILINE)


class PromptMissingError(TrainingError, ImportError):
    """The published prompt is not installed; the message says how to get it."""


@cache
def _published() -> ModuleType:
    # radeval's own __init__ pulls in a dozen judges and asks the network for corpora; the one file needs none of that.
    package = importlib.util.find_spec("radeval")
    if package is None or not package.submodule_search_locations:
        raise PromptMissingError("GREEN's prompt comes with radeval: pip install --no-deps radeval==2.2.1")
    file = Path(package.submodule_search_locations[0]) / "metrics" / "green_score" / "utils.py"
    spec = importlib.util.spec_from_file_location("radeval_green_prompt", file)
    if spec is None or spec.loader is None:
        raise PromptMissingError(f"radeval holds no {file.name}: version 2.2.1 is needed")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_prompt(reference: str, candidate: str) -> str:
    """The published prompt about a reference and a candidate report; PromptMissingError without radeval."""
    return str(_published().make_prompt(reference, candidate))


@dataclass(frozen=True)
class Verdict:
    """A parsed answer: significant and insignificant errors by kind (a) to (f), and matched findings."""

    significant: tuple[int, ...]
    insignificant: tuple[int, ...]
    matched: int

    @property
    def score(self) -> float:
        """Matched / (matched + significant), 0 when nothing matched."""
        return self.matched / (self.matched + sum(self.significant)) if self.matched else 0.0


def parse(answer: str) -> Verdict | None:
    """Read an answer in the published format; None when a section is missing or holds no count where one is due.

    Of a section that is quoted or repeated the last counts. A kind of error that is listed without a number makes the
    answer unreadable: taken as zero it would raise the score.
    """
    plain = MARKUP.sub("", answer)
    significant = _error_counts(plain, SIGNIFICANT)
    insignificant = _error_counts(plain, INSIGNIFICANT)
    matched = _matched_count(plain)
    if significant is None or matched is None:
        return None
    # Judges often leave the insignificant section out; the score does not use it.
    return Verdict(significant, insignificant or (0,) * len(LETTERS), matched)


def _section(answer: str, name: str) -> str | None:
    title = rf"\[{re.escape(name)}\][ \t]*:?"
    for start in (r"^[ \t]*", ""):
        found = list(re.finditer(rf"{start}{title}", answer, re.IGNORECASE | re.MULTILINE))
        if found:
            return re.split(r"^[ \t]*\[", answer[found[-1].end() :], maxsplit=1, flags=re.MULTILINE)[0].strip()
    return None


def _error_counts(answer: str, name: str) -> tuple[int, ...] | None:
    body = _section(answer, name)
    if body is None:
        return None
    kinds = [(letter or other, rest) for letter, other, rest in KIND.findall(NEXT_KIND.sub("\n", body))]
    if not kinds:
        return (0,) * len(LETTERS) if not body or NONE.match(body) else None
    lettered = any(mark.isalpha() for mark, _ in kinds)
    counts = [0] * len(LETTERS)
    for mark, rest in kinds:
        count = COUNT.match(rest)
        if count is not None:
            counts[LETTERS.index(mark.lower()) if mark.isalpha() else int(mark) - 1] += int(count.group(1))
        # Beside letters, "(1) nodule" lists the errors of a kind.
        elif not NO_ERROR.match(rest) and (mark.isalpha() or not lettered):
            return None
    return tuple(counts)


def _matched_count(answer: str) -> int | None:
    body = _section(answer, MATCHED)
    if body is None:
        return None
    if NONE.match(body):
        return 0
    count = re.match(r"\(?(\d+)\b(?!\s*(?:mm|cm))", body)
    if count is None:
        return None
    listed = [int(number) for number in LISTED.findall(body)]
    # "1. A" and below it "2. B" are two findings in a list, not one.
    return len(listed) if listed == list(range(1, len(listed) + 1)) and len(listed) > 1 else int(count.group(1))


class Judge(Protocol):
    """Whoever compares a candidate with a reference."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    def judge(self, reference: str, candidate: str) -> Verdict | None:
        """The verdict, or None when the answer could not be parsed."""
        ...


@dataclass(frozen=True)
class ModelJudge:
    """A causal language model in a local folder, such as StanfordAIMI/GREEN-radllama2-7b."""

    model: Any
    tokenizer: Any
    name: str = "model"

    @classmethod
    def from_pretrained(cls, folder: Path, device: str = "cpu") -> "ModelJudge":
        """Load model and tokenizer from a folder."""
        model = AutoModelForCausalLM.from_pretrained(folder).eval().to(device)
        return cls(model, AutoTokenizer.from_pretrained(folder), f"model:{folder.name}")

    @torch.inference_mode()
    def judge(self, reference: str, candidate: str) -> Verdict | None:
        """Ask greedily."""
        prompt = make_prompt(reference, candidate)
        if self.tokenizer.chat_template:
            message = [{"role": "user", "content": prompt}]
            prompt = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        inputs = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        output = self.model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        return parse(self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@dataclass(frozen=True)
class EndpointJudge:
    """A model behind an OpenAI-compatible endpoint."""

    endpoint: Endpoint

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"endpoint:{self.endpoint.model}"

    def judge(self, reference: str, candidate: str) -> Verdict | None:
        """Ask at temperature 0."""
        return parse(self.endpoint.complete(make_prompt(reference, candidate), temperature=0.0).text)


@dataclass(frozen=True)
class PhantomJudge:
    """Writes the published answer from structured truth: exact where phantoms are concerned, of no use elsewhere.

    `read` turns a report into its findings.
    """

    read: Callable[[str], Sequence[Stated]]
    name: str = "phantom"

    def judge(self, reference: str, candidate: str) -> Verdict | None:
        """The verdict on two phantom reports."""
        return parse(self.answer(self.read(reference), self.read(candidate)))

    def answer(self, truth: Sequence[Stated], said: Sequence[Stated]) -> str:
        """The answer in the published format.

        A true finding stated on the wrong side is one error of place, not a missed and an invented one; a wrong lobe or a
        size off by more than 25 % is an error beside a match. A normal report that is stated normal matches in one
        finding, its normality, so that it scores 1.
        """
        counts = compare(truth, said)
        missed, invented = list(counts.missed), list(counts.invented)
        misplaced = []
        for true in list(missed):
            other = next((s for s in invented if s.kind == true.kind), None)
            if other is not None:
                missed.remove(true)
                invented.remove(other)
                misplaced.append(true)
        missized = [true for true, other in counts.matched if _wrong_size(true, other)]
        places = [true for true, other in counts.matched if true.place and other.place and true.place != other.place]
        matched = [_name(true) for true, _ in counts.matched]
        if not truth and not said:
            matched = ["no abnormality"]
        significant: tuple[list[str], ...] = (
            _names(invented),
            _names(missed),
            _names([*misplaced, *places]),
            _names(missized),
            [],
            [],
        )
        insignificant: tuple[list[str], ...] = ([],) * len(LETTERS)
        parts = ["[Explanation]:", f"{len(truth)} findings in the reference, {len(said)} in the candidate.", ""]
        for title, groups in ((SIGNIFICANT, significant), (INSIGNIFICANT, insignificant)):
            parts.append(f"[{title}]:")
            parts += [
                f"({letter}) {kind}: {len(group)}. {'; '.join(group)}".rstrip()
                for letter, kind, group in zip(LETTERS, ERROR_KINDS, groups, strict=True)
            ]
            parts.append("")
        parts += [f"[{MATCHED}]:", f"{len(matched)}. {'; '.join(matched)}".rstrip()]
        return "\n".join(parts)


def _wrong_size(true: Stated, other: Stated) -> bool:
    if not true.size_mm or not other.size_mm:
        return False
    return abs(other.size_mm - true.size_mm) > SIZE_TOLERANCE * true.size_mm


def _name(finding: Stated) -> str:
    return " ".join(part for part in (finding.side, finding.kind.replace("_", " ")) if part)


def _names(findings: Sequence[Stated]) -> list[str]:
    return [_name(finding) for finding in findings]
