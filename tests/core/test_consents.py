"""Consent to training on both databases: the last answer stands, every answer is audited, none outlives its study."""

from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.core import builders
from worker.core import consents, discard
from worker.core.consents import Decision, TrainingConsent
from worker.core.database import Database
from worker.core.errors import NotFoundError
from worker.core.records import AuditEvent, new_id


def test_the_last_answer_stands_and_every_answer_is_audited(database: Database) -> None:
    study_id = builders.completed(database)
    for decision in (Decision.GIVEN, Decision.REFUSED):
        with database.write() as session:
            consents.record(session, study_id, decision, actor="cli:ada")
    with database.read() as session:
        row = session.get_one(TrainingConsent, study_id)
        told = session.scalars(sa.select(AuditEvent.detail).order_by(AuditEvent.id)).all()
    assert (row.decision, row.recorded_by) == (Decision.REFUSED, "cli:ada")
    assert told == [{"decision": "given"}, {"decision": "refused"}]


def test_a_study_that_nobody_asked_about_has_no_decision(sqlite_database: Database) -> None:
    study_id = builders.completed(sqlite_database)
    with sqlite_database.read() as session:
        assert consents.decision_of(session, study_id) is None


def test_no_consent_is_recorded_for_a_study_that_is_not_there(sqlite_database: Database) -> None:
    with sqlite_database.write() as session, pytest.raises(NotFoundError):
        consents.record(session, new_id(), Decision.GIVEN, actor="test")


def test_a_discarded_study_takes_its_consent_with_it(database: Database, tmp_path: Path) -> None:
    study_id = builders.completed(database)
    with database.write() as session:
        consents.record(session, study_id, Decision.GIVEN, actor="test")
    discard.run(database, tmp_path, study_id, actor="test")
    with database.read() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(TrainingConsent)) == 0
