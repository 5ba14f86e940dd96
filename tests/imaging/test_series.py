"""Which series is reported, and why not each other."""

import doctest
import random
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from tests.imaging.studies import RULES, Study, chosen, reason
from tests.imaging.synthetic import Scan
from worker.core.errors import GeometryError, NothingToReportError, PatientMismatchError, PixelDataError, SettingsError
from worker.imaging import kernels, regions, series
from worker.imaging.headers import read_header
from worker.imaging.rules import ImagingRules
from worker.imaging.series import Cause


def test_a_soft_tissue_kernel_goes_before_lung_and_bone(a_study: Study) -> None:
    lung = a_study.add(ConvolutionKernel="LUNG", SliceThickness=3.0)
    soft = a_study.add(ConvolutionKernel="B31f", SliceThickness=5.0)
    bone = a_study.add(ConvolutionKernel="BONEPLUS", SliceThickness=3.0)
    choice = a_study.choose()

    assert chosen(choice) == [soft]
    assert reason(choice, lung) == reason(choice, bone)
    assert reason(choice, lung) == "reportable, but series 2 is preferred: its kernel suits better."


@pytest.mark.parametrize(
    ("kernel", "description", "expected"),
    [
        ("B10f", "", "soft"),
        ("Br40d\\3", "", "soft"),
        ("Br64", "", "lung"),
        ("Bl57d", "", "lung"),
        ("Hr60s", "", "bone"),
        ("FC51", "", "lung"),
        ("FC18", "", "soft"),
        ("FC30", "", "bone"),
        ("STD+", "", "soft"),
        ("STANDARD", "", "soft"),
        ("EDGE", "", "bone"),
        ("YB", "", "lung"),
        ("UB", "", "soft"),
        ("None", "Poumon 1mm", "lung"),
        ("", "Mediastinum", "soft"),
        ("", "axial", "unknown"),
    ],
)
def test_kernels_are_understood_by_the_vendors_names(kernel: str, description: str, expected: str) -> None:
    assert kernels.kernel_class(kernel, description) == expected


def test_the_thickness_nearest_the_wanted_wins_and_of_two_as_near_the_thinner(a_study: Study) -> None:
    thick = a_study.add(SliceThickness=5.0)
    near = a_study.add(SliceThickness=2.0)
    thin = a_study.add(SliceThickness=1.0)

    assert chosen(a_study.choose()) == [near]
    assert chosen(a_study.choose(ImagingRules(wanted_slice_mm=5.0))) == [thick]
    assert chosen(a_study.choose(ImagingRules(wanted_slice_mm=1.5))) == [thin]


def test_a_complete_series_goes_before_one_with_a_missing_slice(a_study: Study) -> None:
    a_study.add(Scan(depths=tuple(3.0 * index for index in range(14) if index != 5)), SliceThickness=3.0)
    complete = a_study.add(Scan(depths=tuple(5.0 * index for index in range(13))), SliceThickness=5.0)

    assert chosen(a_study.choose()) == [complete]


def test_original_goes_before_derived_and_the_latest_before_the_earlier(a_study: Study) -> None:
    a_study.add(ImageType=["DERIVED", "PRIMARY", "AXIAL"], AcquisitionTime="130000")
    a_study.add(AcquisitionTime="120000")
    latest = a_study.add(AcquisitionTime="120500")

    assert chosen(a_study.choose()) == [latest]


@pytest.mark.parametrize(
    ("better", "worse", "why"),
    [
        ({"ConvolutionKernel": "B31f"}, {"ConvolutionKernel": "B70f"}, "its kernel suits better"),
        ({"SeriesDescription": "CHEST ABDOMEN"}, {}, "it shows more of what is reported here"),
        ({"SliceThickness": 3.0}, {"SliceThickness": 1.0}, "its slices are nearer the wanted thickness"),
        ({}, {"ImageType": ["DERIVED", "PRIMARY", "AXIAL"]}, "it is original, not derived"),
        ({"AcquisitionTime": "120001"}, {"AcquisitionTime": "120000"}, "it was acquired later"),
        ({}, {"AcquisitionDate": "", "AcquisitionTime": ""}, "it was acquired later"),
        ({}, {}, "nothing but its number tells them apart"),
    ],
)
def test_a_series_that_is_not_preferred_says_to_which_and_why(
    better: dict[str, object], worse: dict[str, object], why: str, a_study: Study
) -> None:
    first = a_study.add(**better)
    second = a_study.add(**worse)
    choice = a_study.choose()

    assert chosen(choice) == [first]
    assert reason(choice, second) == f"reportable, but series 1 is preferred: {why}."


