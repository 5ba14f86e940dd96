"""Looking studies up and over: one by id or UID, many by state and age, everything that is known about one."""

import re
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from worker.core.errors import NotFoundError
from worker.core.records import (
    Attempt,
    Disposition,
    Instance,
    Message,
    Priority,
    Report,
    ReportVersion,
    Series,
    Study,
    StudyStatus,
)

SHORTEST_PREFIX = 8
_PREFIX = re.compile(rf"[0-9a-f-]{{{SHORTEST_PREFIX},36}}")
_REQUEUE_BATCH = 10_000


@dataclass(frozen=True)
class StudyLine:
    """A study in a list, without its patient."""

    id: str
    status: str
    revision: int
    priority: str
    instances: int  # kept ones
    received_at: datetime
    status_at: datetime
    calling_ae: str
    failed_stage: str
    reason: str


def find(session: Session, text: str) -> Study:
    """The study whose id this is, or begins with this (8 characters or more), or whose UID this is.

    Raises `NotFoundError` when there is none, or when several ids begin so.
    """
    text = text.strip().lower()
    if _is_uuid(text):
        study = session.get(Study, text)
    elif _PREFIX.fullmatch(text) and "." not in text and not text.isdigit():
        study = _by_prefix(session, text)
    else:
        study = session.scalars(sa.select(Study).where(Study.study_instance_uid == text)).one_or_none()
        if study is None and text.isdigit() and len(text) >= SHORTEST_PREFIX:
            study = _by_prefix(session, text)
    if study is None:
        raise NotFoundError("no study has this id or UID; `mu2 study list` shows them all")
    return study


def many(
    session: Session, *, statuses: Collection[StudyStatus] = (), since: datetime | None = None, limit: int = 50
) -> list[StudyLine]:
    """Studies, the latest change first; `since` bounds the time of that change."""
    kept = (
        sa.select(sa.func.count())
        .select_from(Instance)
        .where(Instance.study_id == Study.id, Instance.disposition == Disposition.KEPT)
        .scalar_subquery()
    )
    query = sa.select(Study, kept).order_by(Study.status_at.desc(), Study.id).limit(limit)
    if statuses:
        query = query.where(Study.status.in_(statuses))
    if since is not None:
        query = query.where(Study.status_at >= since)
    return [_line(study, instances) for study, instances in session.execute(query)]


def to_requeue(
    session: Session, *, statuses: Collection[StudyStatus], since: datetime | None = None
) -> list[tuple[str, str]]:
    """Ids and reasons of the studies in these states, the oldest first."""
    query = sa.select(Study.id, Study.reason).where(Study.status.in_(statuses)).order_by(Study.status_at, Study.id)
    if since is not None:
        query = query.where(Study.status_at >= since)
    return [(study_id, reason) for study_id, reason in session.execute(query.limit(_REQUEUE_BATCH))]


def pixels_removed(session: Session, study_id: str) -> bool:
    """Whether retention removed any of the study's files: what is left is not the study."""
    removed = sa.exists().where(
        Instance.study_id == study_id, Instance.disposition == Disposition.KEPT, Instance.removed_at.is_not(None)
    )
    return bool(session.scalar(sa.select(removed)))


def details(session: Session, study: Study) -> dict[str, Any]:
    """Everything about one study but its patient, its texts and the senders' own words."""
    instances = session.execute(
        sa.select(Instance.disposition, sa.func.count(), sa.func.sum(Instance.size_bytes))
        .where(Instance.study_id == study.id)
        .group_by(Instance.disposition)
    ).all()
    kept = next((count for disposition, count, _ in instances if disposition is Disposition.KEPT), 0)
    line = _line(study, kept)
    return {
        **{name: getattr(line, name) for name in StudyLine.__dataclass_fields__},
        "bytes": sum(int(size) for *_, size in instances),
        "aside": {
            str(disposition): count for disposition, count, _ in instances if disposition is not Disposition.KEPT
        },
        "pixels_removed": pixels_removed(session, study.id),
        "last_arrival_at": study.last_arrival_at,
        "completed_at": study.completed_at,
        "due_at": study.due_at,
        "lease_until": study.lease_until,
        "attempts_of_stage": study.attempts,
        "crashes_of_stage": study.crashes,
        "series": _series(session, study.id),
        "choice": _without_senders_words(study.choice),
        "attempts": _attempts(session, study.id),
        "report_versions": _versions(session, study.id),
        "messages": _messages(session, study.id),
    }


