"""The same SOP Instance UID in two encodings: are they the same image?

What arrives second in another transfer syntax is recorded as a variant and lies aside. A comparison outside the receive
path decodes both and looks at pixels and at what places, scales and names them:

    equal      the first is kept, the second's file is removed, its row stays as the note
    different  the row becomes a conflict, its file stays, an alarm is raised

Decoding runs in a process of its own: a codec that a hostile object crashes takes only that process with it, and the
listener stays small. A pair that cannot be decoded, or takes too long, is not proven equal and so is a conflict.
"""

import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import sqlalchemy as sa
import structlog
from sqlalchemy.orm import Session

from dicom_listener import comparison
from dicom_listener.comparison import DIFFERENT, EQUAL
from dicom_listener.storage import Store
from worker.core.database import Database
from worker.core.errors import DatabaseUnavailableError
from worker.core.records import Disposition, Instance

log = structlog.get_logger(__name__)

LONGEST_COMPARISON_SECONDS = 120.0
RETRY_SECONDS = 5.0

T = TypeVar("T")


class Comparer:
    """The thread that decides what became of variants; at start-up it takes up those that were left undecided."""

    def __init__(self, store: Store, database: Database, on_conflict: Callable[[str], None]) -> None:
        self._store = store
        self._database = database
        self._on_conflict = on_conflict
        self._inbox: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="comparer", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; what is undecided is taken up at the next start."""
        self._stopping.set()
        self._inbox.put(None)
        self._thread.join()

    def compare(self, path: str) -> None:
        """Asks for the comparison of the variant with this path."""
        self._inbox.put(path)

    def _run(self) -> None:
        waiting = self._until_available(self._undecided) or []
        while not self._stopping.is_set():
            path = waiting.pop() if waiting else self._inbox.get()
            if path is None:
                return
            self._until_available(lambda path=path: self.decide(path))  # type: ignore[misc]

    def _until_available(self, work: Callable[[], T]) -> T | None:
        while not self._stopping.is_set():
            try:
                return work()
            except DatabaseUnavailableError as error:
                log.warning("comparison_postponed", error=type(error).__name__)
                self._stopping.wait(RETRY_SECONDS)
        return None

    def _undecided(self) -> list[str]:
        with self._database.read() as session:
            rows = sa.select(Instance.path).where(
                Instance.disposition == Disposition.VARIANT, Instance.removed_at.is_(None)
            )
            return list(session.scalars(rows))

    def decide(self, path: str) -> None:
        """Compares one variant with the kept instance and records the outcome. Raises `DatabaseUnavailableError`."""
        with self._database.read() as session:
            pair = self._pair(session, path)
        if pair is None:
            return
        study_id, kept = pair
        if same_image(self._store.path(kept), self._store.path(path)):
            self._database.run(lambda session: _set(session, path, removed_at=datetime.now(UTC)))
            self._store.path(path).unlink(missing_ok=True)
            log.info("variant_equal", study_id=study_id, disposition=Disposition.VARIANT.value)
        else:
            self._database.run(lambda session: _set(session, path, disposition=Disposition.CONFLICT))
            self._on_conflict(study_id)

    def _pair(self, session: Session, path: str) -> tuple[str, str] | None:
        """Study id and path of the kept instance that an undecided variant stands beside."""
        variant = session.scalar(
            sa.select(Instance).where(
                Instance.path == path, Instance.disposition == Disposition.VARIANT, Instance.removed_at.is_(None)
            )
        )
        if variant is None:
            return None
        kept = session.scalar(
            sa.select(Instance).where(
                Instance.sop_instance_uid == variant.sop_instance_uid, Instance.disposition == Disposition.KEPT
            )
        )
        return (variant.study_id, kept.path) if kept else None


def _set(session: Session, path: str, **values: object) -> None:
    session.execute(sa.update(Instance).where(Instance.path == path).values(**values))


def same_image(first: Path, second: Path) -> bool:
    """True when both files are proven to show the same image; decoded in a process of its own."""
    command = [sys.executable, "-I", comparison.__file__, str(first), str(second)]
    try:
        ended = subprocess.run(
            command, timeout=LONGEST_COMPARISON_SECONDS, stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        log.warning("comparison_failed", error=type(error).__name__)
        return False
    if ended.returncode not in (EQUAL, DIFFERENT):
        log.warning("comparison_failed", exit_code=ended.returncode)
    return ended.returncode == EQUAL
