"""Every change of a study's state: one function each, which checks the state it leaves.

                    late instances, requeue: a new revision
        ┌──────────────────────────────┬───────────────────────────────┐
        ▼                              │                               │
    receiving ─▶ complete ─▶ preparing ─▶ prepared ─▶ drafting ─▶ drafted
        │            ▲           │  │         ▲           │
        │            └─ retry ───┘  ├─▶ skipped └─ retry ─┤
        └───────────────────────────┴─────────▶ failed ◀──┘

Work is claimed on the row: a claim holds a random token and a lease that a heartbeat renews. Whoever finishes shows the
token; when the lease was lost the finish is refused, so a stage that ran twice is recorded once.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from worker.core.errors import LeaseLostError, Mu2Error, NotFoundError, StateError, StoreFullError
from worker.core.records import (
    REASON_LENGTH,
    Attempt,
    AttemptOutcome,
    Disposition,
    Instance,
    Stage,
    Study,
    StudyStatus,
    new_id,
)

LONGEST_BACKOFF_SECONDS = 3600.0
FULL_STORE_SECONDS = 30.0  # between two tries of a study while the store has no room
MOST_LOST_TO_CLAIM = 20  # quarantined in one claim before it gives up for now

_LEADS_TO: dict[StudyStatus, frozenset[StudyStatus]] = {
    StudyStatus.RECEIVING: frozenset({StudyStatus.COMPLETE, StudyStatus.FAILED}),
    StudyStatus.COMPLETE: frozenset({StudyStatus.PREPARING, StudyStatus.RECEIVING}),
    StudyStatus.PREPARING: frozenset(
        {
            StudyStatus.COMPLETE,
            StudyStatus.PREPARED,
            StudyStatus.SKIPPED,
            StudyStatus.FAILED,
            StudyStatus.RECEIVING,
            StudyStatus.PREPARING,
        }
    ),
    StudyStatus.PREPARED: frozenset({StudyStatus.DRAFTING, StudyStatus.RECEIVING}),
    StudyStatus.DRAFTING: frozenset(
        {
            StudyStatus.PREPARED,
            StudyStatus.DRAFTED,
            StudyStatus.FAILED,
            StudyStatus.RECEIVING,
            StudyStatus.COMPLETE,
            StudyStatus.DRAFTING,
        }
    ),
    StudyStatus.DRAFTED: frozenset({StudyStatus.RECEIVING, StudyStatus.COMPLETE}),
    StudyStatus.SKIPPED: frozenset({StudyStatus.RECEIVING, StudyStatus.COMPLETE}),
    StudyStatus.FAILED: frozenset({StudyStatus.RECEIVING, StudyStatus.COMPLETE}),
}

_WAITS = {Stage.PREPARE: StudyStatus.COMPLETE, Stage.DRAFT: StudyStatus.PREPARED}
_WORKS = {Stage.PREPARE: StudyStatus.PREPARING, Stage.DRAFT: StudyStatus.DRAFTING}
_STAGE_OF = {status: stage for stage, status in _WORKS.items()}


@dataclass(frozen=True)
class Claim:
    """The right to do one stage of one revision until the lease runs out."""

    study_id: str
    revision: int
    stage: Stage
    token: str
    attempts: int  # retryable failures of this stage before this try


@dataclass(frozen=True)
class Limits:
    """When a stage is given up, and how long a claim lasts."""

    lease_seconds: float
    max_attempts: int
    max_crashes: int
    backoff_seconds: float


def now() -> datetime:
    """The present time, zone-aware."""
    return datetime.now(UTC)


def get(session: Session, study_id: str) -> Study:
    """The study with this id; raises `NotFoundError`."""
    study = session.get(Study, study_id)
    if study is None:
        raise NotFoundError(f"no study has the id {study_id}")
    return study


def complete_quiet(session: Session, quiet_seconds: float, held: Container[str] = ()) -> list[str]:
    """Completes every study that has been quiet for long enough and whose Study Instance UID is not in `held`.

    `held` is asked after the rows were read: who holds a study before its rows are committed is never overlooked.

    A study whose instances carry two patients' ids fails instead. Returns the ids of the completed ones.
    """
    since = now() - timedelta(seconds=quiet_seconds)
    quiet = session.scalars(
        sa.select(Study)
        .where(Study.status == StudyStatus.RECEIVING, Study.last_arrival_at <= since)
        .with_for_update(skip_locked=True)
    ).all()
    return [study.id for study in quiet if study.study_instance_uid not in held and complete(session, study)]


def complete(session: Session, study: Study) -> bool:
    """Receiving → complete, or failed when two patients' ids are mixed; says whether it is complete."""
    found = session.scalars(
        sa.select(Instance.patient_identifier)
        .where(
            Instance.study_id == study.id, Instance.disposition == Disposition.KEPT, Instance.patient_identifier != ""
        )
        .distinct()
    ).all()
    identifiers = _patients(found)
    if len(identifiers) > 1:
        _move(study, StudyStatus.FAILED)
        study.failed_stage = "receive"
        study.reason = (
            f"PatientMismatchError: the objects of this study carry the ids of {len(identifiers)} patients; "
            "correct it in the PACS, run `mu2 study discard` and send it again"
        )
        return False
    _move(study, StudyStatus.COMPLETE)
    study.completed_at = study.status_at
    return True


