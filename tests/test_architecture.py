"""The arrows of the architecture: who may import whom, read from the imports themselves."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("worker", "dicom_listener", "mu2_model", "training", "migrations")

CORE = ["worker.core"]
INSIDE = ["worker.imaging", "worker.results", "worker.delivery", "worker.inference"]
MAY_IMPORT: dict[str, list[str]] = {
    "mu2_model": [],
    "training": ["mu2_model"],
    "worker.core": [],
    "worker.queues": CORE,
    "worker.imaging": CORE,
    "worker.results": CORE,
    "worker.delivery": CORE,
    "worker.inference": CORE,
    "worker.inference.mu2": [*CORE, "mu2_model"],
    "worker.review": [*CORE, "worker.queues", "worker.results", "worker.imaging"],
    "dicom_listener": [*CORE, "worker.queues"],
    "migrations": [*CORE, "worker.queues"],
    "worker.cli": ["worker", "mu2_model", "dicom_listener", "training"],
}
"""A package may import itself and what stands here; the longest name that fits a module is its rule."""

NO_DATABASE = ("worker.imaging", "worker.results", "worker.delivery", "worker.inference")
FORBIDDEN: dict[str, set[str]] = {
    "mu2_model": {"pydicom", "celery", "sqlalchemy", "pynetdicom", "structlog"},
    "worker.core": {"torch", "transformers", "mu2_model"},
    "worker.queues": {"torch", "transformers"},
    "dicom_listener": {"torch", "transformers", "celery"},
}
DATABASE_MODULES = {"worker.core.database", "worker.core.records", "worker.core.studies", "worker.core.outbox"}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of ours with its dotted name."""
    for package in OURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path) -> set[str]:
    """The dotted names that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(name: str, package: str) -> bool:
    """Whether a dotted name is the package or lies in it."""
    return name == package or name.startswith(package + ".")


def rule_for(module: str) -> str | None:
    """The longest rule that fits a module."""
    fitting = [rule for rule in MAY_IMPORT if within(module, rule)]
    return max(fitting, key=len) if fitting else None


def broken_arrows(module: str, path: Path) -> list[str]:
    """The imports of ours that a module's rule does not allow."""
    rule = rule_for(module)
    if rule is None:
        return []
    package = ".".join(rule.split(".")[:2])
    allowed = [*MAY_IMPORT[rule], package]
    ours = {name for name in imports(path) if name.split(".")[0] in OURS and name != "worker"}
    return sorted(name for name in ours if not any(within(name, a) for a in allowed))


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda v: v if isinstance(v, str) else "")
def test_module_keeps_the_arrows(module: str, path: Path) -> None:
    assert broken_arrows(module, path) == []


@pytest.mark.parametrize(("package", "names"), FORBIDDEN.items())
def test_package_stays_free_of(package: str, names: set[str]) -> None:
    for module, path in modules():
        if within(module, package):
            assert not {name.split(".")[0] for name in imports(path)} & names, module


@pytest.mark.parametrize("package", NO_DATABASE)
def test_package_touches_no_database(package: str) -> None:
    for module, path in modules():
        if within(module, package):
            assert not imports(path) & (DATABASE_MODULES | {"sqlalchemy"}), module


def test_every_package_that_a_rule_names_exists() -> None:
    names = {module for module, _ in modules()}
    ruled = {*MAY_IMPORT, *NO_DATABASE, *FORBIDDEN, *DATABASE_MODULES}
    assert {name for name in ruled if not any(within(module, name) for module in names)} == set()


def test_the_check_sees_a_wrong_arrow(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from worker import pipeline\nimport worker.core.errors\n")
    assert broken_arrows("worker.imaging.wrong", wrong) == ["worker.pipeline"]


def test_settings_are_read_at_entries_only() -> None:
    readers = {m for m, p in modules() if "settings.current()" in p.read_text(encoding="utf-8")}
    entries = {"worker.celery", "worker.process", "migrations.env", "dicom_listener.__main__"}
    assert {m for m in readers if not within(m, "worker.cli")} <= entries
