"""The few attributes read from the head of a data set, held to what pydicom reads of the whole."""

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset, Sequence, dcmread
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from dicom_listener import attributes, part10
from worker.core.errors import InvalidObjectError

SYNTAXES = [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian]


def encoded(data: Dataset, syntax: str) -> bytes:
    out = DicomBytesIO()
    out.is_implicit_VR, out.is_little_endian = syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
    write_dataset(out, data)
    return out.getvalue()


def described() -> Dataset:
    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.2.3.4"
    data.StudyInstanceUID, data.SeriesInstanceUID = "1.2.3", "1.2.3.1"
    data.PatientID = "MRN-1"
    return data


def test_every_readable_object_is_read_as_pydicom_reads_it(odd: Path) -> None:
    files = [
        p for p in sorted(odd.rglob("*.dcm")) if p.stem not in ("not_dicom", "ct_header_cut", "ct_undeclared_utf8")
    ]
    assert len(files) > 30
    for file in files:
        data = dcmread(file, stop_before_pixels=True)
        found = part10.read_file(file).attributes()
        for tag, name in attributes._WANTED.items():
            element = data.get(tag)
            expected = "" if element is None or element.value is None else element.value
            text = str(expected) if element is None or element.VM < 2 else "\\".join(map(str, expected))
            assert getattr(found, name) == text.strip(), f"{file.name} {name}"


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda s: s.name)
@pytest.mark.parametrize("undefined", [True, False])
def test_sequences_before_the_wanted_elements_are_passed_over(syntax: str, undefined: bool) -> None:
    data = described()
    inner, outer = Dataset(), Dataset()
    inner.PatientID, inner.StudyInstanceUID = "WRONG", "9.9.9"
    outer.ReferencedSOPInstanceUID = "1.1"
    outer.ReferencedStudySequence = Sequence([inner, inner])
    data.ReferencedImageSequence = Sequence([outer])
    for sequence in (data.ReferencedImageSequence, outer.ReferencedStudySequence):
        sequence.is_undefined_length = undefined
        for item in sequence:
            item.is_undefined_length_sequence_item = undefined
    data["ReferencedImageSequence"].is_undefined_length = undefined
    outer["ReferencedStudySequence"].is_undefined_length = undefined
    found = attributes.read(encoded(data, syntax), syntax, whole=True)
    assert found is not None
    assert (found.patient_id, found.study_uid) == ("MRN-1", "1.2.3")


def test_head_that_ends_too_early_asks_for_more() -> None:
    data = encoded(described(), ExplicitVRLittleEndian)
    assert attributes.read(data[:-4], ExplicitVRLittleEndian, whole=False) is None
    with pytest.raises(InvalidObjectError):
        attributes.read(data[:-4], ExplicitVRLittleEndian, whole=True)


ORDER = {0x00080050: "ACC-7", 0x00402016: "PLACER-7", 0x00402017: "FILLER-7"}


def ordered(*orders: dict[int, str], sequence: int = 0x00400275, undefined: bool = False) -> Dataset:
    """A data set whose order numbers stand in the items of a sequence of requests."""
    data, requests = described(), []
    for order in orders:
        item = Dataset()
        for tag, value in order.items():
            item.add_new(tag, "SH" if tag == 0x00080050 else "LO", value)
        item.is_undefined_length_sequence_item = undefined
        requests.append(item)
    data.add_new(sequence, "SQ", Sequence(requests))
    data[sequence].is_undefined_length = undefined
    data.add_new(0x7FE00010, "OW", bytes(512))
    return data


def order_numbers(data: Dataset, syntax: str = ExplicitVRLittleEndian) -> tuple[str, str, str]:
    found = attributes.read(encoded(data, syntax)[:-300], syntax, whole=False)
    assert found is not None
    return found.accession_number, found.placer, found.filler


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda s: s.name)
@pytest.mark.parametrize("undefined", [True, False])
@pytest.mark.parametrize("sequence", [0x00400275, 0x0040A370])
def test_order_numbers_that_only_a_request_names_are_read(syntax: str, undefined: bool, sequence: int) -> None:
    data = ordered(ORDER, sequence=sequence, undefined=undefined)
    assert order_numbers(data, syntax) == ("ACC-7", "PLACER-7", "FILLER-7")


def test_order_numbers_at_the_top_level_come_before_those_of_requests() -> None:
    data = ordered(ORDER)
    data.AccessionNumber, data.PlacerOrderNumberImagingServiceRequest = "ACC-1", "PLACER-1"
    assert order_numbers(data) == ("ACC-1", "PLACER-1", "FILLER-7")
    data.AccessionNumber = ""
    assert order_numbers(data)[0] == "ACC-7"


def test_image_of_two_orders_takes_what_they_share_and_belongs_to_neither_alone() -> None:
    assert order_numbers(ordered(ORDER, {**ORDER, 0x00402016: "PLACER-8"})) == ("ACC-7", "", "FILLER-7")


def code(value: str, scheme: str = "99SITE", meaning: str = "CT Chest", *, keyword: str = "CodeValue") -> Dataset:
    item = Dataset()
    setattr(item, keyword, value)
    item.CodingSchemeDesignator, item.CodeMeaning = scheme, meaning
    return item


