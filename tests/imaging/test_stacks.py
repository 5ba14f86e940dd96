"""What makes one stack and what makes several."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.imaging import synthetic
from tests.imaging.studies import RULES, Study
from tests.imaging.synthetic import Field, Scan
from worker.core.errors import GeometryError
from worker.imaging import series, study, volume
from worker.imaging.headers import read_header


def test_two_phases_in_one_series_are_two_parts_and_one_is_chosen(a_study: Study) -> None:
    uid = a_study.add(AcquisitionNumber=1, AcquisitionTime="120000")
    first = [header.sop_instance_uid for header in a_study.headers]
    synthetic.write(
        Scan(attributes={"AcquisitionNumber": 2, "AcquisitionTime": "120100", "SeriesNumber": 1}),
        a_study.folder / "late",
        {**a_study.uids, "series": uid},
    )
    a_study.headers.extend(read_header(path) for path in sorted((a_study.folder / "late").iterdir()))
    choice = a_study.choose()

    assert [(verdict.part, verdict.chosen) for verdict in choice.verdicts] == [
        ("part 1 (acquisition 1)", False),
        ("part 2 (acquisition 2)", True),
    ]
    assert len(choice.selected) == 1
    assert not {piece.sop_instance_uid for piece in choice.selected[0].slices} & set(first)


def test_acquisitions_that_only_count_rotations_stay_one_volume(a_study: Study) -> None:
    scan, uids = Scan(), {**a_study.uids, "series": synthetic.generate_uid()}
    for number, depth in enumerate(scan.depths):
        ds = synthetic.dataset(scan, depth, uids, number)
        ds.AcquisitionNumber = number // 2
        a_study.headers.append(read_header(synthetic.save(ds, a_study.folder / str(number), scan.syntax)))

    assert [len(stack.slices) for stack in a_study.choose().selected] == [14]


def add_two_acquisitions(a_study: Study, second_mm: float) -> None:
    """One series of two acquisitions; the lowest slice of the second lies at `second_mm`."""
    uid = a_study.add(AcquisitionNumber=1)
    scan = Scan(corner=(-15.0, -16.0, second_mm), attributes={"AcquisitionNumber": 2, "SeriesNumber": 1})
    paths = synthetic.write(scan, a_study.folder / "second", {**a_study.uids, "series": uid})
    a_study.headers.extend(map(read_header, paths))


def test_two_overlapping_breath_holds_are_not_interleaved(a_study: Study) -> None:
    add_two_acquisitions(a_study, second_mm=-4.0)

    assert sorted(verdict.images for verdict in a_study.choose().verdicts) == [14, 14]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"AcquisitionNumber": 1}, {"AcquisitionNumber": 2}, "acquisition"),
        ({"AcquisitionTime": "120000"}, {"AcquisitionTime": "120100"}, "acquisition time"),
        ({"KVP": 80}, {"KVP": 140}, "tube voltage"),
        ({"TemporalPositionIdentifier": 1}, {"TemporalPositionIdentifier": 2}, "temporal position"),
    ],
)
@pytest.mark.parametrize("start_mm", [-13.75, -14.2])
def test_two_scans_of_the_same_tissue_are_not_interleaved_even_where_their_slices_alternate_evenly(
    first: dict[str, object], second: dict[str, object], words: str, start_mm: float, a_study: Study
) -> None:
    uid = a_study.add(**first)
    paths = synthetic.write(
        Scan(corner=(-15.0, -16.0, start_mm), attributes={"SeriesNumber": 1, **second}),
        a_study.folder / "second",
        {**a_study.uids, "series": uid},
    )
    a_study.headers.extend(map(read_header, paths))
    choice = a_study.choose()

    assert [(verdict.part, verdict.images) for verdict in choice.verdicts] == [
        (f"part 1 ({words} 1)", 14),
        (f"part 2 ({words} 2)", 14),
    ]
    assert len(choice.selected) == 1


def test_pictures_that_are_never_reported_are_told_apart_from_the_slices_beside_them(a_study: Study) -> None:
    uid = a_study.add()
    paths = synthetic.write(
        Scan(attributes={"SeriesNumber": 1, "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "MIP"]}),
        a_study.folder / "projections",
        {**a_study.uids, "series": uid},
    )
    a_study.headers.extend(map(read_header, paths))

    assert sorted((verdict.images, verdict.reason) for verdict in a_study.choose().verdicts) == [
        (14, "axial, soft-tissue kernel, 2.5 mm thick every 2.50 mm, shows chest."),
        (14, "image type MIP."),
    ]


def test_two_parts_of_the_body_far_apart_in_one_series_are_two_volumes(a_study: Study) -> None:
    add_two_acquisitions(a_study, second_mm=-90.0)

    assert sorted((verdict.part, verdict.chosen) for verdict in a_study.choose().verdicts) == [
        ("part 1 (acquisition 1)", True),
        ("part 2 (acquisition 2)", True),
    ]


def test_different_orientation_matrix_and_kernel_make_parts_of_a_series(a_study: Study) -> None:
    uid = a_study.add()
    for index, scan in enumerate(
        (
            Scan(rows=18),
            Scan(column_axis=(1, 0, 0), row_axis=(0, 0, -1)),
            Scan(attributes={"ConvolutionKernel": "BONE"}),
        )
    ):
        own = replace(scan, attributes={"SeriesNumber": 1, **scan.attributes})
        paths = synthetic.write(own, a_study.folder / f"more{index}", {**a_study.uids, "series": uid})
        a_study.headers.extend(map(read_header, paths))
    choice = a_study.choose()

    assert [verdict.part for verdict in choice.verdicts] == ["part 1", "part 2", "part 3", "part 4"]
    assert [verdict.images for verdict in choice.verdicts] == [14] * 4


WIDE = Scan(spacing=(8.0, 8.0), known=Field(gradient=(1.0, 1.0, -7.0)))
"""160 mm across, so that a turned slice moves its corners."""


def turned(scan: Scan, radians: Sequence[float], study_under_test: Study) -> None:
    """Adds one series whose slices are each turned in their plane by an own angle."""
    uids = {**study_under_test.uids, "series": synthetic.generate_uid()}
    for number, (depth, angle) in enumerate(zip(scan.depths, radians, strict=True)):
        ds = synthetic.dataset(scan, depth, uids, number)
        ds.ImageOrientationPatient = [
            f"{value:.9g}" for value in (math.cos(angle), math.sin(angle), 0, -math.sin(angle), math.cos(angle), 0)
        ]
        path = synthetic.save(ds, study_under_test.folder / str(number), scan.syntax)
        study_under_test.headers.append(read_header(path))


@pytest.mark.parametrize(
    "radians", [[0.003 * (n % 2) for n in range(14)], [0.0002 * n for n in range(14)], [0.003] + [0.0] * 13]
)
def test_a_scan_whose_orientation_jitters_is_never_reported_in_part(radians: list[float], a_study: Study) -> None:
    turned(WIDE, radians, a_study)
    (stack,) = a_study.choose().selected
    built = volume.build(stack.slices, RULES)

    assert built.hu.shape[0] == 14
    assert re.fullmatch(
        r"slices turned against each other were put in one orientation, which moved corners by up to 0\.\d mm",
        built.repairs[0],
    )
    assert synthetic.largest_error(built, WIDE.known) <= 2.0


def test_a_scan_whose_orientation_jitters_by_more_than_a_millimetre_is_refused(a_study: Study) -> None:
    turned(WIDE, [0.0099 * (n % 2) for n in range(14)], a_study)

    assert isinstance(a_study.choose().refusal(), GeometryError)
    assert re.search(r"would move their corners by up to 1\.\d mm", a_study.choose().verdicts[0].reason)


def test_two_scans_one_above_another_in_slightly_different_orientations_are_two_parts(a_study: Study) -> None:
    scan = replace(WIDE, depths=tuple(2.5 * n for n in range(28)), known=Field(gradient=(1.0, 1.0, -3.0)))
    turned(scan, [0.009 * (n >= 14) for n in range(28)], a_study)

    assert [(verdict.part, verdict.images) for verdict in a_study.choose().verdicts] == [("part 1", 14), ("part 2", 14)]


def test_a_second_image_type_of_the_same_kind_does_not_split_a_series(a_study: Study) -> None:
    scan, uids = Scan(), {**a_study.uids, "series": synthetic.generate_uid()}
    for number, depth in enumerate(scan.depths):
        ds = synthetic.dataset(scan, depth, uids, number)
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"] + ["ADD"] * (number % 2)
        a_study.headers.append(read_header(synthetic.save(ds, a_study.folder / str(number), scan.syntax)))

    assert [len(stack.slices) for stack in a_study.choose().selected] == [14]


def test_objects_without_uids_are_grouped_by_what_they_have(a_study: Study) -> None:
    a_study.add(SeriesInstanceUID="", StudyInstanceUID="", SeriesDescription="CHEST A")
    a_study.add(SeriesInstanceUID="", StudyInstanceUID="", SeriesDescription="CHEST B")
    choice = a_study.choose()

    assert [verdict.images for verdict in choice.verdicts] == [14, 14]
    assert len(choice.selected) == 1


def test_series_without_any_uid_are_built_each_from_its_own_slices(a_study: Study) -> None:
    nameless = {"SOPInstanceUID": "", "SeriesInstanceUID": "", "StudyInstanceUID": "", "FrameOfReferenceUID": ""}
    a_study.add(**nameless)
    a_study.add(
        Scan(corner=(-15.0, -16.0, -48.0)), BodyPartExamined="ABDOMENPELVIS", SeriesDescription="AX", **nameless
    )
    headers = [
        replace(header, sop_instance_uid="", slices=tuple(replace(p, sop_instance_uid="") for p in header.slices))
        for header in a_study.headers
    ]
    found = study.assemble(study.Examination(tuple(headers), series.choose(headers, RULES), ()), RULES)

    assert {(volume.series_number, volume.affine[2, 3]) for volume in found.volumes} == {(1, -15.0), (2, -48.0)}


def test_objects_without_a_study_uid_are_one_study_a_patient(a_study: Study) -> None:
    for patient in "AB":
        a_study.add(StudyInstanceUID="", PatientID=patient)

    assert [(uid, len(headers)) for uid, headers in series.studies(a_study.headers)] == [("", 14), ("", 14)]


def test_phases_of_a_multi_frame_object_are_told_apart_by_their_temporal_position(tmp_path: Path) -> None:
    scan = Scan(depths=tuple(2.5 * (index % 14) for index in range(28)))
    ds = synthetic.multiframe(scan)
    for index, frame in enumerate(ds.PerFrameFunctionalGroupsSequence):
        frame.FrameContentSequence[0].TemporalPositionIndex = 1 + index // 14
    header = read_header(synthetic.save(ds, tmp_path / "phases", synthetic.ExplicitVRLittleEndian))

    assert [(verdict.part, verdict.images) for verdict in series.choose([header], RULES).verdicts] == [
        ("part 1 (temporal position 1)", 14),
        ("part 2 (temporal position 2)", 14),
    ]
