"""Signed reports that may train a model, each beside the machine's draft that its signer corrected.

What leaves is decided here and nowhere else: consent, a signature that fits the text, a report that stands as it was
signed and the very images that it was signed on.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import sqlalchemy as sa
from sqlalchemy.orm import Session

from worker.core import consents, editing, notices, reports, studies
from worker.core.consents import Decision
from worker.core.records import Report, ReportVersion, Signature, Study, StudyStatus, User
from worker.core.report import Phi, ReportState, Sentence, canonical_text, text_sha256

SHORTEST_NAME = 2  # "J" would take every J out of a text
SHORTEST_WORD_OF_A_NAME = 4  # "der" of "van der Berg" is a word of its own in some languages
SHORTEST_IDENTIFIER = 4  # "12" would take the size out of "12 mm"


class LeftOut(StrEnum):
    """Why a signed report does not go into a training set."""

    NOT_ASKED = "no consent was recorded"
    REFUSED = "consent was refused"
    NOT_SIGNED = "rejected or not signed"
    RETRACTED = "retracted"
    ADDENDED = "an addendum changes what the signed text says"
    UNFIT_SIGNATURE = "the signature does not fit the text"
    OTHER_IMAGES = "the study changed or is being worked on since it was signed"
    NO_PATIENT_ID = "no patient id, so that no split can be made by patient"


@dataclass(frozen=True)
class SignedStudy:
    """A signed report and what it was written from."""

    study_id: str
    revision: int  # of the study that draft, signature and images share
    patient: Phi  # authority and id, as one text
    model_input: str | None  # folder below the store; None when retention took the pixels
    regions: tuple[tuple[str, ...], ...]  # body regions of each volume, the main volume first
    signed: tuple[Sentence, ...]
    draft: tuple[Sentence, ...] | None  # None when no model trained on patients wrote one
    names: tuple[Phi, ...]  # of patient and physicians, and their numbers: what a text must not hold


def signed_ids(session: Session) -> list[str]:
    """The studies with a signed report, the earliest report first."""
    signed = sa.exists().where(Signature.version_id == ReportVersion.id, ReportVersion.report_id == Report.id)
    return list(session.scalars(sa.select(Report.study_id).where(signed).order_by(Report.created_at, Report.id)))


def look(session: Session, study_id: str) -> SignedStudy | LeftOut:
    """The signed report of a study as it stands now, or why it must not leave; raises `NotFoundError`."""
    study = studies.get(session, study_id)
    decision = consents.decision_of(session, study_id)
    if decision is not Decision.GIVEN:
        return LeftOut.NOT_ASKED if decision is None else LeftOut.REFUSED
    if study.report is None:
        return LeftOut.NOT_SIGNED
    version = editing.of_record(session, study.report.id)
    reason = _reason(study, version)
    if reason is not None:
        return reason
    return SignedStudy(
        study_id=study.id,
        revision=study.revision,
        patient=f"{study.patient_authority.strip()}^{study.patient_identifier.strip()}",
        model_input=study.model_input,
        regions=tuple(tuple(volume.get("regions", ())) for volume in (study.choice or {}).get("volumes", [])),
        signed=_learned(version),
        draft=_draft(session, version),
        names=names(study),
    )


def _reason(study: Study, version: ReportVersion) -> LeftOut | None:
    if version.state is ReportState.RETRACTED:
        return LeftOut.RETRACTED
    if version.state is ReportState.ADDENDED:
        return LeftOut.ADDENDED
    if version.signature is None:
        return LeftOut.NOT_SIGNED
    if version.signature.text_sha256 != text_sha256(canonical_text(_sentences(version))):
        return LeftOut.UNFIT_SIGNATURE
    if study.status is not StudyStatus.DRAFTED or study.revision != version.study_revision:
        return LeftOut.OTHER_IMAGES
    if not study.patient_identifier.strip():
        return LeftOut.NO_PATIENT_ID
    return None


def _sentences(version: ReportVersion) -> tuple[Sentence, ...]:
    return tuple(reports.to_sentence(row) for row in version.sentences)


def _draft(session: Session, signed: ReportVersion) -> tuple[Sentence, ...] | None:
    """The machine's text about the same images; a model that saw no patient has no opinion to correct."""
    version = reports.draft_of(session, signed.report_id, signed.study_revision)
    if version is None or notices.saw_no_patient(version.provenance):
        return None
    return _learned(version)


def _learned(version: ReportVersion) -> tuple[Sentence, ...]:
    """The sentences without what the system says about its model."""
    return tuple(sentence for sentence in _sentences(version) if sentence.text not in notices.NOTICES)


def names(study: Study) -> tuple[Phi, ...]:
    """What points to a person in the words of this study: names whole and in parts, and numbers."""
    whole = _components([study.patient_name, study.referring_physician, study.requesting_physician])
    orders = [study.accession, study.placer, study.filler, study.visit]
    numbers = [study.patient_identifier, *orders, study.study_instance_uid]
    return (*_with_words(whole), *(n.strip() for n in numbers if len(n.strip()) >= SHORTEST_IDENTIFIER))


def reader_names(session: Session) -> tuple[str, ...]:
    """The names of everyone with an account: radiologists sign in the text, too."""
    rows = session.execute(sa.select(User.family_name, User.given_name, User.username))
    return _with_words(_components(part for row in rows for part in row))


def _components(values: Iterable[str]) -> list[str]:
    """The components of DICOM person names (PS3.5 section 6.2) and of plain ones."""
    return [
        part.strip() for value in values for part in re.split(r"[\^=]", value) if len(part.strip()) >= SHORTEST_NAME
    ]


def _with_words(components: list[str]) -> tuple[str, ...]:
    words = [word for part in components for word in re.split(r"[\s-]+", part) if len(word) >= SHORTEST_WORD_OF_A_NAME]
    return tuple(dict.fromkeys([*components, *words]))
