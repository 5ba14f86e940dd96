"""Where a checkpoint comes from: data, code, settings, seeds, versions; stored beside the weights and read by the card."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mu2_model import Mu2Config
from mu2_model.configuration_mu2 import TrainedOn
from training.data import Case, manifest_digest
from training.recipes import write_json

FILE = "training_run.json"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets")
UNKNOWN = "unknown"
PHANTOM_SETS = "phantomct-"
"""How the sets begin that `python -m training phantoms` makes."""


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
    trained_on: TrainedOn
    """What the result of this stage learned from: the checkpoint's `trained_on`."""
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
    known = Mu2Config.from_pretrained(model_folder).trained_on
    if any(stage.get("trained_on") == "patients" for stage in before):
        # Stages that teach the tower or the tokenizer alone say it here and not in the config, whose drafts are still random.
        known = "patients"
    trained_on = learned_from(cases, known)
    return Provenance(stage, seed, len(cases), digest, code_revision(), settings, versions(), trained_on, before)


def learned_from(cases: Sequence[Case], before: TrainedOn) -> TrainedOn:
    """What a model may be said to know after these cases: phantoms when it knew no more and every case is of a set of phantoms.

    What was once learned from patients stays so, whatever comes after. A case that names no set counts as a patient's, since
    phantoms are always named.
    """
    if not cases or before == "patients":
        return before
    return "phantoms" if all(case.source.startswith(PHANTOM_SETS) for case in cases) else "patients"


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