def coded(data: Dataset, syntax: str = ExplicitVRLittleEndian) -> tuple[str, str, str]:
    found = attributes.read(encoded(data, syntax), syntax, whole=True)
    assert found is not None
    return found.procedure_code, found.procedure_system, found.procedure_text


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda s: s.name)
def test_procedure_code_of_the_request_comes_before_that_of_what_was_performed(syntax: str) -> None:
    data = ordered(ORDER, undefined=True)
    data.ProcedureCodeSequence = Sequence([code("PERFORMED")])
    assert coded(data, syntax) == ("PERFORMED", "99SITE", "CT Chest")
    data.RequestAttributesSequence[0].RequestedProcedureCodeSequence = Sequence([code("24627-2", "LN")])
    assert coded(data, syntax) == ("24627-2", "LN", "CT Chest")
    data.RequestedProcedureCodeSequence = Sequence([code("24627-2", "LN")])
    assert coded(data, syntax) == ("24627-2", "LN", "CT Chest")


def test_image_of_two_procedures_is_coded_as_neither() -> None:
    data = described()
    data.ProcedureCodeSequence = Sequence([code("1"), code("2")])
    assert coded(data) == ("", "", "")
    data.ProcedureCodeSequence = Sequence([code("1"), code("1")])
    assert coded(data)[0] == "1"


def test_code_may_be_long_has_its_character_set_and_is_none_without_a_value() -> None:
    data = described()
    data.SpecificCharacterSet = "ISO_IR 100"
    data.ProcedureCodeSequence = Sequence([code("", meaning="no value")])
    assert coded(data) == ("", "", "")
    sctid = "16858601000119104"
    data.ProcedureCodeSequence = Sequence([code(sctid, "SCT", "CT für Thorax", keyword="LongCodeValue")])
    assert coded(data) == (sctid, "SCT", "CT für Thorax")


def test_code_sequence_that_breaks_off_refuses_no_instance() -> None:
    data = described()
    raw = encoded(data, ExplicitVRLittleEndian)
    at = raw.index(struct.pack("<HH2s", 0x10, 0x20, b"LO"))
    broken = struct.pack("<HH2sHI", 0x08, 0x1032, b"SQ", 0, 16) + struct.pack("<HHI", 0xFFFE, 0xE000, 99) + b"\xff" * 8
    found = attributes.read(raw[:at] + broken + raw[at:], ExplicitVRLittleEndian, whole=True)
    assert found is not None
    assert (found.patient_id, found.procedure_code) == ("MRN-1", "")


def test_who_asked_and_why_is_read_from_the_request_and_the_visit_from_the_top_level() -> None:
    data = ordered({0x00401002: "cough", 0x00321032: "ASKS^ANN"})
    data.AdmissionID = "V-1"
    found = attributes.read(encoded(data, ExplicitVRLittleEndian), ExplicitVRLittleEndian, whole=True)
    assert found is not None
    asked = (found.requested_procedure_reason, found.requesting_physician, found.admission_id)
    assert asked == ("cough", "ASKS^ANN", "V-1")


def test_request_that_breaks_off_refuses_no_instance() -> None:
    data = ordered()
    raw = encoded(data, ExplicitVRLittleEndian)
    broken = raw.replace(struct.pack("<HH2sHI", 0x40, 0x275, b"SQ", 0, 0), b"")
    at = len(broken) - 512 - 12
    request = struct.pack("<HH2sHI", 0x40, 0x275, b"SQ", 0, 16) + struct.pack("<HHI", 0xFFFE, 0xE000, 99) + b"\xff" * 8
    found = attributes.read(broken[:at] + request + broken[at:], ExplicitVRLittleEndian, whole=True)
    assert found is not None
    assert (found.study_uid, found.placer) == ("1.2.3", "")


def test_priority_behind_a_long_header_is_read_when_more_of_it_is_there() -> None:
    data = described()
    data.add_new(0x00210010, "LO", "MU2 TEST")
    data.add_new(0x00211001, "OB", bytes(attributes.HEAD_BYTES))
    data.RequestedProcedurePriority = "STAT"
    raw = encoded(data, ExplicitVRLittleEndian)
    assert attributes.read(raw[: attributes.HEAD_BYTES], ExplicitVRLittleEndian, whole=False) is None
    found = attributes.read(raw, ExplicitVRLittleEndian, whole=True)
    assert found is not None
    assert found.requested_priority == "STAT"


def test_nesting_without_end_is_refused() -> None:
    item, sequence = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF), struct.pack("<HHI", 8, 0x1140, 0xFFFFFFFF)
    with pytest.raises(InvalidObjectError, match="nested"):
        attributes.read((sequence + item) * 2000, ImplicitVRLittleEndian, whole=True)


def test_wrong_transfer_syntax_is_noticed() -> None:
    data = encoded(described(), ImplicitVRLittleEndian)
    with pytest.raises(InvalidObjectError):
        attributes.read(data, ExplicitVRLittleEndian, whole=True)


@given(st.binary(max_size=300), st.sampled_from([*SYNTAXES, "1.2.840.10008.1.2.1.99"]), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_read_or_refused(data: bytes, syntax: str, whole: bool) -> None:
    try:
        attributes.read(data, syntax, whole=whole)
    except InvalidObjectError:
        return


@pytest.mark.parametrize(
    ("uid", "valid"),
    [
        ("1.2.840.10008.1.2", True),
        ("2.25.0123", True),
        ("1" * 64, True),
        ("1" * 65, False),
        ("", False),
        ("1..2", False),
        (".1", False),
        ("1.2/../3", False),
        ("../../etc/passwd", False),
        ("１.２", False),
        ("1.2\n", False),
    ],
)
def test_uid_is_digits_and_dots(uid: str, valid: bool) -> None:
    assert attributes.valid_uid(uid) is valid
