"""CT-RATE: 50,188 chest volumes of 25,692 studies with reports and 18 abnormality labels.

Layout as published: `dataset/{train,valid}/train_1/train_1_a/train_1_a_1.nii.gz` (patient, scan, reconstruction; folders
`train_fixed` and `valid_fixed` are preferred where they are there, they hold corrected headers),
`dataset/radiology_text_reports/{train,validation}_reports.csv` (VolumeName, ..., Findings_EN, Impressions_EN) and
`dataset/multi_abnormality_labels/{train,valid}_predicted_labels.csv` (VolumeName and a column of 0 or 1 per abnormality).
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from training.data import QUESTION, Case, ManifestError

SOURCE = "ct-rate"
PARTS = {"train": ("train", "train", "train"), "valid": ("test", "validation", "valid")}
"""Published part: (our split, prefix of its reports file, prefix of its labels file)."""


def read(root: Path, every_reconstruction: bool = False) -> Iterator[Case]:
    """Cases of a CT-RATE folder: the first reconstruction of every scan, or all of them."""
    base = root / "dataset" if (root / "dataset").is_dir() else root
    reports = base / "radiology_text_reports"
    if not reports.is_dir():
        raise ManifestError(f"{root} is not CT-RATE: no radiology_text_reports folder")
    for part, (split, report_prefix, label_prefix) in PARTS.items():
        file = reports / f"{report_prefix}_reports.csv"
        if not file.is_file():
            continue
        labels = _labels(base / "multi_abnormality_labels" / f"{label_prefix}_predicted_labels.csv")
        volumes = base / f"{part}_fixed" if (base / f"{part}_fixed").is_dir() else base / part
        for row in _rows(file):
            name = row["VolumeName"].removesuffix(".nii.gz")
            patient, scan, reconstruction = name.rsplit("_", 2)
            if reconstruction != "1" and not every_reconstruction:
                continue
            image = volumes / patient / f"{patient}_{scan}" / f"{name}.nii.gz"
            yield Case(
                case_id=name,
                image=str(image),
                question=QUESTION,
                answer=_answer(row),
                split=split,
                patient_id=patient,
                study_id=f"{patient}_{scan}",
                source=SOURCE,
                labels=labels.get(row["VolumeName"]),
            )


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


def _labels(file: Path) -> dict[str, dict[str, int]]:
    if not file.is_file():
        return {}
    return {
        row["VolumeName"]: {name: int(float(value)) for name, value in row.items() if name != "VolumeName"}
        for row in _rows(file)
    }


def _answer(row: dict[str, str]) -> str:
    # Absent texts are written as "Not given." in the published files.
    parts = [("Findings", row.get("Findings_EN", "")), ("Impression", row.get("Impressions_EN", ""))]
    given = [(name, text.strip()) for name, text in parts if text and text.strip().rstrip(".").lower() != "not given"]
    return " ".join(f"{name}: {text}" for name, text in given)
