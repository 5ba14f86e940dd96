"""Reports as rows: a draft becomes a version, a version becomes the value that the writers take."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import sqlalchemy as sa
from sqlalchemy.orm import Session

from worker.core import records, studies
from worker.core.errors import NotFoundError
from worker.core.records import AuthorKind, ReportVersion, Study
from worker.core.report import (
    DISCLOSURE,
    DISCLOSURE_REVIEWED,
    SIGNED_STATES,
    Order,
    Origin,
    Patient,
    Person,
    Provenance,
    Report,
    ReportState,
    Sentence,
    canonical_text,
    text_sha256,
)
from worker.core.review_records import WorkingSentence

MINIMUM_STEP = timedelta(seconds=1)  # between the status times of two versions: receivers drop equal ones


@dataclass(frozen=True)
class Draft:
    """What a reporter wrote about one study."""

    sentences: tuple[Sentence, ...]
    provenance: Provenance


def add_draft(session: Session, study: Study, draft: Draft) -> ReportVersion:
    """Stores a draft as the next version of the study's report; a report that a person worked on keeps its state.

    Idempotent per (study, revision): a draft that is there already is returned as it is.
    """
    report = session.scalars(sa.select(records.Report).where(records.Report.study_id == study.id)).one_or_none()
    if report is None:
        report = records.Report(id=records.new_id(), study_id=study.id, created_at=studies.now())
        session.add(report)
        session.flush()
    there = draft_of(session, report.id, study.revision)
    if there is not None:
        return there
    version = add_version(
        session,
        report,
        state=ReportState.AI_DRAFT,
        sentences=draft.sentences,
        study_revision=study.revision,
        author_kind=AuthorKind.MACHINE,
    )
    version.provenance = asdict(draft.provenance)
    if not has_person(session, report.id):
        report.state = ReportState.AI_DRAFT
    return version


def draft_of(session: Session, report_id: str, study_revision: int) -> ReportVersion | None:
    """The machine's draft about the images of one revision; there is one at most."""
    return session.scalars(
        sa.select(ReportVersion).where(
            ReportVersion.report_id == report_id,
            ReportVersion.study_revision == study_revision,
            ReportVersion.author_kind == AuthorKind.MACHINE,
        )
    ).one_or_none()


def add_version(
    session: Session,
    report: records.Report,
    *,
    state: ReportState,
    sentences: Sequence[Sentence],
    study_revision: int,
    author_kind: AuthorKind,
    author_id: str | None = None,
) -> ReportVersion:
    """Appends a version with its sentences; its status time is at least a second after the one before."""
    last = session.execute(
        sa.select(ReportVersion.number, ReportVersion.status_time)
        .where(ReportVersion.report_id == report.id)
        .order_by(ReportVersion.number.desc())
        .limit(1)
    ).first()
    at = studies.now()
    version = ReportVersion(
        id=records.new_id(),
        report_id=report.id,
        number=last.number + 1 if last else 1,
        study_revision=study_revision,
        state=state,
        author_kind=author_kind,
        author_id=author_id,
        created_at=at,
        status_time=max(at, last.status_time + MINIMUM_STEP) if last else at,
        text_sha256=text_sha256(canonical_text(sentences)),
    )
    version.sentences = [
        records.Sentence(
            id=records.new_id(),
            ordinal=ordinal,
            section=sentence.section,
            region=sentence.region,
            text=sentence.text,
            confidence=sentence.confidence,
            support=sentence.support,
            best_slice=asdict(sentence.best_slice) if sentence.best_slice is not None else None,
            origin=sentence.origin,
            assessment=sentence.assessment,
        )
        for ordinal, sentence in enumerate(sentences)
    ]
    session.add(version)
    session.flush()
    return version


def has_person(session: Session, report_id: str) -> bool:
    """Whether a person wrote any version of this report: then a machine's draft only lies beside it, unsent."""
    written = sa.exists().where(ReportVersion.report_id == report_id, ReportVersion.author_kind == AuthorKind.PERSON)
    return bool(session.scalar(sa.select(written)))


def is_signed(session: Session, report_id: str) -> bool:
    """Whether any version of this report carries a signature."""
    signed = sa.exists().where(records.Signature.version_id == ReportVersion.id, ReportVersion.report_id == report_id)
    return bool(session.scalar(sa.select(signed)))


def to_sentence(row: records.Sentence | WorkingSentence) -> Sentence:
    """The row of a version's or a working copy's sentence as a value."""
    return Sentence(
        section=row.section,
        text=row.text,
        origin=row.origin,
        assessment=row.assessment,
        confidence=row.confidence,
        support=row.support,
        region=row.region,
    )


