"""The acts on a report: sign, save as preliminary, correct, addend, reject, retract, draft again.

Signing asks for the password again, in the same request; under OIDC the provider is asked first (`oidc.prove`) and its
fresh answer waits in the session for one act on this study.
"""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Form
from fastapi.responses import Response
from sqlalchemy.orm import Session

from worker import queues
from worker.core import accounts, audit, editing, signing, studies, worklist
from worker.core.errors import AccessError, ReportError, SignatureError, StateError
from worker.core.report import ReportState
from worker.core.signing import Done
from worker.review.access import Login, OfficeOf, RadiologistLogin
from worker.review.desk import Office
from worker.review.sentences import Revision
from worker.review.study import find, find_report, report_side

router = APIRouter(prefix="/studies/{study_id}")
Password = Annotated[str, Form(max_length=accounts.LONGEST_PASSWORD)]
Reason = Annotated[str, Form(max_length=2000)]
Version = Annotated[int, Form(ge=1)]


@router.post("/sign")
def sign(
    study_id: str,
    found: OfficeOf,
    login: RadiologistLogin,
    after: BackgroundTasks,
    revision: Revision,
    password: Password = "",
) -> Response:
    """Signs the text as it was shown; needs a proof of identity made for this very act."""

    def act(session: Session, proof: str) -> Done:
        report = find_report(session, study_id)
        return signing.sign(session, report.id, login.reader, found.desk, revision=revision, authentication_id=proof)

    return _proven(found, login, study_id, after, password, act, "Signed.")


@router.post("/sign-correction")
def sign_correction(
    study_id: str,
    found: OfficeOf,
    login: RadiologistLogin,
    after: BackgroundTasks,
    revision: Revision,
    password: Password = "",
) -> Response:
    """Signs the correction of a signed text as it was shown."""

    def act(session: Session, proof: str) -> Done:
        report = find_report(session, study_id)
        return signing.correct(session, report.id, login.reader, found.desk, revision=revision, authentication_id=proof)

    return _proven(found, login, study_id, after, password, act, "The correction is signed.")


@router.post("/addend")
def addend(
    study_id: str,
    found: OfficeOf,
    login: RadiologistLogin,
    after: BackgroundTasks,
    version: Version,
    revision: Revision = "",
    text: Annotated[str, Form(max_length=8000)] = "",
    password: Password = "",
) -> Response:
    """Signs an addendum, one sentence a line."""

    def act(session: Session, proof: str) -> Done:
        report = find_report(session, study_id)
        return signing.addend(
            session,
            report.id,
            login.reader,
            found.desk,
            sentences=text.splitlines(),
            version=version,
            revision=revision,
            authentication_id=proof,
        )

    return _proven(found, login, study_id, after, password, act, "The addendum is signed.")


@router.post("/retract")
def retract(
    study_id: str,
    found: OfficeOf,
    login: RadiologistLogin,
    after: BackgroundTasks,
    version: Version,
    revision: Revision = "",
    reason: Reason = "",
    password: Password = "",
) -> Response:
    """Withdraws a signed report, with the reason."""

    def act(session: Session, proof: str) -> Done:
        report = find_report(session, study_id)
        return signing.retract(
            session,
            report.id,
            login.reader,
            found.desk,
            reason=reason,
            version=version,
            revision=revision,
            authentication_id=proof,
        )

    return _proven(found, login, study_id, after, password, act, "The report is retracted.")


@router.post("/preliminary")
def save_preliminary(
    study_id: str, found: OfficeOf, login: RadiologistLogin, after: BackgroundTasks, revision: Revision
) -> Response:
    """Saves the text as a preliminary report: the reader says that they read it."""

    def act(session: Session) -> Done:
        report = find_report(session, study_id)
        return signing.save_preliminary(session, report.id, login.reader, found.desk, revision=revision)

    return _done(found, login, study_id, after, act, "Saved as preliminary.")


@router.post("/reject")
def reject(
    study_id: str,
    found: OfficeOf,
    login: RadiologistLogin,
    after: BackgroundTasks,
    revision: Revision,
    reason: Reason = "",
) -> Response:
    """Refuses the draft as it was shown, with the reason."""

    def act(session: Session) -> Done:
        report = find_report(session, study_id)
        return signing.reject(session, report.id, login.reader, found.desk, revision=revision, reason=reason)

    return _done(found, login, study_id, after, act, "The draft is rejected.")


