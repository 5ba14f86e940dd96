"""A report, a destination and an independent reader of the ORU, for the tests of this folder."""

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import hl7 as python_hl7

from worker.core.report import (
    DISCLOSURE,
    DISCLOSURE_REVIEWED,
    SIGNED_STATES,
    Order,
    Patient,
    Person,
    Report,
    ReportState,
    Section,
    Sentence,
)
from worker.core.settings import Destination
from worker.results import hl7

SENT = datetime(2026, 3, 2, 9, 30, tzinfo=UTC)
CODECS = {"UNICODE UTF-8": "utf-8", "8859/1": "latin-1"}

RADIOLOGIST = Person("r7", "Okafor", "Ada")
DRAFT = Report(
    study_instance_uid="1.2.840.99.1",
    version=1,
    state=ReportState.AI_DRAFT,
    sentences=(
        Sentence(Section.FINDINGS, "No pleural effusion."),
        Sentence(Section.FINDINGS, "Nodule of 5 mm in the left upper lobe."),
        Sentence(Section.IMPRESSION, "Small pulmonary nodule."),
    ),
    patient=Patient("4711", "CITY", "Rossi", "Maria", "Luisa", date(1961, 4, 9), "F"),
    order=Order(
        accession="A-100",
        placer="P-1",
        filler="F-1",
        procedure_code="24627-2",
        procedure_text="CT Chest",
        procedure_system="LN",
        ordering_provider="Berg^Nils^O^Dr^Jr",
        reason="cough & fever",
        patient_class="I",
        visit="V-9",
    ),
    study_time=datetime(2026, 3, 1, 14, 5),
    status_time=datetime(2026, 3, 1, 15, 0, 0, 250_000, tzinfo=timezone(timedelta(hours=1))),
    model_version="1.0",
    disclosure=DISCLOSURE,
)


def report(state: ReportState = ReportState.AI_DRAFT, **changes: Any) -> Report:
    """The example in another state, signed where the state needs a signature."""
    if state in SIGNED_STATES or state is ReportState.RETRACTED:
        changes = {"signer": RADIOLOGIST, "disclosure": DISCLOSURE_REVIEWED, **changes}
    return replace(DRAFT, state=state, **changes)


def destination(**changes: Any) -> Destination:
    """A destination that takes every state."""
    return Destination(**{"name": "ris", "host": "ris", "port": 2575, "drafts": "R", "preliminary": True, **changes})


def parsed(written: Report, to: Destination | None = None) -> python_hl7.Message:
    """The ORU of a report as the independent package `hl7` reads it."""
    to = to or destination()
    return python_hl7.parse(hl7.write(written, to, "C1", SENT), encoding=CODECS[to.character_set])


def section_text(message: python_hl7.Message, code: str) -> str:
    """Text of the OBX with this LOINC code, its repetitions joined by line feeds, unescaped by the package `hl7`."""
    for segment in message.segments("OBX"):
        if str(segment[3]).startswith(code):
            return "\n".join(message.unescape(str(repetition)) for repetition in segment[5])
    raise AssertionError(f"no OBX {code}")