def test_an_axial_reformat_is_reported_when_there_is_nothing_better(a_study: Study) -> None:
    only = a_study.add(ImageType=["DERIVED", "SECONDARY", "REFORMATTED"])
    assert chosen(a_study.choose()) == [only]


def test_the_order_of_preferences_is_a_setting(a_study: Study) -> None:
    a_study.add(ConvolutionKernel="B31f", AcquisitionTime="120000")
    lung = a_study.add(ConvolutionKernel="B70f", AcquisitionTime="130000")

    assert chosen(a_study.choose(ImagingRules(preferences=("latest", "kernel")))) == [lung]


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "image type LOCALIZER."),
        ({"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "MIP"]}, "image type MIP."),
        ({"ImageType": ["DERIVED", "SECONDARY", "OTHER", "CT_SOM5 MIP"]}, "image type MIP."),
        ({"SeriesDescription": "Dose Report"}, "its description names a localizer"),
        ({"SeriesDescription": "CT Dose"}, "its description names a localizer"),
        ({"SeriesDescription": "3D Recon"}, "its description names a localizer"),
        ({"SeriesDescription": "COR THIN MIPS"}, "its description names a localizer"),
        ({"SeriesDescription": "Bolus tracking"}, "its description names a localizer"),
        ({"Modality": "PT"}, "a CT object of another modality than CT."),
        ({"PhotometricInterpretation": "RGB"}, "a colour picture, not CT values."),
        ({"RescaleSlope": None}, "their unit is unknown"),
        ({"RescaleType": "HU_MOD"}, "not Hounsfield units"),
        ({"RescaleType": "US", "ImageType": ["DERIVED", "PRIMARY", "AXIAL"]}, "not Hounsfield units"),
        ({"ImagePositionPatient": None}, "carry no position"),
        ({"ImageOrientationPatient": None}, "carry no orientation"),
        ({"PixelSpacing": None}, "carry no Pixel Spacing"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "not two unit vectors at a right angle"),
    ],
)
def test_what_is_no_axial_ct_in_hounsfield_units_is_refused_with_its_reason(
    attributes: dict[str, object], why: str, a_study: Study
) -> None:
    uid = a_study.add(**attributes)
    choice = a_study.choose()

    assert chosen(choice) == []
    assert why in reason(choice, uid)


@pytest.mark.parametrize(
    "description", ["Low Dose CT Thorax", "LOW-DOSE LUNG", "Body 1.0 AIDR 3D", "Thorax 1.0 for 3D"]
)
def test_a_low_dose_scan_is_no_dose_report_and_axial_slices_for_3d_are_no_rendering(
    description: str, a_study: Study
) -> None:
    uid = a_study.add(SeriesDescription=description)

    assert chosen(a_study.choose()) == [uid]


def test_coronal_and_sagittal_series_are_not_axial(a_study: Study) -> None:
    coronal = a_study.add(Scan(column_axis=(1, 0, 0), row_axis=(0, 0, -1)))
    sagittal = a_study.add(Scan(column_axis=(0, 1, 0), row_axis=(0, 0, -1)))
    choice = a_study.choose()

    assert reason(choice, coronal) == "coronal or oblique, not axial (90 degrees off)."
    assert reason(choice, sagittal) == "sagittal or oblique, not axial (90 degrees off)."


def test_too_few_slices_are_refused_and_the_limit_is_a_setting(a_study: Study) -> None:
    uid = a_study.add(Scan(depths=tuple(2.5 * index for index in range(8))))

    assert reason(a_study.choose(), uid) == "too few slices: 8 of at least 12."
    assert chosen(a_study.choose(ImagingRules(minimum_slices=8))) == [uid]


def test_a_site_reports_only_the_regions_it_sets(a_study: Study) -> None:
    head = a_study.add(BodyPartExamined="HEAD", SeriesDescription="AX")
    rules = ImagingRules(reported_regions=("chest", "abdomen", "pelvis"))

    assert reason(a_study.choose(rules), head) == "shows head, which this site does not report."