@router.post("/correct")
def begin_correction(study_id: str, found: OfficeOf, login: RadiologistLogin) -> Response:
    """Opens the signed text for a correction; it stands until the correction is signed."""

    def work(session: Session) -> Response:
        signing.begin_correction(session, find_report(session, study_id).id, login.reader, found.desk)
        return report_side(session, found, login, study_id)

    return found.database.run(work)


@router.post("/leave-correction")
def leave_correction(study_id: str, found: OfficeOf, login: RadiologistLogin, revision: Revision) -> Response:
    """Puts a correction aside as it was shown: the signed text stands."""

    def work(session: Session) -> Response:
        signing.leave_correction(session, find_report(session, study_id).id, login.reader, revision=revision)
        return report_side(session, found, login, study_id, notice="The signed text stands as it was.")

    return found.database.run(work)


@router.post("/regenerate")
def regenerate(study_id: str, found: OfficeOf, login: RadiologistLogin, after: BackgroundTasks) -> Response:
    """Has the study drafted again in a new revision; nothing that was signed or written by a person goes away."""

    def work(session: Session) -> Response:
        study = find(session, study_id)
        editing.radiologist(session, login.reader)
        if study.report is not None and study.report.state is ReportState.RETRACTED:
            raise StateError("the report is retracted; a new draft would not be read in its place")
        if worklist.pixels_removed(session, study.id):
            raise StateError("the images were removed by retention; have the PACS send them again")
        studies.requeue(session, study.id)
        audit.append(session, "requeue", actor=login.username, study_id=study.id, origin=login.origin, force=False)
        return report_side(session, found, login, study_id, notice="A new draft is on its way.")

    response = found.database.run(work)
    after.add_task(found.ring, queues.PREPARE, study_id)
    return response


def _proven(
    found: Office,
    login: Login,
    study_id: str,
    after: BackgroundTasks,
    password: str,
    act: Callable[[Session, str], Done],
    notice: str,
) -> Response:
    """Runs an act with a proof of identity: the password typed now, or the provider's fresh answer in this session."""
    with found.database.read() as session:
        find_report(session, study_id)
    try:
        proof = _proof(found, login, study_id, password)
    except (AccessError, SignatureError) as error:
        sentence = str(error)
        found.database.run(
            lambda session: audit.append(
                session, "prove", actor=login.username, study_id=study_id, origin=login.origin, outcome="refused"
            )
        )
        return _refused(found, login, study_id, sentence)
    return _done(found, login, study_id, after, lambda session: act(session, proof), notice)


def _proof(found: Office, login: Login, study_id: str, password: str) -> str:
    if login.local:
        if not password:
            raise SignatureError("enter your password to sign")
        try:
            return accounts.prove_by_password(
                found.database, login.user_id, password, found.lockout, study_id, login.session_id
            )
        except AccessError:
            raise AccessError("the password is wrong, or the account is locked; nothing was signed") from None
    with found.database.read() as session:
        proof = accounts.unused_proof(
            session, login.user_id, study_id, login.session_id, found.settings.review.fresh_seconds
        )
    if proof is None:
        raise SignatureError("prove who you are at the identity provider, then sign")
    return proof.id


def _done(
    found: Office,
    login: Login,
    study_id: str,
    after: BackgroundTasks,
    act: Callable[[Session], Done],
    notice: str,
) -> Response:
    made: list[Done] = []

    def work(session: Session) -> Response:
        done = act(session)
        made[:] = [done]
        problem = "; ".join(f"no message to {name}: {why}" for name, why in done.unwritable.items())
        return report_side(session, found, login, study_id, notice=notice, problem=problem)

    try:
        response = found.database.run(work)
    except (StateError, ReportError, SignatureError) as error:
        return _refused(found, login, study_id, str(error))
    for done in made:  # of the try that was committed
        found.metrics.versions.labels(done.version.state.value).inc()
        after.add_task(found.ring, queues.DELIVER, *done.destinations)
    return response


def _refused(found: Office, login: Login, study_id: str, sentence: str) -> Response:
    """The report's side with the reason why nothing was done, as status 409."""

    def work(session: Session) -> Response:
        return report_side(session, found, login, study_id, problem=f"{sentence[:1].upper()}{sentence[1:]}.")

    response = found.database.run(work)
    response.status_code = 409
    return response
