"""Live updates: one look at the database a second for all open pages, and a word to those whom a change concerns.

Events carry opaque ids and nothing else; a page that hears one asks for what it shows, under its own session.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
import structlog
from starlette.concurrency import run_in_threadpool

from worker.core import studies
from worker.core.database import Database
from worker.core.errors import DatabaseUnavailableError
from worker.core.records import Message, Report, ReportVersion, Study
from worker.core.review_records import Communication, EvidenceRequest, Presence, WorkingCopy

log = structlog.get_logger(__name__)

LOOK_SECONDS = 1.0
OVERLAP = timedelta(seconds=3)  # a transaction that committed late is still seen
PRESENT = timedelta(seconds=45)  # a study counts as open in a browser for this long after its last sign
KEEP_ALIVE_SECONDS = 15.0


class Hub:
    """Tells subscribers which studies changed."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._subscribers: set[asyncio.Queue[set[str]]] = set()
        self._seen: dict[str, datetime] = {}
        self._open: frozenset[tuple[str, str]] = frozenset()
        self._closing = asyncio.Event()

    @property
    def listeners(self) -> int:
        """How many pages listen now."""
        return len(self._subscribers)

    async def run(self) -> None:
        """Looks until `close`; an absent database is waited for."""
        since = studies.now()
        while not self._closing.is_set():
            if self._subscribers:
                at = studies.now()
                try:
                    changed = await run_in_threadpool(self._changed, since - OVERLAP)
                    since = at
                    for queue in self._subscribers if changed else ():
                        queue.put_nowait(changed)
                except DatabaseUnavailableError as error:
                    log.warning("database_unavailable", error=type(error).__name__)
            else:
                since = studies.now()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), LOOK_SECONDS)

    def close(self) -> None:
        """Ends `run` and every stream; call it in the event loop."""
        self._closing.set()
        for queue in self._subscribers:
            queue.put_nowait(set())

    async def events(self, study_id: str | None) -> AsyncIterator[str]:
        """Server-sent events for one page: `worklist` after any change, `study` after one of the study it shows.

        The stream begins with one of each: the page may have missed a change before it listened, or while it could not.
        """
        queue: asyncio.Queue[set[str]] = asyncio.Queue()
        self._subscribers.add(queue)
        try:
            yield "retry: 2000\n\n" + _words(study_id)
            while not self._closing.is_set():
                try:
                    changed = await asyncio.wait_for(queue.get(), KEEP_ALIVE_SECONDS)
                except TimeoutError:
                    yield ": here\n\n"
                    continue
                yield _words(study_id if study_id in changed else None)
        finally:
            self._subscribers.discard(queue)

    def _changed(self, since: datetime) -> set[str]:
        """Ids of studies with a newer change than the last look saw."""
        latest: dict[str, datetime] = {}
        with self._database.read() as session:
            for query in _changes(since):
                for study_id, at in session.execute(query):
                    latest[study_id] = max(at, latest.get(study_id, at))
            now_open = frozenset(
                (study_id, user_id)
                for study_id, user_id in session.execute(
                    sa.select(Presence.study_id, Presence.user_id).where(Presence.seen_at >= studies.now() - PRESENT)
                )
            )
        changed = {study_id for study_id, at in latest.items() if self._seen.get(study_id) != at}
        changed |= {study_id for study_id, _ in now_open ^ self._open}
        self._open = now_open
        self._seen = latest
        return changed


def _words(study_id: str | None) -> str:
    study = f"event: study\ndata: {study_id}\n\n" if study_id else ""
    return f"event: worklist\ndata: changed\n\n{study}"


def _changes(since: datetime) -> list[sa.Select[Any, Any]]:
    of_report = sa.select(Report.study_id)
    of_version = of_report.join(ReportVersion, ReportVersion.report_id == Report.id)
    of_message = of_version.join(Message, Message.version_id == ReportVersion.id)
    return [
        sa.select(Study.id, Study.status_at).where(Study.status_at >= since),
        of_version.add_columns(ReportVersion.created_at).where(ReportVersion.created_at >= since),
        of_report.join(WorkingCopy, WorkingCopy.report_id == Report.id)
        .add_columns(WorkingCopy.changed_at)
        .where(WorkingCopy.changed_at >= since),
        of_version.join(EvidenceRequest, EvidenceRequest.version_id == ReportVersion.id)
        .add_columns(EvidenceRequest.done_at)
        .where(EvidenceRequest.done_at >= since),
        of_report.join(Communication, Communication.report_id == Report.id)
        .add_columns(Communication.recorded_at)
        .where(Communication.recorded_at >= since),
        of_message.add_columns(Message.sent_at).where(Message.sent_at >= since),
        of_message.add_columns(Message.acknowledged_at).where(Message.acknowledged_at >= since),
    ]
