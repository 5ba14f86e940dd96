"""Where a checkpoint comes from: data, code, settings, seeds, versions; stored beside the weights and read by the card."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from training.data import Case, manifest_digest
from training.recipes import write_json

FILE = "training_run.json"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets")
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Provenance:
    """How one stage was run, and what it started from."""

    stage: str
    seed: int
    cases: int
    manifest_sha256: str
    revision: str
    settings: dict[str, Any]
    versions: dict[str, str]
    before: list[dict[str, Any]] = field(default_factory=list)
    """The stages that made the checkpoint this one started from, first one first."""

    def write(self, folder: Path) -> None:
        """Store it in a checkpoint folder."""
        write_json(folder / FILE, asdict(self))


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint folder says about itself, or None for one that was not trained here."""
    file = folder / FILE
    return None if not file.is_file() else dict(json.loads(file.read_text(encoding="utf-8")))


def collect(stage: str, seed: int, cases: Sequence[Case], settings: dict[str, Any], model_folder: Path) -> Provenance:
    """The provenance of a run that is about to start from a checkpoint folder."""
    earlier = read_provenance(model_folder)
    before: list[dict[str, Any]] = []
    if earlier is not None:
        before = [*earlier.pop("before", []), earlier]
    digest = manifest_digest(cases)
    return Provenance(stage, seed, len(cases), digest, code_revision(), settings, versions(), before)


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    return {name: version(name) for name in PACKAGES}


def code_revision() -> str:
    """The commit of the code, with a + when files differ from it; "unknown" outside a repository."""
    root = Path(__file__).resolve().parents[1]
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "training", "mu2_model"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
    return head + ("+" if changed else "")
