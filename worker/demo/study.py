"""The default study of the demo, and what is known to be true of a synthetic study."""

import json
from pathlib import Path
from typing import Any

from worker.core.errors import InvalidObjectError

FOLDER = Path(__file__).parent / "study"
TRUTH_NAME = "truth.json"
_DETAILS = ("side", "place", "density", "degree")


def truth(folder: Path) -> list[str]:
    """What was painted into the synthetic study in `folder`, a line each; empty for any other study.

    Raises `InvalidObjectError` when the file that says so cannot be read.
    """
    path = folder / TRUTH_NAME
    if not path.is_file():
        return []
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        lines = [_line(finding) for finding in known["findings"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidObjectError(f"{path} is no list of findings of a synthetic study; move it away") from error
    return [*lines, "Nothing else abnormal was painted."]


def _line(finding: dict[str, Any]) -> str:
    parts = [finding["type"].replace("_", " ").capitalize(), *(finding[name] for name in _DETAILS if finding.get(name))]
    if finding.get("size_mm"):
        parts.append(f"{finding['size_mm']} mm")
    return ", ".join(parts)
