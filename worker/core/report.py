"""The report as a value, and the one status table that HL7, DICOM SR and FHIR are written from.

`Report` is what the pure writers of `worker.results` take. It is frozen and complete: nothing in it is looked up later.
Fields marked `Phi` hold data of a patient: they go to the database, the ORU and the review page, and nowhere else.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date, datetime
from enum import StrEnum
from typing import Annotated

Phi = Annotated[str, "patient data: never logged, never in a metric, a task argument or a URL"]


class ReportState(StrEnum):
    """Where a report stands between the machine's draft and a person's signature."""

    AI_DRAFT = "ai_draft"  # written by the machine, read by nobody
    PRELIMINARY = "preliminary"  # read and saved as such by a radiologist, not signed
    FINAL = "final"  # signed
    CORRECTED = "corrected"  # signed again inside the correction window
    ADDENDED = "addended"  # the signed text stands, a signed addendum follows
    REJECTED = "rejected"  # refused by a radiologist before it was ever final
    RETRACTED = "retracted"  # was final, withdrawn with a reason


class Section(StrEnum):
    """The sections of a report, in the order in which they are written."""

    FINDINGS = "findings"
    IMPRESSION = "impression"
    RECOMMENDATIONS = "recommendations"
    ADDENDUM = "addendum"

    @property
    def heading(self) -> str:
        """What stands above the section on a page.

        >>> Section.FINDINGS.heading
        'Findings'
        """
        return self.value.capitalize()


class Origin(StrEnum):
    """Who wrote the sentence as it stands."""

    MACHINE = "machine"  # the model's own words
    EDITED = "edited"  # the model's words, changed by a person
    PERSON = "person"  # a person's own words


class Assessment(StrEnum):
    """What the reader decided about a sentence."""

    UNTOUCHED = "untouched"  # not looked at, as far as the record shows
    ACCEPTED = "accepted"
    EDITED = "edited"
    REJECTED = "rejected"  # stays in the record, leaves the text


@dataclass(frozen=True)
class BestSlice:
    """The slice that a drafted sentence leans on most, found by the model with the draft; never a measurement of a finding."""

    volume: int  # number of the study's volume, from 1
    ras_mm: tuple[float, float, float]  # a point of the slice in the patient


@dataclass(frozen=True)
class Sentence:
    """One sentence of a report with what is known about its origin."""

    section: Section
    text: Phi
    origin: Origin = Origin.MACHINE
    assessment: Assessment = Assessment.UNTOUCHED
    confidence: float | None = None  # mean log-probability of its tokens; None for a person's words
    support: float | None = None  # drop in log-probability when the evidence is masked; None when not asked for
    region: str = ""  # body region that a findings sentence belongs to; empty where there is only one
    best_slice: BestSlice | None = None  # of a machine's draft alone


@dataclass(frozen=True)
class Patient:
    """Who the study is of, as the order says or else as DICOM says, never mixed."""

    identifier: Phi
    authority: Phi = ""  # issuer of the identifier
    family_name: Phi = ""
    given_name: Phi = ""
    middle_name: Phi = ""
    birth_date: date | None = None
    sex: str = ""  # HL7 table 0001: F, M, O, U; empty when unknown
    prefix: Phi = ""
    suffix: Phi = ""


@dataclass(frozen=True)
class Order:
    """What was asked for and by whom; every field may be empty."""

    accession: Phi = ""
    placer: Phi = ""
    filler: Phi = ""
    procedure_code: str = ""
    procedure_text: str = ""
    procedure_system: str = ""
    ordering_provider: Phi = ""  # as DICOM writes a name: Family^Given^Middle^Prefix^Suffix
    reason: Phi = ""
    patient_class: str = "U"  # HL7 table 0004; U is unknown
    visit: Phi = ""


@dataclass(frozen=True)
class Person:
    """A radiologist as HL7 names one: id, family name, given name."""

    identifier: str
    family_name: str
    given_name: str


@dataclass(frozen=True)
class Provenance:
    """What made a draft: enough to make it again."""

    model_name: str
    model_version: str
    weights_sha256: str
    prompt: str
    decoding: dict[str, str | int | float | bool] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """One version of a report with everything a writer needs."""

    study_instance_uid: Phi
    version: int  # 1, 2, ... for one report; a later one replaces an earlier one
    state: ReportState
    sentences: tuple[Sentence, ...]
    patient: Patient
    order: Order
    study_time: datetime | None
    status_time: datetime  # zone-aware; strictly increasing over the versions of one report
    model_version: str = ""  # empty when no machine-written text survives
    signer: Person | None = None  # whose signature the text stands on; a retracted report keeps the one it had
    reader: Person | None = None  # who saved it as preliminary, rejected or retracted it
    reason: Phi = ""  # why it was rejected or retracted, in that person's words
    disclosure: str = ""  # one sentence; set while any machine-written text survives
    supersedes_final: bool = False  # an earlier version of this report was final

    @property
    def text(self) -> str:
        """The text that a signature covers (see `canonical_text`)."""
        return canonical_text(self.sentences)

    @property
    def text_sha256(self) -> str:
        """SHA-256 of `text` in UTF-8, as stored with a signature."""
        return text_sha256(self.text)

    def section(self, section: Section) -> tuple[Sentence, ...]:
        """The sentences of one section that are part of the text, in order."""
        return tuple(s for s in self.sentences if s.section is section and s.assessment is not Assessment.REJECTED)


def canonical_text(sentences: Iterable[Sentence]) -> str:
    """The report as plain text: sections in their order, one line a sentence, rejected sentences left out.

    A body region stands as a line of its own before its first sentence. This exact text is what is hashed and signed,
    so a change here would break the check of every signature made before.
    """
    sentences = tuple(sentences)
    blocks = [(section, section_lines(sentences, section)) for section in Section]
    return "\n\n".join("\n".join([section.value.upper(), *lines]) for section, lines in blocks if lines)


def section_lines(sentences: Iterable[Sentence], section: Section) -> list[str]:
    """The lines of one section as `canonical_text` has them, without its title; every outgoing format writes these."""
    lines: list[str] = []
    region = ""
    for sentence in sentences:
        if sentence.section is not section or sentence.assessment is Assessment.REJECTED:
            continue
        if sentence.region != region:
            region = sentence.region
            if region:
                lines.append(f"{region.capitalize()}:")
        lines.append(sentence.text)
    return lines


def text_sha256(text: str) -> str:
    """SHA-256 of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Status:
    """One row of the status table: the same state in the words of each outgoing format."""

    obr_25: str  # HL7 table 0123
    obx_11: str  # HL7 table 0085
    sr_completion: str  # DICOM (0040,A491)
    sr_verification: str  # DICOM (0040,A493)
    sr_preliminary: str  # DICOM (0040,A496)
    fhir: str  # DiagnosticReport.status
    leaves: str  # when a message may leave at all: "drafts" by the destination's choice, "always", "if_sent" before


