"""The manifest: one JSONL file that says which volume is asked what, what the answer is, and whose split it belongs to.

A row is a `Case`. Paths of images are relative to the manifest's folder unless absolute. `check` reads a manifest before
anything is trained on it and says in plain words what is wrong.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from training.errors import TrainingError

SPLITS = ("train", "validation", "test")
MANIFEST = "manifest.jsonl"
QUESTION = "Write the report of this CT."
"""What is asked where a data set brings no question of its own."""
HASH_BLOCK_BYTES = 1 << 20
SHOWN = 5


class ManifestError(TrainingError, ValueError):
    """A manifest that cannot be read or must not be trained on; the message says why and in which lines."""


@dataclass(frozen=True)
class Case:
    """One question about one volume.

    `patient_id` keeps the cases of a person in one split; `study_id` names the examination. `findings` is the structured
    truth where it is known (an empty list is a normal case, None is not known); `labels` are whole-volume labels as a data
    set publishes them.
    """

    case_id: str
    image: str
    question: str
    answer: str
    split: str
    patient_id: str
    study_id: str
    source: str = ""
    findings: tuple[dict[str, Any], ...] | None = None
    labels: dict[str, int] | None = None

    def to_json(self) -> str:
        """One line of the manifest, without fields that hold nothing."""
        optional = ("source", "findings", "labels")
        row = {key: value for key, value in asdict(self).items() if key not in optional or value not in (None, "")}
        return json.dumps({KEY_OF[key]: value for key, value in row.items()}, ensure_ascii=False)


KEYS = {
    "case_id": "id",
    "question": "prompt",
    "patient_id": "patient",
    "study_id": "study",
    "source": "set",
    "findings": "labels",
    "labels": "classes",
}
"""Field of Case: its key in the file, where the two differ."""
KEY_OF = {f.name: KEYS.get(f.name, f.name) for f in fields(Case)}
REQUIRED = ("case_id", "image", "question", "answer", "split", "patient_id", "study_id")


def parse_case(row: dict[str, Any], where: str) -> Case:
    """A row of a manifest as a Case; keys that Case does not know stay in the file and are left alone."""
    values = {name: row[key] for name, key in KEY_OF.items() if key in row}
    missing = [KEY_OF[name] for name in REQUIRED if not isinstance(values.get(name), str)]
    if missing:
        raise ManifestError(f"{where}: no text under {', '.join(missing)}")
    if row["split"] not in SPLITS:
        raise ManifestError(f"{where}: the split is {row['split']!r}, not one of {', '.join(SPLITS)}")
    if values.get("findings") is not None:
        values["findings"] = tuple(values["findings"])
    return Case(**values)


def manifest_path(path: Path | str) -> Path:
    """The manifest file itself: `path`, or manifest.jsonl in it when it is a folder; ManifestError when there is none."""
    file = Path(path)
    file = file / MANIFEST if file.is_dir() else file
    if not file.is_file():
        raise ManifestError(f"no manifest at {file}: make one with `python -m training phantoms` or `import`")
    return file


def read_manifests(paths: Iterable[Path | str], split: str | None = None) -> list[Case]:
    """The cases of several manifests, one after another."""
    return [case for path in paths for case in read_manifest(path, split)]


def read_manifest(path: Path | str, split: str | None = None) -> list[Case]:
    """The cases of a manifest, or of one split of it, with absolute paths; ManifestError for a line that is no case."""
    file = manifest_path(path)
    root = file.parent.resolve()
    cases = []
    # Not splitlines: a text may hold other ends of lines, such as U+2028, which JSON does not escape.
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file.name} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ManifestError(f"{where} is not JSON: {error.msg}") from error
        case = parse_case(row, where)
        if split is None or case.split == split:
            cases.append(replace(case, image=str(root / case.image)))
    return cases


def write_manifest(cases: Iterable[Case], path: Path | str) -> Path:
    """Write a manifest atomically; images that lie below its folder get relative paths."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    root = file.parent.resolve()
    lines = []
    for case in cases:
        row = json.loads(case.to_json())
        if Path(row["image"]).is_absolute() and Path(row["image"]).is_relative_to(root):
            row["image"] = str(Path(row["image"]).relative_to(root))
        lines.append(json.dumps(row, ensure_ascii=False))
    partial = file.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(file)
    return file


@dataclass(frozen=True)
class Problem:
    """One kind of fault and the cases that have it."""

    kind: str
    advice: str
    cases: tuple[str, ...]


