"""Enhanced and legacy converted multi-frame objects: what makes one stack of their frames, and what makes several."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from tests.imaging import synthetic
from tests.imaging.conftest import files_of
from tests.imaging.synthetic import Field, Scan
from worker.core.errors import GeometryError
from worker.imaging import headers, study
from worker.imaging.rules import ImagingRules
from worker.imaging.study import StudyVolumes

RULES = ImagingRules(decode_threads=2)
ONE = tuple(2.5 * index for index in range(14))
TWICE = Scan(depths=ONE + ONE)
"""Two scans of one place: the second half of the frames stands where the first half does."""
INTERLEAVED = Scan(depths=ONE + tuple(depth + 1.25 for depth in ONE))
"""Two scans whose slices alternate evenly, so that their geometry alone would pass for one scan of half the step."""
FAR_APART = Scan(depths=ONE + tuple(depth + 100 for depth in ONE), known=Field(gradient=(3.0, 5.0, -2.0)))
ABUTTING = Scan(depths=tuple(2.5 * index for index in range(28)), known=Field(gradient=(3.0, 5.0, -3.0)))
EXPLICIT = synthetic.ExplicitVRLittleEndian


def save(ds: Dataset, folder: Path) -> Path:
    return synthetic.save(ds, folder / ds.SOPInstanceUID, EXPLICIT)


def built(paths: Sequence[Path]) -> StudyVolumes:
    return study.assemble(study.examine(paths, RULES), RULES)


def parts(found: StudyVolumes) -> list[tuple[str, int]]:
    return [(verdict.part, verdict.images) for verdict in found.verdicts]


def by_half(name: str) -> Callable[[Dataset], None]:
    """Marks the first half of an object's frames as 1 and the second as 2, by nothing but one element."""

    def mark(ds: Dataset) -> None:
        frames = ds.PerFrameFunctionalGroupsSequence
        for index, frame in enumerate(frames):
            half = 1 + 2 * index // len(frames)
            if name == "StackID":
                frame.FrameContentSequence[0].StackID = str(half)
            elif name == "KVP":
                frame.CTXRayDetailsSequence = [synthetic.item(KVP=(80, 140)[half - 1])]
            elif name == "TemporalPositionTimeOffset":
                frame.TemporalPositionSequence = [synthetic.item(TemporalPositionTimeOffset=1.5 * half)]
            else:
                frame.FrameContentSequence[0].DimensionIndexValues = [index % 14 + 1, half]
        if name == "DimensionIndexValues":
            ds.DimensionOrganizationSequence = [synthetic.item(DimensionOrganizationUID=f"1.2.3.{n}") for n in (1, 2)]
            ds.DimensionIndexSequence = [
                synthetic.item(DimensionIndexPointer=Tag(pointer), DimensionOrganizationUID=f"1.2.3.{n}")
                for n, pointer in enumerate(("InStackPositionNumber", "ContrastBolusAgentNumber"), 1)
            ]

    return mark


TOLD_BY = {
    "StackID": "stack",
    "KVP": "tube voltage",
    "TemporalPositionTimeOffset": "temporal position",
    "DimensionIndexValues": "dimension",
}


@pytest.mark.parametrize("scan", [TWICE, INTERLEAVED, FAR_APART], ids=["twice", "interleaved", "far apart"])
@pytest.mark.parametrize("name", sorted(TOLD_BY))
def test_two_scans_in_one_object_are_two_parts_whatever_tells_their_frames_apart(
    name: str, scan: Scan, tmp_path: Path
) -> None:
    ds = synthetic.multiframe(scan)
    by_half(name)(ds)
    found = built([save(ds, tmp_path)])

    assert parts(found) == [(f"part {half} ({TOLD_BY[name]} {half})", 14) for half in (1, 2)]
    assert len(found.volumes) == (2 if scan is FAR_APART else 1)
    assert all(synthetic.largest_error(volume, scan.known) <= 0.51 for volume in found.volumes)


@pytest.mark.parametrize("name", ["StackID", "KVP", "DimensionIndexValues"])
def test_one_scan_that_is_only_labelled_in_two_stays_one_volume(name: str, tmp_path: Path) -> None:
    ds = synthetic.multiframe(ABUTTING)
    by_half(name)(ds)
    found = built([save(ds, tmp_path)])

    assert parts(found) == [("", 28)]
    assert synthetic.largest_error(found.volumes[0], ABUTTING.known) <= 0.51


