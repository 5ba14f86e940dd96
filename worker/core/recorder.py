"""Rows for a process that records instances all day long: most groups cost two statements, sent without any mapping.

Measured for a group of one on SQLite, with caches cold from half a megabyte of pixels: 1.5 ms with mapped objects, 0.75 ms
with SQLAlchemy's statements, 0.2 ms like this. It was the dearest part of a C-STORE.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import PoolProxiedConnection

from worker.core import arrivals
from worker.core.arrivals import Arrival, Recorded, instance_row
from worker.core.database import Database
from worker.core.errors import DatabaseUnavailableError
from worker.core.records import Disposition, Instance, Series, Study, StudyStatus

MOST_REMEMBERED = 4_096

_STUDY, _INSTANCE = (cast(sa.Table, kind.__table__) for kind in (Study, Instance))
_TOUCH_STUDY = (
    sa.update(_STUDY)
    .where(
        _STUDY.c.id == sa.bindparam("study_id"),
        _STUDY.c.revision == sa.bindparam("expected"),
        _STUDY.c.status == sa.bindparam("receiving"),
    )
    .values(last_arrival_at=sa.bindparam("at"))
)
_INSTANCE_COLUMNS = (
    "id", "study_id", "series_id", "sop_instance_uid", "sop_class_uid", "transfer_syntax_uid", "path", "size_bytes",
    "sha256", "revision", "patient_identifier", "disposition", "received_at",
)  # fmt: skip


class Recorder:
    """`arrivals.record` for a process that records all day. Used by one thread at a time.

    It remembers studies and series, and on that guess adds rows by the driver alone. The guess holds when the study
    still receives in the remembered revision and every instance is new. When it does not, or the driver fails, nothing
    was written and `arrivals.record` looks at everything and waits for a database that is away.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        dialect = database.engine.dialect
        insert = postgresql.insert if dialect.name == "postgresql" else sqlite.insert
        self._touch = _Driver(_TOUCH_STUDY, dialect)
        self._insert = _Driver(
            insert(_INSTANCE).values({c: sa.bindparam(c) for c in _INSTANCE_COLUMNS}).on_conflict_do_nothing(), dialect
        )
        self._connection: PoolProxiedConnection | None = None
        self._seen: dict[tuple[str, str], _Seen] = {}  # study and series UID → ids, oldest first

    def record(self, group: Sequence[Arrival]) -> list[Recorded]:
        """Records all arrivals in one transaction, in their order; raises `DatabaseUnavailableError`."""
        seen = [self._seen.get((a.study_instance_uid, a.series_instance_uid)) for a in group]
        known = [(a, s) for a, s in zip(group, seen, strict=True) if s is not None and s.covers(a)]
        if len(known) == len(group) and self._append(known):
            return [Recorded(s.study_id, s.revision, Disposition.KEPT, False, False) for _, s in known]
        for arrival in group:
            self._seen.pop((arrival.study_instance_uid, arrival.series_instance_uid), None)
        recorded = arrivals.record(self._database, group)
        self._remember(group)
        return recorded

    def close(self) -> None:
        """Gives the connection back."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _append(self, known: Sequence[tuple[Arrival, "_Seen"]]) -> bool:
        """Adds new instances to studies that still receive; false, and nothing written, when that is not what they are."""
        errors = self._database.engine.dialect.loaded_dbapi.Error
        try:
            if self._connection is None:
                self._connection = self._database.engine.raw_connection()
            connection = self._connection
            cursor = connection.cursor()
            if self._database.is_sqlite:
                cursor.execute("BEGIN IMMEDIATE")
            if self._write(cursor, known):
                connection.commit()
                return True
            connection.rollback()
        except (errors, DBAPIError, PoolTimeoutError):
            if self._connection is not None:
                self._connection.invalidate()
                self._connection = None
        return False

    def _write(self, cursor: DBAPICursor, known: Sequence[tuple[Arrival, "_Seen"]]) -> bool:
        latest: dict[tuple[str, int], datetime] = {}
        for arrival, seen in known:
            key = (seen.study_id, seen.revision)
            latest[key] = max(arrival.received_at, latest.get(key, arrival.received_at))
        for (study_id, revision), at in sorted(latest.items()):  # one order in every process: no deadlock
            values = {"study_id": study_id, "expected": revision, "receiving": StudyStatus.RECEIVING, "at": at}
            cursor.execute(self._touch.text, self._touch.parameters(values))
            if cursor.rowcount != 1:
                return False
        rows = [instance_row(a, s.study_id, s.revision, s.series_id, Disposition.KEPT) for a, s in known]
        cursor.executemany(self._insert.text, [self._insert.parameters(row) for row in rows])
        return cursor.rowcount == len(rows)

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


class _Driver:
    """A statement as the driver takes it: compiled once, its values converted by the columns' own types."""

    def __init__(self, statement: sa.UpdateBase, dialect: Dialect) -> None:
        compiled = statement.compile(dialect=dialect)
        self.text = str(compiled)
        self._order: Sequence[str] | None = getattr(compiled, "positiontup", None)
        self._convert = {
            name: bind.type.dialect_impl(dialect).bind_processor(dialect)
            for name, bind in compiled.binds.items()  # type: ignore[attr-defined]
        }

    def parameters(self, values: Mapping[str, Any]) -> Any:
        """The values in the driver's order, or by name, as its paramstyle asks."""
        converted = {
            name: convert(values[name]) if convert else values[name] for name, convert in self._convert.items()
        }
        return tuple(converted[name] for name in self._order) if self._order else converted
