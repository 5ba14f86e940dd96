"""Instances become rows: many at a time, so that one commit serves every association that waits.

The listener calls `record` with what it has made durable in the store; the answer says what each instance was.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from worker.core import studies
from worker.core.database import Database
from worker.core.records import Disposition, Instance, Priority, Series, Study, StudyStatus, new_id
from worker.core.report import Phi

TRIES = 5  # two processes that insert the same study at once collide; the second sees the first's rows


LONGEST_CODE = 64


@dataclass(frozen=True)
class CodedProcedure:
    """A procedure as DICOM codes it; all empty when it does not."""

    code: str = ""  # at most `LONGEST_CODE` characters
    text: Phi = ""
    system: str = ""  # Coding Scheme Designator: LN, SCT, 99..., which HL7 table 0396 shares


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
    requesting_physician: Phi = ""
    procedure: CodedProcedure = CodedProcedure()
    procedure_reason: Phi = ""
    visit: Phi = ""
    study_time: datetime | None = None
    study_description: Phi = ""
    modality: str = ""
    series_number: int | None = None
    series_description: Phi = ""

    @property
    def patient_key(self) -> Phi:
        """The patient's id with its issuer: one number of two issuers is two patients."""
        if not self.patient_identifier or not self.patient_authority:
            return self.patient_identifier
        return f"{self.patient_identifier}^{self.patient_authority}"


@dataclass(frozen=True)
class Recorded:
    """What one arrival was."""

    study_id: str
    revision: int
    disposition: Disposition
    duplicate: bool  # equal bytes were there before: no row was written and the new file is not needed
    new_revision: bool  # the study had been complete
    repeated: bool = False  # this very file had its row before: a commit whose answer was lost, or it was sent again
    corrected: bool = False  # it took the place of an earlier header of the same picture


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
    """The body of `record`, for a transaction of the caller's.

    Plain statements rather than mapped objects: this runs once per group of instances between two answers of the
    listener, and mapping costs three times as much as the database.
    """
    connection = session.connection()
    by_uid = _studies(connection, arrivals)
    series_ids = _series(connection, arrivals, by_uid)
    known, removed = _known_instances(connection, arrivals)
    rows: list[dict[str, object]] = []
    recorded: list[Recorded] = []
    for arrival in arrivals:
        study = by_uid[arrival.study_instance_uid]
        present = known.setdefault(arrival.sop_instance_uid, [])
        disposition, duplicate = _disposition(arrival, present, study.id)
        # The same file again: a commit whose answer was lost, or a store that names files by their content.
        recorded_before = any(path == arrival.path for *_, path in present)
        new_revision = False
        if disposition is Disposition.KEPT and not duplicate and not recorded_before:
            new_revision = study.status is not StudyStatus.RECEIVING
            if new_revision:
                _reopen(session, study)
            study.arrived(arrival)
        recorded.append(Recorded(study.id, study.revision, disposition, duplicate, new_revision, recorded_before))
        if not duplicate and not recorded_before:
            series_id = series_ids[study.id, arrival.series_instance_uid]
            rows.append(instance_row(arrival, study.id, study.revision, series_id, disposition))
            present.append((disposition, arrival.sha256, arrival.transfer_syntax_uid, study.id, arrival.path))
    for study in by_uid.values():
        study.save(connection)
    if rows:
        connection.execute(_INSERT_INSTANCES, rows)
    back = removed & {a.path for a in arrivals}
    if back:
        connection.execute(_RESTORE_INSTANCES, {"paths": list(back)})
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


_STUDY, _SERIES, _INSTANCE = (cast(sa.Table, kind.__table__) for kind in (Study, Series, Instance))
# Built once: a statement that is built anew costs more than its execution.
_SELECT_STUDIES = (
    sa.select(
        _STUDY.c.study_instance_uid,
        _STUDY.c.id,
        _STUDY.c.revision,
        _STUDY.c.status,
        _STUDY.c.priority,
        _STUDY.c.last_arrival_at,
        _STUDY.c.patient_identifier,
    )
    .where(_STUDY.c.study_instance_uid.in_(sa.bindparam("uids", expanding=True)))
    .order_by(_STUDY.c.study_instance_uid)  # one order in every process: no deadlock
    .with_for_update()
)
_SELECT_SERIES = sa.select(_SERIES.c.study_id, _SERIES.c.series_instance_uid, _SERIES.c.id).where(
    _SERIES.c.study_id.in_(sa.bindparam("ids", expanding=True))
)
_SELECT_INSTANCES = sa.select(
    _INSTANCE.c.sop_instance_uid,
    _INSTANCE.c.disposition,
    _INSTANCE.c.sha256,
    _INSTANCE.c.transfer_syntax_uid,
    _INSTANCE.c.study_id,
    _INSTANCE.c.path,
    _INSTANCE.c.removed_at,
).where(_INSTANCE.c.sop_instance_uid.in_(sa.bindparam("uids", expanding=True)))
_UPDATE_ARRIVAL = (
    sa.update(_STUDY)
    .where(_STUDY.c.id == sa.bindparam("study_id"))
    .values(last_arrival_at=sa.bindparam("at"), priority=sa.bindparam("rank"))
)
_RESTORE_INSTANCES = (  # sent again after retention had removed the file
    sa.update(_INSTANCE).where(_INSTANCE.c.path.in_(sa.bindparam("paths", expanding=True))).values(removed_at=None)
)
_INSERT_SERIES = sa.insert(_SERIES)
_INSERT_INSTANCES = sa.insert(_INSTANCE)


