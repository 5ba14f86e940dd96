"""Values that the core's tests start from."""

import uuid
from dataclasses import replace
from datetime import datetime

from sqlalchemy.orm import Session

from worker.core import arrivals, outbox, reports, studies
from worker.core.database import Database
from worker.core.records import AuthorKind, Report, ReportVersion, Role, Signature, Stage, Study, User, new_id
from worker.core.report import Provenance, ReportState, Section, Sentence
from worker.core.review_records import Authentication, AuthenticationMethod
from worker.core.settings import Destination

LIMITS = studies.Limits(lease_seconds=60, max_attempts=3, max_crashes=2, backoff_seconds=5)


def uid() -> str:
    """A fresh UID."""
    return f"2.25.{uuid.uuid4().int}"


def arrival(study_uid: str, **changes: object) -> arrivals.Arrival:
    """One CT instance of a study."""
    base = arrivals.Arrival(
        path=f"ab/{uuid.uuid4().hex}.dcm",
        size_bytes=1000,
        sha256=uuid.uuid4().hex * 2,
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        sop_instance_uid=uid(),
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        study_instance_uid=study_uid,
        series_instance_uid=f"{study_uid}.1"[:64],
        received_at=studies.now(),
        calling_ae="PACS",
        patient_identifier="MRN-1",
        patient_name="DOE^JANE",
        accession="A-1",
        modality="CT",
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def received(database: Database, **changes: object) -> str:
    """The id of a study with one instance."""
    return arrivals.record(database, [arrival(uid(), **changes)])[0].study_id


def completed(database: Database, **changes: object) -> str:
    """The id of a study that waits for prepare."""
    study_id = received(database, **changes)
    with database.write() as session:
        assert studies.complete(session, studies.get(session, study_id))
    return study_id


def claimed(database: Database, stage: Stage, limits: studies.Limits = LIMITS) -> studies.Claim:
    """A claim of this stage on whatever is due."""
    with database.write() as session:
        claim = studies.claim(session, stage, "test", limits)
    assert claim is not None
    return claim


def drafting(database: Database, **changes: object) -> studies.Claim:
    """A claim to draft a study that is prepared."""
    completed(database, **changes)
    prepare = claimed(database, Stage.PREPARE)
    with database.write() as session:
        studies.store_prepared(session, prepare, {"series": []}, "inputs/x.npz")
    return claimed(database, Stage.DRAFT)


def draft(text: str = "The lungs are clear.") -> reports.Draft:
    """A draft of one sentence."""
    return reports.Draft(
        sentences=(Sentence(Section.FINDINGS, text, confidence=-0.1),),
        provenance=Provenance("test", "1", "0" * 64, "prompt"),
    )


def drafted(database: Database, text: str = "The lungs are clear.", **changes: object) -> str:
    """The id of the version of a study that is drafted."""
    claim = drafting(database, **changes)
    with database.write() as session:
        study = studies.held(session, claim)
        assert study is not None
        version = reports.add_draft(session, study, draft(text))
        studies.mark_drafted(session, study, claim)
        return version.id


def destination(name: str = "ris", **changes: object) -> Destination:
    """A destination that takes drafts as R."""
    return Destination.model_validate({"name": name, "host": "127.0.0.1", "port": 1, "drafts": "R", **changes})


def render(report, destination: Destination, control_id: str, sent_time: datetime) -> bytes:
    """A writer that is enough for the outbox: it names version and status."""
    return f"{destination.name}|{control_id}|{report.version}|{report.text}".encode()


def sign(session: Session, version_id: str, text: str = "The lungs are clear.") -> ReportVersion:
    """A final version of the same report with a person's signature."""
    machine = session.get_one(ReportVersion, version_id)
    user = User(
        id=new_id(),
        username=f"reader-{new_id()}",
        family_name="Reader",
        role=Role.RADIOLOGIST,
        created_at=studies.now(),
    )
    session.add(user)
    session.flush()
    version = reports.add_version(
        session,
        session.get_one(Report, machine.report_id),
        state=ReportState.FINAL,
        sentences=[Sentence(Section.FINDINGS, text)],
        study_revision=machine.study_revision,
        author_kind=AuthorKind.PERSON,
        author_id=user.id,
    )
    prove(session, user.id, version.id)
    session.add(
        Signature(
            id=new_id(),
            version_id=version.id,
            text_sha256=version.text_sha256,
            user_id=user.id,
            signed_at=studies.now(),
        )
    )
    machine.report.state = ReportState.FINAL
    session.flush()
    return version


def prove(session: Session, user_id: str, version_id: str) -> None:
    """A used-up proof that this person was there to sign this version."""
    at = studies.now()
    session.add(
        Authentication(
            user_id=user_id,
            study_id=session.get_one(ReportVersion, version_id).report.study_id,
            method=AuthenticationMethod.PASSWORD,
            at=at,
            used_at=at,
            version_id=version_id,
        )
    )
    session.flush()


def study_of(database: Database, study_id: str) -> Study:
    """The study's row as it is now."""
    with database.read() as session:
        return studies.get(session, study_id)


def enqueued(database: Database, version_id: str, *destinations: Destination, **changes: object) -> list[int]:
    """Message numbers of a version."""
    with database.write() as session:
        version = session.get_one(ReportVersion, version_id)
        return [m.id for m in outbox.enqueue(session, version, destinations or [destination(**changes)], render)]
