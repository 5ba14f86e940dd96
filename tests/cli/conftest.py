"""The `mu2` command in this process, on a migrated database in a home of the test's own."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog
from typer.testing import CliRunner

from worker import queues
from worker.cli import app
from worker.core import settings
from worker.core.database import Database


@dataclass
class Terminal:
    """One person's terminal."""

    home: Path
    database: Database

    def run(self, *arguments: str, answer: str | None = None) -> Any:
        """Runs `mu2` with these arguments; errors of ours come back as `result.exception`."""
        settings.current.cache_clear()
        return CliRunner().invoke(app, list(arguments), input=answer)

    def data(self, *arguments: str) -> Any:
        """What a command wrote to stdout as JSON."""
        result = self.run(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)


@pytest.fixture
def terminal(tmp_path: Path, sqlite_template: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """A terminal on a home with an empty database and no broker."""
    for name in [name for name in os.environ if name.startswith("MU2_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MU2_CONFIG", os.devnull)
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("MU2_HOME", str(home))
    shutil.copy(sqlite_template, home / "mu2.sqlite")
    database = Database(f"sqlite:///{home / 'mu2.sqlite'}", busy_seconds=5)
    handlers, configured = list(logging.getLogger().handlers), structlog.get_config()
    yield Terminal(home, database)
    logging.getLogger().handlers[:] = handlers
    structlog.configure(**configured)
    database.close()
    settings.current.cache_clear()
    queues._doorbell.cache_clear()
