"""Instances become rows: many at a time, so that one commit serves every association that waits.

The listener calls `record` with what it has made durable in the store; the answer says what each instance was.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from worker.core import studies
from worker.core.database import Database
from worker.core.records import Disposition, Instance, Priority, Series, Study, StudyStatus, new_id
from worker.core.report import Phi

TRIES = 5  # two processes that insert the same study at once collide; the second sees the first's rows


@dataclass(frozen=True)
class Arrival:
    """One instance that lies safely in the store, with what its rows need of its header."""

    path: str  # below the store
    size_bytes: int
    sha256: str  # of the data set's bytes as received
    sop_class_uid: str
    sop_instance_uid: Phi
    transfer_syntax_uid: str
    study_instance_uid: Phi
    series_instance_uid: Phi
    received_at: datetime
    calling_ae: str = ""
    priority: Priority = Priority.ROUTINE
    patient_identifier: Phi = ""
    patient_authority: Phi = ""
    patient_name: Phi = ""
    patient_birth_date: date | None = None
    patient_sex: str = ""
    accession: Phi = ""
    placer: Phi = ""
    filler: Phi = ""
    referring_physician: Phi = ""
    study_time: datetime | None = None
    study_description: Phi = ""
    modality: str = ""
    series_number: int | None = None
    series_description: Phi = ""


@dataclass(frozen=True)
class Recorded:
    """What one arrival was."""

    study_id: str
    revision: int
    disposition: Disposition
    duplicate: bool  # equal bytes were there before: no row was written and the new file is not needed
    new_revision: bool  # the study had been complete


def record(database: Database, arrivals: Sequence[Arrival]) -> list[Recorded]:
    """Records all arrivals in one transaction, in their order; raises `DatabaseUnavailableError`."""
    for last_try in [False] * (TRIES - 1) + [True]:
        try:
            return database.run(lambda session: record_many(session, arrivals))
        except IntegrityError:
            if last_try:
                raise
    raise AssertionError("unreachable")


def record_many(session: Session, arrivals: Sequence[Arrival]) -> list[Recorded]:
    """The body of `record`, for a transaction of the caller's."""
    by_uid = _studies(session, arrivals)
    series_ids = _series(session, arrivals, by_uid)
    known = _known_instances(session, arrivals)
    rows: list[dict[str, object]] = []
    recorded: list[Recorded] = []
    for arrival in arrivals:
        study = by_uid[arrival.study_instance_uid]
        present = known.setdefault(arrival.sop_instance_uid, [])
        disposition, duplicate = _disposition(arrival, present, study.id)
        recorded_before = any(path == arrival.path for *_, path in present)  # a commit whose answer was lost
        new_revision = False
        if disposition is Disposition.KEPT and not duplicate and not recorded_before:
            new_revision = study.status is not StudyStatus.RECEIVING
            if new_revision:
                studies.reopen(session, study)
            study.last_arrival_at = max(study.last_arrival_at, arrival.received_at)
            study.priority = min(study.priority, arrival.priority)
            _fill_patient(study, arrival)
        recorded.append(Recorded(study.id, study.revision, disposition, duplicate, new_revision))
        if not duplicate and not recorded_before:
            row = _instance_row(arrival, study, series_ids[study.id, arrival.series_instance_uid], disposition)
            rows.append(row)
            present.append((disposition, arrival.sha256, arrival.transfer_syntax_uid, study.id, arrival.path))
    if rows:
        session.execute(sa.insert(Instance), rows)
    return recorded


_Known = tuple[Disposition, str, str, str, str]  # disposition, sha256, transfer syntax, study id, path


def _disposition(arrival: Arrival, known: Sequence[_Known], study_id: str) -> tuple[Disposition, bool]:
    """What the arrival is beside the instances of its UID, and whether these very bytes lie in another file."""
    for disposition, *content, path in known:
        if path == arrival.path:
            return disposition, False
        if content == [arrival.sha256, arrival.transfer_syntax_uid, study_id]:
            return disposition, True
    kept = next((k for k in known if k[0] is Disposition.KEPT), None)
    if kept is None:
        return Disposition.KEPT, False
    other_encoding = kept[2] != arrival.transfer_syntax_uid and kept[3] == study_id
    return (Disposition.VARIANT if other_encoding else Disposition.CONFLICT), False


