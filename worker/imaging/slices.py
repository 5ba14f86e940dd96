"""One image of an object: where its pixels are, and what its functional groups or the object itself say about it."""

from dataclasses import dataclass, field
from pathlib import Path

from pydicom.tag import Tag

from worker.core.errors import InvalidObjectError
from worker.imaging.elements import Values

# fmt: off
KEYWORDS = (
    "ImageType", "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "AcquisitionDateTime", "StudyTime",
    "SeriesTime", "AcquisitionTime", "ContentTime", "KVP", "SliceThickness", "ConvolutionKernel",
    "NominalPercentageOfCardiacPhase", "AcquisitionNumber", "ImagePositionPatient", "ImageOrientationPatient",
    "TemporalPositionIdentifier", "StackID", "PixelSpacing", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "RescaleIntercept", "RescaleSlope", "RescaleType", "LossyImageCompression", "ConcatenationUID",
    "DimensionIndexSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
)
# fmt: on
"""Elements of an object that its slices are read from."""
_POSITIONAL = frozenset(map(Tag, ("InStackPositionNumber", "ImagePositionPatient", "SliceLocation")))
"""Dimensions along which the slices of one volume differ."""


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
    stack: str
    """Stack ID of a multi-frame object's frame."""
    dimensions: tuple[str, ...]
    """Dimension Index Values (PS3.3 C.7.6.17) but those that count positions."""
    lossy: bool
    """Whether the header says that its pixels were compressed with loss."""
    container: str
    """Multi-frame object it is a frame of, or the concatenation of such objects; empty for a single-frame object."""
    folder: Path | None = field(repr=False)
    """Where an object without Series Instance UID lies; None for any other."""


def anatomy(values: Values) -> str:
    """Anatomic regions of a multi-frame object (PS3.3 C.7.6.16.2.8), by their code meanings; empty when it names none."""
    shared = values.first_item("SharedFunctionalGroupsSequence")
    places = [shared] if shared else []
    places.extend(Values(item, values) for item in values.items("PerFrameFunctionalGroupsSequence"))
    meanings: dict[str, None] = {}
    for place in places:
        named = place.first_item("FrameAnatomySequence")
        region = named.first_item("AnatomicRegionSequence") if named else None
        if region:
            meanings.setdefault(region.words("CodeMeaning").upper())
    return " ".join(meanings)


def slices_of(path: Path, sop_instance: str, pixels: Pixels, values: Values) -> tuple[Slice, ...]:
    """Every image of an object. Raises InvalidObjectError when it describes another number of frames than it holds."""
    shared = values.first_item("SharedFunctionalGroupsSequence")
    frames = values.items("PerFrameFunctionalGroupsSequence")
    folder = None if values.text("SeriesInstanceUID") else path.parent
    if shared is None and not frames and pixels.frames == 1:
        return (_slice(path, sop_instance, pixels, 0, _Groups(values, None, None, ()), "", folder),)
    if len(frames) != pixels.frames:
        raise InvalidObjectError(
            "A multi-frame object describes another number of frames than it holds. Send it again."
        )
    container = values.text("ConcatenationUID") or sop_instance
    telling = _telling_dimensions(values)
    return tuple(
        _slice(
            path, sop_instance, pixels, index, _Groups(values, shared, Values(item, values), telling), container, folder
        )
        for index, item in enumerate(frames)
    )


def _telling_dimensions(values: Values) -> tuple[int, ...]:
    """Places in Dimension Index Values of what is no position."""
    pointers = [item.get("DimensionIndexPointer") for item in values.items("DimensionIndexSequence")]
    return tuple(index for index, pointer in enumerate(pointers) if pointer not in _POSITIONAL)


@dataclass(frozen=True)
class _Groups:
    """Looks a value up in the frame's functional groups, then in the shared ones, then in the object itself."""

    top: Values
    shared: Values | None
    frame: Values | None
    telling: tuple[int, ...]

    def holder(self, macro: str) -> Values:
        """The innermost place that has a functional group; the object itself when none has."""
        for place in (self.frame, self.shared):
            item = place.first_item(macro) if place else None
            if item is not None:
                return item
        return self.top

    def about(self, keyword: str, macro: str = "") -> Values:
        """The innermost place that states an element: its functional group, what a converter could not assign to one, the top.

        Converters of single-frame objects keep what no functional group holds in a sequence of its own (PS3.3 C.7.6.16.2.25).
        """
        if self.frame is None:  # a single-frame object: most are, and this is asked a dozen times of each
            return self.top
        for place, unassigned in (
            (self.frame, "UnassignedPerFrameConvertedAttributesSequence"),
            (self.shared, "UnassignedSharedConvertedAttributesSequence"),
        ):
            for name in filter(None, (macro, unassigned)):
                item = place.first_item(name) if place else None
                if item is not None and item.has(keyword):
                    return item
        return self.top

    def text(self, keyword: str, macro: str = "") -> str:
        return self.about(keyword, macro).text(keyword)


def _slice(
    path: Path, sop_instance: str, pixels: Pixels, frame: int, groups: _Groups, container: str, folder: Path | None
) -> Slice:
    measures = groups.holder("PixelMeasuresSequence")
    transformation = groups.holder("PixelValueTransformationSequence")
    content = groups.holder("FrameContentSequence")
    position = groups.holder("PlanePositionSequence").floats("ImagePositionPatient", 3)
    spacing = measures.floats("PixelSpacing", 2)
    dimensions = content.binaries("DimensionIndexValues")
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
        padding=_padding(groups, pixels.signed),
        image_type=groups.holder("CTImageFrameTypeSequence").texts("FrameType") or groups.top.texts("ImageType"),
        kernel=groups.text("ConvolutionKernel", "CTReconstructionSequence"),
        acquired=_acquired(groups),
        acquisition=content.binary("FrameAcquisitionNumber") or groups.text("AcquisitionNumber"),
        temporal_position=content.binary("TemporalPositionIndex")
        or groups.holder("TemporalPositionSequence").binary("TemporalPositionTimeOffset")
        or groups.text("TemporalPositionIdentifier"),
        cardiac_phase=groups.holder("CardiacSynchronizationSequence").binary("NominalPercentageOfCardiacPhase"),
        kilovolts=groups.text("KVP", "CTXRayDetailsSequence"),
        stack=content.text("StackID"),
        dimensions=tuple(dimensions[index] for index in groups.telling if index < len(dimensions)),
        lossy=groups.text("LossyImageCompression") == "01",
        container=container,
        folder=folder,
    )


def _padding(groups: _Groups, signed: bool) -> tuple[int, int] | None:
    place = groups.about("PixelPaddingValue")
    value = place.short("PixelPaddingValue", signed)
    if value is None:
        return None
    limit = place.short("PixelPaddingRangeLimit", signed)
    limit = value if limit is None else limit
    return min(value, limit), max(value, limit)


def _acquired(groups: _Groups) -> str:
    when = groups.text("FrameAcquisitionDateTime", "FrameContentSequence") or groups.text("AcquisitionDateTime")
    if when:
        return when
    for name in ("Acquisition", "Content", "Series", "Study"):
        date = groups.text(f"{name}Date")
        if date:
            return date + groups.text(f"{name}Time")
    return ""
