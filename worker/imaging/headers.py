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

from worker.core.errors import InvalidObjectError, StoreUnavailableError
from worker.imaging import deflated
from worker.imaging.elements import Values

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2.1"
LEGACY_CONVERTED_ENHANCED_CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2.2"
CT_CLASSES = frozenset({CT_IMAGE, ENHANCED_CT_IMAGE, LEGACY_CONVERTED_ENHANCED_CT_IMAGE})

# fmt: off
_KEYWORDS = (
    "SpecificCharacterSet", "ImageType", "SOPClassUID", "SOPInstanceUID", "StudyDate", "SeriesDate",
    "AcquisitionDate", "ContentDate", "AcquisitionDateTime", "StudyTime", "SeriesTime", "AcquisitionTime",
    "ContentTime", "Modality", "StudyDescription", "SeriesDescription", "PatientID", "BodyPartExamined", "KVP",
    "SliceThickness", "ProtocolName", "ConvolutionKernel", "NominalPercentageOfCardiacPhase",
    "StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber", "AcquisitionNumber",
    "ImagePositionPatient", "ImageOrientationPatient", "TemporalPositionIdentifier", "FrameOfReferenceUID",
    "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns",
    "PixelSpacing", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue",
    "PixelPaddingRangeLimit", "RescaleIntercept", "RescaleSlope", "RescaleType", "LossyImageCompression",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
)
# fmt: on
_TAGS = {keyword: Tag(keyword) for keyword in _KEYWORDS}
_LOSSY = frozenset(f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 53, 55))
"""Transfer syntaxes that are never without loss, whatever the header says."""
_DICOMDIR = "1.2.840.10008.1.3.10"
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
_NO_ELEMENTS = "The header of the file does not parse as DICOM. Send the object again."


@dataclass(frozen=True)
class Pixels:
    """Where and how an object's Pixel Data (7FE0,0010) is stored."""

    transfer_syntax: str
    offset: int
    """First byte of the value in the file, or in the inflated dataset of a deflated object."""
    length: int | None
    """Bytes of the value; None for encapsulated fragments."""
    encapsulated: bool
    rows: int
    columns: int
    frames: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    big_endian: bool
    deflated_from: int | None = None
    """First byte of the deflated dataset in the file; None for any other object."""


@dataclass(frozen=True)
class Slice:
    """One image: a single-frame object, or one frame of a multi-frame object. None marks an absent or unreadable value."""

    path: Path = field(repr=False)
    frame: int
    """Index in the object, from 0."""
    sop_instance_uid: str
    pixels: Pixels
    position: tuple[float, float, float] | None
    """Image Position (Patient): centre of the first voxel, LPS millimetres."""
    orientation: tuple[float, ...] | None
    """Image Orientation (Patient): direction of growing columns, then of growing rows, LPS."""
    spacing: tuple[float, float] | None
    """Pixel Spacing: between rows, between columns, millimetres."""
    thickness_mm: float | None
    slope: float | None
    intercept: float | None
    rescale_type: str
    padding: tuple[int, int] | None
    """Stored values from .. to that mean "no data here"."""
    image_type: tuple[str, ...]
    kernel: str
    acquired: str
    """YYYYMMDDHHMMSS.ffffff as far as known; sorts by time."""
    acquisition: str
    temporal_position: str
    cardiac_phase: str
    kilovolts: str


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
    slices: tuple[Slice, ...]
    """One a frame; empty for an object without pixels."""


@dataclass(frozen=True)
class Unreadable:
    """A file that is no DICOM object, with the reason in one sentence."""

    path: Path = field(repr=False)
    reason: str


def read_header(path: Path | str) -> Header:
    """Read one DICOM file up to its pixels.

    Raises InvalidObjectError when the file is no DICOM object or ends before its pixel data begin, StoreUnavailableError
    when it cannot be opened.
    """
    path = Path(path)
    try:
        with _Reader(io.FileIO(path)) as file:
            return _read(path, file)
    except InvalidDicomError as error:
        raise InvalidObjectError("The file is not DICOM: it has no DICM prefix. Take it out of the study.") from error
    except (EOFError, struct.error) as error:
        raise InvalidObjectError("The file ends inside its header. Send the object again.") from error
    except OSError as error:
        if error.errno is None:  # pydicom's own, for bytes where an element should be
            raise InvalidObjectError(_NO_ELEMENTS) from None
        raise StoreUnavailableError(f"A stored object cannot be read: {error.strerror or 'input error'}.") from error
    except _MALFORMED:  # their texts quote the bytes, a patient's name among them, so the cause is cut off
        raise InvalidObjectError(_NO_ELEMENTS) from None


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
    try:
        dataset = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_TAGS.values()))
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
    slices = _slices(path, sop_instance, pixels, values) if pixels and sop_class in CT_CLASSES else ()
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
        body_part=values.text("BodyPartExamined") or _anatomy(values),
        frame_of_reference=values.text("FrameOfReferenceUID"),
        photometric=values.text("PhotometricInterpretation"),
        samples=values.short("SamplesPerPixel") or 1,
        lossy=values.text("LossyImageCompression") == "01" or (pixels is not None and pixels.transfer_syntax in _LOSSY),
        slices=slices,
    )


def _inflated_dataset(path: Path, inflated: BinaryIO) -> FileDataset:
    """The elements of an inflated dataset up to its pixels; leaves `inflated` there."""
    elements = read_dataset(
        inflated,
        is_implicit_VR=False,
        is_little_endian=True,
        stop_when=lambda tag, *_: tag >= _FLOAT_PIXEL_DATA,
        specific_tags=list(_TAGS.values()),
    )
    meta = pydicom.filereader.read_file_meta_info(path)
    return FileDataset(path, elements, file_meta=meta, is_implicit_VR=False, is_little_endian=True)