def _patients(identifiers: Iterable[str]) -> set[str]:
    """The patients that `id^issuer` strings name; an id without issuer is the same id with one."""
    issuers: dict[str, set[str]] = {}
    for identifier in identifiers:
        number, _, issuer = identifier.partition("^")
        issuers.setdefault(number, set()).update({issuer} - {""})
    return {f"{number}^{issuer}" for number, named in issuers.items() for issuer in named or {""}}


def reopen(session: Session, study: Study) -> None:
    """Any state but receiving → receiving in a new revision: late instances arrived."""
    _move(study, StudyStatus.RECEIVING)
    _new_revision(session, study)


def requeue(session: Session, study_id: str, *, force: bool = False) -> None:
    """skipped, failed, drafted (and, by force, preparing or drafting) → complete in a new revision.

    Raises `StateError` for a study that still arrives, waits, or is under way without `force`.
    """
    study = _locked(session, study_id)
    allowed = {StudyStatus.SKIPPED, StudyStatus.FAILED, StudyStatus.DRAFTED}
    if force:
        allowed |= {StudyStatus.PREPARING, StudyStatus.DRAFTING}
    if study.status not in allowed:
        hint = "; --force takes it from its worker" if study.status in _STAGE_OF else "; it is due already"
        raise StateError(f"study {study_id} is {study.status}, which cannot be requeued{hint}")
    _new_revision(session, study)
    _move_forced(study, StudyStatus.COMPLETE)
    study.completed_at = study.status_at


def due_count(session: Session, stage: Stage) -> int:
    """How many studies wait for this stage now, lost leases included."""
    return session.scalar(sa.select(sa.func.count()).select_from(Study).where(_due(stage))) or 0


def claim(session: Session, stage: Stage, worker: str, limits: Limits) -> Claim | None:
    """Claims the most urgent due study of a stage, or None when nothing is due.

    A lease found expired is a crash of its worker; a study that crashed `max_crashes` workers is quarantined as failed.
    """
    for _ in range(MOST_LOST_TO_CLAIM):
        study = session.scalars(
            sa.select(Study)
            .where(_due(stage))
            .order_by(Study.priority, Study.completed_at, Study.id)
            .limit(1)
            .with_for_update(skip_locked=True)
        ).one_or_none()
        if study is None:
            return None
        if study.lease_token is not None:
            _end_attempt(session, study.lease_token, AttemptOutcome.LOST, None)
            study.crashes += 1
            if study.crashes >= limits.max_crashes:
                _quarantine(study, stage)
                session.flush()
                continue
        _move(study, _WORKS[stage])
        study.lease_token = new_id()
        study.lease_until = study.status_at + timedelta(seconds=limits.lease_seconds)
        study.due_at = None
        session.add(
            Attempt(
                token=study.lease_token,
                study_id=study.id,
                revision=study.revision,
                stage=stage,
                worker=worker,
                started_at=study.status_at,
            )
        )
        return Claim(study.id, study.revision, stage, study.lease_token, study.attempts)
    return None


def renew(session: Session, tokens: Iterable[str], lease_seconds: float) -> set[str]:
    """Renews the leases of these claims; returns the tokens that are still held."""
    wanted = list(tokens)
    session.execute(
        sa.update(Study)
        .where(Study.lease_token.in_(wanted))
        .values(lease_until=now() + timedelta(seconds=lease_seconds))
        .execution_options(synchronize_session=False)
    )
    alive = session.scalars(sa.select(Study.lease_token).where(Study.lease_token.in_(wanted)))
    return {token for token in alive if token is not None}


def store_prepared(session: Session, claim: Claim, choice: dict[str, Any], model_input: str) -> None:
    """Preparing → prepared, with the choice of series and the path of the model input."""
    study = held(session, claim)
    if study is None:
        return
    study.choice = choice
    study.model_input = model_input
    _finish(session, study, StudyStatus.PREPARED, claim, AttemptOutcome.DONE)


def skip(session: Session, claim: Claim, reason: str, choice: dict[str, Any]) -> None:
    """Preparing → skipped: there is nothing to report, for this reason."""
    study = held(session, claim)
    if study is None:
        return
    study.choice = choice
    study.reason = reason[:REASON_LENGTH]
    _finish(session, study, StudyStatus.SKIPPED, claim, AttemptOutcome.SKIPPED)


def mark_drafted(session: Session, study: Study, claim: Claim) -> None:
    """Drafting → drafted; the caller has stored the report in this transaction."""
    _finish(session, study, StudyStatus.DRAFTED, claim, AttemptOutcome.DONE)


