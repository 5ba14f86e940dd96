"""The listener as a process of its own, as `python -m dicom_listener` runs it."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import free_port
from tests.dicom_listener.sending import echo, eventually
from worker.core.database import Database
from worker.core.settings import Settings
from worker.services import environment

ROOT = Path(__file__).resolve().parents[2]


class ListenerProcess:
    """A started process; `settings` must name fixed ports, see `with_ports`."""

    def __init__(self, settings: Settings, log: Path, wrapper: Sequence[str] = ()) -> None:
        self.settings = settings
        self.port = settings.dicom.port
        self.database = Database.from_settings(settings)
        self.log = log
        variables = environment(settings, {**os.environ, "PYTHONPATH": str(ROOT)})
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [*wrapper, sys.executable, "-m", "dicom_listener"],
                env=variables,
                cwd=settings.home,
                stderr=stream,
                stdout=stream,
            )
        eventually(self._answers, 60)

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return echo(self.port)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(30)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(10)


def with_ports(settings: Settings) -> Settings:
    """The settings with free ports instead of 0."""
    return settings.model_copy(
        update={"dicom": settings.dicom.model_copy(update={"port": free_port(), "metrics_port": free_port()})}
    )