def latest(session: Session, study_id: str) -> ReportVersion | None:
    """The newest version of a study's report, or None before the first draft."""
    return session.scalars(
        sa.select(ReportVersion)
        .join(records.Report)
        .where(records.Report.study_id == study_id)
        .order_by(ReportVersion.number.desc())
        .limit(1)
    ).one_or_none()


def to_value(
    session: Session, version_id: str, *, default_authority: str = "", procedure_codes: Mapping[str, str] | None = None
) -> Report:
    """A version with its study, patient and signer as the value that the writers take; raises `NotFoundError`.

    `procedure_codes` maps a study's description, or the regions it shows joined by `+`, to `code^text^system`.
    """
    version = session.get(ReportVersion, version_id)
    if version is None:
        raise NotFoundError(f"no report version has the id {version_id}")
    study = version.report.study
    sentences = tuple(to_sentence(row) for row in version.sentences)
    machine = any(s.origin is not Origin.PERSON for s in sentences)
    signed = version.state in SIGNED_STATES
    return Report(
        study_instance_uid=study.study_instance_uid,
        version=version.number,
        state=version.state,
        sentences=sentences,
        patient=_patient(study, default_authority),
        order=Order(
            accession=study.accession,
            placer=study.placer,
            filler=study.filler
            or study.accession,  # HL7 wants one of the two; the accession is the filler's own number
            **_procedure(study, procedure_codes or {}),
            ordering_provider=study.requesting_physician or study.referring_physician,
            reason=study.procedure_reason,
            visit=study.visit,
        ),
        study_time=study.study_time,
        status_time=version.status_time,
        model_version=(version.provenance or {}).get("model_version", "") if machine else "",
        signer=_signer(session, version),
        reader=_reader(version),
        reason=version.reason,
        disclosure="" if not machine else DISCLOSURE_REVIEWED if signed else DISCLOSURE,
        supersedes_final=_earlier_was_final(session, version),
    )


def _procedure(study: Study, codes: Mapping[str, str]) -> dict[str, str]:
    """OBR-4: the site's code for this description, else DICOM's own, else the site's for these regions, else a local one."""
    volumes = (study.choice or {}).get("volumes", [])
    regions = "+".join(dict.fromkeys(region for volume in volumes for region in volume.get("regions", [])))
    known = {name.casefold(): code for name, code in codes.items()}
    coded = known.get(study.description.casefold())
    if not coded and study.procedure_code:
        text, system = study.procedure_text or study.description, study.procedure_system or "L"
        return {"procedure_code": study.procedure_code, "procedure_text": text, "procedure_system": system}
    coded = coded or known.get(regions.casefold())
    if coded:
        code, text, system = [*coded.split("^"), "", ""][:3]
        return {"procedure_code": code, "procedure_text": text, "procedure_system": system}
    return {"procedure_code": "CT", "procedure_text": study.description or "CT study", "procedure_system": "L"}


def _patient(study: Study, default_authority: str) -> Patient:
    """The patient with the first component group of the name that holds anything: alphabetic, ideographic, phonetic."""
    group = next((part for part in study.patient_name.split("=") if part.strip("^ ")), "")
    family, given, middle, prefix, suffix = [*group.split("^"), "", "", "", "", ""][:5]
    return Patient(
        identifier=study.patient_identifier,
        authority=study.patient_authority or default_authority,
        family_name=family,
        given_name=given,
        middle_name=middle,
        prefix=prefix,
        suffix=suffix,
        birth_date=study.patient_birth_date,
        sex=study.patient_sex,
    )


def _signer(session: Session, version: ReportVersion) -> Person | None:
    """Whose signature the text stands on: the version's own, or for a retraction the one that is withdrawn."""
    signature = version.signature
    if signature is None and version.state is ReportState.RETRACTED:
        signature = session.scalars(
            sa.select(records.Signature)
            .join(ReportVersion, records.Signature.version_id == ReportVersion.id)
            .where(ReportVersion.report_id == version.report_id, records.Signature.text_sha256 == version.text_sha256)
            .order_by(ReportVersion.number.desc())
            .limit(1)
        ).one_or_none()
    return None if signature is None else _person(signature.user)


def _reader(version: ReportVersion) -> Person | None:
    """Who saved the version as preliminary, rejected or retracted it."""
    if version.author is None or version.state in SIGNED_STATES:
        return None
    return _person(version.author)


def _person(user: records.User) -> Person:
    return Person(identifier=user.username, family_name=user.family_name, given_name=user.given_name)


def _earlier_was_final(session: Session, version: ReportVersion) -> bool:
    earlier = sa.exists().where(
        ReportVersion.report_id == version.report_id,
        ReportVersion.number < version.number,
        ReportVersion.state.in_(SIGNED_STATES),
    )
    return bool(session.scalar(sa.select(earlier)))
