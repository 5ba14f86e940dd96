"""What stands between a text and a signature: each problem named, with the sentence that it is about.

The rules read English report prose by words alone. They are narrow on purpose: a reader who is stopped without reason
soon stops reading what stops him. What they do not see, they do not claim to.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from worker.core.report import Assessment, Origin, Section, Sentence


class Rule(StrEnum):
    """The checks by name."""

    UNTOUCHED = "untouched"  # a machine's sentence that nobody accepted, edited or rejected
    EMPTY_IMPRESSION = "empty_impression"
    SIDE = "side"  # the impression names one side of a structure, the findings only the other
    SEX = "sex"  # an organ that the patient of this sex does not have
    SIZE_WITHOUT_UNIT = "size_without_unit"
    CRITICAL_NOT_COMMUNICATED = "critical_not_communicated"


TITLES: dict[Rule, str] = {
    Rule.UNTOUCHED: "Not yet judged",
    Rule.EMPTY_IMPRESSION: "The impression is empty",
    Rule.SIDE: "Side differs between findings and impression",
    Rule.SEX: "Organ does not fit the patient's sex",
    Rule.SIZE_WITHOUT_UNIT: "Size without a unit",
    Rule.CRITICAL_NOT_COMMUNICATED: "Critical finding without a record of who was told",
}


@dataclass(frozen=True)
class Problem:
    """One reason why a text cannot be signed; `index` is the sentence's place in what was checked, if it is about one."""

    rule: Rule
    index: int | None = None
    word: str = ""  # what in the sentence, in lower case

    @property
    def title(self) -> str:
        """The problem for a person."""
        return f"{TITLES[self.rule]}: “{self.word}”" if self.word else TITLES[self.rule]


_PAIRED = (
    "kidney", "renal", "lung", "pulmonary", "lobe", "pleural", "effusion", "adrenal", "ovary", "ovarian", "adnexa",
    "breast", "hip", "femur", "femoral", "iliac", "inguinal", "ureter", "hydronephrosis", "pneumothorax", "hilar",
    "axillary", "hemithorax", "rib", "clavicle", "scapula", "humerus", "testis", "hemisphere", "frontal", "temporal",
    "parietal", "occipital", "subdural", "maxillary", "orbit", "jugular", "carotid", "psoas",
)  # fmt: skip
_SIDED = re.compile(
    rf"\b(?P<side>right|left|bilateral)(?:[\s-]+(?:\w+[\s-]+){{0,2}}?)(?P<part>{'|'.join(_PAIRED)})(?:s|es)?\b", re.I
)
_BOTH = re.compile(rf"\bboth\s+(?:\w+\s+)?(?P<part>{'|'.join(_PAIRED)})(?:s|es)?\b", re.I)
_SAME = {
    "renal": "kidney", "pulmonary": "lung", "lobe": "lung", "ovarian": "ovary", "femoral": "femur",
    "pleural": "pleura", "effusion": "pleura", "hemithorax": "lung",
}  # fmt: skip
_OF_THE_OTHER_SEX = {
    "M": re.compile(
        r"\b(uterus|uterine|endometri\w+|myometri\w+|cervix uteri|ovar(?:y|ies|ian)|adnexa\w*|fallopian|vagina\w*|"
        r"pregnan\w+|gravid|hysterectomy)\b",
        re.I,
    ),
    "F": re.compile(r"\b(prostat\w*|seminal vesicles?|testi(?:s|cle|cles|cular)|scrot\w+|penis|penile)\b", re.I),
}
_NUMBER = r"\d+(?:[.,]\d+)?"
_UNIT = r"(?:mm|cm|m|ml|cc|millimet\w+|centimet\w+|hu|hounsfield|%|percent|degrees?|°)"
_SIZE = re.compile(
    rf"(?P<product>{_NUMBER}(?:\s*{_UNIT})?(?:\s*[x×]\s*{_NUMBER}(?:\s*{_UNIT})?)+)"
    rf"|(?:measur\w+|diameter(?: of)?|sized?|thickness(?: of)?)\s+(?:(?:up to|about|approximately|is|of|at)\s+)*"
    rf"(?P<single>{_NUMBER}(?:\s*{_UNIT})?)",
    re.I,
)
_HAS_UNIT = re.compile(rf"{_UNIT}(?![a-z])", re.I)
_UNIT_FOLLOWS = re.compile(rf"[\s-]*(?:[-–]|to|and)?\s*(?:{_NUMBER}\s*)?-?{_UNIT}\b", re.I)
_CRITICAL = re.compile(
    r"\b(tension pneumothorax|pneumothorax|pulmonary embol\w+|aortic dissection|dissection of the aorta|"
    r"ruptured? (?:\w+ ){0,3}aneurysm|active (?:\w+ )?(?:bleeding|hemorrhage|extravasation)|pneumoperitoneum|"
    r"free (?:intraperitoneal )?air|(?:intracranial|subdural|epidural|subarachnoid|intracerebral) h(?:a)?emorrhage|"
    r"(?:mesenteric|bowel) isch(?:a)?emia|midline shift|spinal cord compression|testicular torsion|ovarian torsion)\b",
    re.I,
)
_NEGATION = re.compile(
    r"\b(no|without|negative for|absence of|not|ruled out|excluded?|nor|resolved|free of|unlikely|cannot)\b[^.;]*$",
    re.I,
)
_NEGATED_AFTER = re.compile(
    r"^[^.;]*\b(?:is|are|was|were|has been)\s+(?:not|no longer|excluded|ruled out|absent|resolved)\b", re.I
)


