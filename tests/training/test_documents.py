"""What the documents tell people to type exists in `python -m training`, with its options."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

from training import __main__ as command_line

ROOT = Path(__file__).resolve().parents[2]
COMMAND = re.compile(r"python -m training ([a-z][^`#]*?)(?:[`#]|(?<!\\)\n)")
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "docs" / "operations.md",
    ROOT / "mu2_model" / "README.md",
    ROOT / "training" / "README.md",
    ROOT / "training" / "phantoms" / "README.md",
]


@pytest.fixture(scope="module")
def commands() -> dict[str, Any]:
    command_line.mount()
    group: Any = typer.main.get_command(command_line.app)
    return dict(group.commands)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_training_command_of_a_document_exists_with_its_options(commands: dict[str, Any], path: Path) -> None:
    found = COMMAND.findall(path.read_text())
    assert found
    for line in found:
        name, *rest = line.replace("\\", " ").split()
        assert name in commands, line
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word.split("=")[0] for word in rest if word.startswith("--")} <= options, line


def test_every_training_command_stands_in_a_document(commands: dict[str, Any]) -> None:
    told = "\n".join(path.read_text() for path in DOCUMENTS)
    assert {name for name in commands if not re.search(rf"`{name}\b|training {name}\b", told)} == set()
