"""The ledger: what was promised to the hospital against what is there, from the rows, the store and the receiver."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import sqlalchemy as sa
from pynetdicom.dsutils import split_dataset
from sqlalchemy.orm import Session

from tests.end_to_end.chaos_load import SentStudy
from worker.core import audit, reports, studies
from worker.core.records import (
    Attempt,
    AttemptOutcome,
    AuthorKind,
    Instance,
    Message,
    MessageState,
    Report,
    ReportVersion,
    Study,
    StudyStatus,
)

STUCK_SECONDS = 60.0
_AT_WORK = (StudyStatus.COMPLETE, StudyStatus.PREPARING, StudyStatus.PREPARED, StudyStatus.DRAFTING)
_ON_ITS_WAY = (MessageState.PENDING, MessageState.SENT)


@dataclass
class Verdict:
    """What the ledger shows; the first four must be 0."""

    lost: int = 0
    stuck: int = 0
    accepted_twice: int = 0
    out_of_order: int = 0
    notes: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def is_clean(self) -> bool:
        """Whether every promise was kept."""
        return self.lost == self.stuck == self.accepted_twice == self.out_of_order == 0

    def lose(self, what: str) -> None:
        """Notes something that was promised and is not there."""
        self.lost += 1
        self.notes.append(f"lost: {what}")


def unfinished(session: Session) -> int:
    """Studies and messages that are still on their way."""
    waiting = sa.select(sa.func.count()).select_from(Study).where(Study.status.in_((*_AT_WORK, StudyStatus.RECEIVING)))
    unsent = sa.select(sa.func.count()).select_from(Message).where(Message.state.in_(_ON_ITS_WAY))
    return (session.scalar(waiting) or 0) + (session.scalar(unsent) or 0)


def stuck(session: Session) -> set[str]:
    """Studies that have stood in one working state, and messages that were on their way, for longer than a minute."""
    before = studies.now() - timedelta(seconds=STUCK_SECONDS)
    slow = sa.select(Study.id).where(Study.status.in_(_AT_WORK), Study.status_at < before)
    late = sa.select(Message.id).where(Message.state.in_(_ON_ITS_WAY), Message.created_at < before)
    return {f"study {i}" for i in session.scalars(slow)} | {f"message {i}" for i in session.scalars(late)}


def examine(
    session: Session, store: Path, sent: Sequence[SentStudy], accepted: Sequence[str], verdict: Verdict
) -> None:
    """Compares everything; `accepted` are the control ids that the receiver took, in order."""
    for study in sent:
        _instances(session, store, study, verdict)
        if study.whole:
            _draft(session, study, verdict)
    _messages(session, accepted, verdict)
    outcomes = session.execute(sa.select(Attempt.outcome, sa.func.count()).group_by(Attempt.outcome))
    verdict.counts.update({f"attempts {outcome}": count for outcome, count in outcomes})
    verdict.counts["leases lost by kills"] = verdict.counts[f"attempts {AttemptOutcome.LOST}"]
    verdict.counts["audit events"] = audit.verify(session).events


def _instances(session: Session, store: Path, study: SentStudy, verdict: Verdict) -> None:
    """Every acknowledged instance has a row whose file holds the very bytes that were sent."""
    rows = session.execute(
        sa.select(Instance.sop_instance_uid, Instance.path).where(Instance.sop_instance_uid.in_(study.acknowledged))
    )
    stored: dict[str, set[str]] = {}
    for uid, path in rows:
        stored.setdefault(uid, set()).add(_sha256_of_data_set(store / path))
    for uid, sha256 in study.acknowledged.items():
        verdict.counts["instances acknowledged"] += 1
        if sha256 not in stored.get(uid, set()):
            verdict.lose("an acknowledged instance")


def _draft(session: Session, sent: SentStudy, verdict: Verdict) -> None:
    """A whole study is drafted, once for its last revision, from all of its slices."""
    verdict.counts["studies sent whole"] += 1
    study = session.scalars(sa.select(Study).where(Study.study_instance_uid == sent.uid)).one_or_none()
    if study is None or study.status is not StudyStatus.DRAFTED:
        verdict.lose(f"the draft of a study that is {study.status if study else 'not there'}")
        return
    verdict.counts["revisions"] += study.revision
    drafts = session.scalar(
        sa.select(sa.func.count())
        .select_from(ReportVersion)
        .join(Report, ReportVersion.report_id == Report.id)
        .where(
            Report.study_id == study.id,
            ReportVersion.study_revision == study.revision,
            ReportVersion.author_kind == AuthorKind.MACHINE,
        )
    )
    latest = reports.latest(session, study.id)
    text = " ".join(row.text for row in latest.sentences) if latest else ""
    if drafts != 1 or f"The volume has {sent.slices} slices" not in text:
        verdict.lose(f"{drafts} drafts of the last revision, or not of all slices")


def _messages(session: Session, accepted: Sequence[str], verdict: Verdict) -> None:
    """Every report reached the receiver once; what the outbox calls acknowledged was accepted, and in order."""
    rows = session.execute(
        sa.select(Message.control_id, Message.state, ReportVersion.report_id, ReportVersion.number).join(
            ReportVersion, Message.version_id == ReportVersion.id
        )
    ).all()
    by_control_id = {row.control_id: row for row in rows}
    taken = set(accepted)
    newest: dict[str, int] = {}
    for row in rows:
        newest[row.report_id] = max(newest.get(row.report_id, 0), row.number)
        if row.state is MessageState.ACKNOWLEDGED and row.control_id not in taken:
            verdict.lose("a message that was never accepted")
    for row in rows:
        if row.number == newest[row.report_id] and row.state is not MessageState.ACKNOWLEDGED:
            verdict.lose(f"the newest report of a study, whose message is {row.state}")
    seen: dict[tuple[str, int], str] = {}
    last: dict[str, int] = {}
    for control_id in accepted:
        row = by_control_id.get(control_id)
        if row is None:
            verdict.lose("the row of an accepted message")
            continue
        if seen.setdefault((row.report_id, row.number), control_id) != control_id:
            verdict.accepted_twice += 1
        if row.number < last.get(row.report_id, 0):
            verdict.out_of_order += 1
        last[row.report_id] = max(row.number, last.get(row.report_id, 0))
    verdict.counts["messages accepted"] = len(taken)
    verdict.counts["reports"] = len(newest)


def _sha256_of_data_set(path: Path) -> str:
    if not path.is_file():
        return ""
    _, offset = split_dataset(path)
    return hashlib.sha256(path.read_bytes()[offset:]).hexdigest()
