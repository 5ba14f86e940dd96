"""Read what choosing and placing a slice needs from a DICOM object, without its pixels."""

import io
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import pydicom
from pydicom.dataset import FileDataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_dataset
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian

from worker.core.errors import InvalidObjectError, StoreUnavailableError
from worker.imaging import deflated, slices
from worker.imaging.elements import Values
from worker.imaging.slices import Pixels, Slice

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2.1"
LEGACY_CONVERTED_ENHANCED_CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2.2"
CT_CLASSES = frozenset({CT_IMAGE, ENHANCED_CT_IMAGE, LEGACY_CONVERTED_ENHANCED_CT_IMAGE})

# fmt: off
_KEYWORDS = (
    *slices.KEYWORDS,
    "SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "Modality", "StudyDescription", "SeriesDescription",
    "PatientID", "BodyPartExamined", "ProtocolName", "StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber",
    "FrameOfReferenceUID", "InConcatenationNumber", "InConcatenationTotalNumber", "SamplesPerPixel",
    "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation",
)
# fmt: on
_TAGS = tuple(map(Tag, _KEYWORDS))
_LOSSY = frozenset(f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 53, 55))
"""Transfer syntaxes that are never without loss, whatever the header says."""
_DICOMDIR = "1.2.840.10008.1.3.10"
_STORAGE_CLASSES = "1.2.840.10008.5.1.4."
"""Start of the UIDs of what can be stored (PS3.4 B.5 and I.4)."""
_FIRST_GROUPS = (b"\x02\x00", b"\x08\x00", b"\x00\x08")
"""First bytes of objects without the prefix of DICOM files: file meta information, or a dataset of either byte order."""
_FLOAT_PIXEL_DATA, _PIXEL_DATA = 0x7FE00008, 0x7FE00010
_UNDEFINED_LENGTH = 0xFFFFFFFF
_MALFORMED = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    NotImplementedError,
    IndexError,
    BytesLengthException,
    zlib.error,
)
"""What pydicom raises for bytes that are no data elements."""
_LONGEST_DEFLATED_HEADER = 32 * deflated.MIB
"""Inflated bytes before the pixels; a thousand frames' functional groups take a twentieth of it."""
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"7z\xbc\xaf": "7z",
    b"\x28\xb5\x2f\xfd": "zstd",
}
"""First bytes of packed files and what they are."""
_NO_ELEMENTS = "The header of the file does not parse as DICOM. Send the object again."


@dataclass(frozen=True)
class Header:
    """One stored DICOM object without its pixels."""

    path: Path = field(repr=False)
    sop_class_uid: str
    sop_instance_uid: str
    study_uid: str
    series_uid: str
    patient_id: str = field(repr=False)
    modality: str
    series_number: int | None
    series_description: str = field(repr=False)
    study_description: str = field(repr=False)
    protocol_name: str = field(repr=False)
    body_part: str
    frame_of_reference: str
    photometric: str
    samples: int
    lossy: bool
    concatenation: str
    """UID of the concatenation (PS3.3 C.7.6.16.2.2.4) that this object is a part of; empty for a whole one."""
    concatenation_number: int
    """Which part, from 1; 0 for a whole object."""
    concatenation_total: int
    """How many parts there are; 0 when nobody says."""
    slices: tuple[Slice, ...]
    """One a frame; empty for an object without pixels."""


@dataclass(frozen=True)
class Unreadable:
    """A file that is no DICOM object, with the reason in one sentence."""

    path: Path = field(repr=False)
    reason: str


def read_header(path: Path | str) -> Header:
    """Read one DICOM file up to its pixels.

    An object written without the prefix of DICOM files, or without file meta information, is read too, as old archives and
    research have them; its transfer syntax shows in its bytes unless its pixels are compressed.

    Raises InvalidObjectError when the file is no DICOM object or ends before its pixel data begin, StoreUnavailableError
    when it cannot be opened.
    """
    path = Path(path)
    try:
        with _Reader(io.FileIO(path)) as file:
            return _read(path, file)
    except InvalidDicomError as error:
        raise InvalidObjectError(_foreign(path)) from error
    except (EOFError, struct.error) as error:
        raise InvalidObjectError("The file ends inside its header. Send the object again.") from error
    except OSError as error:
        if error.errno is None:  # pydicom's own, for bytes where an element should be
            raise InvalidObjectError(_NO_ELEMENTS) from None
        raise StoreUnavailableError(f"A stored object cannot be read: {error.strerror or 'input error'}.") from error
    except _MALFORMED:  # their texts quote the bytes, a patient's name among them, so the cause is cut off
        raise InvalidObjectError(_NO_ELEMENTS) from None


