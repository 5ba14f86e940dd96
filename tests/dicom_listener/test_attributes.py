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
