"""A study's journey as its rows tell it: which stage it reached, when, and how long each took."""

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from worker.core import reports
from worker.core.database import Database
from worker.core.records import (
    Attempt,
    AttemptOutcome,
    Disposition,
    Instance,
    Message,
    MessageState,
    Report,
    ReportVersion,
    Stage,
    Study,
    StudyStatus,
)

LOOK_SECONDS = 0.1
_ENDS_WITHOUT_DRAFT = frozenset({StudyStatus.SKIPPED, StudyStatus.FAILED})
_UNDER_WAY = frozenset({MessageState.PENDING, MessageState.SENT})


@dataclass(frozen=True)
class Step:
    """One thing that was seen to happen."""

    study_id: str
    status: StudyStatus
    note: str  # what a person wants to know beside the state
    ended: bool  # nothing more will happen to this study by itself


@dataclass(frozen=True)
class Timing:
    """How long one stage took."""

    stage: str
    seconds: float


def follow(
    database: Database, study_uids: Collection[str], deadline: float, alive: Callable[[], None]
) -> Iterator[Step]:
    """Yields every change of these studies until each has ended or `deadline` (monotonic) has passed.

    `alive` is called at every look and may raise, when the services died for instance.
    """
    seen: dict[str, tuple[StudyStatus, str]] = {}
    ended: set[str] = set()
    while time.monotonic() < deadline:
        alive()
        with database.read() as session:
            steps = [_look(session, study) for study in _studies(session, study_uids)]
        for step in steps:
            if seen.get(step.study_id) != (step.status, step.note):
                seen[step.study_id] = (step.status, step.note)
                yield step
            if step.ended:
                ended.add(step.study_id)
        if len(steps) == len(set(study_uids)) and len(ended) == len(steps):
            return
        time.sleep(LOOK_SECONDS)


def timings(session: Session, study: Study) -> list[Timing]:
    """The stages of the present revision: receiving, waiting for quiet, prepare, draft, deliver."""
    found = [Timing("receive", _seconds(study.received_at, study.last_arrival_at))]
    if study.completed_at is not None:
        found.append(Timing("wait until the study is quiet", _seconds(study.last_arrival_at, study.completed_at)))
    for stage in Stage:
        attempt = _attempt(session, study, stage)
        if attempt is not None and attempt.ended_at is not None:
            found.append(Timing(stage.value, _seconds(attempt.started_at, attempt.ended_at)))
    for message in messages(session, study.id):
        if message.acknowledged_at is not None:
            took = _seconds(message.created_at, message.acknowledged_at)
            found.append(Timing(f"deliver to {message.destination}", took))
            if study.completed_at is not None:
                total = _seconds(study.completed_at, message.acknowledged_at)
                found.append(Timing("from complete to acknowledged", total))
    return found


def messages(session: Session, study_id: str) -> list[Message]:
    """The messages about the newest version of a study's report."""
    version = reports.latest(session, study_id)
    if version is None:
        return []
    return list(session.scalars(sa.select(Message).where(Message.version_id == version.id).order_by(Message.id)))


def _studies(session: Session, study_uids: Collection[str]) -> list[Study]:
    return list(session.scalars(sa.select(Study).where(Study.study_instance_uid.in_(study_uids)).order_by(Study.id)))


def _look(session: Session, study: Study) -> Step:
    if study.status in _ENDS_WITHOUT_DRAFT:
        return Step(study.id, study.status, study.reason, ended=True)
    if study.status is StudyStatus.DRAFTED:
        states = [(m.destination, m.state, m.acknowledgement, m.error) for m in _all_messages(session, study.id)]
        note = ", ".join(f"{name} {state}{f' ({code})' if code else ''}" for name, state, code, _ in states)
        return Step(study.id, study.status, note, ended=not any(state in _UNDER_WAY for _, state, _, _ in states))
    if study.status is StudyStatus.RECEIVING:
        count = session.scalar(
            sa.select(sa.func.count())
            .select_from(Instance)
            .where(Instance.study_id == study.id, Instance.disposition == Disposition.KEPT)
        )
        return Step(study.id, study.status, f"{count} objects stored", ended=False)
    return Step(study.id, study.status, "", ended=False)


def _all_messages(session: Session, study_id: str) -> list[Message]:
    query = (
        sa.select(Message)
        .join(ReportVersion, Message.version_id == ReportVersion.id)
        .join(Report, ReportVersion.report_id == Report.id)
        .where(Report.study_id == study_id)
        .order_by(Message.id)
    )
    return list(session.scalars(query))


def _attempt(session: Session, study: Study, stage: Stage) -> Attempt | None:
    return session.scalars(
        sa.select(Attempt)
        .where(
            Attempt.study_id == study.id,
            Attempt.revision == study.revision,
            Attempt.stage == stage,
            Attempt.outcome == AttemptOutcome.DONE,
        )
        .order_by(Attempt.started_at.desc())
        .limit(1)
    ).one_or_none()


def _seconds(start: datetime, end: datetime) -> float:
    return (end - start).total_seconds()
