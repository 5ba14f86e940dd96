"""Questions, answers and narratives from reports, through an OpenAI-compatible endpoint, in five stages.

The stages are those of the publication's second version: questions from a report; thinking and answer; a yes/no filter;
refining, so that the thinking never mentions a report; one narrative per image. Text is de-identified before it leaves the
machine. Every whole answer is stored under the hash of what was asked, so a run that stops goes on without paying twice; only
what is no answer (cut at the limit of tokens, empty, not in the asked form) is asked again by the next run.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from os import SEEK_END
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from training.data import QUESTION, Case
from training.deidentify import deidentify
from training.endpoint import Completion, Endpoint, EndpointError, Price, estimate_tokens

STAGES = ("questions", "answer", "filter", "refine", "narrative")
QUESTIONS_A_REPORT = 4
EXPECTED_OUTPUT_TOKENS = {"questions": 160, "answer": 220, "filter": 4, "refine": 220, "narrative": 300}
"""For the price before a run."""
FAILURES_IN_A_ROW = 5
"""Reports that the endpoint may refuse one after another; more is no matter of a report, and the run stops."""
REPORT_WORDS = re.compile(
    r"\b(reports?|reported(?:ly)?|reporting|radiolog(?:ist|y)|(?:clinical|written|provided|the) (?:notes?|texts?)"
    r"|(?:findings|impression) section|dictat\w+|descri(?:bed|bes|ption)|documented|mentioned|states?d?|according to)\b",
    re.I,
)
SUPPORTED = re.compile(r"\W*yes\b", re.IGNORECASE)
"""How the filter says that the report supports an answer."""
SYSTEM = "You write training data for a model that reads CT volumes. Be exact, invent nothing, write English."

PROMPTS = {
    "questions": (
        "Below is the report of one CT. Write {count} different questions that somebody who sees the images and not the "
        "report could be asked, and that the report answers: presence, side, place, size, number. Answer with a JSON list of "
        "strings and nothing else.\n\nReport:\n{report}"
    ),
    "answer": (
        "Report of one CT:\n{report}\n\nQuestion: {question}\n\nFirst think step by step as if you looked at the images, "
        "between <thinking> and </thinking>. Then give the answer in one or two sentences between <answer> and </answer>."
    ),
    "filter": (
        "Report of one CT:\n{report}\n\nQuestion: {question}\nAnswer: {answer}\n\nDoes the report fully support this answer? "
        "Reply with yes or no and nothing else."
    ),
    "refine": (
        "Rewrite the reasoning below so that it speaks only of what is seen in the images. It must never mention a report, a "
        "text or a description. Keep every fact. Reply with the reasoning alone.\n\n{thinking}"
    ),
    "narrative": (
        "Rewrite the report below as one flowing narrative of the findings followed by the impression. Keep every finding, "
        "side, size and negation; add nothing.\n\n{report}"
    ),
}


@dataclass(frozen=True)
class Estimate:
    """What a run would ask and cost before it starts; only what is not stored yet."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    dollars: float

    def text(self) -> str:
        """The estimate to read."""
        return (
            f"about {self.requests} requests, {self.prompt_tokens} tokens in, {self.completion_tokens} out, "
            f"{self.dollars:.2f} US dollars"
        )


@dataclass
class Spent:
    """What a run has asked and paid so far."""

    requests: int = 0
    stored: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str) -> None:
        """Count something that was left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


class AnswerStore:
    """Answers on disk by the hash of model, prompt and stage; one file a stage, appended line by line."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = Lock()
        self._known: dict[str, str] = {}
        for file in sorted(self.folder.glob("*.jsonl")):
            # Not splitlines: an answer may hold U+2028. The last line may be cut within a letter.
            for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # The last line of a killed run may be cut; its answer is asked again.
                self._known[row["key"]] = row["text"]

    @staticmethod
    def key(model: str, stage: str, prompt: str) -> str:
        """Name of one answer."""
        return hashlib.sha256(json.dumps([model, stage, prompt]).encode()).hexdigest()

    def get(self, key: str) -> str | None:
        """A stored answer."""
        return self._known.get(key)

    def put(self, stage: str, key: str, answer: Completion) -> None:
        """Store an answer before anybody uses it."""
        row = json.dumps({"key": key, "text": answer.text}, ensure_ascii=False)
        with self._lock:
            with (self.folder / f"{stage}.jsonl").open("a+b") as stream:
                stream.write(_line_end(stream) + row.encode() + b"\n")
            self._known[key] = answer.text


