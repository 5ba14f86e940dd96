"""The acts of a radiologist on a report: save as preliminary, sign, correct, addend, reject, retract.

    ai_draft ─▶ preliminary ─┬─▶ final ─▶ corrected ─▶ addended      (corrected inside the window, addended after it)
        │            │       │      └──────────┴───────────┴──▶ retracted
        ├────────────┼───────┘
        └────────────┴──▶ rejected ─▶ ai_draft      (where a draft was made since: `redrafts.start_over`)

Each act checks the state it leaves, the role, and what it needs of proof; then version, signature, messages and audit are
written in the caller's one transaction. Signing uses up one `Authentication`: a proof that the person who signs was there
a moment ago, for the report of this very study. There is no other way to a signature; a trigger in the database refuses
one without.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import sqlalchemy as sa
from sqlalchemy.orm import Session

from worker.core import audit, changed_words, checks, communications, editing, outbox, records, reports, seen, studies
from worker.core.editing import Reader
from worker.core.errors import ReportError, SignatureError, StateError
from worker.core.records import REASON_LENGTH, AuthorKind, ReportVersion, Signature, User, new_id
from worker.core.report import SIGNED_STATES, Assessment, Origin, ReportState, Section, Sentence
from worker.core.review_records import Authentication, WorkingCopy
from worker.core.settings import Destination, Settings


@dataclass(frozen=True)
class Desk:
    """What the acts need of the settings: where messages go, who writes them, how long a proof and a window last."""

    destinations: tuple[Destination, ...]
    render: outbox.Render
    default_authority: str = ""
    procedure_codes: Mapping[str, str] = field(default_factory=dict)
    fresh_seconds: float = 120.0
    correction_minutes: float = 60.0

    @classmethod
    def from_settings(cls, settings: Settings, render: outbox.Render) -> "Desk":
        """What the settings say; `render` is the writer of the messages."""
        review, hl7 = settings.review, settings.hl7
        return cls(
            destinations=hl7.destinations,
            render=render,
            default_authority=hl7.assigning_authority,
            procedure_codes=hl7.procedure_codes,
            fresh_seconds=review.fresh_seconds,
            correction_minutes=review.correction_minutes,
        )


@dataclass(frozen=True)
class Done:
    """What an act made."""

    version: ReportVersion
    destinations: tuple[str, ...]  # that got a message: ring them after the commit
    unwritable: dict[str, str]  # destinations whose message could not be written, and why


def sign(
    session: Session, report_id: str, reader: Reader, desk: Desk, *, revision: str, authentication_id: str
) -> Done:
    """ai_draft or preliminary → final: signs the working copy as the reader saw it (`seen.full_revision`).

    Raises `StateError` when the state does not allow it, the copy changed meanwhile or a check blocks, `AccessError` for
    anyone but a radiologist, `SignatureError` without a fresh proof of identity of this very person.
    """
    user, report = _at_the_desk(session, report_id, reader)
    _require(report, {ReportState.AI_DRAFT, ReportState.PRELIMINARY}, "signed")
    copy = _copy_as_seen(session, report, user, revision)
    _require_unblocked(session, report, copy)
    return _sign_copy(session, report, user, reader, desk, copy, ReportState.FINAL, authentication_id)


def correct(
    session: Session, report_id: str, reader: Reader, desk: Desk, *, revision: str, authentication_id: str
) -> Done:
    """Final or corrected → corrected: signs the corrected working copy, inside the window. Raises as `sign`."""
    user, report = _at_the_desk(session, report_id, reader)
    _require(report, {ReportState.FINAL, ReportState.CORRECTED}, "corrected")
    if not correctable(session, report, desk):
        raise StateError("the time for corrections is over; write an addendum")
    copy = _copy_as_seen(session, report, user, revision)
    _require_unblocked(session, report, copy)
    return _sign_copy(session, report, user, reader, desk, copy, ReportState.CORRECTED, authentication_id)


def begin_correction(session: Session, report_id: str, reader: Reader, desk: Desk) -> WorkingCopy:
    """Opens a working copy of the signed text, inside the window; the signed text stands until `correct`."""
    user, report = _at_the_desk(session, report_id, reader)
    _require(report, {ReportState.FINAL, ReportState.CORRECTED}, "corrected")
    if not correctable(session, report, desk):
        raise StateError("the time for corrections is over; write an addendum")
    copy = editing.current_copy(session, report_id)
    if copy is None:
        copy = editing.begin(session, editing.of_record(session, report_id))
        audit.append(session, "begin_correction", actor=user.username, study_id=report.study_id, origin=reader.origin)
    return copy


def leave_correction(session: Session, report_id: str, reader: Reader, *, revision: str) -> None:
    """Puts a correction aside as its reader saw it: it stays on record, the signed text stands. Raises `StateError`."""
    user, report = _at_the_desk(session, report_id, reader)
    _require(report, SIGNED_STATES, "left as it was signed")
    seen.text_under_work(session, report_id, revision).closed_at = studies.now()
    audit.append(session, "leave_correction", actor=user.username, study_id=report.study_id, origin=reader.origin)


def addend(
    session: Session,
    report_id: str,
    reader: Reader,
    desk: Desk,
    *,
    sentences: Sequence[str],
    version: int,
    revision: str = "",
    authentication_id: str,
) -> Done:
    """final, corrected or addended → addended: the signed text that the reader saw stands, a signed addendum follows.

    `version` is its number, `revision` the text of a correction that lies beside it unsigned. Raises as `sign`.
    """
    user, report = _at_the_desk(session, report_id, reader)
    _require(report, SIGNED_STATES, "addended")
    lines = [line for line in map(editing.one_line, sentences) if line]
    if not lines:
        raise ReportError("the addendum has no text")
    addendum = [
        Sentence(Section.ADDENDUM, line, origin=Origin.PERSON, assessment=Assessment.ACCEPTED) for line in lines
    ]
    problems = [
        problem
        for problem in checks.blocking(
            addendum,
            patient_sex=report.study.patient_sex,
            communicated=communications.covers_addendum(session, report),
        )
        if problem.rule is not checks.Rule.EMPTY_IMPRESSION  # the signed text has its own
    ]
    if problems:
        raise StateError("; ".join(problem.title for problem in problems))
    signed = _signed_as_seen(session, report, desk, version, revision)
    added = _add_version(
        session, report, user, ReportState.ADDENDED, [*map(reports.to_sentence, signed.sentences), *addendum]
    )
    for old, new in zip(signed.sentences, added.sentences, strict=False):
        new.assessed_by, new.assessed_at, new.evidence = old.assessed_by, old.assessed_at, old.evidence
    _attach_signature(session, added, user, desk, authentication_id)
    return _finish(session, report, added, user, reader, desk, "addend")


def save_preliminary(session: Session, report_id: str, reader: Reader, desk: Desk, *, revision: str) -> Done:
    """ai_draft or preliminary → preliminary: the reader says that they read it; every sentence must have been judged."""
    user, report = _at_the_desk(session, report_id, reader)
    _require(report, {ReportState.AI_DRAFT, ReportState.PRELIMINARY}, "saved as preliminary")
    copy = _copy_as_seen(session, report, user, revision)
    values = _sentences(copy)
    untouched = [p for p in checks.blocking(values) if p.rule is checks.Rule.UNTOUCHED]
    if untouched:
        raise StateError(f"{len(untouched)} sentences are not yet accepted, edited or rejected")
    version = _version_of_copy(session, report, user, copy, ReportState.PRELIMINARY)
    return _finish(session, report, version, user, reader, desk, "save_preliminary")


def reject(session: Session, report_id: str, reader: Reader, desk: Desk, *, revision: str, reason: str) -> Done:
    """ai_draft or preliminary → rejected as the reader saw it, with their reason; the text stays on record."""
    user, report = _at_the_desk(session, report_id, reader)
    _require(report, {ReportState.AI_DRAFT, ReportState.PRELIMINARY}, "rejected")
    copy = seen.text_under_work(session, report_id, revision)
    version = _version_of_copy(session, report, user, copy, ReportState.REJECTED)
    copy.closed_at, copy.version_id = studies.now(), version.id
    version.reason = _reason(reason)
    return _finish(session, report, version, user, reader, desk, "reject")


def retract(
    session: Session,
    report_id: str,
    reader: Reader,
    desk: Desk,
    *,
    reason: str,
    version: int,
    revision: str = "",
    authentication_id: str,
) -> Done:
    """final, corrected or addended → retracted, with a reason; it takes a fresh proof of identity, as a signature does.

    `version` and `revision` name what the reader saw, as in `addend`.
    """
    user, report = _at_the_desk(session, report_id, reader)
    _require(report, SIGNED_STATES, "retracted")
    signed = _signed_as_seen(session, report, desk, version, revision)
    added = _add_version(session, report, user, ReportState.RETRACTED, list(map(reports.to_sentence, signed.sentences)))
    added.reason = _reason(reason)
    _use_proof(session, added, user, desk, authentication_id)
    return _finish(session, report, added, user, reader, desk, "retract")


def correctable(session: Session, report: records.Report, desk: Desk) -> bool:
    """Whether the first signature is younger than the window for corrections."""
    first = session.scalar(
        sa.select(sa.func.min(Signature.signed_at))
        .join(ReportVersion, Signature.version_id == ReportVersion.id)
        .where(ReportVersion.report_id == report.id)
    )
    return first is not None and studies.now() - first <= timedelta(minutes=desk.correction_minutes)


def problems(session: Session, report: records.Report, copy: WorkingCopy) -> tuple[checks.Problem, ...]:
    """What blocks the signature on this copy; an index counts in `editing.written(copy)`."""
    sentences = _sentences(copy)
    return checks.blocking(
        sentences,
        patient_sex=report.study.patient_sex,
        communicated=communications.covers_copy(session, copy, sentences),
    )


def _at_the_desk(session: Session, report_id: str, reader: Reader) -> tuple[User, records.Report]:
    user = editing.radiologist(session, reader)
    return user, editing.locked_report(session, report_id)


def _require(report: records.Report, states: frozenset[ReportState] | set[ReportState], act: str) -> None:
    if report.state not in states:
        raise StateError(f"the report is {report.state}; it cannot be {act}")


def _copy_as_seen(session: Session, report: records.Report, user: User, revision: str) -> WorkingCopy:
    copy = seen.text_under_work(session, report.id, revision)
    if editing.conflicts(session, copy.id, user.id):  # the page still shows the reader's own words there
        raise StateError(
            "a sentence was changed elsewhere while you wrote; take your words or leave the others, then sign"
        )
    return copy


def _signed_as_seen(session: Session, report: records.Report, desk: Desk, version: int, revision: str) -> ReportVersion:
    """The signed text as its reader saw it; what a correction had changed when its time was over is put aside."""
    open_to_correction = correctable(session, report, desk)
    signed = seen.signed_text(session, report.id, version, revision, correctable=open_to_correction)
    copy = editing.current_copy(session, report.id)
    if copy is not None:
        copy.closed_at = studies.now()
    return signed


def _sentences(copy: WorkingCopy) -> list[Sentence]:
    return [reports.to_sentence(row) for row in editing.written(copy)]


def _require_unblocked(session: Session, report: records.Report, copy: WorkingCopy) -> None:
    found = problems(session, report, copy)
    if found:
        titles = dict.fromkeys(checks.TITLES[problem.rule] for problem in found)
        raise StateError("the report cannot be signed yet: " + "; ".join(titles))


def _sign_copy(
    session: Session,
    report: records.Report,
    user: User,
    reader: Reader,
    desk: Desk,
    copy: WorkingCopy,
    state: ReportState,
    authentication_id: str,
) -> Done:
    version = _version_of_copy(session, report, user, copy, state)
    _attach_signature(session, version, user, desk, authentication_id)
    copy.closed_at, copy.version_id = studies.now(), version.id
    if state is ReportState.FINAL:
        copy.words_drafted, copy.words_changed = changed_words.counts(copy)
    return _finish(session, report, version, user, reader, desk, "sign" if state is ReportState.FINAL else "correct")


def _version_of_copy(
    session: Session, report: records.Report, user: User, copy: WorkingCopy, state: ReportState
) -> ReportVersion:
    rows = editing.written(copy)
    version = _add_version(session, report, user, state, [reports.to_sentence(row) for row in rows], copy.base)
    for row, sentence in zip(rows, version.sentences, strict=True):
        sentence.assessed_by, sentence.assessed_at = row.assessed_by, row.assessed_at
        sentence.evidence = row.source.evidence if row.source is not None else None
    session.flush()
    return version


def _add_version(
    session: Session,
    report: records.Report,
    user: User,
    state: ReportState,
    sentences: Sequence[Sentence],
    base: ReportVersion | None = None,
) -> ReportVersion:
    base = base or editing.of_record(session, report.id)
    version = reports.add_version(
        session,
        report,
        state=state,
        sentences=sentences,
        study_revision=base.study_revision,
        author_kind=AuthorKind.PERSON,
        author_id=user.id,
    )
    version.provenance = base.provenance  # while machine text survives, the message names the model
    report.state = state
    session.flush()
    return version


def _attach_signature(session: Session, version: ReportVersion, user: User, desk: Desk, authentication_id: str) -> None:
    _use_proof(session, version, user, desk, authentication_id)
    session.add(
        Signature(
            id=new_id(),
            version_id=version.id,
            text_sha256=version.text_sha256,
            user_id=user.id,
            signed_at=studies.now(),
        )
    )
    session.flush()
    session.refresh(version, ["signature"])


def _use_proof(session: Session, version: ReportVersion, user: User, desk: Desk, authentication_id: str) -> None:
    """Uses up a proof of identity; raises `SignatureError` for one that is used, old, another person's or study's."""
    proof = session.get(Authentication, authentication_id, with_for_update=True, populate_existing=True)
    if (
        proof is None
        or proof.user_id != user.id
        or proof.study_id != version.report.study_id
        or proof.used_at is not None
    ):
        raise SignatureError("a signature needs a new proof of your identity; enter your password again")
    age = studies.now() - proof.at
    if not timedelta(0) <= age <= timedelta(seconds=desk.fresh_seconds):
        raise SignatureError("the proof of your identity is too old; enter your password again")
    proof.used_at = studies.now()
    proof.version_id = version.id
    session.flush()


def _finish(
    session: Session,
    report: records.Report,
    version: ReportVersion,
    user: User,
    reader: Reader,
    desk: Desk,
    act: str,
) -> Done:
    """Messages and audit of an act. A message that cannot be written stops neither the act nor the other messages."""
    session.flush()
    written, refused = outbox.enqueue_each(
        session,
        version,
        desk.destinations,
        desk.render,
        default_authority=desk.default_authority,
        procedure_codes=desk.procedure_codes,
    )
    unwritable = {name: str(error) for name, error in refused.items()}
    audit.append(
        session,
        act,
        actor=user.username,
        study_id=report.study_id,
        origin=reader.origin,
        version=version.number,
        state=version.state.value,
        text_sha256=version.text_sha256,
        messages=written,
        unwritable=unwritable,
    )
    return Done(version, tuple(written), unwritable)


def _reason(text: str) -> str:
    line = " ".join(text.split())
    if not line:
        raise ReportError("a reason is needed")
    if len(line) > REASON_LENGTH:
        raise ReportError(f"a reason has at most {REASON_LENGTH} characters")
    return line