STATUS: dict[ReportState, Status] = {
    ReportState.AI_DRAFT: Status("R", "R", "PARTIAL", "UNVERIFIED", "PRELIMINARY", "partial", "drafts"),
    ReportState.PRELIMINARY: Status("P", "P", "COMPLETE", "UNVERIFIED", "PRELIMINARY", "preliminary", "drafts"),
    ReportState.FINAL: Status("F", "F", "COMPLETE", "VERIFIED", "FINAL", "final", "always"),
    ReportState.CORRECTED: Status("C", "C", "COMPLETE", "VERIFIED", "FINAL", "corrected", "always"),
    ReportState.ADDENDED: Status("C", "C", "COMPLETE", "VERIFIED", "FINAL", "appended", "always"),
    ReportState.REJECTED: Status("X", "X", "COMPLETE", "UNVERIFIED", "FINAL", "cancelled", "if_sent"),
    ReportState.RETRACTED: Status("C", "W", "COMPLETE", "UNVERIFIED", "FINAL", "entered-in-error", "always"),
}
"""The status table. A destination may be set to send `ai_draft` as P instead of R (`drafts = "P"`); nothing else varies."""

SIGNED_STATES = frozenset({ReportState.FINAL, ReportState.CORRECTED, ReportState.ADDENDED})
"""States that only a signature reaches: their messages carry F or C and name the signature they stand on."""

DISCLOSURE = "Machine-written draft, not reviewed by a radiologist; not for clinical use without local approval."
DISCLOSURE_REVIEWED = "Contains machine-written text that was read and signed by the named radiologist."
