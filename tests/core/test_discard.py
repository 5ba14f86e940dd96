"""A discard on both databases: the constraints and triggers of each let all rows of a study go, and no signed one."""

from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.core import builders
from worker.core import discard, editing, outbox
from worker.core.database import Database
from worker.core.errors import StateError
from worker.core.records import AuditEvent, Base, ReportVersion


def rows(database: Database) -> dict[str, int]:
    """How many rows each table holds that holds any."""
    with database.read() as session:
        counts = {
            table.name: session.scalar(sa.select(sa.func.count()).select_from(table)) or 0
            for table in Base.metadata.sorted_tables
        }
    return {name: count for name, count in counts.items() if count}


def test_nothing_of_a_discarded_study_is_left_but_the_audit(database: Database, tmp_path: Path) -> None:
    version_id = builders.drafted(database)
    with database.write() as session:
        version = session.get_one(ReportVersion, version_id)
        study_id = version.report.study_id
        outbox.enqueue(session, version, [builders.destination()], builders.render)
        editing.begin(session, version)
    discard.run(database, tmp_path, study_id, actor="test")
    assert rows(database) == {AuditEvent.__tablename__: 1}


def test_a_refused_discard_changes_nothing(database: Database, tmp_path: Path) -> None:
    version_id = builders.drafted(database)
    with database.write() as session:
        study_id = session.get_one(ReportVersion, version_id).report.study_id
        builders.sign(session, version_id)
    before = rows(database)
    with pytest.raises(StateError, match="signed"):
        discard.run(database, tmp_path, study_id, actor="test")
    assert rows(database) == before


def test_a_discard_whose_commit_was_not_answered_is_done_once(
    sqlite_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study_id = builders.completed(sqlite_database)
    run = sqlite_database.run
    monkeypatch.setattr(sqlite_database, "run", lambda change: [run(change), run(change)][1])
    assert discard.run(sqlite_database, tmp_path, study_id, actor="test").instances == 1
    assert rows(sqlite_database) == {AuditEvent.__tablename__: 1}
