"""Rows for a process that records instances all day long: most groups cost two statements."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import cast

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from worker.core import arrivals
from worker.core.arrivals import Arrival, Recorded, instance_row
from worker.core.database import Database
from worker.core.errors import DatabaseUnavailableError
from worker.core.records import Disposition, Instance, Series, Study, StudyStatus

MOST_REMEMBERED = 4_096

_STUDY, _INSTANCE = (cast(sa.Table, kind.__table__) for kind in (Study, Instance))
_INSERT_NEW = {
    "sqlite": sqlite.insert(_INSTANCE).on_conflict_do_nothing(),
    "postgresql": postgresql.insert(_INSTANCE).on_conflict_do_nothing(),
}
_TOUCH_STUDY = (
    sa.update(_STUDY)
    .where(
        _STUDY.c.id == sa.bindparam("study_id"),
        _STUDY.c.revision == sa.bindparam("expected"),
        _STUDY.c.status == StudyStatus.RECEIVING,
    )
    .values(last_arrival_at=sa.bindparam("at"))
)


class Recorder:
    """`record` for a process that records all day: it remembers studies and series, so that most groups are two statements.

    What it remembers is only ever a guess: the study must still be receiving in the remembered revision and every
    instance must be new, or nothing is written and `record` looks at everything. Used by one thread at a time.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._seen: dict[tuple[str, str], _Seen] = {}  # study and series UID → ids, oldest first

    def record(self, group: Sequence[Arrival]) -> list[Recorded]:
        """Records all arrivals in one transaction, in their order; raises `DatabaseUnavailableError`."""
        seen = [self._seen.get((a.study_instance_uid, a.series_instance_uid)) for a in group]
        known = [(a, s) for a, s in zip(group, seen, strict=True) if s is not None and s.covers(a)]
        if len(known) == len(group):
            try:
                return self._database.run(lambda session: _append(session.connection(), known))
            except _OutdatedError:
                for arrival in group:
                    self._seen.pop((arrival.study_instance_uid, arrival.series_instance_uid), None)
        recorded = arrivals.record(self._database, group)
        self._remember(group)
        return recorded

    def _remember(self, group: Sequence[Arrival]) -> None:
        uids = list({(a.study_instance_uid, a.series_instance_uid) for a in group})
        query = (
            sa.select(Study, Series.series_instance_uid, Series.id)
            .join(Series, Series.study_id == Study.id)
            .where(sa.tuple_(Study.study_instance_uid, Series.series_instance_uid).in_(uids))
        )
        try:
            with self._database.read() as session:
                for study, series_uid, series_id in session.execute(query):
                    self._seen[study.study_instance_uid, series_uid] = _Seen(
                        study.id, series_id, study.revision, study.priority, bool(study.patient_identifier)
                    )
        except DatabaseUnavailableError:
            return  # the rows are committed; not remembering costs time only
        while len(self._seen) > MOST_REMEMBERED:
            del self._seen[next(iter(self._seen))]


@dataclass(frozen=True)
class _Seen:
    """A study and a series whose rows were there a moment ago."""

    study_id: str
    series_id: str
    revision: int
    priority: int
    patient_known: bool

    def covers(self, arrival: Arrival) -> bool:
        """Whether the study's row needs nothing of this arrival but its time."""
        return arrival.priority >= self.priority and (self.patient_known or not arrival.patient_identifier)


class _OutdatedError(Exception):
    """What was remembered is no longer so."""


def _append(connection: sa.Connection, known: Sequence[tuple[Arrival, _Seen]]) -> list[Recorded]:
    """Adds new instances to studies that still receive; raises `_OutdatedError` when that is not what they are."""
    latest: dict[tuple[str, int], datetime] = {}
    for arrival, seen in known:
        key = (seen.study_id, seen.revision)
        latest[key] = max(arrival.received_at, latest.get(key, arrival.received_at))
    for (study_id, revision), at in sorted(latest.items()):  # one order in every process: no deadlock
        touched = connection.execute(_TOUCH_STUDY, {"study_id": study_id, "expected": revision, "at": at})
        if touched.rowcount != 1:
            raise _OutdatedError
    rows = [instance_row(a, s.study_id, s.revision, s.series_id, Disposition.KEPT) for a, s in known]
    insert = _INSERT_NEW[connection.dialect.name]
    if connection.execute(insert, rows, execution_options={"preserve_rowcount": True}).rowcount != len(rows):
        raise _OutdatedError
    return [Recorded(s.study_id, s.revision, Disposition.KEPT, duplicate=False, new_revision=False) for _, s in known]