def _foreign(path: Path) -> str:
    """What a file without the prefix of DICOM files is instead, and what to do with it."""
    with path.open("rb") as file:
        start = file.read(262)
    if not start:
        return "The file is empty. Send the object again."
    packed = next((name for first, name in _PACKED.items() if start.startswith(first)), "")
    if packed or start.endswith(b"ustar"):
        return f"The file is packed ({packed or 'tar'}). Unpack it."
    if start[:2] in _FIRST_GROUPS:
        return (
            "The file has no DICM prefix (PS3.10 7.1) and holds no DICOM object without it. Take it out of the study, or "
            "write it again as a DICOM file, for example with dcmtk's dcmconv."
        )
    return "The file is not DICOM: it has no DICM prefix. Take it out of the study."


def read_headers(paths: Iterable[Path | str]) -> tuple[list[Header], list[Unreadable]]:
    """Read many files; what cannot be read as DICOM comes back with its reason and stops nothing.

    Raises StoreUnavailableError when a file cannot be opened.
    """
    headers: list[Header] = []
    unreadable: list[Unreadable] = []
    for path in sorted({Path(path) for path in paths}):
        try:
            headers.append(read_header(path))
        except InvalidObjectError as error:
            unreadable.append(Unreadable(path, str(error)))
    return headers, unreadable


