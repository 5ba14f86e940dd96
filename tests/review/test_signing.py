"""The acts of a radiologist: what each leaves, needs and writes; and that nothing signs but a person."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from tests.core.builders import destination, received, render
from tests.review.builders import PASSWORD, SENTENCES
from tests.review.ward import DESK, Ward, redraft
from worker.core import accounts, audit, editing, reports, seen, signing, studies
from worker.core.database import Database
from worker.core.errors import AccessError, ReportError, SignatureError, StateError
from worker.core.records import Report, ReportVersion, Role, Signature, User, new_id
from worker.core.report import Assessment, ReportState, Section, canonical_text, text_sha256
from worker.core.review_records import Authentication, WorkingCopy
from worker.core.signing import Desk


@pytest.fixture
def ward(database: Database, tmp_path: Path) -> Ward:
    """On SQLite and on PostgreSQL."""
    return Ward(database, tmp_path)


@pytest.fixture
def desk_ward(sqlite_database: Database, tmp_path: Path) -> Ward:
    """On SQLite, where the database makes no difference."""
    return Ward(sqlite_database, tmp_path)


def test_signing_makes_a_final_version_its_signature_and_one_message_in_one_transaction(ward: Ward) -> None:
    ward.signed()
    assert ward.state() is ReportState.FINAL
    assert ward.messages() == [("F", True)]
    with ward.database.read() as session:
        version = editing.of_record(session, ward.report_id)
        text = canonical_text(map(reports.to_sentence, version.sentences))
        assert version.signature is not None
        assert version.signature.text_sha256 == text_sha256(text)
        assert audit.verify(session).events > 0
        assert session.scalars(sa.select(WorkingCopy.closed_at)).one() is not None


def signature(version: ReportVersion, user: User) -> Signature:
    """A row as it would be written past the code that signs."""
    return Signature(
        id=new_id(),
        version_id=version.id,
        text_sha256=version.text_sha256,
        user_id=user.id,
        signed_at=studies.now(),
    )


def test_database_refuses_a_signature_without_a_proof_of_the_signer(ward: Ward) -> None:
    with ward.database.read() as session:
        version = editing.of_record(session, ward.report_id)
    with pytest.raises(DBAPIError, match="proof of identity"), ward.database.write() as session:
        session.add(signature(version, ward.users[Role.RADIOLOGIST]))


def test_database_refuses_the_signature_of_an_administrator_whatever_they_proved(ward: Ward) -> None:
    with ward.database.read() as session:
        version = editing.of_record(session, ward.report_id)
    ward.proof(Role.ADMIN, used_at=studies.now(), version_id=version.id)
    with pytest.raises(DBAPIError, match="proof of identity"), ward.database.write() as session:
        session.add(signature(version, ward.users[Role.ADMIN]))


def test_database_refuses_a_signature_whose_proof_was_made_for_another_study(ward: Ward) -> None:
    with ward.database.read() as session:
        version = editing.of_record(session, ward.report_id)
    ward.proof(study_id=received(ward.database), used_at=studies.now(), version_id=version.id)
    with pytest.raises(DBAPIError, match="proof of identity"), ward.database.write() as session:
        session.add(signature(version, ward.users[Role.RADIOLOGIST]))


def test_used_proof_cannot_be_changed(ward: Ward) -> None:
    ward.signed()
    with pytest.raises(DBAPIError, match="proof of identity"), ward.database.write() as session:
        session.execute(sa.update(Authentication).values(used_at=None, version_id=None))


def test_nothing_is_signed_when_a_message_cannot_be_kept(desk_ward: Ward) -> None:
    def broken(*_: Any) -> bytes:
        raise RuntimeError("no disk")

    revision = desk_ward.judge_all()
    with pytest.raises(RuntimeError):
        desk_ward.do(
            signing.sign, desk=Desk((destination(),), broken), revision=revision, authentication_id=desk_ward.proof()
        )
    assert desk_ward.state() is ReportState.AI_DRAFT
    with desk_ward.database.read() as session:
        assert session.scalars(sa.select(Signature)).all() == []


def test_two_requests_to_sign_at_once_make_one_signature_and_one_message(ward: Ward) -> None:
    revision = ward.judge_all()
    proofs = [ward.proof() for _ in range(4)]
    together = threading.Barrier(len(proofs))

    def sign(proof: str) -> str:
        together.wait(30)
        try:
            ward.database.run(
                lambda session: signing.sign(
                    session, ward.report_id, ward.reader(), DESK, revision=revision, authentication_id=proof
                )
            )
        except StateError:
            return "refused"
        return "signed"

    with ThreadPoolExecutor(len(proofs)) as pool:
        told = sorted(pool.map(sign, proofs))
    assert told == ["refused", "refused", "refused", "signed"]
    assert ward.messages() == [("F", True)]
    with ward.database.read() as session:
        assert len(session.scalars(sa.select(Signature)).all()) == 1
        used = session.scalars(sa.select(Authentication).where(Authentication.used_at.is_not(None))).all()
        assert len(used) == 1  # the proofs of the refused are not spent
        audit.verify(session)


@pytest.mark.parametrize(("seconds", "open"), [(-1, True), (0, True), (1, False)])
def test_window_for_corrections_ends_to_the_second(
    desk_ward: Ward, monkeypatch: pytest.MonkeyPatch, seconds: int, open: bool
) -> None:
    desk_ward.signed()
    with desk_ward.database.read() as session:
        signed_at = session.scalars(sa.select(Signature.signed_at)).one()
        at = signed_at + timedelta(minutes=DESK.correction_minutes, seconds=seconds)
        monkeypatch.setattr(studies, "now", lambda: at)
        assert signing.correctable(session, session.get_one(Report, desk_ward.report_id), DESK) is open


def test_message_that_cannot_be_written_does_not_stop_the_signature(desk_ward: Ward) -> None:
    def picky(*_: Any) -> bytes:
        raise ReportError("no patient id")

    revision = desk_ward.judge_all()
    done = desk_ward.do(
        signing.sign, desk=Desk((destination(),), picky), revision=revision, authentication_id=desk_ward.proof()
    )
    assert done.unwritable == {"ris": "no patient id"}
    assert desk_ward.state() is ReportState.FINAL


@pytest.mark.parametrize("role", [Role.ADMIN, Role.VIEWER, Role.AUDITOR])
def test_only_a_radiologist_signs(desk_ward: Ward, role: Role) -> None:
    revision = desk_ward.judge_all()
    with pytest.raises(AccessError):
        desk_ward.do(signing.sign, role=role, revision=revision, authentication_id=desk_ward.proof(role))


def test_proof_signs_once(desk_ward: Ward) -> None:
    proof = desk_ward.proof()
    desk_ward.do(signing.sign, revision=desk_ward.judge_all(), authentication_id=proof)
    with pytest.raises(SignatureError):
        desk_ward.do(signing.addend, sentences=["More."], version=desk_ward.version(), authentication_id=proof)


def test_old_proof_does_not_sign(desk_ward: Ward) -> None:
    proof = desk_ward.proof(at=studies.now() - timedelta(seconds=121))
    with pytest.raises(SignatureError, match="too old"):
        desk_ward.do(signing.sign, revision=desk_ward.judge_all(), authentication_id=proof)


def test_proof_of_somebody_else_does_not_sign(desk_ward: Ward) -> None:
    proof = desk_ward.proof(Role.ADMIN)
    with pytest.raises(SignatureError):
        desk_ward.do(signing.sign, revision=desk_ward.judge_all(), authentication_id=proof)


def test_password_typed_for_another_study_does_not_sign(desk_ward: Ward) -> None:
    proof = accounts.prove_by_password(
        desk_ward.database,
        desk_ward.users[Role.RADIOLOGIST].id,
        PASSWORD,
        accounts.Lockout(5, 15),
        received(desk_ward.database),
    )
    with pytest.raises(SignatureError):
        desk_ward.do(signing.sign, revision=desk_ward.judge_all(), authentication_id=proof)
    desk_ward.signed()
    with pytest.raises(SignatureError):
        desk_ward.do(signing.retract, reason="wrong", version=desk_ward.version(), authentication_id=proof)


def test_text_that_changed_since_it_was_shown_is_not_signed(desk_ward: Ward) -> None:
    revision = desk_ward.judge_all()
    desk_ward.judge_all(Assessment.REJECTED)
    with pytest.raises(StateError, match="changed since"):
        desk_ward.do(signing.sign, revision=revision, authentication_id=desk_ward.proof())


def test_untouched_sentence_is_not_signed(desk_ward: Ward) -> None:
    with desk_ward.database.write() as session:
        revision = seen.full_revision(editing.open_copy(session, desk_ward.report_id, desk_ward.reader()))
    with pytest.raises(StateError, match="Not yet judged"):
        desk_ward.do(signing.sign, revision=revision, authentication_id=desk_ward.proof())


def test_preliminary_takes_an_explicit_act_and_no_signature(desk_ward: Ward) -> None:
    revision = desk_ward.judge_all()
    assert desk_ward.state() is ReportState.AI_DRAFT  # judging, which the page saves by itself, changed nothing
    desk_ward.do(signing.save_preliminary, revision=revision)
    assert desk_ward.state() is ReportState.PRELIMINARY
    assert desk_ward.messages() == [("P", False)]


def test_correction_inside_the_window_replaces_the_text_and_keeps_the_first(desk_ward: Ward) -> None:
    desk_ward.signed()
    with desk_ward.database.write() as session:
        copy = signing.begin_correction(session, desk_ward.report_id, desk_ward.reader(), DESK)
        row = copy.sentences[1]
        editing.change(
            session, row.id, desk_ward.reader(), revision=row.revision, text="A 13 mm cyst in the left kidney."
        )
        revision = seen.full_revision(copy)
    assert desk_ward.state() is ReportState.FINAL
    desk_ward.do(signing.correct, revision=revision, authentication_id=desk_ward.proof())
    assert desk_ward.state() is ReportState.CORRECTED
    assert [status for status, _ in desk_ward.messages()] == ["F", "C"]
    with desk_ward.database.read() as session:
        states = session.scalars(sa.select(ReportVersion.state).order_by(ReportVersion.number)).all()
        assert states == [ReportState.AI_DRAFT, ReportState.FINAL, ReportState.CORRECTED]


def test_after_the_window_only_an_addendum_is_possible(desk_ward: Ward) -> None:
    desk_ward.signed()
    late = Desk(DESK.destinations, render, correction_minutes=-1)
    with pytest.raises(StateError, match="addendum"), desk_ward.database.write() as session:
        signing.begin_correction(session, desk_ward.report_id, desk_ward.reader(), late)
    desk_ward.do(
        signing.addend,
        desk=late,
        sentences=["Compared with 2024."],
        version=desk_ward.version(),
        authentication_id=desk_ward.proof(),
    )
    assert desk_ward.state() is ReportState.ADDENDED
    with desk_ward.database.read() as session:
        version = editing.of_record(session, desk_ward.report_id)
        assert [s.text for s in version.sentences if s.section is Section.ADDENDUM] == ["Compared with 2024."]
        assert len(version.sentences) == len(SENTENCES) + 1


def test_rejection_needs_a_reason_and_leaves_nothing_signed(desk_ward: Ward) -> None:
    revision = desk_ward.judge_all()
    with pytest.raises(ReportError):
        desk_ward.do(signing.reject, revision=revision, reason="  ")
    desk_ward.do(signing.reject, revision=revision, reason="Wrong patient position")
    assert desk_ward.state() is ReportState.REJECTED
    with desk_ward.database.read() as session:
        value = reports.to_value(session, editing.of_record(session, desk_ward.report_id).id)
    assert (value.reason, value.signer) == ("Wrong patient position", None)
    assert value.reader is not None and value.reader.identifier == "radiologist"


def test_retraction_withdraws_the_signed_text_under_its_old_signature(desk_ward: Ward) -> None:
    desk_ward.signed()
    desk_ward.do(
        signing.retract, reason="Wrong study", version=desk_ward.version(), authentication_id=desk_ward.proof()
    )
    assert desk_ward.state() is ReportState.RETRACTED
    assert desk_ward.messages()[-1] == ("C", True)
    with desk_ward.database.read() as session:
        value = reports.to_value(session, editing.of_record(session, desk_ward.report_id).id)
    assert value.signer is not None


def test_drafting_again_takes_nothing_away_that_was_signed(desk_ward: Ward) -> None:
    desk_ward.signed()
    with desk_ward.database.read() as session:
        before = editing.of_record(session, desk_ward.report_id).id
    redraft(desk_ward)
    assert desk_ward.state() is ReportState.FINAL
    with desk_ward.database.read() as session:
        assert editing.of_record(session, desk_ward.report_id).id == before


def test_password_makes_the_proof_and_a_wrong_one_does_not(desk_ward: Ward) -> None:
    lockout = accounts.Lockout(5, 15)
    user = desk_ward.users[Role.RADIOLOGIST]
    with pytest.raises(AccessError):
        accounts.prove_by_password(desk_ward.database, user.id, "not the password", lockout, desk_ward.study_id)
    proof = accounts.prove_by_password(desk_ward.database, user.id, PASSWORD, lockout, desk_ward.study_id)
    desk_ward.do(signing.sign, revision=desk_ward.judge_all(), authentication_id=proof)
    assert desk_ward.state() is ReportState.FINAL
