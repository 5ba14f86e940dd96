"""The command as a whole: usage, exit codes, JSON, speed, and errors without a trace."""

import json
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer

from tests.cli.conftest import Terminal
from tests.core import builders
from worker.cli.terminal import parse_since, show

READS = (
    ("study", "list"),
    ("message", "list"),
    ("queue", "status"),
    ("audit", "verify"),
    ("db", "current"),
    ("user", "list"),
    ("retention", "run", "--dry-run"),
)


@pytest.mark.parametrize("command", READS, ids=" ".join)
def test_every_read_writes_json_and_nothing_else_to_stdout(terminal: Terminal, command: tuple[str, ...]) -> None:
    result = terminal.run(*command, "--json")
    assert result.exit_code == 0, result.output
    json.loads(result.stdout)


@pytest.mark.parametrize("command", READS, ids=" ".join)
def test_every_read_has_a_form_for_people(terminal: Terminal, command: tuple[str, ...]) -> None:
    builders.drafted(terminal.database)
    assert terminal.run(*command).exit_code == 0


@pytest.mark.parametrize(
    "arguments", [["study", "list", "--status", "lost"], ["nonsense"], ["study", "list", "--since", "x"]]
)
def test_wrong_usage_is_exit_code_2(terminal: Terminal, arguments: list[str]) -> None:
    assert terminal.run(*arguments).exit_code == 2


def run_process(*arguments: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    environment = {"PATH": "/usr/bin", "MU2_HOME": str(folder / "home")}
    command = [sys.executable, "-m", "worker", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def test_an_error_of_ours_is_one_sentence_without_a_trace(tmp_path: Path) -> None:
    result = run_process("study", "list", folder=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("mu2: there is no database") and "Traceback" not in result.stderr


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; import worker.cli; "
        "print([m for m in ('torch', 'transformers', 'pydicom', 'sqlalchemy', 'numpy', 'celery') if m in sys.modules])"
    )
    began = time.monotonic()
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert time.monotonic() - began < 5.0


def test_db_upgrade_makes_a_database_and_current_says_so(tmp_path: Path) -> None:
    assert run_process("db", "current", folder=tmp_path).returncode == 1
    assert run_process("db", "upgrade", folder=tmp_path).returncode == 0
    assert json.loads(run_process("db", "current", "--json", folder=tmp_path).stdout)["ok"]


def test_a_look_for_the_database_makes_none_and_names_the_home_where_it_is_not(tmp_path: Path) -> None:
    said = run_process("db", "current", folder=tmp_path)
    assert said.returncode == 1 and "MU2_HOME is" in said.stderr
    assert not (tmp_path / "home").exists()
    assert "set MU2_HOME, or start with `mu2 up`" in run_process("study", "list", folder=tmp_path).stderr


def test_audit_verify_names_the_row_that_was_changed(terminal: Terminal) -> None:
    from worker.core import audit
    from worker.core.errors import AuditError

    with terminal.database.write() as session:
        for number in range(3):
            audit.append(session, "look", actor="test", number=number)
    assert terminal.data("audit", "verify")["events"] == 3
    with terminal.database.engine.connect() as connection:
        connection.exec_driver_sql("DROP TRIGGER IF EXISTS audit_events_no_update")
        names = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'trigger'").scalars().all()
        for name in names:
            connection.exec_driver_sql(f"DROP TRIGGER {name}")
        connection.exec_driver_sql("UPDATE audit_events SET actor = 'nobody' WHERE id = 2")
        connection.commit()
    error = terminal.run("audit", "verify").exception
    assert isinstance(error, AuditError) and "event 2" in str(error)


@pytest.mark.parametrize(("text", "ago"), [("90m", timedelta(minutes=90)), ("3d", timedelta(days=3))])
def test_an_age_is_a_moment(text: str, ago: timedelta) -> None:
    assert abs(parse_since(text) - (datetime.now(UTC) - ago)) < timedelta(seconds=5)


def test_a_date_is_a_moment_and_anything_else_is_wrong_usage() -> None:
    assert parse_since("2026-03-31T08:00+02:00") == datetime(2026, 3, 31, 6, 0, tzinfo=UTC)
    with pytest.raises(typer.BadParameter, match="90m, 12h or 3d"):
        parse_since("yesterday")


def test_control_characters_never_reach_the_terminal() -> None:
    assert show("a\x1b[31mred\x07") == "a�[31mred�"
    assert (show(None), show("")) == ("-", "-")