def test_chest_and_abdomen_in_two_series_are_two_volumes(a_study: Study) -> None:
    chest = a_study.add(BodyPartExamined="CHEST", SeriesDescription="lung base")
    abdomen = a_study.add(Scan(corner=(-15.0, -16.0, -45.0)), BodyPartExamined="ABDOMEN", SeriesDescription="AX")
    a_study.add(BodyPartExamined="CHEST", SeriesDescription="AX", SliceThickness=1.0)

    assert set(chosen(a_study.choose())) == {chest, abdomen}


def test_one_series_that_covers_all_goes_before_one_a_region(a_study: Study) -> None:
    a_study.add(BodyPartExamined="CHEST", SeriesDescription="CHEST")
    everything = a_study.add(BodyPartExamined="CHEST", SeriesDescription="CHEST ABDOMEN PELVIS")
    choice = a_study.choose()

    assert chosen(choice) == [everything]
    assert choice.selected[0].regions == ("chest", "abdomen", "pelvis")


def test_a_soft_tissue_series_a_region_goes_before_a_lung_kernel_that_covers_all(a_study: Study) -> None:
    a_study.add(
        Scan(depths=tuple(2.5 * i for i in range(28)), corner=(-15.0, -16.0, -50.0)),
        ConvolutionKernel="LUNG",
        SeriesDescription="CHEST ABDOMEN PELVIS",
    )
    chest = a_study.add(BodyPartExamined="CHEST", SeriesDescription="AX")
    abdomen = a_study.add(Scan(corner=(-15.0, -16.0, -50.0)), BodyPartExamined="ABDOMENPELVIS", SeriesDescription="AX")

    assert set(chosen(a_study.choose())) == {chest, abdomen}


def test_a_header_that_claims_more_than_any_scan_is_refused_before_memory_is_taken(a_study: Study) -> None:
    uid = a_study.add()
    huge = [
        replace(
            header, slices=tuple(replace(p, pixels=replace(p.pixels, rows=60000, columns=60000)) for p in header.slices)
        )
        for header in a_study.headers
    ]

    assert (
        reason(series.choose(huge, RULES), uid)
        == "The volume would have 14 x 60000 x 60000 voxels, more than a scan has. "
        "Correct the matrix and positions of the slices at the sender."
    )


def test_a_second_series_of_other_tissue_is_reported_whatever_it_is_named(a_study: Study) -> None:
    upper = a_study.add()
    lower = a_study.add(Scan(corner=(-15.0, -16.0, -48.0)))

    assert set(chosen(a_study.choose())) == {upper, lower}


def test_the_same_tissue_under_another_name_is_not_reported_twice(a_study: Study) -> None:
    a_study.add(BodyPartExamined="CHEST", SeriesDescription="CHEST")
    a_study.add(BodyPartExamined="ABDOMEN", SeriesDescription="LIVER")

    assert len(chosen(a_study.choose())) == 1


@pytest.mark.parametrize(
    ("body_part", "text", "other", "length_mm", "expected"),
    [
        ("CHEST", "", (), 300, ("chest",)),
        ("CHEST", "", (), 650, ("chest", "abdomen", "pelvis")),
        ("ABDOMEN", "", (), 400, ("abdomen", "pelvis")),
        ("", "", (), 650, ("chest", "abdomen", "pelvis")),
        ("", "", (), 300, ()),
        ("", "AX 3mm", ("", "CT THORAX"), 300, ("chest",)),
        ("CHEST", "AX", ("", "CT ABDOMEN"), 300, ("chest",)),
        ("", "TAP_venous", (), 600, ("chest", "abdomen", "pelvis")),
        ("ABDOMENPELVIS", "", (), 420, ("abdomen", "pelvis")),
        ("HEADNECK", "", (), 300, ("head", "neck")),
        ("", "CT C-SPINE", (), 200, ("spine",)),
        ("BRAIN", "", (), 140, ("head",)),
        ("", "CT CHEST ABD PEL W CON", (), 500, ("chest", "abdomen", "pelvis")),
        ("", "ABD/PELV", (), 400, ("abdomen", "pelvis")),
        ("", "CT C/A/P", (), 500, ("chest", "abdomen", "pelvis")),
        ("CHEST_TO_PELVIS", "", (), 500, ("chest", "abdomen", "pelvis")),
        ("", "TÓRAX", (), 300, ("chest",)),
        ("", "Schädel nativ", (), 140, ("head",)),
        ("", "Oberbauch", (), 250, ("abdomen",)),
        ("", "LWS", (), 200, ("spine",)),
    ],
)
def test_regions_come_from_codes_words_and_length(
    body_part: str, text: str, other: tuple[str, ...], length_mm: float, expected: tuple[str, ...]
) -> None:
    assert regions.shown(body_part, text, other, length_mm) == expected


