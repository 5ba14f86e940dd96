"""What the documents tell people to type and to watch exists."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

from dicom_listener.metrics import Metrics as ListenerMetrics
from dicom_listener.statuses import Status
from tests.settings_table import settings_of
from worker.cli import app
from worker.core.settings import Settings
from worker.metrics import Metrics as WorkerMetrics
from worker.review.metrics import Metrics as ReviewMetrics

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "worker" / "README.md", ROOT / "docs" / "operations.md"]
COMMAND = re.compile(r"(?:^|`|bin/|\| )mu2 ([a-z][^`\n#|>]*)", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s:]+)\)")
FILE = re.compile(r"`([\w./-]+\.(?:py|yaml|sh|js|sbatch))`")
BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)
CODE = ("worker", "dicom_listener", "mu2_model", "training", "migrations", "tests", "benchmarks", "docker")
PROSE = [*ROOT.glob("*/phantoms/README.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md"), ROOT / "README.md"]


def commands(text: str) -> list[list[str]]:
    return [found.split() for found in COMMAND.findall(text)]


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words name, and the rest of them."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while rest and hasattr(command, "commands"):
        assert rest[0] in command.commands, " ".join(words)
        command = command.commands[rest.pop(0)]
    return command, rest


@pytest.mark.parametrize("path", PROSE, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_of_a_document_exists_with_its_options(path: Path) -> None:
    for words in commands(path.read_text()):
        command, rest = command_of(words)
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word.split("=")[0] for word in rest if word.startswith("-")} <= options, " ".join(words)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_command_to_copy_has_all_that_it_needs(path: Path) -> None:
    found = commands("\n".join(BLOCK.findall(path.read_text())))
    assert found
    for words in found:
        command, rest = command_of(words)
        needed = [parameter for parameter in command.params if parameter.required]
        options = [parameter for parameter in needed if parameter.opts[0].startswith("-")]
        assert not [option.opts for option in options if not set(option.opts) & set(rest)], " ".join(words)
        assert len(rest) >= len(needed) + len(options), " ".join(words)


@pytest.mark.parametrize("path", PROSE, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_of_a_document_leads_somewhere(path: Path) -> None:
    assert [link for link in LINK.findall(path.read_text()) if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", PROSE, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_that_a_document_names_is_there(path: Path) -> None:
    files = [str(file.relative_to(ROOT)) for folder in CODE for file in (ROOT / folder).rglob("*.*")]
    named = FILE.findall(path.read_text())
    assert [name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)] == []


@pytest.mark.parametrize("package", ["dicom_listener", "worker", "mu2_model", "training", "training/phantoms"])
def test_every_module_stands_in_its_packages_table_of_files(package: str) -> None:
    told = (ROOT / package / "README.md").read_text()
    modules = {file.name for file in (ROOT / package).glob("*.py")} - {"__init__.py", "__main__.py"}
    assert {name for name in modules if f"`{name}`" not in told} == set()


def test_every_decision_stands_in_the_list_of_decisions() -> None:
    folder = ROOT / "docs" / "decisions"
    listed = set(LINK.findall((folder / "README.md").read_text()))
    assert listed == {path.name for path in folder.glob("*.md")} - {"README.md"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_setting_of_a_document_exists(path: Path) -> None:
    known = {name for name, *_ in settings_of(Settings)} | {"MU2_CONFIG"}
    known |= {f"{name}_FILE" for name in known}  # each may stand in a file
    named = set(re.findall(r"MU2_[A-Z]+(?:__[A-Z_]+)?(?!\.\.\.)\b", path.read_text()))
    groups = {name.split("__")[0] for name in known}
    assert {name for name in named if name not in known and name.removesuffix("__") not in groups} == set()


def test_every_metric_that_operations_alert_on_exists() -> None:
    registries = [ListenerMetrics().registry, WorkerMetrics().registry, ReviewMetrics(lambda: 0).registry]
    exported = {
        sample.name for registry in registries for family in registry.collect() for sample in family.samples
    } | {
        f"{family.name}_total" if family.type == "counter" else family.name
        for registry in registries
        for family in registry.collect()
    }
    named = set(re.findall(r"`(mu2_[a-z_]+)", (ROOT / "docs" / "operations.md").read_text()))
    assert named and named <= exported


def constants(*path: str) -> set[str]:
    """The constants of a module as text: an outcome or a status that is counted stands among them."""
    tree = ast.parse(ROOT.joinpath(*path).read_text())
    return {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}


def test_every_label_that_operations_alert_on_has_such_values() -> None:
    written = {
        ("mu2_messages_total", "outcome"): constants("worker", "senders.py"),
        ("mu2_stage_outcomes_total", "outcome"): constants("worker", "tasks.py"),
        ("mu2_review_requests_total", "status"): constants("worker", "review", "app.py"),
        ("mu2_dicom_instances_total", "status"): {status.name.lower() for status in Status},
    }
    text = (ROOT / "docs" / "operations.md").read_text()
    selectors = re.findall(r'(mu2_[a-z_]+)\{(\w+)(=~|!~|!=|=)"([^"]+)"\}', text)
    assert len(selectors) == text.count("{outcome") + text.count("{status") > 0
    for metric, label, _, values in selectors:
        named = set(re.split(r"\\?\|", values))  # a table cell hides its bar behind a backslash
        assert named <= written[metric, label], f"{metric}: {named}"
