"""Makes many phantoms on several processes: images, labels, reports and a manifest, resumable at every phantom."""

import json
import os
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from training.phantoms import dicom, report
from training.phantoms.case import Case
from training.phantoms.disease import draw_case
from training.phantoms.nifti import write_nifti
from training.phantoms.phantom import Phantom, render
from training.phantoms.vocabulary import Region

SEEDS_A_SET = 1_000_000
"""Phantom k of set S has seed S * 1,000,000 + k: sets of different seeds never share a phantom."""
MOST_WORDINGS = 99
"""More would run into the next stream of random numbers."""
PROMPT = "Write the report of this CT."
SERVED_PROMPT = "Describe the findings and the impression of this CT."
"""What a worker asks unless its settings say otherwise."""
MANIFEST = "manifest.jsonl"


class ImageFormat(StrEnum):
    """How the images are stored."""

    NIFTI = "nifti"  # <name>.nii.gz, and labels beside it when asked for
    DICOM = "dicom"  # a folder of JPEG-LS objects a phantom
    NUMPY = "numpy"  # <name>.npz with hu, affine, organs and findings: for training
    NONE = "none"  # reports and truth only


class Split(StrEnum):
    """What a set of phantoms is for."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


@dataclass(frozen=True)
class Order:
    """What to make and where."""

    folder: Path
    count: int
    seed: int
    full: bool = False
    image_format: ImageFormat = ImageFormat.NIFTI
    labels: bool = False
    split: Split = Split.TRAIN
    wordings: int = 1
    """Reports written of each phantom, in other words and to other questions: rows of the manifest that share an image."""
    plain: bool = False
    """Plain words throughout: what varies from report to report is then what the image shows."""
    crowded: bool = False
    """Six to ten findings in every phantom: teaches a tower what is rare, is no part of the benchmark."""

    def __post_init__(self) -> None:
        if not 1 <= self.count <= SEEDS_A_SET:
            raise ValueError(f"count must be 1 to {SEEDS_A_SET:,}, not {self.count}")
        if not 1 <= self.wordings <= MOST_WORDINGS:
            raise ValueError(f"wordings must be 1 to {MOST_WORDINGS}, not {self.wordings}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, not {self.seed}")

    def name(self, number: int) -> str:
        """Name of phantom `number`, the stem of its files."""
        return f"phantom_{self.seed * SEEDS_A_SET + number:09d}"


def asked(case: Case, wording: int) -> tuple[str, tuple[Region, ...]]:
    """The question of a wording and the regions of its answer: of the whole scan, and, in every second pair, of one region.

    >>> from training.phantoms.disease import draw_case
    >>> asked(draw_case(0), 0)[0]
    'Write the report of this CT.'
    """
    regions = case.scan.regions
    if wording % 4 < 2 or len(regions) == 1:
        return (SERVED_PROMPT if wording % 2 else PROMPT), regions
    region = regions[(wording // 4 * 2 + wording % 2) % len(regions)]
    return f"{SERVED_PROMPT} Report on the {region.value} only.", (region,)


def manifest_row(
    case: Case, name: str, image: str | None, split: str, wording: int = 0, plain: bool = False, crowded: bool = False
) -> dict[str, Any]:
    """One line of the manifest: image, prompt, answer, structured labels, ids of patient and study."""
    prompt, regions = asked(case, wording)
    whole = regions == case.scan.regions
    told = [f for f in case.findings if whole or report.region_of(f, case.scan.regions) in regions]
    return {
        "id": f"{name}_{wording}" if wording else name,
        "image": image,
        "prompt": prompt,
        "answer": report.write(case, None if whole else regions, None if plain else wording),
        "labels": [finding.to_dict() for finding in told],
        "regions": [region.value for region in regions],
        "patient": dicom.patient_id(case),
        "study": dicom.uid(case, "study"),
        "split": split,
        "seed": case.seed,
        "set": ("phantomct-full" if case.full else "phantomct-core") + ("-crowded" if crowded else ""),
        "phase": case.scan.phase.value,
        "noise_hu": round(case.scan.noise_hu, 1),
    }


def _write_numpy(phantom: Phantom, path: Path) -> None:
    arrays = {
        "hu": phantom.hu,
        "affine": phantom.affine,
        "organs": phantom.labels.organs,
        "findings": phantom.labels.findings,
    }
    # As np.savez_compressed, at level 1: noise packs no better at its level 6, which takes a quarter of the whole time.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, values in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")  # dated 1980, so that the same seed gives the same bytes
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w") as stream:
                np.lib.format.write_array(stream, np.ascontiguousarray(values), allow_pickle=False)


def _write_images(order: Order, name: str, case: Case) -> str | None:
    """Store the images of one phantom under final names only when whole; returns the path for the manifest."""
    if order.image_format is ImageFormat.NONE:
        return None
    phantom = render(case)
    images = order.folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    grid = case.scan.grid
    if order.labels and order.image_format is not ImageFormat.NUMPY:
        write_nifti(phantom.labels.organs, grid, order.folder / "labels" / f"{name}_organs.nii.gz")
        write_nifti(phantom.labels.findings, grid, order.folder / "labels" / f"{name}_findings.nii.gz")
    if order.image_format is ImageFormat.DICOM:
        dicom.write_series(phantom, images / name)
        return f"images/{name}"
    suffix = ".nii.gz" if order.image_format is ImageFormat.NIFTI else ".npz"
    unfinished = images / f".{name}.part"
    if order.image_format is ImageFormat.NIFTI:
        write_nifti(phantom.hu, grid, unfinished)
    else:
        _write_numpy(phantom, unfinished)
    unfinished.replace(images / f"{name}{suffix}")
    return f"images/{name}{suffix}"


def make_one(order: Order, number: int) -> None:
    """Make phantom `number` of an order; its rows are written last, so that they mean that all is there."""
    name = order.name(number)
    case = draw_case(order.seed * SEEDS_A_SET + number, full=order.full, crowded=order.crowded)
    image = _write_images(order, name, case)
    wordings = [
        manifest_row(case, name, image, order.split.value, wording, order.plain, order.crowded)
        for wording in range(order.wordings)
    ]
    rows = order.folder / "rows"
    rows.mkdir(parents=True, exist_ok=True)
    unfinished = rows / f".{name}.part"
    unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in wordings), encoding="utf-8")
    unfinished.replace(rows / f"{name}.json")


def _same_order(order: Order) -> None:
    """Refuse to mix two kinds of phantoms in one folder.

    Raises FileExistsError when the folder holds another order.
    """
    kept = order.folder / "order.json"
    wanted = {
        "seed": order.seed,
        "full": order.full,
        "format": order.image_format.value,
        "labels": order.labels,
        "split": order.split.value,
        "wordings": order.wordings,
        "plain": order.plain,
        **({"crowded": True} if order.crowded else {}),
    }
    if kept.exists():
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found != wanted:
            raise FileExistsError(f"{order.folder} was begun with {found}, not {wanted}: choose another folder")
    order.folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")


def generate(order: Order, processes: int | None = None) -> Iterator[int]:
    """Make what is missing of an order and yield the number of phantoms that are there after each; the manifest comes last.

    Raises FileExistsError when the folder holds another order.
    """
    _same_order(order)
    missing = [n for n in range(order.count) if not (order.folder / "rows" / f"{order.name(n)}.json").exists()]
    done = order.count - len(missing)
    yield done
    workers = min(processes or os.cpu_count() or 1, max(1, len(missing)))
    if workers == 1:
        for number in missing:
            make_one(order, number)
            done += 1
            yield done
    else:
        pool = ProcessPoolExecutor(workers)
        try:
            for finished in as_completed([pool.submit(make_one, order, number) for number in missing]):
                finished.result()
                done += 1
                yield done
        finally:
            # After Ctrl-C only the phantoms under way are finished, not all that were asked for.
            pool.shutdown(cancel_futures=True)
    write_manifest(order)


def write_manifest(order: Order) -> Path:
    """Join the rows of an order, in the order of their numbers, to `manifest.jsonl`."""
    path = order.folder / MANIFEST
    unfinished = order.folder / f".{MANIFEST}.part"
    with unfinished.open("w", encoding="utf-8") as stream:
        for number in range(order.count):
            stream.write((order.folder / "rows" / f"{order.name(number)}.json").read_text(encoding="utf-8"))
    unfinished.replace(path)
    return path
