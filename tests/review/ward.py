"""One drafted report and the people around it: what the acts of a radiologist are tried on."""

from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tests.core.builders import claimed, destination, draft, render
from tests.review.builders import SENTENCES, department
from worker.core import editing, reports, seen, signing, studies
from worker.core.database import Database
from worker.core.editing import Reader
from worker.core.records import Message, Report, Role, Stage, new_id
from worker.core.report import Assessment, ReportState, Sentence
from worker.core.review_records import Authentication, AuthenticationMethod
from worker.core.signing import Desk

DESK = Desk(destinations=(destination(preliminary=True),), render=render)


class Ward:
    """One drafted report and the people around it."""

    def __init__(self, database: Database, folder: Path, sentences: tuple[Sentence, ...] = SENTENCES) -> None:
        self.database = database
        self.there = department(database, folder)
        self.study_id = self.there.drafted(sentences=sentences, slices=2)
        self.users = {role: self.there.user(role.value, role) for role in Role}
        with database.read() as session:
            self.report_id = session.scalars(sa.select(Report.id)).one()

    def reader(self, role: Role = Role.RADIOLOGIST) -> Reader:
        return Reader(self.users[role].id)

    def proof(self, role: Role = Role.RADIOLOGIST, **changes: Any) -> str:
        """A fresh proof of identity."""
        with self.database.write() as session:
            row = Authentication(
                id=new_id(),
                **{
                    "user_id": self.users[role].id,
                    "study_id": self.study_id,
                    "method": AuthenticationMethod.PASSWORD,
                    "at": studies.now(),
                    **changes,
                },
            )
            session.add(row)
            session.flush()
            return row.id

    def judge_all(self, assessment: Assessment = Assessment.ACCEPTED) -> str:
        """Judges every sentence; returns what an act on this text names."""
        with self.database.write() as session:
            copy = editing.open_copy(session, self.report_id, self.reader())
            for row in list(copy.sentences):
                editing.change(session, row.id, self.reader(), revision=row.revision, assessment=assessment)
            return seen.full_revision(copy)

    def do(self, act: Any, *arguments: Any, desk: Desk = DESK, role: Role = Role.RADIOLOGIST, **named: Any) -> Any:
        """One act in one transaction."""
        with self.database.write() as session:
            return act(session, self.report_id, self.reader(role), desk, *arguments, **named)

    def signed(self) -> None:
        self.do(signing.sign, revision=self.judge_all(), authentication_id=self.proof())

    def version(self) -> int:
        """The number of the version that stands."""
        with self.database.read() as session:
            return editing.of_record(session, self.report_id).number

    def state(self) -> ReportState:
        with self.database.read() as session:
            return session.get_one(Report, self.report_id).state

    def messages(self) -> list[tuple[str, bool]]:
        with self.database.read() as session:
            rows = session.scalars(sa.select(Message).order_by(Message.id)).all()
            return [(row.result_status, row.signature_version_id is not None) for row in rows]


def redraft(ward: Ward) -> None:
    """The machine drafts the study again."""
    with ward.database.write() as session:
        studies.requeue(session, ward.study_id)
    prepare = claimed(ward.database, Stage.PREPARE)
    with ward.database.write() as session:
        studies.store_prepared(session, prepare, {}, "inputs/x")
    claim = claimed(ward.database, Stage.DRAFT)
    with ward.database.write() as session:
        study = studies.held(session, claim)
        assert study is not None
        reports.add_draft(session, study, draft("The machine wrote this later."))
        studies.mark_drafted(session, study, claim)