@dataclass(frozen=True)
class ManifestReport:
    """What `check` found: counts of what is there, and every fault."""

    counts: dict[str, int]
    problems: tuple[Problem, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether the manifest may be trained on."""
        return not self.problems

    def text(self) -> str:
        """The report to read: a line of counts, then a line for each kind of fault with its first cases."""
        lines = ["cases: " + ", ".join(f"{split} {self.counts[split]}" for split in self.counts)]
        for problem in self.problems:
            shown = ", ".join(problem.cases[:SHOWN])
            more = f" and {len(problem.cases) - SHOWN} more" if len(problem.cases) > SHOWN else ""
            lines.append(f"{problem.kind}: {len(problem.cases)} ({shown}{more}). {problem.advice}")
        return "\n".join(lines + (["no fault found"] if self.ok else []))


def check(cases: Sequence[Case], compare_contents: bool = True) -> ManifestReport:
    """Look for missing files, duplicates, leakage across splits and empty text.

    `compare_contents` also finds equal volumes under different names, by SHA-256 of files of equal length; published sets
    hold such pairs (AMOS-MM ships three volumes in both its training and its validation archive). Folders of DICOM files
    are not compared.
    """
    found = [
        Problem("missing file", "Correct the paths or take these cases out.", tuple(_missing(cases))),
        Problem("empty text", "Every case needs a question and an answer.", tuple(_empty(cases))),
        Problem(
            "duplicate case",
            "The same id, or one question and answer twice about an image.",
            tuple(_duplicates(cases)),
        ),
        Problem("patient in two splits", "Split by patient.", tuple(_leaks(cases, lambda case: case.patient_id))),
        Problem("study in two splits", "Split by patient.", tuple(_leaks(cases, lambda case: case.study_id))),
    ]
    if compare_contents:
        digests = _digests_of_equal_lengths(cases)
        leaks = _leaks([case for case in cases if case.image in digests], lambda case: digests[case.image])
        found.append(Problem("equal volume in two splits", "Keep it in one of them.", tuple(leaks)))
    counts = Counter(case.split for case in cases)
    return ManifestReport({split: counts[split] for split in SPLITS}, tuple(p for p in found if p.cases))


def _missing(cases: Sequence[Case]) -> list[str]:
    return [case.case_id for case in cases if not _is_there(Path(case.image))]


def _is_there(image: Path) -> bool:
    """Whether an image is on disk: a file, or the folder of a DICOM series."""
    return image.is_file() or (image.is_dir() and any(image.iterdir()))


def _empty(cases: Sequence[Case]) -> list[str]:
    return [case.case_id for case in cases if not case.question.strip() or not case.answer.strip()]


def _duplicates(cases: Sequence[Case]) -> list[str]:
    ids = Counter(case.case_id for case in cases)
    told = Counter((case.image, case.question, case.answer) for case in cases)
    return [c.case_id for c in cases if ids[c.case_id] > 1 or told[c.image, c.question, c.answer] > 1]


def _leaks(cases: Sequence[Case], key: Callable[[Case], str]) -> list[str]:
    splits: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        splits[key(case)].add(case.split)
    return [case.case_id for case in cases if len(splits[key(case)]) > 1]


def _digests_of_equal_lengths(cases: Sequence[Case]) -> dict[str, str]:
    by_length: dict[int, set[str]] = defaultdict(set)
    for image in {case.image for case in cases}:
        if Path(image).is_file():
            by_length[Path(image).stat().st_size].add(image)
    candidates = [image for images in by_length.values() if len(images) > 1 for image in images]
    return {image: file_digest(Path(image)) for image in candidates}


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def manifest_digest(cases: Sequence[Case]) -> str:
    """SHA-256 over all rows in order of their ids: stored in every checkpoint trained on them."""
    rows = sorted((case.case_id, Path(case.image).name, case.question, case.answer, case.split) for case in cases)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def split_by_patient(patient_id: str, validation: float, test: float) -> str:
    """The split of a patient by a hash of the id: the same on every machine and for every order of the cases.

    >>> {split_by_patient(f"patient {n}", 0.0, 1.0) for n in range(9)}
    {'test'}
    """
    place = int.from_bytes(hashlib.sha256(patient_id.encode()).digest()[:8], "big") / 2**64
    if place < test:
        return "test"
    return "validation" if place < test + validation else "train"


def cut_validation(cases: Iterable[Case], share: float) -> Iterator[Case]:
    """The cases with a share of the training patients moved to validation, all cases of a patient together.

    Public sets come with training and test parts alone, but preferences are drafted on cases that SFT did not see and
    that no score is published on. The patients are chosen by a hash, the same on every machine. ValueError for a share
    outside 0 to 1.
    """
    if not 0 <= share < 1:
        raise ValueError(f"a validation share of {share} is none: it lies from 0 to below 1")
    for case in cases:
        # Another hash than the one that an adapter may have cut its test part by, else the two would choose the same patients.
        chosen = case.split == "train" and split_by_patient(f"validation {case.patient_id}", share, 0.0) == "validation"
        yield replace(case, split="validation") if chosen else case
