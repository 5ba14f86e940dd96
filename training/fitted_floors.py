"""The two floors as a checkpoint keeps them, and the rows that they have in every table of `evaluate`.

A floor is fitted on the cases that the checkpoint learned from. They are named by hand, or stored with the checkpoint in
`floors.json`, or found again by what its `training_run.json` says; where none of this helps, the tables say so.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from training import floors as models
from training.data import Case, ManifestError, manifest_digest, read_manifests
from training.errors import TrainingError
from training.evaluate import ScoredCase, derangement, finding_figures
from training.floors import HistogramModel, Key, TextOnly
from training.metrics.findings import Stated, compare, stated
from training.provenance import read_provenance
from training.volumes import BadVolumeError, read_volume

FILE = "floors.json"
NAMES = {"text_only": "no image (floor)", "histogram": "HU histogram (floor)"}
"""How the tables call them."""
DIGITS = 6
"""Of a stored coefficient: predictions stay, the file is a third of its size."""
LEAST_CASES = 8
NOTES = Console(stderr=True)


class FloorError(TrainingError, ValueError):
    """Floors that cannot be had for a checkpoint and a set of cases; the message says why and what to do."""


@dataclass(frozen=True)
class FittedFloors:
    """Both floors, fitted on one set of cases."""

    text_only: TextOnly
    histogram: HistogramModel
    train_cases: int
    train_manifest_sha256: str

    def save(self, folder: Path) -> None:
        """Store them in a checkpoint folder."""
        model = self.histogram
        histogram = {
            "keys": [list(key) for key in model.keys],
            "mean": _rounded(model.mean),
            "deviation": _rounded(model.deviation),
            "weights": [_rounded(row) for row in model.weights],
            "threshold": model.threshold,
        }
        told = {
            "train_cases": self.train_cases,
            "train_manifest_sha256": self.train_manifest_sha256,
            "text_only": {question: [list(key) for key in keys] for question, keys in self.text_only.answers.items()},
            "histogram": histogram,
        }
        (folder / FILE).write_text(json.dumps(told, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "FittedFloors | None":
        """What a checkpoint folder keeps, or None; FloorError for a file that is not one of ours."""
        if not (folder / FILE).is_file():
            return None
        try:
            told = json.loads((folder / FILE).read_text(encoding="utf-8"))
            stored = told["histogram"]
            answers = {question: tuple(_key(pair) for pair in keys) for question, keys in told["text_only"].items()}
            model = HistogramModel(
                tuple(_key(pair) for pair in stored["keys"]),
                np.array(stored["mean"]),
                np.array(stored["deviation"]),
                np.array(stored["weights"]).reshape(len(stored["keys"]), -1),
                float(stored["threshold"]),
            )
            return cls(TextOnly(answers), model, int(told["train_cases"]), str(told["train_manifest_sha256"]))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise FloorError(f"{folder / FILE} holds no floors: fit them again by --train") from error

    def predict(self, cases: Sequence[Case], cache: Path) -> dict[str, list[tuple[Key, ...]]]:
        """What each floor says of each case, by its name in tables."""
        return {
            NAMES["text_only"]: self.text_only.predict([case.question for case in cases]),
            NAMES["histogram"]: self.histogram.predict(histograms(cases, cache, "histograms to score")),
        }

    def figures(self, cases: Sequence[Case], cache: Path, resamples: int) -> list[dict[str, Any]]:
        """Finding scores of both floors on held-out cases, with intervals, under the names that a model's have.

        FloorError when a case has no structured truth or a volume cannot be read.
        """
        truths = truths_of(cases)
        rows = []
        for name, keys in self.predict(cases, cache).items():
            said = [[Stated(*key) for key in one] for one in keys]
            rows.append(finding_figures(name, _scored(cases, truths, said), resamples))
        return rows


def _rounded(values: NDArray[np.float64]) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]


def _key(pair: Sequence[str]) -> Key:
    kind, side = pair
    return str(kind), str(side)


def _scored(cases: Sequence[Case], truths: list[list[Stated]], said: list[list[Stated]]) -> list[ScoredCase]:
    other = derangement(len(cases))
    return [
        ScoredCase(
            case_id=case.case_id,
            reference=case.answer,
            candidate="",
            truth=tuple(truths[row]),
            counts=compare(truths[row], said[row]),
            shuffled_counts=compare(truths[row], said[other[row]]),
            verdict=None,
            judged=False,
        )
        for row, case in enumerate(cases)
    ]


def truths_of(cases: Sequence[Case]) -> list[list[Stated]]:
    """The structured truth of every case; FloorError when one has none."""
    unknown = [case.case_id for case in cases if case.findings is None]
    if unknown:
        raise FloorError(f"{len(unknown)} cases have no structured truth, {unknown[0]} for one: use phantoms")
    return [[stated(finding) for finding in case.findings or ()] for case in cases]


def histograms(cases: Sequence[Case], cache: Path, what: str) -> NDArray[np.float64]:
    """Histogram of every case's volume (cases, bins); each file is read once, and a set that was read is stored.

    FloorError for a volume that cannot be read.
    """
    paths = list(dict.fromkeys(case.image for case in cases))
    try:
        states = [Path(path).stat() for path in paths]
        identity = [(path, state.st_size, state.st_mtime_ns) for path, state in zip(paths, states, strict=True)]
        # The edges are part of the name: other bins never meet an old entry.
        told = json.dumps([identity, models.BIN_EDGES_HU.tolist()]).encode()
        entry = cache / "histograms" / f"{hashlib.sha256(told).hexdigest()[:40]}.npy"
        if entry.is_file():
            rows = np.load(entry)
        else:
            made = [models.histogram(np.asarray(read_volume(p)[0])) for p in track(paths, what, console=NOTES)]
            rows = np.array(made).reshape(len(paths), len(models.BIN_EDGES_HU) - 1)
            entry.parent.mkdir(parents=True, exist_ok=True)
            partial = entry.with_suffix(f".{os.getpid()}.partial")
            with partial.open("wb") as stream:
                np.save(stream, rows)
            partial.replace(entry)
    except (OSError, BadVolumeError) as error:
        raise FloorError(f"a volume of the floors cannot be read: {error}") from error
    place = {path: row for row, path in enumerate(paths)}
    return np.array([rows[place[case.image]] for case in cases])


def whole_scans(cases: Sequence[Case]) -> list[Case]:
    """One case an image, the one that tells most findings: a histogram is of the whole scan, whatever was asked."""
    fullest: dict[str, Case] = {}
    for case in cases:
        if case.image not in fullest or len(case.findings or ()) > len(fullest[case.image].findings or ()):
            fullest[case.image] = case
    return list(fullest.values())


def fit(cases: Sequence[Case], cache: Path) -> FittedFloors:
    """Both floors of a set of training cases; FloorError without structured truth or with fewer than 8 volumes."""
    truths = truths_of(cases)
    scans = whole_scans(cases)
    if len(scans) < LEAST_CASES:
        raise FloorError(f"{len(scans)} training volumes are too few for a floor: {LEAST_CASES} or more are needed")
    text = models.fit_text_only([case.question for case in cases], truths)
    image = models.fit_histogram_model(histograms(scans, cache, "histograms to fit"), truths_of(scans))
    return FittedFloors(text, image, len(cases), manifest_digest(cases))


def find(folder: Path, train: Sequence[Path], cache: Path) -> FittedFloors:
    """The floors of a checkpoint: fitted on `train`, else stored with it, else fitted on what it was trained on.

    FloorError when none can be had.
    """
    if train:
        return fit(read_manifests(train, "train"), cache)
    stored = FittedFloors.load(folder)
    return fit(remembered_cases(folder), cache) if stored is None else stored


def remembered_cases(folder: Path) -> list[Case]:
    """The cases of the last SFT stage behind a checkpoint, by its own record; FloorError when they are not those any more."""
    run = read_provenance(folder) or {}
    for stage in [run, *reversed(run.get("before", []))]:
        manifests = [Path(name) for name in stage.get("settings", {}).get("data", ())]
        if not manifests:
            continue
        try:
            cases = read_manifests(manifests, "train")
        except (OSError, ManifestError) as error:
            raise FloorError(f"the training manifest is not where it was ({error}): name it by --train") from error
        if manifest_digest(cases) != stage["manifest_sha256"]:
            raise FloorError(f"{manifests[0]} is not what the checkpoint was trained on any more: name that by --train")
        return cases
    raise FloorError("the checkpoint does not say what it was trained on: name its training manifest by --train")


def refuse_shared_studies(train: Sequence[Case], held_out: Sequence[Case]) -> None:
    """FloorError when a study is in both sets."""
    shared = {case.study_id for case in train} & {case.study_id for case in held_out}
    if shared:
        raise FloorError(f"{len(shared)} studies are in both sets: score on phantoms of another seed")