class _Reader(io.BufferedReader):
    """A file that is never read to its end in one go: pydicom asks for that only to inflate a dataset, of any size."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            raise _DeflatedError
        return super().read(size)


class _DeflatedError(Exception):
    """The dataset that starts here is deflated."""


def _read(path: Path, file: BinaryIO) -> Header:
    deflated_from: int | None = None
    bare = _is_bare(file)
    try:
        dataset = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_TAGS), force=bare)
    except _DeflatedError:
        deflated_from = file.tell()
        file = io.BytesIO(deflated.inflate(path, deflated_from, 0, _LONGEST_DEFLATED_HEADER))
        dataset = _inflated_dataset(path, file)
        if file.tell() >= _LONGEST_DEFLATED_HEADER:
            raise InvalidObjectError(
                f"The deflated object holds more than {_LONGEST_DEFLATED_HEADER // deflated.MIB} MiB before its pixels. "
                "Send it in another transfer syntax."
            ) from None
    values = Values(dataset)
    if not values.text("SOPClassUID").startswith(_STORAGE_CLASSES):
        if bare:
            raise InvalidDicomError
        if not dataset.file_meta.get("TransferSyntaxUID"):
            raise InvalidObjectError(_NO_ELEMENTS)
    stored_class = str(dataset.file_meta.get("MediaStorageSOPClassUID", ""))
    if stored_class == _DICOMDIR:
        raise InvalidObjectError("The file is a DICOMDIR: it lists other files and is no object of a study.")
    sop_class = values.text("SOPClassUID") or stored_class
    sop_instance = values.text("SOPInstanceUID") or str(dataset.file_meta.get("MediaStorageSOPInstanceUID", ""))
    pixels = _locate_pixels(dataset, values, file, deflated_from)
    if pixels is None and not CT_CLASSES.isdisjoint((sop_class, stored_class)):
        raise InvalidObjectError(
            "The CT object has no pixel data: the file ends inside its header. Send the object again."
        )
    images = slices.slices_of(path, sop_instance, pixels, values) if pixels and sop_class in CT_CLASSES else ()
    return Header(
        path=path,
        sop_class_uid=sop_class,
        sop_instance_uid=sop_instance,
        study_uid=values.text("StudyInstanceUID"),
        series_uid=values.text("SeriesInstanceUID"),
        patient_id=values.words("PatientID"),
        modality=values.text("Modality"),
        series_number=values.integer("SeriesNumber"),
        series_description=values.words("SeriesDescription"),
        study_description=values.words("StudyDescription"),
        protocol_name=values.words("ProtocolName"),
        body_part=values.text("BodyPartExamined") or slices.anatomy(values),
        frame_of_reference=values.text("FrameOfReferenceUID"),
        photometric=values.text("PhotometricInterpretation"),
        samples=values.short("SamplesPerPixel") or 1,
        lossy=any(image.lossy for image in images) or (pixels is not None and pixels.transfer_syntax in _LOSSY),
        concatenation=values.text("ConcatenationUID"),
        concatenation_number=values.short("InConcatenationNumber") or 0,
        concatenation_total=values.short("InConcatenationTotalNumber") or 0,
        slices=images,
    )


def _is_bare(file: BinaryIO) -> bool:
    """Whether a file begins as a DICOM object without the prefix of DICOM files does."""
    start = file.read(132)
    file.seek(0)
    return start[:2] in _FIRST_GROUPS and not start.endswith(b"DICM")


def _inflated_dataset(path: Path, inflated: BinaryIO) -> FileDataset:
    """The elements of an inflated dataset up to its pixels; leaves `inflated` there."""
    elements = read_dataset(
        inflated,
        is_implicit_VR=False,
        is_little_endian=True,
        stop_when=lambda tag, *_: tag >= _FLOAT_PIXEL_DATA,
        specific_tags=list(_TAGS),
    )
    meta = pydicom.filereader.read_file_meta_info(path)
    return FileDataset(path, elements, file_meta=meta, is_implicit_VR=False, is_little_endian=True)


def _locate_pixels(dataset: FileDataset, values: Values, file: BinaryIO, deflated_from: int | None) -> Pixels | None:
    """Find Pixel Data behind the header just read; None when the object has none."""
    rows, columns = values.short("Rows"), values.short("Columns")
    little = bool(dataset.original_encoding[1])
    element = _element_at(file, little)
    if element is None or not rows or not columns:
        return None
    offset, size = element
    encapsulated = size == _UNDEFINED_LENGTH
    syntax = str(dataset.file_meta.get("TransferSyntaxUID") or "")
    if not syntax and encapsulated:
        raise InvalidObjectError("The file names no transfer syntax for its compressed pixels. Send the object again.")
    syntax = syntax or (ExplicitVRLittleEndian if little else ExplicitVRBigEndian)  # implicit VR stores pixels alike
    bits_stored = values.short("BitsStored") or values.short("BitsAllocated") or 16
    high_bit = values.short("HighBit")
    return Pixels(
        transfer_syntax=syntax,
        offset=offset,
        length=None if encapsulated else size,
        encapsulated=encapsulated,
        rows=rows,
        columns=columns,
        frames=max(1, values.integer("NumberOfFrames") or 1),
        bits_allocated=values.short("BitsAllocated") or 16,
        bits_stored=bits_stored,
        high_bit=bits_stored - 1 if high_bit is None else high_bit,
        signed=values.short("PixelRepresentation") == 1,
        big_endian=not little,
        deflated_from=deflated_from,
    )


def _element_at(file: BinaryIO, little: bool) -> tuple[int, int] | None:
    """Offset and length of the Pixel Data element that starts at the file's position; None at the end of the file.

    Whether it names its VR shows in its bytes, whatever the transfer syntax says: read as a length, all these VRs are odd,
    and no length is.
    """
    order = "<" if little else ">"
    start = file.tell()
    head = file.read(12)
    implicit = head[4:6] not in (b"OB", b"OW", b"UN")
    if len(head) < 8 or (len(head) < 12 and not implicit):
        return None
    group, element = struct.unpack_from(order + "HH", head)
    if (group << 16 | element) != _PIXEL_DATA:
        return None
    if implicit:
        return start + 8, struct.unpack_from(order + "I", head, 4)[0]
    return start + 12, struct.unpack_from(order + "I", head, 8)[0]
