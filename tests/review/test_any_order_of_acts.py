"""Acts in any order, by anybody, with any proof: nothing signs but a person, and nothing final leaves unsigned."""

import contextlib
from datetime import timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.core.builders import received
from tests.review.ward import DESK, Ward, redraft
from worker.core import outbox, reports, seen, signing, studies
from worker.core.database import Database
from worker.core.errors import DeliveryRefusedError, Mu2Error
from worker.core.records import Message, MessageState, ReportVersion, Role, Signature, User, new_id
from worker.core.report import SIGNED_STATES, Assessment, canonical_text, text_sha256
from worker.core.review_records import Authentication

ANYBODY = st.sampled_from([Role.RADIOLOGIST] * 6 + [Role.ADMIN, Role.VIEWER])


class AnyOrder(RuleBasedStateMachine):
    """Acts in any order, by anybody, with any proof: no F or C without a radiologist's signature on the very text."""

    template: Path
    folder: Path
    count = 0
    signatures = 0  # seen in all runs: a run that signs nothing proves nothing

    @initialize()
    def open(self) -> None:
        type(self).count += 1
        path = self.folder / f"{self.count}.sqlite"
        path.write_bytes(self.template.read_bytes())
        self.database = Database(f"sqlite:///{path}")
        self.ward = Ward(self.database, self.folder / str(self.count))
        stale = self.ward.proof(at=studies.now() - timedelta(seconds=500))
        self.elsewhere = received(self.database)
        foreign = self.ward.proof(study_id=self.elsewhere)
        self.proofs = [new_id(), stale, foreign, self.ward.proof(Role.ADMIN), self.ward.proof()]
        self.revision = self.ward.judge_all()

    def teardown(self) -> None:
        if hasattr(self, "database"):
            self.database.close()

    def attempt(self, act: Any, role: Role, **named: Any) -> None:
        with contextlib.suppress(Mu2Error):
            self.ward.do(act, role=role, **named)

    @rule(role=ANYBODY, age=st.sampled_from([0, 500]))
    def prove(self, role: Role, age: int) -> None:
        self.proofs.append(self.ward.proof(role, at=studies.now() - timedelta(seconds=age)))

    @rule(assessment=st.sampled_from([Assessment.ACCEPTED, Assessment.REJECTED, Assessment.UNTOUCHED]))
    def judge_some(self, assessment: Assessment) -> None:
        self.judge(assessment)

    def judge(self, assessment: Assessment) -> None:
        with contextlib.suppress(Mu2Error):
            self.revision = self.ward.judge_all(assessment)

    @rule(act=st.sampled_from([signing.sign, signing.correct]), role=ANYBODY, data=st.data())
    def sign(self, act: Any, role: Role, data: Any) -> None:
        proof = data.draw(st.sampled_from(self.proofs))
        self.attempt(act, role, revision=self.revision, authentication_id=proof)

    @rule(kind=st.sampled_from(["fresh", "fresh", "stale", "of somebody else", "for another study", "invented"]))
    def judge_and_sign(self, kind: str) -> None:
        self.judge(Assessment.ACCEPTED)
        proof = {
            "fresh": self.ward.proof,
            "stale": lambda: self.ward.proof(at=studies.now() - timedelta(seconds=500)),
            "of somebody else": lambda: self.ward.proof(Role.ADMIN),
            "for another study": lambda: self.ward.proof(study_id=self.elsewhere),
            "invented": new_id,
        }[kind]()
        self.attempt(signing.sign, Role.RADIOLOGIST, revision=self.revision, authentication_id=proof)

    @rule(role=ANYBODY, data=st.data())
    def addend(self, role: Role, data: Any) -> None:
        proof = data.draw(st.sampled_from(self.proofs))
        self.attempt(signing.addend, role, sentences=["More."], version=self.ward.version(), authentication_id=proof)

    @rule(role=ANYBODY, data=st.data())
    def retract(self, role: Role, data: Any) -> None:
        proof = data.draw(st.sampled_from(self.proofs))
        self.attempt(signing.retract, role, reason="wrong", version=self.ward.version(), authentication_id=proof)

    @rule(role=ANYBODY)
    def save_preliminary(self, role: Role) -> None:
        self.attempt(signing.save_preliminary, role, revision=self.revision)

    @rule(role=ANYBODY)
    def reject(self, role: Role) -> None:
        self.attempt(signing.reject, role, revision=self.revision, reason="wrong")

    @rule()
    def refuse_and_renew(self) -> None:
        with contextlib.suppress(Mu2Error), self.database.write() as session:
            claim = outbox.claim(session, "ris", 60)
            if claim is not None:
                outbox.refuse(session, claim, DeliveryRefusedError("AR"), "AR")
                outbox.renew(session, claim.message_id, DESK.destinations, DESK.render)

    @rule()
    def draft_again(self) -> None:
        redraft(self.ward)

    @rule()
    def correct_begins(self) -> None:
        try:
            with self.database.write() as session:
                copy = signing.begin_correction(session, self.ward.report_id, self.ward.reader(), DESK)
                self.revision = seen.full_revision(copy)
        except Mu2Error:
            pass

    @invariant()
    def nothing_final_without_a_persons_signature(self) -> None:
        if not hasattr(self, "ward"):
            return
        with self.database.read() as session:
            for message in session.scalars(sa.select(Message).where(Message.result_status.in_(["F", "C"]))):
                signature = session.scalars(
                    sa.select(Signature).where(Signature.version_id == message.signature_version_id)
                ).one()
                version = session.get_one(ReportVersion, message.version_id)
                text = canonical_text(map(reports.to_sentence, version.sentences))
                assert text_sha256(text) == message.text_sha256 == signature.text_sha256
            for signature in session.scalars(sa.select(Signature)):
                type(self).signatures += 1
                proof = session.scalars(
                    sa.select(Authentication).where(Authentication.version_id == signature.version_id)
                ).one()
                assert (proof.user_id, proof.study_id) == (signature.user_id, self.ward.study_id)
                assert session.get_one(User, signature.user_id).role is Role.RADIOLOGIST
                assert signature.signed_at - proof.at <= timedelta(seconds=DESK.fresh_seconds)
            for version in session.scalars(sa.select(ReportVersion)):
                assert (version.signature is not None) == (version.state in SIGNED_STATES)
            live = sa.select(Message.version_id, Message.destination).where(Message.state != MessageState.SUPERSEDED)
            rows = session.execute(live).all()
            assert len(rows) == len(set(rows))


def test_no_order_of_acts_lets_a_final_text_leave_unsigned(sqlite_template: Path, tmp_path: Path) -> None:
    AnyOrder.template, AnyOrder.folder = sqlite_template, tmp_path
    case = AnyOrder.TestCase
    case.settings = settings(
        max_examples=20,
        stateful_step_count=14,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    case().runTest()
    assert AnyOrder.signatures > 5
