"""The machine's draft behind a text, sentence by sentence: what its reader changed, and where the model looked.

A reader accepts, edits or rejects the machine's sentences and adds their own; none is taken out or moved. So the sentences
of any later version that are not a person's are the draft's, in its order.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy.orm import Session

from worker.core import reports
from worker.core.records import ReportVersion, Sentence
from worker.core.report import Origin, Section

Drafted = Mapping[str, Sentence]
"""Id of a sentence to the sentence of the draft that it was made from."""

_RANK = {section: number for number, section in enumerate(Section)}


@dataclass(frozen=True)
class Piece:
    """A run of words in the difference between two texts."""

    kind: str  # "same", "added" or "removed"
    text: str


def machine_version(session: Session, shown: ReportVersion) -> ReportVersion | None:
    """The machine's draft that the shown text began from; evidence is asked for it and stored with its sentences.

    There is one draft a revision; a later one lies beside a text that was begun before it.
    """
    return reports.draft_of(session, shown.report_id, shown.study_revision)


def drafted(machine: ReportVersion | None, shown: ReportVersion) -> Drafted:
    """The draft's sentence behind each sentence of a version that is not a person's own; {} where that cannot be told."""
    rows, drafts = _of_the_machine(shown), _of_the_machine(machine) if machine is not None else []
    if len(rows) != len(drafts):  # written by another program: a wrong difference would be worse than none
        return {}
    return {row.id: draft for row, draft in zip(rows, drafts, strict=True)}


def difference(old: str, new: str) -> tuple[Piece, ...]:
    """What changed, word by word."""
    before, after = re.findall(r"\s+|[^\s]+", old), re.findall(r"\s+|[^\s]+", new)
    pieces: list[Piece] = []
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if tag == "equal":
            pieces.append(Piece("same", "".join(before[i1:i2])))
            continue
        if i2 > i1:
            pieces.append(Piece("removed", "".join(before[i1:i2])))
        if j2 > j1:
            pieces.append(Piece("added", "".join(after[j1:j2])))
    return tuple(pieces)


def _of_the_machine(version: ReportVersion) -> list[Sentence]:
    rows = [row for row in version.sentences if row.origin is not Origin.PERSON]
    return sorted(rows, key=lambda row: (_RANK[row.section], row.ordinal))