class _StudyRow:
    """What recording needs of a study's row, and what it changes there."""

    def __init__(self, row: Any) -> None:
        self.id: str = row.id
        self.revision: int = row.revision
        self.status: StudyStatus = row.status
        self.priority: int = row.priority
        self.last_arrival_at: datetime = row.last_arrival_at
        self.patient_identifier: str = row.patient_identifier
        self._arrived = False
        self._patient: Arrival | None = None

    def arrived(self, arrival: Arrival) -> None:
        """Notes a kept instance."""
        self._arrived = True
        self.last_arrival_at = max(self.last_arrival_at, arrival.received_at)
        self.priority = min(self.priority, arrival.priority)
        if not self.patient_identifier and arrival.patient_identifier:
            # The patient comes from the first instance that names one; fields of two instances are never mixed.
            self.patient_identifier, self._patient = arrival.patient_identifier, arrival

    def save(self, connection: sa.Connection) -> None:
        """Writes what changed."""
        if not self._arrived:
            return
        connection.execute(
            _UPDATE_ARRIVAL, {"study_id": self.id, "at": self.last_arrival_at, "rank": int(self.priority)}
        )
        if self._patient is not None:
            connection.execute(sa.update(_STUDY).where(_STUDY.c.id == self.id), patient_columns(self._patient))


def _reopen(session: Session, study: _StudyRow) -> None:
    """Late instances: a new revision, by the one function that may open it."""
    mapped = studies.get(session, study.id)
    studies.reopen(session, mapped)
    session.flush()
    study.status, study.revision = mapped.status, mapped.revision


def _studies(connection: sa.Connection, arrivals: Sequence[Arrival]) -> dict[str, _StudyRow]:
    uids = sorted({a.study_instance_uid for a in arrivals})

    def select() -> dict[str, _StudyRow]:
        return {row[0]: _StudyRow(row) for row in connection.execute(_SELECT_STUDIES, {"uids": uids})}

    by_uid = select()
    missing = [a for a in arrivals if a.study_instance_uid not in by_uid]
    if not missing:
        return by_uid
    first = {a.study_instance_uid: a for a in reversed(missing)}
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    rows = [_study_row(a) for _, a in sorted(first.items())]
    connection.execute(insert(_STUDY).on_conflict_do_nothing(), rows)
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
        **patient_columns(arrival),
    }


def patient_columns(arrival: Arrival) -> dict[str, object]:
    """The columns of a study's row that describe its patient and its order."""
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
        "requesting_physician": arrival.requesting_physician,
        "procedure_code": arrival.procedure.code,
        "procedure_text": arrival.procedure.text,
        "procedure_system": arrival.procedure.system,
        "procedure_reason": arrival.procedure_reason,
        "visit": arrival.visit,
        "study_time": arrival.study_time,
        "description": arrival.study_description,
    }


def _series(
    connection: sa.Connection, arrivals: Sequence[Arrival], by_uid: dict[str, _StudyRow]
) -> dict[tuple[str, str], str]:
    found = connection.execute(_SELECT_SERIES, {"ids": [study.id for study in by_uid.values()]})
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
        connection.execute(_INSERT_SERIES, rows)
    return series_ids


def _known_instances(
    connection: sa.Connection, arrivals: Sequence[Arrival]
) -> tuple[dict[str, list[_Known]], set[str]]:
    """The rows that carry a UID of these arrivals, and the paths of those whose file had been removed."""
    known: dict[str, list[_Known]] = {}
    removed = set()
    for row in connection.execute(_SELECT_INSTANCES, {"uids": list({a.sop_instance_uid for a in arrivals})}):
        uid, disposition, sha256, syntax, study_id, path, removed_at = row
        known.setdefault(uid, []).append((disposition, sha256, syntax, study_id, path))
        if removed_at is not None:
            removed.add(path)
    return known, removed


def instance_row(
    arrival: Arrival, study_id: str, revision: int, series_id: str, disposition: Disposition
) -> dict[str, object]:
    """The columns of an instance's row."""
    return {
        "id": new_id(),
        "study_id": study_id,
        "series_id": series_id,
        "sop_instance_uid": arrival.sop_instance_uid,
        "sop_class_uid": arrival.sop_class_uid,
        "transfer_syntax_uid": arrival.transfer_syntax_uid,
        "path": arrival.path,
        "size_bytes": arrival.size_bytes,
        "sha256": arrival.sha256,
        "revision": revision,
        "patient_identifier": arrival.patient_key,
        "disposition": disposition,
        "received_at": arrival.received_at,
    }