def test_frames_of_two_orientations_in_one_object_are_two_parts(tmp_path: Path) -> None:
    axial, coronal = Scan(), Scan(column_axis=(1, 0, 0), row_axis=(0, 0, -1))
    objects = [synthetic.multiframe(scan) for scan in (axial, coronal)]
    for ds in objects:
        (shared,) = ds.SharedFunctionalGroupsSequence
        for frame in ds.PerFrameFunctionalGroupsSequence:
            frame.PlaneOrientationSequence = shared.PlaneOrientationSequence
        del shared.PlaneOrientationSequence
    both, other = objects
    both.PerFrameFunctionalGroupsSequence = [
        *both.PerFrameFunctionalGroupsSequence,
        *other.PerFrameFunctionalGroupsSequence,
    ]
    both.NumberOfFrames, both.PixelData = 28, both.PixelData + other.PixelData
    found = built([save(both, tmp_path)])

    assert [verdict.reason for verdict in found.verdicts] == [
        "axial, soft-tissue kernel, 2.5 mm thick every 2.50 mm, shows chest.",
        "coronal or oblique, not axial (90 degrees off).",
    ]
    assert synthetic.largest_error(found.volumes[0], axial.known) <= 0.51


def test_slope_and_intercept_may_differ_from_frame_to_frame(tmp_path: Path) -> None:
    scan, stored = Scan(), []
    ds = synthetic.multiframe(scan)
    for index, (frame, depth) in enumerate(zip(ds.PerFrameFunctionalGroupsSequence, scan.depths, strict=True)):
        own = replace(scan, slope=(1.0, 2.0)[index % 2], intercept=(-1024.0, -2000.0)[index % 2])
        (transformation,) = frame.PixelValueTransformationSequence
        transformation.RescaleSlope, transformation.RescaleIntercept = own.slope, own.intercept
        stored.append(own.stored(depth).tobytes())
    ds.PixelData = b"".join(stored)

    assert synthetic.largest_error(built([save(ds, tmp_path)]).volumes[0], scan.known) <= 1.01


def test_regions_that_only_the_frames_name_are_all_shown(tmp_path: Path) -> None:
    ds = synthetic.multiframe(Scan())
    del ds.BodyPartExamined, ds.SeriesDescription
    for index, frame in enumerate(ds.PerFrameFunctionalGroupsSequence):
        region = synthetic.item(CodeMeaning="Chest" if index < 7 else "Abdomen")
        frame.FrameAnatomySequence = [synthetic.item(AnatomicRegionSequence=[region])]

    assert built([save(ds, tmp_path)]).volumes[0].regions == ("chest", "abdomen")


@pytest.mark.parametrize("shift_mm", [0.0, 1.25])
def test_two_objects_of_one_series_at_one_place_are_two_parts_and_never_interleaved(
    shift_mm: float, tmp_path: Path
) -> None:
    paths, uids = [], synthetic.new_uids()
    for index in range(2):
        scan = Scan(corner=(-15.0, -16.0, -15.0 + index * shift_mm), known=Field(offset=-300.0 + 40 * index))
        ds = synthetic.multiframe(scan)
        ds.StudyInstanceUID, ds.SeriesInstanceUID = uids["study"], uids["series"]
        ds.FrameOfReferenceUID = uids["frame"]
        paths.append(save(ds, tmp_path))
    found = built(paths)

    assert parts(found) == [(f"part {half} (multi-frame object {half})", 14) for half in (1, 2)]
    assert len(found.volumes) == 1


def test_objects_of_two_ct_classes_in_one_series_are_told_apart_by_name(tmp_path: Path) -> None:
    uids = synthetic.new_uids()
    ds = synthetic.multiframe(Scan())
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = uids["study"], uids["series"], uids["frame"]
    found = built([*synthetic.write(Scan(), tmp_path, uids), save(ds, tmp_path)])

    assert parts(found) == [("CT Image", 14), ("Enhanced CT Image", 14)]
    assert found.verdicts[1].reason.startswith("reportable, but series 2 CT Image is preferred")