def _line_end(stream: BinaryIO) -> bytes:
    """What a file needs before its next line: a line end where a killed run left none."""
    if not stream.tell():
        return b""
    stream.seek(-1, SEEK_END)
    return b"" if stream.read(1) == b"\n" else b"\n"


class Synthesizer:
    """Runs the five stages for reports; `names` are words to take out of every text, of patients and staff."""

    def __init__(self, endpoint: Endpoint, store: AnswerStore, names: Sequence[str] = ()):
        self.endpoint, self.store, self.names = endpoint, store, tuple(names)
        self.spent = Spent()
        self._lock = Lock()

    def ask(self, stage: str, **values: Any) -> str:
        """The stored or fresh answer of one stage, "" for one that was cut; EndpointError when it cannot be had."""
        known = self.stored(stage, **values)
        if known is not None:
            with self._lock:
                self.spent.stored += 1
            return known
        prompt = PROMPTS[stage].format(**values)
        answer = self.endpoint.complete(prompt, SYSTEM)
        with self._lock:
            self.spent.requests += 1
            self.spent.prompt_tokens += answer.prompt_tokens
            self.spent.completion_tokens += answer.completion_tokens
        if not answer.whole:
            self._drop(f"{stage}: cut at the limit of tokens")
            return ""
        self.store.put(stage, self.store.key(self.endpoint.model, stage, prompt), answer)
        return answer.text

    def stored(self, stage: str, **values: Any) -> str | None:
        """The stored answer of one stage, or None when there is none of any use: then it is asked again."""
        text = self.store.get(self.store.key(self.endpoint.model, stage, PROMPTS[stage].format(**values)))
        return text if text is not None and USABLE[stage](text) else None

    def synthesize(self, case: Case) -> list[Case]:
        """New cases about the volume of one report: questions with thinking and answer, and one narrative."""
        report = deidentify(case.answer, self.names)
        made = []
        asked = parse_questions(self.ask("questions", report=report, count=QUESTIONS_A_REPORT))
        if not asked:
            self._drop("questions: not a JSON list")
        for number, question in enumerate(asked, start=1):
            answer = self._answer(report, question)
            if answer is not None:
                made.append(replace(case, case_id=f"{case.case_id}-syn{number}", question=question, answer=answer))
        narrative = self.ask("narrative", report=report).strip()
        if narrative:
            made.append(replace(case, case_id=f"{case.case_id}-narrative", question=QUESTION, answer=narrative))
        else:
            self._drop("narrative: empty")
        return [replace(new, findings=None, source=f"{case.source}+synthetic") for new in made]

    def _answer(self, report: str, question: str) -> str | None:
        parts = parse_thinking(self.ask("answer", report=report, question=question))
        if parts is None:
            self._drop("answer: no thinking and answer")
            return None
        thinking, answer = parts
        verdict = self.ask("filter", report=report, question=question, answer=answer)
        if SUPPORTED.match(verdict) is None:
            self._drop("filter: not supported by the report")
            return None
        refined = self.ask("refine", thinking=thinking).strip()
        if not refined or REPORT_WORDS.search(refined):
            self._drop("refine: still mentions a report")
            return None
        return f"<think>\n{refined}\n</think>\n{answer}"

    def _drop(self, reason: str) -> None:
        with self._lock:
            self.spent.drop(reason)

    def run(self, cases: Sequence[Case], threads: int, done: Callable[[], None]) -> Iterator[Case]:
        """Synthesize for many reports at once, in order; `done` is called after each.

        A report that the endpoint refuses for good (a content filter, say) is left out and counted. EndpointError when it
        refuses five in a row: then nothing more is asked, and what was answered is stored.
        """
        refused = 0
        pool = ThreadPoolExecutor(threads)
        try:
            for running in [pool.submit(self.synthesize, case) for case in cases]:
                try:
                    made = running.result()
                    refused = 0
                except EndpointError:
                    refused += 1
                    if refused >= min(FAILURES_IN_A_ROW, len(cases)):
                        raise
                    self._drop("endpoint: refused or kept failing")
                    made = []
                done()
                yield from made
        finally:
            pool.shutdown(cancel_futures=True)

    def estimate(self, cases: Sequence[Case], price: Price) -> Estimate:
        """What is left to ask for the cases, counted by rule of thumb; answers that are stored cost nothing."""
        requests = prompt_tokens = completion_tokens = 0
        for case in cases:
            report = deidentify(case.answer, self.names)
            size = estimate_tokens(SYSTEM + report)
            for stage, times in self._unasked(report).items():
                requests += times
                prompt_tokens += times * (size + estimate_tokens(PROMPTS[stage]))
                completion_tokens += times * EXPECTED_OUTPUT_TOKENS[stage]
        return Estimate(requests, prompt_tokens, completion_tokens, price.cost(prompt_tokens, completion_tokens))

    def _unasked(self, report: str) -> Counter[str]:
        """How often each stage is still to be asked about a report."""
        missing: Counter[str] = Counter()
        listed = self.stored("questions", report=report, count=QUESTIONS_A_REPORT)
        asked: Sequence[str | None] = [None] * QUESTIONS_A_REPORT if listed is None else parse_questions(listed)
        missing["questions"] += listed is None
        for question in asked:
            missing.update(self._unasked_about(report, question))
        missing["narrative"] += self.stored("narrative", report=report) is None
        return missing

    def _unasked_about(self, report: str, question: str | None) -> Sequence[str]:
        reply = None if question is None else self.stored("answer", report=report, question=question)
        parts = None if reply is None else parse_thinking(reply)
        if parts is None:
            return "answer", "filter", "refine"
        verdict = self.stored("filter", report=report, question=question, answer=parts[1])
        if verdict is None:
            return "filter", "refine"
        left_out = SUPPORTED.match(verdict) is None
        return () if left_out or self.stored("refine", thinking=parts[0]) is not None else ("refine",)


