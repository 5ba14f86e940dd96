"""From generated text to sections and sentences.

A report has the sections Findings, Impression and Recommendations, each begun by its name and a colon; text before the first
name belongs to Findings. A thinking block is never part of a report.
"""

import itertools
import re
from dataclasses import dataclass

FINDINGS, IMPRESSION, RECOMMENDATIONS = "findings", "impression", "recommendations"
SECTIONS = (FINDINGS, IMPRESSION, RECOMMENDATIONS)
THINKING_END = "</think>"
THINKING_START = "<think>"

_HEADER = re.compile(
    r"(?:^|(?<=[\n.;:!?])|(?<=[.;:!?] ))[ \t]*[*#]{0,4}[ \t]*(findings?|impressions?|recommendations?)[ \t]*:[*]{0,2}",
    re.IGNORECASE | re.MULTILINE,
)
# A sentence ends at . ! ? before white space, or at a line's end. "3.5 cm", "e.g. left" and a leading "1." do not end one.
_BOUNDARY = re.compile(r"(?<!\b[A-Za-z]\.[A-Za-z]\.)(?<!^\d\.)(?<!\n\d\.)(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class SentenceSpan:
    """A sentence's section and its place [start, end) in the generated text."""

    section: str
    start: int
    end: int
    text: str


def opens_thinking(prompt: str) -> bool:
    """Whether the prompt itself ends in the beginning of a thinking block, so that the text after it is thought until it ends."""
    return prompt.rstrip().endswith(THINKING_START)


def strip_thinking(text: str, thinking: bool = False) -> int:
    """Where the report begins: after the last thinking block; at the end when a block was begun and never closed.

    `thinking`: the prompt has begun one.
    """
    closed = text.rfind(THINKING_END)
    if closed >= 0:
        return closed + len(THINKING_END)
    opened = text.find(THINKING_START)
    return len(text) if thinking or opened >= 0 else 0


def split_report(text: str, thinking: bool = False) -> list[SentenceSpan]:
    """Sentences of the text in order, each with its section and its place in the text; `thinking` as `strip_thinking`.

    >>> [(s.section, s.text) for s in split_report("Lungs are clear. Impression: Normal chest.")]
    [('findings', 'Lungs are clear.'), ('impression', 'Normal chest.')]
    """
    begin = strip_thinking(text, thinking)
    # The pattern is run on the report alone: a header right behind a thinking block begins it.
    section, position = FINDINGS, begin
    sentences: list[SentenceSpan] = []
    for header in _HEADER.finditer(text[begin:]):
        sentences += _sentences(text, position, begin + header.start(), section)
        section, position = _section(header.group(1)), begin + header.end()
    return sentences + _sentences(text, position, len(text), section)


def _section(name: str) -> str:
    return next(section for section in SECTIONS if section.startswith(name.lower().rstrip("s")))


def _sentences(text: str, start: int, end: int, section: str) -> list[SentenceSpan]:
    spans = []
    part = text[start:end]
    cuts = [(0, 0), *(match.span() for match in _BOUNDARY.finditer(part)), (len(part), len(part))]
    for (_, first), (last, _) in itertools.pairwise(cuts):
        sentence = part[first:last]
        lead = len(sentence) - len(sentence.lstrip())
        stripped = sentence.strip()
        if any(character.isalnum() for character in stripped):
            begin = start + first + lead
            spans.append(SentenceSpan(section, begin, begin + len(stripped), stripped))
    return spans