def concatenation(scan: Scan, sizes: Sequence[int], folder: Path) -> list[Path]:
    """The frames of one object sent in several, whose ends lie at each other's slices."""
    whole = synthetic.multiframe(scan)
    frames = list(whole.PerFrameFunctionalGroupsSequence)
    planes = np.frombuffer(whole.PixelData, np.uint16).reshape(len(frames), -1)
    paths, start = [], 0
    for number, size in enumerate(sizes, 1):
        ds = pydicom.Dataset(whole)
        ds.file_meta = pydicom.dataset.FileMetaDataset(whole.file_meta)
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = synthetic.generate_uid()
        ds.ConcatenationUID, ds.SOPInstanceUIDOfConcatenationSource = "1.2.3.77", "1.2.3.78"
        ds.InConcatenationNumber, ds.InConcatenationTotalNumber = number, len(sizes)
        ds.ConcatenationFrameOffsetNumber = start
        ds.PerFrameFunctionalGroupsSequence = frames[start : start + size]
        ds.NumberOfFrames, ds.PixelData = size, planes[start : start + size].tobytes()
        paths.append(save(ds, folder))
        start += size
    return paths


def test_a_concatenation_gives_the_volume_of_all_its_objects(tmp_path: Path) -> None:
    scan = Scan()
    found = built(concatenation(scan, (5, 6, 3), tmp_path)[::-1])

    assert parts(found) == [("", 14)]
    assert found.volumes[0].hu.shape == (14, 16, 20)
    assert synthetic.largest_error(found.volumes[0], scan.known) <= 0.51


def test_a_concatenation_whose_frames_alternate_between_its_objects_is_one_scan(tmp_path: Path) -> None:
    alternating = Scan(depths=ONE[::2] + ONE[1::2])

    assert parts(built(concatenation(alternating, (7, 7), tmp_path))) == [("", 14)]


def test_a_concatenation_that_lacks_its_end_is_refused_and_not_reported_as_a_shorter_scan(tmp_path: Path) -> None:
    scan = Scan(depths=tuple(2.5 * index for index in range(20)))
    found = built(concatenation(scan, (7, 7, 6), tmp_path)[:2])

    assert isinstance(found.refusal, GeometryError)
    assert str(found.refusal) == (
        "2 of the 3 objects of one concatenation arrived. Send the others and requeue the study."
    )


LEGACY = {"ConvolutionKernel": "B70f", "KVP": "120", "LossyImageCompression": "01", "PixelPaddingValue": -2000}


def test_what_a_converter_could_not_assign_to_a_functional_group_is_read(tmp_path: Path) -> None:
    ds = synthetic.multiframe(Scan(signed=True, intercept=0.0))
    unassigned = Dataset()
    for keyword, value in LEGACY.items():
        if keyword in ds:
            delattr(ds, keyword)
        unassigned.add_new(keyword, "SS", value) if keyword == "PixelPaddingValue" else setattr(
            unassigned, keyword, value
        )
    ds.SharedFunctionalGroupsSequence[0].UnassignedSharedConvertedAttributesSequence = [unassigned]
    for number, frame in enumerate(ds.PerFrameFunctionalGroupsSequence):
        frame.FrameContentSequence = []
        frame.UnassignedPerFrameConvertedAttributesSequence = [synthetic.item(AcquisitionNumber=number // 7)]
    header = headers.read_header(save(ds, tmp_path))

    assert {piece.kernel for piece in header.slices} == {"B70f"}
    assert {piece.kilovolts for piece in header.slices} == {"120"}
    assert {piece.padding for piece in header.slices} == {(-2000, -2000)}
    assert [piece.acquisition for piece in header.slices] == ["0"] * 7 + ["1"] * 7
    assert header.lossy


@pytest.mark.filterwarnings("ignore:The string:UserWarning")  # a PatientName of one word
@pytest.mark.parametrize("name", ["acrin_flt_thorax_49", "ge_head_tilt_gap_28"])
def test_a_real_series_converted_by_highdicom_gives_the_volume_of_its_slices(
    name: str, real_series: Path, tmp_path: Path
) -> None:
    legacy = pytest.importorskip("highdicom.legacy", reason="highdicom is not installed")
    files = files_of(real_series / name)
    originals = [pydicom.dcmread(path) for path in files]
    for ds in originals:
        ds.setdefault("AccessionNumber", "")
    legacy.LegacyConvertedEnhancedCTImage(
        originals,
        series_instance_uid="1.2.3.1",
        series_number=9,
        sop_instance_uid="1.2.3.2",
        instance_number=1,
    ).save_as(tmp_path / "legacy")
    single, multiple = built(files), built([tmp_path / "legacy"])

    assert np.array_equal(multiple.volumes[0].hu, single.volumes[0].hu)
    assert np.array_equal(multiple.volumes[0].affine, single.volumes[0].affine)
    assert multiple.volumes[0].repairs == single.volumes[0].repairs
    assert multiple.verdicts[0].reason == single.verdicts[0].reason