def parse_questions(text: str) -> list[str]:
    """The questions of an answer that should be a JSON list; empty when it is none.

    >>> parse_questions('Here they are: ["Where?", " ", 3]')
    ['Where?']
    """
    found = re.search(r"\[.*\]", text, re.DOTALL)
    try:
        listed = json.loads(found.group(0)) if found else []
    except json.JSONDecodeError:
        return []
    return [question.strip() for question in listed if isinstance(question, str) and question.strip()]


def parse_thinking(text: str) -> tuple[str, str] | None:
    """Thinking and answer of a reply, or None when a part is missing.

    >>> parse_thinking("<thinking>Bright.</thinking> <answer>A stone.</answer>")
    ('Bright.', 'A stone.')
    """
    thinking = re.search(r"<thinking>(.*?)</thinking>", text, re.DOTALL)
    answer = re.search(r"<answer>(.*?)(?:</answer>|\Z)", text, re.DOTALL)
    if thinking is None or answer is None or not thinking.group(1).strip() or not answer.group(1).strip():
        return None
    return thinking.group(1).strip(), answer.group(1).strip()


USABLE: dict[str, Callable[[str], object]] = {
    "questions": parse_questions,
    "answer": parse_thinking,
    "filter": re.compile(r"\W*(?:yes|no)\b", re.IGNORECASE).match,
    "refine": str.strip,
    "narrative": str.strip,
}
"""Of each stage: whether an answer is one."""