def _studies(session: Session, arrivals: Sequence[Arrival]) -> dict[str, Study]:
    uids = {a.study_instance_uid for a in arrivals}

    def select() -> dict[str, Study]:
        found = session.scalars(
            sa.select(Study)
            .where(Study.study_instance_uid.in_(uids))
            .order_by(Study.study_instance_uid)  # one order in every process: no deadlock
            .with_for_update()
        )
        return {study.study_instance_uid: study for study in found}

    by_uid = select()
    missing = [a for a in arrivals if a.study_instance_uid not in by_uid]
    if not missing:
        return by_uid
    first = {a.study_instance_uid: a for a in reversed(missing)}
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    rows = [_study_row(a) for _, a in sorted(first.items())]
    session.execute(insert(Study).on_conflict_do_nothing(), rows)
    return select()


def _study_row(arrival: Arrival) -> dict[str, object]:
    return {
        "id": new_id(),
        "study_instance_uid": arrival.study_instance_uid,
        "revision": 1,
        "status": StudyStatus.RECEIVING,
        "priority": arrival.priority,
        "calling_ae": arrival.calling_ae,
        "received_at": arrival.received_at,
        "last_arrival_at": arrival.received_at,
        "status_at": arrival.received_at,
        "attempts": 0,
        "crashes": 0,
        "failed_stage": "",
        "reason": "",
        **_patient_columns(arrival),
    }


def _patient_columns(arrival: Arrival) -> dict[str, object]:
    return {
        "patient_identifier": arrival.patient_identifier,
        "patient_authority": arrival.patient_authority,
        "patient_name": arrival.patient_name,
        "patient_birth_date": arrival.patient_birth_date,
        "patient_sex": arrival.patient_sex,
        "accession": arrival.accession,
        "placer": arrival.placer,
        "filler": arrival.filler,
        "referring_physician": arrival.referring_physician,
        "study_time": arrival.study_time,
        "description": arrival.study_description,
    }


def _fill_patient(study: Study, arrival: Arrival) -> None:
    """Takes the patient from the first instance that names one; fields of two instances are never mixed."""
    if not study.patient_identifier and arrival.patient_identifier:
        for column, value in _patient_columns(arrival).items():
            setattr(study, column, value)


def _series(session: Session, arrivals: Sequence[Arrival], by_uid: dict[str, Study]) -> dict[tuple[str, str], str]:
    ids = {study.id for study in by_uid.values()}
    found = session.execute(
        sa.select(Series.study_id, Series.series_instance_uid, Series.id).where(Series.study_id.in_(ids))
    )
    series_ids = {(study_id, uid): series_id for study_id, uid, series_id in found}
    rows = []
    for arrival in arrivals:
        key = (by_uid[arrival.study_instance_uid].id, arrival.series_instance_uid)
        if key not in series_ids:
            series_ids[key] = new_id()
            rows.append(
                {
                    "id": series_ids[key],
                    "study_id": key[0],
                    "series_instance_uid": arrival.series_instance_uid,
                    "modality": arrival.modality,
                    "number": arrival.series_number,
                    "description": arrival.series_description,
                }
            )
    if rows:
        session.execute(sa.insert(Series), rows)
    return series_ids


def _known_instances(session: Session, arrivals: Sequence[Arrival]) -> dict[str, list[_Known]]:
    found = session.execute(
        sa.select(
            Instance.sop_instance_uid,
            Instance.disposition,
            Instance.sha256,
            Instance.transfer_syntax_uid,
            Instance.study_id,
            Instance.path,
        ).where(Instance.sop_instance_uid.in_({a.sop_instance_uid for a in arrivals}))
    )
    known: dict[str, list[_Known]] = {}
    for uid, *rest in found:
        known.setdefault(uid, []).append(tuple(rest))  # type: ignore[arg-type]
    return known


def _instance_row(arrival: Arrival, study: Study, series_id: str, disposition: Disposition) -> dict[str, object]:
    return {
        "id": new_id(),
        "study_id": study.id,
        "series_id": series_id,
        "sop_instance_uid": arrival.sop_instance_uid,
        "sop_class_uid": arrival.sop_class_uid,
        "transfer_syntax_uid": arrival.transfer_syntax_uid,
        "path": arrival.path,
        "size_bytes": arrival.size_bytes,
        "sha256": arrival.sha256,
        "revision": study.revision,
        "patient_identifier": arrival.patient_identifier,
        "disposition": disposition,
        "received_at": arrival.received_at,
    }