def patient(study: Study) -> dict[str, Any]:
    """Who the study is of and what the senders wrote about it; whoever calls this audits it."""
    return {
        "patient_name": study.patient_name,
        "patient_identifier": study.patient_identifier,
        "patient_authority": study.patient_authority,
        "patient_birth_date": study.patient_birth_date,
        "patient_sex": study.patient_sex,
        "accession": study.accession,
        "study_instance_uid": study.study_instance_uid,
        "study_time": study.study_time,
        "description": study.description,
    }


def _line(study: Study, instances: int) -> StudyLine:
    return StudyLine(
        id=study.id,
        status=study.status.value,
        revision=study.revision,
        priority=Priority(study.priority).name.lower(),
        instances=instances,
        received_at=study.received_at,
        status_at=study.status_at,
        calling_ae=study.calling_ae,
        failed_stage=study.failed_stage,
        reason=study.reason,
    )


def _without_senders_words(choice: dict[str, Any] | None) -> dict[str, Any] | None:
    """The choice of series without UIDs and descriptions, which may name a patient."""
    if choice is None:
        return None
    hidden = {"series_uid", "description"}
    return {
        key: [{k: v for k, v in entry.items() if k not in hidden} for entry in value]
        if isinstance(value, list)
        else value
        for key, value in choice.items()
    }


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


def _by_prefix(session: Session, prefix: str) -> Study | None:
    bare = prefix.replace("-", "")
    low, high = uuid.UUID(bare.ljust(32, "0")), uuid.UUID(bare.ljust(32, "f"))
    found = session.scalars(sa.select(Study).where(Study.id.between(str(low), str(high))).limit(2)).all()
    if len(found) > 1:
        raise NotFoundError("several studies' ids begin so; write more of the id")
    return found[0] if found else None


def _series(session: Session, study_id: str) -> list[dict[str, Any]]:
    rows = session.execute(
        sa.select(Series.number, Series.modality, sa.func.count(Instance.id))
        .outerjoin(Instance, sa.and_(Instance.series_id == Series.id, Instance.disposition == Disposition.KEPT))
        .where(Series.study_id == study_id)
        .group_by(Series.id)
        .order_by(Series.number)
    )
    return [{"number": number, "modality": modality, "instances": count} for number, modality, count in rows]


def _attempts(session: Session, study_id: str) -> list[dict[str, Any]]:
    rows = session.scalars(sa.select(Attempt).where(Attempt.study_id == study_id).order_by(Attempt.started_at)).all()
    return [
        {
            "revision": row.revision,
            "stage": row.stage.value,
            "outcome": row.outcome.value,
            "started_at": row.started_at,
            "ended_at": row.ended_at,
            "worker": row.worker,
            "reason": row.reason,
        }
        for row in rows
    ]


def _versions(session: Session, study_id: str) -> list[dict[str, Any]]:
    rows = session.scalars(
        sa.select(ReportVersion)
        .join(Report, ReportVersion.report_id == Report.id)
        .where(Report.study_id == study_id)
        .order_by(ReportVersion.number)
    ).all()
    return [
        {
            "number": row.number,
            "state": row.state.value,
            "author": row.author_kind.value,
            "study_revision": row.study_revision,
            "created_at": row.created_at,
            "signed": row.signature is not None,
            "model_version": (row.provenance or {}).get("model_version", ""),
        }
        for row in rows
    ]


def _messages(session: Session, study_id: str) -> list[dict[str, Any]]:
    rows = session.scalars(
        sa.select(Message)
        .join(ReportVersion, Message.version_id == ReportVersion.id)
        .join(Report, ReportVersion.report_id == Report.id)
        .where(Report.study_id == study_id)
        .order_by(Message.id)
    ).all()
    return [
        {
            "number": row.id,
            "destination": row.destination,
            "result_status": row.result_status,
            "state": row.state.value,
            "attempts": row.attempts,
            "acknowledgement": row.acknowledgement,
            "error": row.error,
        }
        for row in rows
    ]