def test_the_choice_does_not_depend_on_the_order_of_the_files(a_study: Study) -> None:
    for kernel in ("B31f", "B31f", "LUNG"):
        a_study.add(ConvolutionKernel=kernel)
    first = a_study.choose()
    for seed in range(5):
        random.Random(seed).shuffle(a_study.headers)
        again = a_study.choose()
        assert again.verdicts == first.verdicts
        assert [stack.slices for stack in again.selected] == [stack.slices for stack in first.selected]


def test_one_study_with_two_patients_ids_is_never_reported(a_study: Study) -> None:
    a_study.add(PatientID="A")
    a_study.add(PatientID="B")
    with pytest.raises(PatientMismatchError, match="different patient ids"):
        a_study.choose()


def test_an_empty_patient_id_is_no_second_patient(a_study: Study) -> None:
    a_study.add(PatientID="A")
    a_study.add(PatientID="")

    assert len(a_study.choose().selected) == 1


def test_a_study_without_a_ct_series_is_refused_with_every_series_named(ct_data: Path) -> None:
    odd = ct_data / "odd"
    names = (
        "sr_basic_text_no_pixel_data",
        "sr_comprehensive3d_for_ct",
        "seg_for_ct",
        "pr_grayscale_softcopy",
        "dx_not_ct",
        "sr_xray_radiation_dose_minimal",
    )
    headers = [replace(read_header(odd / f"{name}.dcm"), study_uid="1", patient_id="") for name in names]
    choice = series.choose(headers, RULES)

    assert {verdict.reason for verdict in choice.verdicts} == {
        "not a CT image but Basic Text SR Storage.",
        "not a CT image but Comprehensive 3D SR Storage.",
        "not a CT image but Segmentation Storage.",
        "not a CT image but Grayscale Softcopy Presentation State Storage.",
        "not a CT image but Digital X-Ray Image Storage - For Presentation.",
        "not a CT image but X-Ray Radiation Dose SR Storage.",
    }
    assert {verdict.cause for verdict in choice.verdicts} == {Cause.KIND}
    refusal = choice.refusal()
    assert isinstance(refusal, NothingToReportError)
    assert str(refusal).startswith("No CT series to report. series ")


def test_a_perfusion_map_is_no_ct_to_report(ct_data: Path) -> None:
    header = read_header(ct_data / "odd" / "ect_perfusion_2frames_jpeg_ext_no_bot.dcm")
    assert series.choose([header], RULES).verdicts[0].reason == "image type PERFUSION."


def test_a_study_whose_only_series_has_a_doubtful_geometry_fails_with_it(a_study: Study) -> None:
    a_study.add(Scan(depths=tuple(1.0 * index for index in range(60) if not 20 <= index < 30)))
    refusal = a_study.choose().refusal()

    assert isinstance(refusal, GeometryError)
    assert str(refusal).startswith("10 of 60 slices are missing, up to 10 in a row")


def test_a_study_whose_only_series_has_unknown_units_fails_with_it(a_study: Study) -> None:
    a_study.add(RescaleIntercept=None)
    assert isinstance(a_study.choose().refusal(), PixelDataError)


def test_no_reason_and_no_refusal_repeats_what_a_sender_wrote(a_study: Study) -> None:
    a_study.add(
        SeriesDescription="CANARY localizer", ProtocolName="CANARY", StudyDescription="CANARY", PatientID="CANARY"
    )
    a_study.add(ImageType=["ORIGINAL", "PRIMARY", "CANARY"], RescaleType="CANARY", PatientID="CANARY")
    choice = a_study.choose()

    assert "CANARY" not in str(choice.refusal())
    assert "CANARY" not in repr(choice.verdicts)


@pytest.mark.parametrize(
    "wrong",
    [
        {"preferences": ("prettiest",)},
        {"reported_regions": ("toe",)},
        {"kernels": ("sfot",)},
        {"never_descriptions": ("([",)},
        {"minimum_slices": 1},
        {"same_position_mm": 1.0},
        {"maximum_gap_mm": 0.0},
    ],
)
def test_rules_that_make_no_sense_are_settings_errors(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        ImagingRules(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("module", [kernels, regions])
def test_examples_in_docstrings_hold(module: ModuleType) -> None:
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0
    assert outcome.failed == 0
