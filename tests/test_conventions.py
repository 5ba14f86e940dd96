"""What style and architecture promise and a test can see."""

import ast
from pathlib import Path

import pytest

from tests.settings_table import README, settings_of, table, told
from worker.core.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("worker", "dicom_listener", "mu2_model", "training", "migrations")
DRAWERS = {"utils", "helpers", "common", "misc"}
DOORS = {"dicom_listener", "worker.tasks", "worker.review"}


def sources() -> list[Path]:
    """Every Python file of the product."""
    return [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]


def test_every_setting_has_a_sentence() -> None:
    assert [name for name, _, sentence in settings_of(Settings) if not sentence.endswith(".")] == []


def test_the_table_in_the_readme_is_the_settings() -> None:
    assert told(README.read_text()) == table(), "run `python -m tests.settings_table`"


def test_there_is_no_drawer() -> None:
    assert [p for p in sources() if p.stem in DRAWERS or p.parent.name in DRAWERS] == []


def test_migrations_are_numbered_without_gap() -> None:
    numbers = [int(p.name[:4]) for p in sorted((ROOT / "migrations" / "versions").glob("*.py"))]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_broad_except_stands_only_at_the_doors(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    broad = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler)
        and not (isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None)  # cleans up and passes it on
        and (node.type is None or getattr(node.type, "id", "") in {"Exception", "BaseException"})
    ]
    assert not broad or any(module == door or module.startswith(door + ".") for door in DOORS), broad


def test_licence_is_apache_2() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]
