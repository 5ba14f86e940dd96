"""Reports as HL7 v2.5.1 ORU^R01 in the shape of IHE Results Distribution (RAD-128): `write`, `validate`, `readable`.

hl7apy gives the structure of the message and checks it; text is escaped by `hl7_text.escape` before hl7apy sees it,
because hl7apy passes `^` and `&` through and makes a new segment of a carriage return. Every message is the whole
report: a receiver replaces what it had for the order by the message with the later OBR-22.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime

from hl7apy.core import Field, Group, Message, Segment

from worker.core.errors import ReportError, SignatureError
from worker.core.report import (
    STATUS,
    Order,
    Origin,
    Patient,
    Person,
    Report,
    ReportState,
    Section,
    section_lines,
)
from worker.core.settings import Destination
from worker.results import hl7_text
from worker.results.hl7_reading import SIGNED, VERSION, readable, validate
from worker.results.hl7_text import carried, escape

__all__ = ["readable", "result_status", "timestamp", "validate", "write"]

SECTION_CODES: dict[Section, tuple[str, str]] = {
    Section.FINDINGS: ("59776-5", "Findings"),
    Section.IMPRESSION: ("19005-8", "Impression"),
    Section.RECOMMENDATIONS: ("18783-1", "Recommendations"),
    Section.ADDENDUM: ("55107-7", "Addendum"),
}
"""OBX-3 of each section, in LOINC."""

WHOLE_REPORT = ("18748-4", "Diagnostic imaging report")  # LOINC; used where no section is left to name
UNKNOWN_PROCEDURE = ("CT", "CT study", "L")  # OBR-4 is required; a local code says no more than is known
WITHDRAWN = {
    ReportState.REJECTED: "The machine-written draft of this study was rejected by a radiologist; do not use it.",
    ReportState.RETRACTED: "This report was retracted; do not use it.",
}
"""What stands in place of the text, which is not sent again: a receiver blind to OBX-11 would show it as valid."""

TRANSLITERATED = "Characters that ISO 8859-1 cannot carry were transliterated."

# hl7apy escapes a second time wherever it meets its escape character, so it is told of one that no text holds.
_ENCODING = {"FIELD": "|", "COMPONENT": "^", "SUBCOMPONENT": "&", "REPETITION": "~", "ESCAPE": "\0"} | {
    "SEGMENT": "\r",
    "GROUP": "\r",
}
_CONTROL_ID = re.compile(r"[0-9A-Za-z._-]{1,20}")  # MSH-10 is ST(20); these characters need no escape

Values = Mapping[int, str | list[str]]


def write(report: Report, destination: Destination, control_id: str, sent_time: datetime) -> bytes:
    """One version of a report as the bytes of an ORU^R01 for one destination, without MLLP framing.

    `sent_time` (zone-aware) is MSH-7. Raises `SignatureError` when F or C would leave without a signer, `ReportError`
    when the destination does not take this state, a required value is missing or the message fails `validate`.
    """
    if not _CONTROL_ID.fullmatch(control_id):
        raise ReportError("the control id needs 1 to 20 letters, figures, dots, hyphens or underscores (MSH-10)")
    status = result_status(report, destination)
    _check_complete(report)
    message = _OruR01(report, destination, *status).build(control_id, sent_time)
    text: str = message.to_er7(_ENCODING)
    payload = text.encode(hl7_text.CODECS[destination.character_set]) + b"\r"
    problems = validate(payload)
    if problems:
        raise ReportError(f"the ORU would break its profile: {'; '.join(problems)}")
    return payload


def result_status(report: Report, destination: Destination) -> tuple[str, str]:
    """OBR-25 and OBX-11 of a report at a destination, from the one status table.

    Raises `ReportError` when the destination takes no report in this state, and `SignatureError` when the status is F
    or C and nobody signed.
    """
    status = STATUS[report.state]
    obr_25, obx_11 = status.obr_25, status.obx_11
    if report.state is ReportState.AI_DRAFT:
        if destination.drafts == "none":
            raise ReportError(f"destination {destination.name} takes no machine drafts (drafts = none)")
        obr_25 = obx_11 = destination.drafts
    if report.state is ReportState.PRELIMINARY and not destination.preliminary:
        raise ReportError(f"destination {destination.name} takes no preliminary reports (preliminary = false)")
    if status.leaves == "drafts" and report.supersedes_final:
        # R and P after F make some receivers delete or downgrade the signed text.
        raise ReportError("a report that was final is not followed by a draft; sign the new text or retract the old")
    if {obr_25, obx_11} & SIGNED and report.signer is None:
        raise SignatureError(f"a report in state {report.state.value} leaves only with the name of its signer")
    return obr_25, obx_11


def _check_complete(report: Report) -> None:
    if not report.patient.identifier.strip():
        raise ReportError("the study has no patient id, so no receiver could file its report (PID-3 is required)")
    if not report.study_instance_uid:
        raise ReportError("the report names no study (Study Instance UID is empty)")
    if report.state in WITHDRAWN:
        return
    kept = [sentence for section in Section for sentence in report.section(section)]
    if not any(sentence.text.strip() for sentence in kept):
        raise ReportError("the report has no text; nothing is sent")
    if any(sentence.origin is not Origin.PERSON for sentence in kept) and not report.disclosure:
        raise ReportError("machine-written text leaves only with its disclosure sentence")


@dataclass
class _OruR01:
    """The message under construction; notes whether the character set forced a change of the text."""

    report: Report
    destination: Destination
    obr_25: str
    obx_11: str
    changed: bool = False

    def build(self, control_id: str, sent_time: datetime) -> Message:
        """The hl7apy message; the observations come first because a note says what they had to change."""
        observations = self._observations()
        patient, visit = self._pid(self.report.patient), self._pv1(self.report.order)
        order, request = self._orc(self.report.order), self._obr(self.report.order)

        message = Message("ORU_R01", version=VERSION)
        _fill(message.msh, self._msh(control_id, sent_time))
        result = message.add_group("ORU_R01_PATIENT_RESULT")
        person = result.add_group("ORU_R01_PATIENT")
        _add(person, "PID", patient)
        _add(person.add_group("ORU_R01_VISIT"), "PV1", visit)
        observed = result.add_group("ORU_R01_ORDER_OBSERVATION")
        _add(observed, "ORC", order)
        _add(observed, "OBR", request)
        for number, note in enumerate(self._notes(), start=1):
            _add(observed, "NTE", {1: str(number), 2: "L", 3: note})
        for number, values in enumerate(observations, start=1):
            _add(observed.add_group("ORU_R01_OBSERVATION"), "OBX", {1: str(number), **values})
        return message

    def _value(self, text: str, line_break: str | None = None) -> str:
        """A text as it stands in a field; blanks alone say nothing in a field of one line, and hl7apy drops them."""
        if line_break is None and not text.strip():
            return ""
        fit = carried(text, self.destination.character_set)
        self.changed = self.changed or fit != text
        return escape(fit, line_break)

    def _parts(self, *texts: str, separator: str = "^") -> str:
        return separator.join(self._value(text) for text in texts).rstrip(separator)

    def _name(self, person: Person) -> tuple[str, str, str]:
        return person.identifier, person.family_name, person.given_name

    def _msh(self, control_id: str, sent_time: datetime) -> Values:
        d = self.destination
        names = (d.sending_application, d.sending_facility, d.receiving_application, d.receiving_facility)
        return {
            # A site may write `NAME^1.2.3^ISO`: these four are HD and keep their components.
            **{number: self._parts(*name.split("^")) for number, name in enumerate(names, start=3)},
            7: timestamp(sent_time, zone_required=True),
            9: "ORU^R01^ORU_R01",
            10: control_id,
            11: d.processing_id,
            12: VERSION,
            15: "NE",
            16: "AL",
            18: d.character_set,
        }

    def _pid(self, patient: Patient) -> Values:
        names = (patient.family_name, patient.given_name, patient.middle_name, patient.suffix, patient.prefix)
        return {
            1: "1",
            3: self._parts(patient.identifier, "", "", patient.authority, "MR"),
            5: self._parts(*names) or "^^^^^^U",  # required; U is a name that is not specified (table 0200)
            7: _day(patient.birth_date),
            8: patient.sex if patient.sex in {"", "F", "M", "O", "U"} else "U",
        }

    def _pv1(self, order: Order) -> Values:
        return {1: "1", 2: self._value(order.patient_class or "U"), 19: self._value(order.visit)}

    def _orc(self, order: Order) -> Values:
        return {1: "RE", 2: self._value(order.placer), 3: self._value(order.filler)}

    def _obr(self, order: Order) -> Values:
        procedure = (order.procedure_code, order.procedure_text, order.procedure_system)
        signed = {self.obr_25, self.obx_11} & SIGNED
        return {
            1: "1",
            2: self._value(order.placer),
            3: self._value(order.filler),
            4: self._parts(*procedure) or "^".join(UNKNOWN_PROCEDURE),
            7: timestamp(self.report.study_time) if self.report.study_time else "",
            16: self._provider(order.ordering_provider),
            18: self._value(order.accession),
            22: timestamp(self.report.status_time, zone_required=True),
            24: "CT",
            25: self.obr_25,
            31: self._parts("", order.reason),
            32: self._parts(*self._name(self.report.signer), separator="&") if signed and self.report.signer else "",
        }

    def _provider(self, name: str) -> str:
        """A DICOM person name (first group that is filled) as XCN, where the suffix precedes the prefix."""
        group = next((group for group in name.split("=") if group.strip("^ ")), "")
        family, given, middle, prefix, suffix = (*group.split("^"), "", "", "", "", "")[:5]
        return self._parts("", family, given, middle, suffix, prefix)

    def _notes(self) -> Iterable[str]:
        if self.report.disclosure and self.report.state not in WITHDRAWN:
            yield self._value(self.report.disclosure, hl7_text.FT_BREAK)
        if self.changed:
            yield TRANSLITERATED

    def _observations(self) -> list[Values]:
        """OBX of the study's UID, then one of each section in its order; OBX-4 is the section's number."""
        uid = self._obx("ST", ("113014", "DICOM Study", "DCM"), "", self._value(self.report.study_instance_uid))
        report = self.report
        lines = {section: section_lines(report.sentences, section) for section in Section}
        if report.state in WITHDRAWN:
            notice = WITHDRAWN[report.state] + (f" Reason: {report.reason}" if report.reason else "")
            lines = {section: [notice] for section in Section if any(s.section is section for s in report.sentences)}
            if not lines:
                return [uid, self._obx(self.destination.text_type, (*WHOLE_REPORT, "LN"), "1", self._text([notice]))]
        return [uid] + [
            self._obx(
                self.destination.text_type, (*SECTION_CODES[section], "LN"), str(number), self._text(lines[section])
            )
            for number, section in enumerate(Section, start=1)
            if lines.get(section)
        ]

    def _text(self, lines: list[str]) -> str | list[str]:
        text = "\n".join(lines)
        if self.destination.text_type == "FT":
            return self._value(text, hl7_text.FT_BREAK)
        return self._value(text, hl7_text.TX_BREAK).split(hl7_text.TX_BREAK)

    def _obx(self, datatype: str, code: tuple[str, str, str], order: str, value: str | list[str]) -> Values:
        report = self.report
        observer = report.signer if {self.obr_25, self.obx_11} & SIGNED else report.reader
        method = self._parts("AI", f"mu2LLM {report.model_version}".strip(), "L")
        return {
            2: datatype,
            3: "^".join(code),
            4: order,
            5: value,
            11: self.obx_11,
            14: timestamp(report.status_time),
            16: self._parts(*self._name(observer)) if observer else "",
            17: method if report.state is ReportState.AI_DRAFT and datatype != "ST" else "",
        }


def timestamp(moment: datetime, zone_required: bool = False) -> str:
    """A time as DTM: `YYYYMMDDHHMMSS[.SSSS][+ZZZZ]` (HL7 2.5.1 §2.A.22), cut to a tenth of a millisecond.

    A time without a zone is written without one (the scanner's wall clock); with `zone_required` it is a `ReportError`.
    """
    offset = moment.utcoffset()
    if offset is None and zone_required:
        raise ReportError("times of a message and of a status need a zone")
    text = f"{moment.year:04d}{moment:%m%d%H%M%S}"
    if moment.microsecond // 100:
        text += f".{moment.microsecond // 100:04d}"
    if offset is None:
        return text
    minutes = round(offset.total_seconds() / 60)
    return f"{text}{'-' if minutes < 0 else '+'}{abs(minutes) // 60:02d}{abs(minutes) % 60:02d}"


def _day(day: date | None) -> str:
    return f"{day.year:04d}{day:%m%d}" if day else ""


def _add(parent: Group, name: str, values: Values) -> None:
    segment = Segment(name, version=VERSION)
    _fill(segment, values)
    parent.add(segment)


def _fill(segment: Segment, values: Values) -> None:
    """Sets the fields of a segment by number; values are escaped, a list is the repetitions of a field."""
    for number, value in values.items():
        name = f"{segment.name}_{number}"
        if isinstance(value, str):
            if value:
                setattr(segment, name.lower(), value)  # replaces what hl7apy presets in MSH
            continue
        for repetition in value:
            field = Field(name, version=VERSION)
            field.value = repetition
            segment.add(field)