def _locate_pixels(dataset: FileDataset, values: Values, file: BinaryIO, deflated_from: int | None) -> Pixels | None:
    """Find Pixel Data behind the header just read; None when the object has none."""
    syntax = str(dataset.file_meta.get("TransferSyntaxUID", ""))
    if not syntax:
        raise InvalidObjectError("The file names no transfer syntax. Send the object again.")
    rows, columns = values.short("Rows"), values.short("Columns")
    implicit, little = dataset.original_encoding
    element = _element_at(file, bool(implicit), bool(little))
    if element is None or not rows or not columns:
        return None
    offset, size = element
    encapsulated = size == _UNDEFINED_LENGTH
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


def _element_at(file: BinaryIO, implicit: bool, little: bool) -> tuple[int, int] | None:
    """Offset and length of the Pixel Data element that starts at the file's position; None at the end of the file."""
    order = "<" if little else ">"
    start = file.tell()
    head = file.read(12)
    if len(head) < 8 or (len(head) < 12 and not implicit):
        return None
    group, element = struct.unpack_from(order + "HH", head)
    if (group << 16 | element) != _PIXEL_DATA:
        return None
    if implicit:
        return start + 8, struct.unpack_from(order + "I", head, 4)[0]
    return start + 12, struct.unpack_from(order + "I", head, 8)[0]


def _anatomy(values: Values) -> str:
    """Anatomic region of a multi-frame object (PS3.3 C.7.6.16.2.8), by its code meaning."""
    shared = values.first_item("SharedFunctionalGroupsSequence")
    anatomy = shared.first_item("FrameAnatomySequence") if shared else None
    region = anatomy.first_item("AnatomicRegionSequence") if anatomy else None
    return region.words("CodeMeaning").upper() if region else ""


def _slices(path: Path, sop_instance: str, pixels: Pixels, values: Values) -> tuple[Slice, ...]:
    shared = values.first_item("SharedFunctionalGroupsSequence")
    frames = values.items("PerFrameFunctionalGroupsSequence")
    if shared is None and not frames and pixels.frames == 1:
        return (_slice(path, sop_instance, pixels, 0, _Groups(values, None, None)),)
    if len(frames) != pixels.frames:
        raise InvalidObjectError("A multi-frame object describes another number of frames than it holds.")
    return tuple(
        _slice(path, sop_instance, pixels, index, _Groups(values, shared, Values(item, values)))
        for index, item in enumerate(frames)
    )


@dataclass(frozen=True)
class _Groups:
    """Looks a value up in the frame's functional groups, then in the shared ones, then in the object itself."""

    top: Values
    shared: Values | None
    frame: Values | None

    def holder(self, macro: str) -> Values:
        for place in (self.frame, self.shared):
            item = place.first_item(macro) if place else None
            if item is not None:
                return item
        return self.top


def _slice(path: Path, sop_instance: str, pixels: Pixels, frame: int, groups: _Groups) -> Slice:
    measures = groups.holder("PixelMeasuresSequence")
    transformation = groups.holder("PixelValueTransformationSequence")
    kind = groups.holder("CTImageFrameTypeSequence")
    content = groups.holder("FrameContentSequence")
    top = groups.top
    position = groups.holder("PlanePositionSequence").floats("ImagePositionPatient", 3)
    spacing = measures.floats("PixelSpacing", 2)
    kernel = groups.holder("CTReconstructionSequence").text("ConvolutionKernel") or top.text("ConvolutionKernel")
    return Slice(
        path=path,
        frame=frame,
        sop_instance_uid=sop_instance,
        pixels=pixels,
        position=(position[0], position[1], position[2]) if position else None,
        orientation=groups.holder("PlaneOrientationSequence").floats("ImageOrientationPatient", 6),
        spacing=(spacing[0], spacing[1]) if spacing else None,
        thickness_mm=measures.decimal("SliceThickness"),
        slope=transformation.decimal("RescaleSlope"),
        intercept=transformation.decimal("RescaleIntercept"),
        rescale_type=transformation.text("RescaleType"),
        padding=_padding(top, pixels.signed),
        image_type=kind.texts("FrameType") or top.texts("ImageType"),
        kernel=kernel,
        acquired=_acquired(content, top),
        acquisition=content.binary("FrameAcquisitionNumber") or top.text("AcquisitionNumber"),
        temporal_position=content.binary("TemporalPositionIndex") or top.text("TemporalPositionIdentifier"),
        cardiac_phase=groups.holder("CardiacSynchronizationSequence").binary("NominalPercentageOfCardiacPhase"),
        kilovolts=top.text("KVP"),
    )


def _padding(top: Values, signed: bool) -> tuple[int, int] | None:
    value = top.short("PixelPaddingValue", signed)
    if value is None:
        return None
    limit = top.short("PixelPaddingRangeLimit", signed)
    limit = value if limit is None else limit
    return min(value, limit), max(value, limit)


def _acquired(content: Values, top: Values) -> str:
    when = content.text("FrameAcquisitionDateTime") or top.text("AcquisitionDateTime")
    if when:
        return when
    for name in ("Acquisition", "Content", "Series", "Study"):
        date = top.text(f"{name}Date")
        if date:
            return date + top.text(f"{name}Time")
    return ""
