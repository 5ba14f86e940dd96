"""How commands speak: data on stdout, notes on stderr, `--json` for machines, a question before what cannot be undone."""

import getpass
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from worker.core.database import Database
    from worker.core.settings import Settings

Json = Annotated[bool, typer.Option("--json", help="Data as JSON on stdout.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and do nothing.")]
StudyArgument = Annotated[
    str, typer.Argument(metavar="STUDY", help="Study id, its first 8 characters or more, or UID.")
]

_AGE = re.compile(r"(\d+)([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def print_json(data: Any) -> None:
    """Writes one JSON document to stdout."""
    sys.stdout.write(json.dumps(data, default=_encode, ensure_ascii=False, indent=2) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Writes a table to stdout, as wide as the terminal; without one, no cell is cut."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(show(value)) for value in row))
    console = Console(width=None if sys.stdout.isatty() else 400)
    console.print(table)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Writes names and values, one a line; empty ones are left out."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        if value not in (None, "", [], {}):
            print(f"{name:<{width}}  {show(value)}")


def note(sentence: str) -> None:
    """Writes a sentence to stderr."""
    print(sentence, file=sys.stderr)


def ask(question: str, yes: bool) -> None:
    """Asks on the terminal unless `--yes` was given; ends the command with exit code 1 when the answer is no."""
    if not yes:
        typer.confirm(question, abort=True, err=True)


def show(value: Any) -> str:
    """A value for a person: local time to the second, a dash for nothing; control characters never reach the terminal."""
    if value is None or value == "":
        return "-"
    if isinstance(value, datetime):
        value = (
            value.astimezone().strftime("%Y-%m-%d %H:%M:%S") if value.tzinfo else value.strftime("%Y-%m-%d %H:%M:%S")
        )
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in str(value))


def parse_since(text: str) -> datetime:
    """A moment from `90m`, `12h`, `3d` ago or an ISO date or time (local unless it names a zone)."""
    age = _AGE.fullmatch(text)
    if age:
        return datetime.now(UTC) - timedelta(**{_UNITS[age[2]]: int(age[1])})
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except ValueError:
        raise typer.BadParameter("write an age such as 90m, 12h or 3d, or a date such as 2026-03-31T08:00") from None


def actor() -> str:
    """Who is at the terminal, for the audit."""
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):
        return "cli:unknown"  # an account without a name, as in some containers


@contextmanager
def opened() -> Iterator[tuple["Settings", "Database"]]:
    """The settings and the migrated database for one command; raises `SettingsError` when it is not there or older."""
    from worker.core import logs, schema, settings
    from worker.core.database import Database
    from worker.core.errors import SettingsError

    current = settings.current()
    logs.configure("cli", "error")
    if not current.database.url.get_secret_value() and not (current.home / "mu2.sqlite").exists():
        raise SettingsError(f"there is no database in {current.home}; set MU2_HOME, or start with `mu2 up`")
    database = Database.from_settings(current)
    try:
        schema.require_head(database)
        yield current, database
    finally:
        database.close()


def _encode(value: Any) -> Any:
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, frozenset | set):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
