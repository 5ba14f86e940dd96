"""A corrected header takes the place of an earlier one: same instance, same picture, other words about patient or order.

Whether the picture is the same is found out by the listener, which has the files. Here the rows follow: the earlier object
stays as a variant, the study's patient and order become those of the corrected one, and a study that was complete opens
a new revision, so that a draft with the old words is written anew.
"""

import sqlalchemy as sa
from sqlalchemy.orm import Session

from worker.core import audit, studies
from worker.core.arrivals import Arrival, Recorded, patient_columns
from worker.core.records import AuditEvent, Disposition, Instance, Study, StudyStatus

ACTION = "correction"
_PEER = "ae:"  # of an audit event's actor


def rival(session: Session, arrival: Arrival) -> str | None:
    """Path of the kept object that `arrival` may correct: same instance, study, class and encoding, its file present."""
    return session.scalar(
        sa.select(Instance.path)
        .join(Study)
        .where(
            Instance.sop_instance_uid == arrival.sop_instance_uid,
            Instance.disposition == Disposition.KEPT,
            Instance.sop_class_uid == arrival.sop_class_uid,
            Instance.transfer_syntax_uid == arrival.transfer_syntax_uid,
            Instance.removed_at.is_(None),
            Instance.path != arrival.path,
            Study.study_instance_uid == arrival.study_instance_uid,
        )
    )


def corrector(session: Session, arrival: Arrival) -> str:
    """AE title of whoever corrected the study of `arrival` last; empty when nobody has."""
    actor = session.scalar(
        sa.select(AuditEvent.actor)
        .join(Study, Study.id == AuditEvent.study_id)
        .where(Study.study_instance_uid == arrival.study_instance_uid, AuditEvent.action == ACTION)
        .order_by(AuditEvent.id.desc())
        .limit(1)
    )
    return (actor or "").removeprefix(_PEER)


def apply(session: Session, arrival: Arrival, kept_path: str) -> Recorded | None:
    """Keeps the recorded `arrival` in place of the object at `kept_path`; None when that is no longer the kept one.

    One audit event a revision and sender; the rows tell how many instances were corrected.
    """
    study = session.scalars(
        sa.select(Study).where(Study.study_instance_uid == arrival.study_instance_uid).with_for_update()
    ).one()
    if _is_kept(session, arrival):  # by a commit whose answer was lost
        return Recorded(study.id, study.revision, Disposition.KEPT, False, False, corrected=True)
    if rival(session, arrival) != kept_path:
        return None
    new_revision = study.status is not StudyStatus.RECEIVING
    if new_revision:
        studies.reopen(session, study)
    _set(session, kept_path, disposition=Disposition.VARIANT)  # first: one instance has one kept row
    _set(session, arrival.path, disposition=Disposition.KEPT, revision=study.revision)
    study.last_arrival_at = max(study.last_arrival_at, arrival.received_at)
    study.priority = min(study.priority, int(arrival.priority))
    if arrival.patient_identifier or not _names_patient(session, study):
        for name, value in patient_columns(arrival).items():
            setattr(study, name, value)
    _note(session, study, arrival.calling_ae)
    return Recorded(study.id, study.revision, Disposition.KEPT, False, new_revision, corrected=True)


def _set(session: Session, path: str, **values: object) -> None:
    session.execute(sa.update(Instance).where(Instance.path == path).values(**values))


def _is_kept(session: Session, arrival: Arrival) -> bool:
    there = sa.select(Instance.disposition).where(Instance.path == arrival.path)
    return session.scalar(there) is Disposition.KEPT


def _names_patient(session: Session, study: Study) -> bool:
    """Whether any instance that counts says whose the study is."""
    named = sa.exists().where(
        Instance.study_id == study.id, Instance.disposition == Disposition.KEPT, Instance.patient_identifier != ""
    )
    return bool(session.scalar(sa.select(named)))


def _note(session: Session, study: Study, calling_ae: str) -> None:
    last = session.execute(
        sa.select(AuditEvent.detail, AuditEvent.actor)
        .where(AuditEvent.study_id == study.id, AuditEvent.action == ACTION)
        .order_by(AuditEvent.id.desc())
        .limit(1)
    ).one_or_none()
    actor = f"{_PEER}{calling_ae}"
    if last is None or (last.detail.get("revision"), last.actor) != (study.revision, actor):
        audit.append(session, ACTION, actor=actor, study_id=study.id, revision=study.revision)
