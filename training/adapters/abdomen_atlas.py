"""Abdomen Atlas 3.0: over 9,000 abdominal CTs with structured and narrative reports.

Layout as published: `AbdomenAtlas3.0MiniWithMeta.csv` (or `AbdomenAtlas3.0.csv`, `AbdomenAtlas3.0Mini.csv`) with the columns
"BDMAP ID", "structured report", "narrative report" and the fused forms, beside `image_only/BDMAP_NNNNNNNN/ct.nii.gz` and
`TrainTestIDS/` with two ways to split the same CTs: `IID_train`, `IID_test` (test CTs of the training hospitals) and `OOD_train`,
`OOD_test` (of other hospitals). Split by the lists of one way where the folder is there, else by a hash of the id.
"""

import csv
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

from training.data import QUESTION, Case, ManifestError, split_by_patient

SOURCE = "abdomen-atlas-3.0"
TABLES = ("AbdomenAtlas3.0MiniWithMeta.csv", "AbdomenAtlas3.0Mini.csv", "AbdomenAtlas3.0.csv")
REPORTS = ("fusion narrative report", "narrative report", "fusion structured report", "structured report")
"""In order of preference: the fused ones carry what radiologists added."""
TEST_SHARE = 0.1
CSV_FIELD_BYTES = 1 << 24


LISTS = "TrainTestIDS"


class Lists(StrEnum):
    """Which of the published lists split the CTs."""

    IID = "iid"  # test CTs of hospitals that are in the training part too
    OOD = "ood"  # test CTs of other hospitals


def read(root: Path, lists: Lists = Lists.IID) -> Iterator[Case]:
    """Cases of an Abdomen Atlas folder: one per CT with a report, without those that its lists leave out.

    ManifestError for a folder that is none, or whose lists do not hold both parts.
    """
    parts = _parts(root, lists)
    for name, answer in _reports(root):
        split = _split(name, parts)
        if split is None:
            continue
        yield Case(
            case_id=name,
            image=str(root / "image_only" / name / "ct.nii.gz"),
            question=QUESTION,
            answer=answer,
            split=split,
            patient_id=name,
            study_id=name,
            source=SOURCE,
        )


def unlisted(root: Path, lists: Lists = Lists.IID) -> list[str]:
    """Ids of CTs with a report that are in neither list, so that `read` leaves them out: nothing says where they belong."""
    parts = _parts(root, lists)
    return [name for name, _ in _reports(root) if _split(name, parts) is None]


def _reports(root: Path) -> Iterator[tuple[str, str]]:
    table = next((root / name for name in TABLES if (root / name).is_file()), None)
    if table is None:
        raise ManifestError(f"{root} is not Abdomen Atlas 3.0: none of {', '.join(TABLES)} is there")
    csv.field_size_limit(CSV_FIELD_BYTES)
    with table.open(encoding="utf-8-sig", newline="") as stream:
        for row in csv.DictReader(stream):
            answer = next((row[key].strip() for key in REPORTS if (row.get(key) or "").strip()), "")
            if answer:
                yield row["BDMAP ID"].strip(), " ".join(answer.split())


def _split(name: str, parts: dict[str, set[str]] | None) -> str | None:
    if parts is None:
        return split_by_patient(name, 0.0, TEST_SHARE)
    return next((part for part in ("test", "train") if name in parts[part]), None)


def _parts(root: Path, lists: Lists) -> dict[str, set[str]] | None:
    """Ids of both parts by their lists; None for a folder without lists."""
    folder = root / LISTS
    if not folder.is_dir():
        return None
    parts: dict[str, set[str]] = {}
    for part in ("train", "test"):
        files = [file for file in folder.iterdir() if file.stem.lower() == f"{lists}_{part}"]
        if not files:
            raise ManifestError(
                f"{folder} has no list {lists.upper()}_{part}: add it, or choose other lists by --lists"
            )
        lines = files[0].read_text(encoding="utf-8-sig").splitlines()
        parts[part] = {line.split(",")[0].strip() for line in lines}
    return parts
