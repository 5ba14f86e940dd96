"""Folders of exactly the published layouts, made small."""

import csv
import json
from pathlib import Path

import pytest

from training.adapters import abdomen_atlas, amos_mm, ct_rate
from training.commands import import_data
from training.data import Case, ManifestError, check, cut_validation, read_manifest, write_manifest


def touch(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def amos(tmp_path: Path) -> Path:
    def record(name: str, folder: str, labels: dict[str, object]) -> dict[str, object]:
        touch(tmp_path / folder / f"{name}.nii.gz", name)
        return {"image": f"./{folder}/{name}.nii.gz", "meta": {"spacing": [1, 1, 5]}, "labels": labels}

    findings = {"chest": "", "abdomen": "The liver is normal.", "pelvis": "No free fluid."}
    options = {"A": "Left", "B": "Right", "C": "Both", "D": "None"}
    qa = [{"type": "location", "question": "Which kidney holds the stone?", "options": options, "answer": "B"}]
    reports = {
        "training": [record("amos_0001", "imagesTr", {"report": {"findings": findings}})],
        "validation": [record("amos_0008", "imagesVa", {"report": {"findings": {"chest": "Clear lungs."}}})],
    }
    touch(tmp_path / "report_generation_train_val.json", json.dumps(reports))
    vqa = {"training": [record("amos_0001", "imagesTr", {"qa": qa})], "validation": []}
    touch(tmp_path / "vqa_train_val.json", json.dumps(vqa))
    return tmp_path


def test_amos_gives_a_case_for_every_region_with_findings_and_every_question(amos: Path) -> None:
    cases = {case.case_id: case for case in amos_mm.read(amos)}
    assert set(cases) == {"amos_0001-abdomen", "amos_0001-pelvis", "amos_0008-chest", "amos_0001-qa1"}
    assert cases["amos_0001-qa1"].question.endswith("Choices: A. Left B. Right C. Both D. None")
    assert cases["amos_0001-qa1"].answer == "B. Right"


def test_amos_files_that_tell_the_same_records_twice_give_each_case_once(amos: Path) -> None:
    before = list(amos_mm.read(amos))
    reports = json.loads((amos / "report_generation_train_val.json").read_text())
    touch(amos / "dataset.json", json.dumps(reports))
    assert sorted(case.case_id for case in amos_mm.read(amos)) == sorted(case.case_id for case in before)


def test_amos_validation_is_the_test_split(amos: Path) -> None:
    assert {case.case_id: case.split for case in amos_mm.read(amos)}["amos_0008-chest"] == "test"


def test_amos_manifest_passes_the_check(amos: Path) -> None:
    cases = read_manifest(write_manifest(amos_mm.read(amos), amos / "manifest.jsonl"))
    assert check(cases).ok


@pytest.fixture
def rate(tmp_path: Path) -> Path:
    base = tmp_path / "dataset"
    columns = {"ClinicalInformation_EN": "Cough.", "Technique_EN": "Non-contrast."}
    for part, report_prefix, label_prefix in (("train", "train", "train"), ("valid", "validation", "valid")):
        names = [f"{part}_1_a_1.nii.gz", f"{part}_1_a_2.nii.gz", f"{part}_2_b_1.nii.gz"]
        for name in names:
            patient, scan, _ = name.rsplit("_", 2)
            touch(base / part / patient / f"{patient}_{scan}" / name, name)
        reports = [
            {"VolumeName": n, **columns, "Findings_EN": "Clear lungs.", "Impressions_EN": "Not given."} for n in names
        ]
        write_csv(base / "radiology_text_reports" / f"{report_prefix}_reports.csv", reports)
        labels = [{"VolumeName": name, "Lung nodule": "1", "Emphysema": "0.0"} for name in names]
        write_csv(base / "multi_abnormality_labels" / f"{label_prefix}_predicted_labels.csv", labels)
    return tmp_path


def test_ct_rate_takes_one_reconstruction_of_every_scan(rate: Path) -> None:
    assert {case.case_id for case in ct_rate.read(rate)} == {
        "train_1_a_1",
        "train_2_b_1",
        "valid_1_a_1",
        "valid_2_b_1",
    }
    assert len(list(ct_rate.read(rate, every_reconstruction=True))) == 6


def test_ct_rate_names_patient_scan_labels_and_leaves_out_what_was_not_given(rate: Path) -> None:
    case = next(case for case in ct_rate.read(rate) if case.case_id == "valid_2_b_1")
    assert (case.patient_id, case.study_id, case.split) == ("valid_2", "valid_2_b", "test")
    assert case.labels == {"Lung nodule": 1, "Emphysema": 0}
    assert case.answer == "Findings: Clear lungs."


def test_ct_rate_prefers_corrected_headers(rate: Path) -> None:
    corrected = touch(rate / "dataset" / "train_fixed" / "train_1" / "train_1_a" / "train_1_a_1.nii.gz", "fixed")
    assert str(corrected) in {case.image for case in ct_rate.read(rate)}


def test_ct_rate_manifest_passes_the_check(rate: Path) -> None:
    assert check(list(ct_rate.read(rate))).ok


@pytest.fixture
def atlas(tmp_path: Path) -> Path:
    names = [f"BDMAP_0000000{number}" for number in range(1, 5)]
    rows = []
    for number, name in enumerate(names):
        touch(tmp_path / "image_only" / name / "ct.nii.gz", name)
        narrative = "" if number == 3 else f"Narrative\n{number}."
        rows.append({"BDMAP ID": name, "structured report": "", "narrative report": narrative})
    write_csv(tmp_path / "AbdomenAtlas3.0MiniWithMeta.csv", rows)
    lists = {"IID_train": (1, 3, 4), "IID_test": (2,), "OOD_train": (2, 4), "OOD_test": (1,)}
    for part, numbers in lists.items():
        ids = "".join(f"{names[number - 1]}\n" for number in numbers)
        touch(tmp_path / "TrainTestIDS" / f"{part}.csv", "BDMAP ID\n" + ids)
    return tmp_path


def test_abdomen_atlas_takes_cts_with_a_report_and_splits_by_its_lists(atlas: Path) -> None:
    cases = list(abdomen_atlas.read(atlas))
    assert [case.split for case in cases] == ["train", "test", "train"]
    assert cases[0].answer == "Narrative 0."
    assert check(cases).ok


def test_abdomen_atlas_splits_by_one_way_alone_where_the_lists_of_two_overlap(
    atlas: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_data("abdomen-atlas", atlas, atlas / "manifest.jsonl", 0, abdomen_atlas.Lists.OOD)
    cases = {case.case_id: case.split for case in read_manifest(atlas / "manifest.jsonl")}
    assert cases == {"BDMAP_00000001": "test", "BDMAP_00000002": "train"}
    assert "in no OOD list, so left out: 1 CTs, the first are BDMAP_00000003" in " ".join(
        capsys.readouterr().err.split()
    )


def test_abdomen_atlas_without_one_of_its_lists_is_refused(atlas: Path) -> None:
    (atlas / "TrainTestIDS" / "IID_train.csv").unlink()
    with pytest.raises(ManifestError, match="has no list IID_train"):
        list(abdomen_atlas.read(atlas))


@pytest.mark.parametrize("read", [amos_mm.read, ct_rate.read, abdomen_atlas.read])
def test_another_folder_is_refused_by_name(read: object, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="is not"):
        list(read(tmp_path))  # type: ignore[operator]


def scans(count: int) -> list[Case]:
    """Two training cases of each patient, and a test case of every fifth."""
    made = []
    for number in range(count):
        patient, split = f"p{number}", "test" if number % 5 == 0 else "train"
        made += [Case(f"{patient}-{n}", f"/{patient}.nii.gz", f"Q{n}", "A.", split, patient, patient) for n in (1, 2)]
    return made


def test_a_share_of_the_training_patients_is_held_out_whole_and_the_test_part_stays() -> None:
    cases = list(cut_validation(scans(500), 0.2))
    patients = {split: {c.patient_id for c in cases if c.split == split} for split in ("train", "validation", "test")}
    assert len(patients["test"]) == 100
    assert not patients["validation"] & (patients["train"] | patients["test"])
    assert 55 < len(patients["validation"]) < 105
    assert cases == list(cut_validation(scans(500), 0.2))
    assert list(cut_validation(scans(20), 0.0)) == scans(20)
    with pytest.raises(ValueError, match="from 0 to below 1"):
        list(cut_validation(scans(5), 1.0))


def test_a_test_part_that_was_cut_by_a_hash_leaves_patients_for_validation(tmp_path: Path) -> None:
    rows = []
    for number in range(60):
        name = f"BDMAP_{number:08d}"
        touch(tmp_path / "image_only" / name / "ct.nii.gz", name)
        rows.append({"BDMAP ID": name, "narrative report": f"Narrative {number}."})
    write_csv(tmp_path / "AbdomenAtlas3.0.csv", rows)
    out = tmp_path / "manifest.jsonl"
    import_data("abdomen-atlas", tmp_path, out, 0.2)
    cases = read_manifest(out)
    assert {case.split for case in cases} == {"train", "validation", "test"}
    assert check(cases).ok


def test_an_imported_public_set_can_feed_preferences(rate: Path) -> None:
    import_data("ct-rate", rate, rate / "manifest.jsonl", 0.5)
    cases = read_manifest(rate / "manifest.jsonl")
    assert [case.split for case in cases].count("test") == 2
    assert {case.case_id for case in cases} == {case.case_id for case in ct_rate.read(rate)}
