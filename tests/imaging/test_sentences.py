"""Every refusal tells a person what to do."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker import imaging

FOLDER = Path(imaging.__file__).parent
REFUSALS = frozenset({"GeometryError", "PixelDataError", "InvalidObjectError", "InsufficientMemoryError"})
ADVICE = ("Send ", "Check ", "Correct ", "Take ", "Requeue ", "Unpack ", "Write ", "Give ", "Fetch ", "ask for ")
NEEDS_NONE = (
    "The file is a DICOMDIR",  # belongs on a disc and harms nothing
    "Objects of the study that cannot be read",  # passes on the sentences of others
)


def literal(node: ast.expr) -> str:
    """The words of a string or of an f-string that stand in the code."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
    return str(node.value) if isinstance(node, ast.Constant) else ""


def sentences() -> Iterator[tuple[str, str]]:
    """(place, words) of each refusal raised with words of its own."""
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in REFUSALS
                and node.args
            ):
                words = literal(node.args[0])
                if words:
                    yield f"{path.name}:{node.lineno}", words


@pytest.mark.parametrize(("place", "words"), [pytest.param(*pair, id=pair[0]) for pair in sentences()])
def test_a_refusal_says_what_to_do(place: str, words: str) -> None:
    assert words.startswith(NEEDS_NONE) or any(advice in words for advice in ADVICE), f"{place}: {words}"


def test_refusals_were_found() -> None:
    assert len(list(sentences())) > 30
