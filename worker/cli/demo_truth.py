"""What was painted into a synthetic study beside what its draft says, read from the text by PhantomCT's labeler."""

from collections.abc import Sequence
from dataclasses import dataclass

from training.phantoms import labeler
from worker.demo.study import Painted, detail

NOT_NAMED = "not named"
NOT_PAINTED = "not there"


@dataclass(frozen=True)
class Row:
    """One finding: what is known of it and what the draft says of it."""

    finding: str
    painted: str
    drafted: str


def compare(truth: Sequence[Painted], text: str) -> list[Row]:
    """A row for every painted finding, then one for everything else that the draft calls present.

    Kind and side must agree; place and size stand side by side for the reader to compare.
    """
    said: dict[tuple[str, str], list[str]] = {}
    for finding in labeler.read(text).findings:
        said.setdefault(finding.key, []).append(detail(finding.to_dict()))
    rows = []
    for painted in truth:
        found = said.get((painted.kind, painted.side), [])
        rows.append(Row(_name(painted.kind), painted.detail, found.pop(0) if found else NOT_NAMED))
    return rows + [Row(_name(kind), NOT_PAINTED, each) for (kind, _), left in said.items() for each in left]


def _name(kind: str) -> str:
    return kind.replace("_", " ").capitalize()
