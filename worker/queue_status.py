"""How the system stands: what waits, since when, who works, and whether a worker is alive but deaf."""

from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.orm import Session

from worker import queues
from worker.core import outbox_view, studies
from worker.core.database import Database
from worker.core.errors import BrokerUnavailableError
from worker.core.records import Heartbeat, Stage, Study, StudyStatus
from worker.core.settings import Settings

BEATS_MISSED = 5  # sweeps without a beat after which a worker counts as gone
LEAST_SILENCE_SECONDS = 15.0
DEAF_SECONDS = 60.0  # work is due for this long and nobody who serves it claimed any
FORGOTTEN_AFTER = timedelta(days=1)
_WAITS = {Stage.PREPARE: StudyStatus.COMPLETE, Stage.DRAFT: StudyStatus.PREPARED}


@dataclass(frozen=True)
class Due:
    """Work of one stage that may begin now."""

    stage: str
    count: int
    oldest_seconds: float  # since it may begin


@dataclass(frozen=True)
class Process:
    """One process by its last beat."""

    owner: str
    service: str
    queues: str
    alive: bool
    beat_age_seconds: float
    claimed_at: datetime | None


@dataclass(frozen=True)
class QueueStatus:
    """All of it."""

    studies: dict[str, int]
    due: list[Due]
    messages: dict[str, dict[str, int]]
    processes: list[Process]
    doorbells: dict[str, int] | None  # None: the broker does not answer

    def deaf_stages(self) -> list[str]:
        """Stages whose work is due for a minute although a live worker serves them."""
        served = {queue for p in self.processes if p.alive for queue in p.queues.split(",")}
        return [d.stage for d in self.due if d.oldest_seconds > DEAF_SECONDS and d.stage in served]

    def unserved_queues(self) -> list[str]:
        """Queues that no live worker serves."""
        served = {queue for p in self.processes if p.alive for queue in p.queues.split(",")}
        return [queue for queue in queues.QUEUES if queue not in served]


def read(settings: Settings, database: Database) -> QueueStatus:
    """Reads rows and broker; raises `DatabaseUnavailableError`, while an absent broker is part of the answer."""
    with database.read() as session:
        counted = session.execute(sa.select(Study.status, sa.func.count()).group_by(Study.status))
        return QueueStatus(
            studies={status.value: 0 for status in StudyStatus} | {status.value: count for status, count in counted},
            due=[_due(session, stage) for stage in Stage],
            messages=outbox_view.counts(session),
            processes=_processes(session, settings.queue.sweep_seconds),
            doorbells=_doorbells(settings),
        )


def _due(session: Session, stage: Stage) -> Due:
    now = studies.now()
    first = session.execute(
        sa.select(sa.func.coalesce(Study.due_at, Study.status_at).label("since"))
        .where(Study.status == _WAITS[stage], sa.or_(Study.due_at.is_(None), Study.due_at <= now))
        .order_by("since")
        .limit(1)
    ).scalar()
    oldest = max(0.0, (now - first).total_seconds()) if first is not None else 0.0
    return Due(stage.value, studies.due_count(session, stage), oldest)


def _processes(session: Session, sweep_seconds: float) -> list[Process]:
    now = studies.now()
    silence = max(BEATS_MISSED * sweep_seconds, LEAST_SILENCE_SECONDS)
    rows = session.scalars(
        sa.select(Heartbeat)
        .where(Heartbeat.beat_at > now - FORGOTTEN_AFTER)
        .order_by(Heartbeat.service, Heartbeat.owner)
    )
    found = []
    for row in rows:
        age = (now - row.beat_at).total_seconds()
        found.append(Process(row.owner, row.service, row.queues, age < silence, round(age, 1), row.claimed_at))
    return found


def _doorbells(settings: Settings) -> dict[str, int] | None:
    bell = queues.Doorbell(queues.new_app(settings))
    try:
        return {queue: bell.waiting(queue) for queue in queues.QUEUES}
    except BrokerUnavailableError:
        return None
    finally:
        bell.close()
