"""The default study of the demo, and what is known to be true of a synthetic study."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.core.errors import InvalidObjectError

FOLDER = Path(__file__).parent / "study"
TRUTH_NAME = "truth.json"
_DETAILS = ("side", "place", "density", "degree")


@dataclass(frozen=True)
class Painted:
    """One finding that was painted into a synthetic study."""

    kind: str  # as PhantomCT names it, "lung_nodule"
    side: str  # "" for organs that are one
    detail: str  # place, size and what else is known, for a reader


def truth(folder: Path) -> list[Painted] | None:
    """What was painted into the synthetic study in `folder`; None for any other study.

    Raises `InvalidObjectError` when the file that says so cannot be read.
    """
    path = folder / TRUTH_NAME
    if not path.is_file():
        return None
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return [Painted(f["type"], f.get("side", ""), detail(f)) for f in known["findings"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidObjectError(f"{path} is no list of findings of a synthetic study; move it away") from error


def detail(finding: dict[str, Any]) -> str:
    """Side, place, density, degree and size of a finding as PhantomCT writes one, as far as they are known."""
    parts = [finding[name] for name in _DETAILS if finding.get(name)]
    if finding.get("size_mm"):
        parts.append(f"{finding['size_mm']} mm")
    return ", ".join(parts) or "present"
