"""The check of an ORU before it leaves, and its form for a reader."""

from pathlib import Path

import hl7 as python_hl7
import pytest

from tests.results.examples import SENT, destination, report
from worker.core.report import ReportState, Section, Sentence
from worker.results import hl7, hl7_reading

SAMPLES = Path(__file__).parents[2].parent / "shared" / "data" / "hl7"
sample_files = sorted(SAMPLES.rglob("*.hl7"))
needs_samples = pytest.mark.skipif(not sample_files, reason="the HL7 sample messages are not part of the repository")


def written(state: ReportState = ReportState.AI_DRAFT) -> bytes:
    return hl7.write(report(state), destination(), "C1", SENT)


@pytest.mark.parametrize("state", list(ReportState))
def test_what_is_written_is_valid(state):
    assert hl7.validate(written(state)) == ()


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (b"||R|||", b"||Q9|||", "OBX-11 is not in HL7 table 0085"),
        (b"|CT|R|", b"|CT|Q9|", "OBR-25 is not in HL7 table 0123"),
        (b"|19610409|F", b"|19610409|W", "PID-8 is not in HL7 table 0001"),
        (b"4711^^^CITY^MR", b"", "PID-3 is empty"),
        (b"24627-2^CT Chest^LN", b"", "OBR-4 is empty"),
        (b"|C1|", b"||", "MSH-10 is empty"),
        (b"PV1|1|I", b"PV1|1|", "PV1-2 is empty"),
        (b"|CT|R|", b"|CT|X|", "not one row of the status table"),
        (b"PID|1|", b"ZZZ|1|", "PID is missing"),
        (b"ORU^R01^ORU_R01", b"ORU^R01", "MSH-9 and MSH-12"),
        (b"effusion", b"effu\x0bsion", "control character"),
        (b"effusion", b"effu\xffsion", "character set"),
        (b"MSH|^~\\&|", b"MSH#^~\\&#", "does not start with MSH"),
    ],
)
def test_broken_message_is_named_by_its_field(old, new, problem):
    payload = written()
    assert old in payload
    assert any(problem in sentence for sentence in hl7.validate(payload.replace(old, new)))


@pytest.mark.parametrize("status", [b"F", b"C"])
def test_final_status_without_a_signer_is_a_problem(status):
    payload = written().replace(b"|CT|R|", b"|CT|" + status + b"|").replace(b"||R|||", b"||" + status + b"|||")
    assert "F or C without a signer in OBR-32" in hl7.validate(payload)


def test_missing_segment_is_found_by_hl7apy():
    segments = written().split(b"\r")
    without_request = b"\r".join(segment for segment in segments if not segment.startswith(b"OBR"))
    assert hl7.validate(without_request)


def test_problems_hold_nothing_of_the_patient():
    payload = written().replace(b"|CT|R|", b"|CT|Rossi|").replace(b"PV1|1|I", b"PV1|Rossi^4711|")
    problems = hl7.validate(payload)
    assert problems and not any("Rossi" in sentence or "4711" in sentence for sentence in problems)


def test_readable_form_names_fields_and_shows_the_text_unescaped():
    text = hl7.readable(
        hl7.write(report(sentences=(Sentence(Section.FINDINGS, "A & B\nC"),)), destination(), "C1", SENT)
    )
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "25 Result status R" in lines
    assert "5 Observation value A & B" in lines
    assert "C" in lines


def test_readable_form_cannot_act_on_a_terminal():
    shown = hl7.readable("MSH|^~\\&|A\rOBX|1|TX|||\\X1B\\[2J\x9b31m\x1b]0;x".encode())
    assert not any(ord(character) < 32 and character != "\n" for character in shown)
    assert "\x9b" not in shown and "␛[2J" in shown


@needs_samples
@pytest.mark.parametrize("path", sample_files, ids=lambda path: path.stem)
def test_readable_form_shows_what_another_parser_reads_of_a_foreign_message(path):
    payload = path.read_bytes()
    message = python_hl7.parse(payload.replace(b"\r\n", b"\r").replace(b"\n", b"\r"), encoding="latin-1")
    shown = hl7.readable(payload)
    header = message.segment("MSH")
    assert str(header[10]) in shown and str(header[3]) in shown
    shown_segments = [line for line in shown.splitlines() if not line.startswith(" ")]
    assert shown_segments == [str(segment[0]) for segment in message if str(segment[0]).strip()]


@needs_samples
def test_imaging_report_of_another_sender_has_the_same_study_observation():
    payload = (SAMPLES / "mpl" / "oru_r01_imaging_report_text_v251.hl7").read_bytes()
    assert b"OBX|1|ST|113014^DICOM Study^DCM||" in payload
    assert b"OBX|1|ST|113014^DICOM Study^DCM||" in written()


def test_field_names_are_those_of_the_standard():
    assert hl7_reading.readable(b"MSH|^~\\&|A").splitlines()[3].split() == ["3", "Sending", "application", "A"]
