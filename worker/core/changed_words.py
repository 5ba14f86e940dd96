"""How many words of a draft its reader changed: counted once, when the report is signed."""

from collections.abc import Sequence

from worker.core import editing
from worker.core.notices import NOTICES
from worker.core.report import Assessment, Origin
from worker.core.review_records import WorkingCopy


def counts(copy: WorkingCopy) -> tuple[int, int]:
    """Words of the machine's sentences that this copy began with, and the edit distance in words to what it says now."""
    drafted = [row.text for row in copy.base.sentences if row.origin is Origin.MACHINE]
    signed = [row.text for row in editing.written(copy) if row.assessment is not Assessment.REJECTED]
    words = [[word for text in texts if text not in NOTICES for word in text.split()] for texts in (drafted, signed)]
    return len(words[0]), edit_distance(words[0], words[1])


def edit_distance(old: Sequence[str], new: Sequence[str]) -> int:
    """Words to insert, delete or replace to make one text the other (Levenshtein)."""
    row = list(range(len(new) + 1))
    for i, a in enumerate(old, start=1):
        above, row[0] = row[0], i
        for j, b in enumerate(new, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]