def postpone(session: Session, claim: Claim, error: Mu2Error, limits: Limits) -> bool:
    """Back to the waiting state until a back-off is over, or failed after the last attempt; says whether it waits."""
    study = held(session, claim)
    if study is None:
        return False
    if isinstance(error, StoreFullError):  # costs no attempt: no study is to blame
        _wait(session, study, claim, error, max(limits.backoff_seconds, FULL_STORE_SECONDS))
        return True
    study.attempts += 1
    if study.attempts >= limits.max_attempts:
        _give_up(session, study, claim, error)
        return False
    wait = min(limits.backoff_seconds * 2 ** (study.attempts - 1), LONGEST_BACKOFF_SECONDS)
    _wait(session, study, claim, error, wait)
    return True


def fail(session: Session, claim: Claim, error: BaseException) -> None:
    """Preparing or drafting → failed, with the stage and the reason."""
    study = held(session, claim)
    if study is not None:
        _give_up(session, study, claim, error)


def give_back(session: Session, claim: Claim) -> None:
    """Back to the waiting state at once and without counting an attempt: the worker stops."""
    study = held(session, claim)
    if study is not None:
        _wait(session, study, claim, None, 0.0)


def held(session: Session, claim: Claim) -> Study | None:
    """The locked study while the claim still holds it; None when this very claim was finished before.

    The second case is a commit whose answer was lost. Raises `LeaseLostError` when another worker or a new revision
    took the study over: the result must be thrown away.
    """
    study = _locked(session, claim.study_id)
    if study.lease_token == claim.token:
        return study
    attempt = session.get(Attempt, claim.token)
    if attempt is not None and attempt.outcome not in {
        AttemptOutcome.LOST,
        AttemptOutcome.SUPERSEDED,
        AttemptOutcome.RUNNING,
    }:
        return None
    raise LeaseLostError(f"{claim.stage} of study {claim.study_id} revision {claim.revision} was taken over")


def describe(error: BaseException) -> str:
    """The reason as it is stored: class and message of our errors, the class alone of others.

    A foreign exception's text may quote the data it choked on.
    """
    text = f"{type(error).__name__}: {error}" if isinstance(error, Mu2Error) else type(error).__name__
    return text[:REASON_LENGTH]


def _due(stage: Stage) -> sa.ColumnElement[bool]:
    at = now()
    waits = sa.and_(Study.status == _WAITS[stage], sa.or_(Study.due_at.is_(None), Study.due_at <= at))
    lost = sa.and_(Study.status == _WORKS[stage], Study.lease_until < at)
    return sa.or_(waits, lost)


def _locked(session: Session, study_id: str) -> Study:
    study = session.get(Study, study_id, with_for_update=True, populate_existing=True)
    if study is None:
        raise NotFoundError(f"no study has the id {study_id}")
    return study


def _move(study: Study, to: StudyStatus) -> None:
    if to not in _LEADS_TO[study.status]:
        raise StateError(f"study {study.id} is {study.status}; that does not lead to {to}")
    _move_forced(study, to)


def _move_forced(study: Study, to: StudyStatus) -> None:
    study.status = to
    study.status_at = now()


def _new_revision(session: Session, study: Study) -> None:
    if study.lease_token is not None:
        _end_attempt(session, study.lease_token, AttemptOutcome.SUPERSEDED, None)
    study.revision += 1
    study.lease_token = study.lease_until = study.due_at = study.completed_at = None
    study.model_input = study.choice = None
    study.attempts = study.crashes = 0
    study.failed_stage = study.reason = ""


def _finish(
    session: Session,
    study: Study,
    to: StudyStatus,
    claim: Claim,
    outcome: AttemptOutcome,
    error: BaseException | None = None,
) -> None:
    _move(study, to)
    study.lease_token = study.lease_until = study.due_at = None
    study.attempts = study.crashes = 0
    _end_attempt(session, claim.token, outcome, error)


def _wait(session: Session, study: Study, claim: Claim, error: BaseException | None, seconds: float) -> None:
    """Back to the waiting state with its counts as they are, due after `seconds`."""
    attempts, crashes = study.attempts, study.crashes
    _finish(session, study, _WAITS[claim.stage], claim, AttemptOutcome.RETRY, error)
    study.attempts, study.crashes = attempts, crashes
    study.due_at = study.status_at + timedelta(seconds=seconds) if seconds else None


def _give_up(session: Session, study: Study, claim: Claim, error: BaseException) -> None:
    study.failed_stage = claim.stage
    study.reason = describe(error)
    _finish(session, study, StudyStatus.FAILED, claim, AttemptOutcome.FAILED, error)


def _quarantine(study: Study, stage: Stage) -> None:
    _move(study, StudyStatus.FAILED)
    study.failed_stage = stage
    study.reason = (
        f"quarantined: {study.crashes} workers died or hung in {stage}; see the worker log, then requeue the study"
    )
    study.lease_token = study.lease_until = study.due_at = None


def _end_attempt(session: Session, token: str, outcome: AttemptOutcome, error: BaseException | None) -> None:
    attempt = session.get(Attempt, token)
    if attempt is None:
        return
    attempt.outcome = outcome
    attempt.ended_at = now()
    if error is not None:
        attempt.error = type(error).__name__
        attempt.reason = describe(error)
