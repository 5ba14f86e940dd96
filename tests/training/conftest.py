"""A world small enough for seconds: six synthetic volumes, a manifest, an untrained checkpoint made for them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from training.data import Case, read_manifest
from training.recipes import RECIPES, make_initial

TINY = replace(
    RECIPES["smoke"],
    name="mu2-tiny",
    size=32,
    chunk_slices=8,
    max_slices=32,
    slice_mm=4.0,
    width=32,
    vision_width=16,
    stem=(8, 8, 16),
    queries=4,
    selected=4,
    max_new_tokens=24,
)
SIDES = ("left", "right")
SLICES = (8, 16, 12, 16, 8, 16)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests share two cores with each other."""
    torch.set_num_threads(1)


def write_volume(path: Path, slices: int, seed: int, side: str) -> None:
    """A body of soft tissue in air with a dense ball on one side, with its voxel labels, as `phantoms` stores it."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(np.arange(slices), np.arange(40), np.arange(40), indexing="ij")
    body = (y - 20) ** 2 + (x - 20) ** 2 < 17**2
    # Columns run towards the patient's left.
    ball = (z - slices // 2) ** 2 + (y - 20) ** 2 + (x - (29 if side == "left" else 11)) ** 2 < 16
    hu = np.where(body, 40, -1000) + rng.normal(0, 10, body.shape)
    hu[ball] = 300
    affine = np.array([[0, 0, -4, 80], [0, -4, 0, 80], [4, 0, 0, 0], [0, 0, 0, 1.0]])
    organs = np.where(body, 13, 0).astype(np.uint8)
    findings = np.where(ball, 1, 0).astype(np.uint8)
    np.savez_compressed(path, hu=hu.astype(np.int16), affine=affine, organs=organs, findings=findings)


def write_cases(
    folder: Path, like: Case, splits: Sequence[str], slices: Sequence[int], sides: Sequence[str] = SIDES
) -> list[Case]:
    """One small volume for each split named, of a patient of its own, told as `like`; slice counts and sides take turns."""
    made = []
    for number, split in enumerate(splits):
        image = folder / f"v{number}.npz"
        write_volume(image, slices[number % len(slices)], number, sides[number % len(sides)])
        names = {"case_id": f"c{number}", "patient_id": f"p{number}", "study_id": f"s{number}"}
        made.append(replace(like, image=str(image), split=split, **names))
    return made


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with manifest.jsonl, images and an untrained checkpoint `init`."""
    folder = tmp_path_factory.mktemp("world")
    rows = []
    for number, slices in enumerate(SLICES):
        side = SIDES[number % 2]
        write_volume(folder / f"v{number}.npz", slices, number, side)
        rows.append(
            {
                "id": f"case{number}",
                "image": f"v{number}.npz",
                "prompt": "Write the report of this CT.",
                "answer": f"FINDINGS: A nodule of {8 + number} mm in the {side} lung. IMPRESSION: Nodule, {side}.",
                "labels": [{"type": "lung_nodule", "side": side, "size_mm": 8 + number}],
                "patient": f"p{number}",
                "study": f"s{number}",
                "set": "phantomct-tiny",
                "split": "train" if number < 4 else "validation",
            }
        )
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_initial(TINY, read_manifest(folder), folder / "init")
    return folder


@pytest.fixture(scope="session")
def cases(world: Path) -> list[Case]:
    """All six cases."""
    return read_manifest(world)
