"""From files to volumes, with the next best series where the best does not build."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest

from tests.imaging import synthetic
from tests.imaging.conftest import files_of
from tests.imaging.synthetic import Scan
from worker.core.errors import GeometryError, InvalidObjectError, NothingToReportError, PixelDataError
from worker.imaging import study
from worker.imaging.rules import ImagingRules
from worker.imaging.series import Cause

RULES = ImagingRules(decode_threads=2)
HALF_OF_THE_PIXELS = 16 * 20


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-HALF_OF_THE_PIXELS])


def test_a_study_gives_its_volume_and_a_verdict_on_every_series(tmp_path: Path) -> None:
    uids = synthetic.new_uids()
    synthetic.write(Scan(), tmp_path / "a", uids)
    scout = Scan(depths=(0.0,), attributes={"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "SeriesNumber": 1})
    synthetic.write(scout, tmp_path / "b", {**uids, "series": synthetic.generate_uid()})
    (tmp_path / "notes.txt").write_text("not an image")

    found = study.build_study(files_of(tmp_path), RULES)

    assert [volume.series_uid for volume in found.volumes] == [uids["series"]]
    assert found.volumes[0].regions == ("chest",)
    assert [(verdict.series_number, verdict.chosen) for verdict in found.verdicts] == [(1, False), (2, True)]
    assert found.verdicts[1].reason == "axial, soft-tissue kernel, 2.5 mm thick every 2.50 mm, shows chest."
    assert [bad.path.name for bad in found.unreadable] == ["notes.txt"]


def test_pixels_that_were_compressed_with_loss_are_told_as_such(tmp_path: Path) -> None:
    paths = synthetic.write(Scan(attributes={"LossyImageCompression": "01"}), tmp_path)

    assert study.build_study(paths, RULES).volumes[0].repairs == (
        "pixels were compressed with loss before they arrived",
    )


def test_the_next_best_series_is_built_when_the_best_does_not_decode(tmp_path: Path) -> None:
    uids = synthetic.new_uids()
    best = {**uids, "series": synthetic.generate_uid()}
    paths = synthetic.write(Scan(attributes={"ConvolutionKernel": "B31f"}), tmp_path / "best", best)
    cut(paths[3])
    synthetic.write(Scan(attributes={"ConvolutionKernel": "LUNG", "SeriesNumber": 3}), tmp_path / "other", uids)

    found = study.build_study(files_of(tmp_path), RULES)

    assert [volume.series_uid for volume in found.volumes] == [uids["series"]]
    assert [verdict.cause for verdict in found.verdicts] == [Cause.PIXELS, Cause.CHOSEN]
    assert "bytes too early" in found.verdicts[0].reason


def test_a_study_whose_only_series_does_not_decode_fails_with_the_reason(tmp_path: Path) -> None:
    cut(synthetic.write(Scan(), tmp_path)[5])
    with pytest.raises(PixelDataError, match=r"The pixel data ends 320 bytes too early\. Send the object again\."):
        study.build_study(files_of(tmp_path), RULES)


def test_a_study_with_contradicting_copies_fails_with_the_reason(tmp_path: Path) -> None:
    uids = synthetic.new_uids()
    synthetic.write(Scan(), tmp_path / "a", uids)
    synthetic.write(Scan(depths=(5.0,), known=synthetic.Field(offset=-280)), tmp_path / "b", uids)
    with pytest.raises(GeometryError, match="Two different images stand at one position"):
        study.build_study(files_of(tmp_path), RULES)


def test_a_study_without_ct_is_skipped_with_the_reason(ct_data: Path) -> None:
    with pytest.raises(NothingToReportError, match="not a CT image but Segmentation Storage"):
        study.build_study([ct_data / "odd" / "seg_for_ct.dcm"], RULES)


def test_a_damaged_object_fails_a_study_that_gives_no_volume_without_it(ct_data: Path) -> None:
    odd = ct_data / "odd"
    with pytest.raises(InvalidObjectError, match=r"cannot be read: 1\. The CT object has no pixel data.*Segmentation"):
        study.build_study([odd / "corrupt" / "ct_header_cut.dcm", odd / "seg_for_ct.dcm"], RULES)


def test_an_empty_study_is_skipped_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(NothingToReportError, match="holds no readable DICOM object"):
        study.build_study(files_of(tmp_path), RULES)


def test_a_slice_without_geometry_never_gets_a_place(ct_data: Path) -> None:
    with pytest.raises(NothingToReportError, match="too few slices: 1 of at least 12"):
        study.build_study([ct_data / "odd" / "corrupt" / "ct_no_geometry.dcm"], RULES)


def test_slices_without_geometry_fail_the_study_with_the_reason(ct_data: Path, tmp_path: Path) -> None:
    ds = pydicom.dcmread(ct_data / "odd" / "corrupt" / "ct_no_geometry.dcm")
    for number in range(12):
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = synthetic.generate_uid()
        ds.save_as(tmp_path / str(number))
    with pytest.raises(GeometryError, match=r"no orientation \(0020,0037\)\. Send the series with its geometry\."):
        study.build_study(files_of(tmp_path), RULES)


def test_an_object_without_patient_id_is_read_like_any_other(ct_data: Path) -> None:
    examined = study.examine([ct_data / "odd" / "corrupt" / "ct_empty_patient_id_and_accession.dcm"], RULES)
    assert examined.choice.verdicts[0].cause is Cause.SIZE


def test_a_legacy_converted_mask_is_no_ct_in_hounsfield_units(ct_data: Path) -> None:
    with pytest.raises(PixelDataError, match="The lowest value is 0: no air and no fat anywhere"):
        study.build_study([ct_data / "odd" / "legacy_enhanced_ct_3frames_23x38.dcm"], replace(RULES, minimum_slices=2))


def test_a_slice_sent_again_in_another_encoding_changes_nothing(ct_data: Path, tmp_path: Path) -> None:
    syntaxes = ct_data / "odd" / "transfer_syntax"
    lossless = [
        syntaxes / f"ctimage_1.2.840.10008.1.2{end}.dcm" for end in ("", ".1", ".4.80", ".4.90", ".4.201", ".5")
    ]
    examined = study.examine(lossless, replace(RULES, minimum_slices=2))

    assert examined.choice.verdicts[0].reason.startswith("All slices stand at one position. Correct ")


def test_several_regions_give_several_volumes_in_a_fixed_order(tmp_path: Path) -> None:
    uids = synthetic.new_uids()
    upper = {**uids, "series": "1.2.3.1"}
    lower = {**uids, "series": "1.2.3.2"}
    synthetic.write(Scan(attributes={"SeriesNumber": 5}), tmp_path / "a", upper)
    abdomen = {"SeriesNumber": 4, "BodyPartExamined": "ABDOMENPELVIS", "SeriesDescription": "AX"}
    synthetic.write(Scan(corner=(-15.0, -16.0, -48.0), attributes=abdomen), tmp_path / "b", lower)

    found = study.build_study(files_of(tmp_path), RULES)

    assert [volume.regions for volume in found.volumes] == [("abdomen", "pelvis"), ("chest",)]


def test_volumes_are_the_same_for_any_number_of_threads(tmp_path: Path) -> None:
    synthetic.write(Scan(shear=(0.3, 0.0), depths=tuple(2.0 * i**1.04 for i in range(16))), tmp_path)
    one, four = (
        study.build_study(files_of(tmp_path), replace(RULES, decode_threads=threads)).volumes[0] for threads in (1, 4)
    )

    assert np.array_equal(one.hu, four.hu)
    assert np.array_equal(one.padding, four.padding)
