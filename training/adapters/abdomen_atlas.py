"""Abdomen Atlas 3.0: over 9,000 abdominal CTs with structured and narrative reports.

Layout as published: `AbdomenAtlas3.0MiniWithMeta.csv` (or `AbdomenAtlas3.0.csv`, `AbdomenAtlas3.0Mini.csv`) with the columns
"BDMAP ID", "structured report", "narrative report" and the fused forms, beside `image_only/BDMAP_NNNNNNNN/ct.nii.gz` and
`TrainTestIDS/` with lists of ids. Split by the lists where they are there, else by a hash of the id.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from training.data import QUESTION, Case, ManifestError, split_by_patient

SOURCE = "abdomen-atlas-3.0"
TABLES = ("AbdomenAtlas3.0MiniWithMeta.csv", "AbdomenAtlas3.0Mini.csv", "AbdomenAtlas3.0.csv")
REPORTS = ("fusion narrative report", "narrative report", "fusion structured report", "structured report")
"""In order of preference: the fused ones carry what radiologists added."""
TEST_SHARE = 0.1
CSV_FIELD_BYTES = 1 << 24


def read(root: Path) -> Iterator[Case]:
    """Cases of an Abdomen Atlas folder: one per CT with a report."""
    table = next((root / name for name in TABLES if (root / name).is_file()), None)
    if table is None:
        raise ManifestError(f"{root} is not Abdomen Atlas 3.0: none of {', '.join(TABLES)} is there")
    test_ids = _listed(root / "TrainTestIDS", "test")
    csv.field_size_limit(CSV_FIELD_BYTES)
    with table.open(encoding="utf-8-sig", newline="") as stream:
        for row in csv.DictReader(stream):
            name = row["BDMAP ID"].strip()
            answer = next((row[key].strip() for key in REPORTS if (row.get(key) or "").strip()), "")
            if not answer:
                continue
            in_test = name in test_ids if test_ids else split_by_patient(name, 0.0, TEST_SHARE) == "test"
            yield Case(
                case_id=name,
                image=str(root / "image_only" / name / "ct.nii.gz"),
                question=QUESTION,
                answer=" ".join(answer.split()),
                split="test" if in_test else "train",
                patient_id=name,
                study_id=name,
                source=SOURCE,
            )


def _listed(folder: Path, part: str) -> set[str]:
    files = [file for file in folder.glob("*") if part in file.name.lower()] if folder.is_dir() else []
    return {line.split(",")[0].strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()}