def blocking(
    sentences: Sequence[Sentence], *, patient_sex: str = "", communicated: bool = False
) -> tuple[Problem, ...]:
    """Every reason why these sentences cannot be signed, in the order of the text; () when there is none.

    `patient_sex` is DICOM's M, F or O; `communicated` says that a communication of a critical finding is on record.
    """
    problems = [
        *_untouched(sentences),
        *_empty_impression(sentences),
        *_sides(sentences),
        *_sexes(sentences, patient_sex),
        *_sizes(sentences),
        *([] if communicated else _critical(sentences)),
    ]
    return tuple(sorted(problems, key=lambda p: (p.index is None, p.index or 0)))


def critical_words(sentences: Sequence[Sentence]) -> frozenset[str]:
    """The critical findings that these sentences name, in lower case."""
    return frozenset(word for _, sentence in _kept(sentences) for word in _critical_words(sentence.text))


def _kept(sentences: Sequence[Sentence]) -> Iterator[tuple[int, Sentence]]:
    return ((i, s) for i, s in enumerate(sentences) if s.assessment is not Assessment.REJECTED and s.text.strip())


def _untouched(sentences: Sequence[Sentence]) -> Iterator[Problem]:
    for index, sentence in enumerate(sentences):
        if sentence.assessment is Assessment.UNTOUCHED and sentence.origin is not Origin.PERSON:
            yield Problem(Rule.UNTOUCHED, index)


def _empty_impression(sentences: Sequence[Sentence]) -> Iterator[Problem]:
    if not any(s.section is Section.IMPRESSION for _, s in _kept(sentences)):
        yield Problem(Rule.EMPTY_IMPRESSION)


def _sided(text: str) -> set[tuple[str, str]]:
    """(part, side) pairs that a text names; both sides count as either."""
    found: set[tuple[str, str]] = set()
    for match in _SIDED.finditer(text):
        part = match["part"].lower()
        side = match["side"].lower()
        part = _SAME.get(part, part)
        found |= {(part, "left"), (part, "right")} if side == "bilateral" else {(part, side)}
    for match in _BOTH.finditer(text):
        part = _SAME.get(match["part"].lower(), match["part"].lower())
        found |= {(part, "left"), (part, "right")}
    return found


def _sides(sentences: Sequence[Sentence]) -> Iterator[Problem]:
    told: set[tuple[str, str]] = set()
    for _, sentence in _kept(sentences):
        if sentence.section is Section.FINDINGS:
            told |= _sided(sentence.text)
    for index, sentence in _kept(sentences):
        if sentence.section is Section.FINDINGS:
            continue
        for part, side in sorted(_sided(sentence.text)):
            other = "left" if side == "right" else "right"
            if (part, other) in told and (part, side) not in told:
                yield Problem(Rule.SIDE, index, f"{side} {part}")


def _sexes(sentences: Sequence[Sentence], sex: str) -> Iterator[Problem]:
    pattern = _OF_THE_OTHER_SEX.get(sex.strip().upper())
    if pattern is None:
        return
    for index, sentence in _kept(sentences):
        match = pattern.search(sentence.text)
        if match:
            yield Problem(Rule.SEX, index, match[1].lower())


def _sizes(sentences: Sequence[Sentence]) -> Iterator[Problem]:
    for index, sentence in _kept(sentences):
        for match in _SIZE.finditer(sentence.text):
            size = match["product"] or match["single"]
            if not _HAS_UNIT.search(size) and not _UNIT_FOLLOWS.match(sentence.text, match.end()):
                yield Problem(Rule.SIZE_WITHOUT_UNIT, index, size.lower())
                break


def _critical(sentences: Iterable[Sentence]) -> Iterator[Problem]:
    for index, sentence in _kept(tuple(sentences)):
        word = next(_critical_words(sentence.text), None)
        if word:
            yield Problem(Rule.CRITICAL_NOT_COMMUNICATED, index, word)


def _critical_words(text: str) -> Iterator[str]:
    for match in _CRITICAL.finditer(text):
        if not _NEGATION.search(text, 0, match.start()) and not _NEGATED_AFTER.search(text[match.end() :]):
            yield match[1].lower()
