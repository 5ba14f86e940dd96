"""Where a checkpoint comes from: data, code, settings, seeds, versions; stored beside the weights and read by the card.

A run folder holds it from the first step on, so that a run never goes on there with other data, settings or start.
"""

import hashlib
import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mu2_model import Mu2Config
from mu2_model.configuration_mu2 import TrainedOn
from training.data import Case, file_digest, manifest_digest
from training.errors import TrainingError
from training.recipes import write_json

FILE = "training_run.json"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets")
UNKNOWN = "unknown"
PHANTOM_SETS = "phantomct-"
"""How the sets begin that `python -m training phantoms` makes."""
SAME = ("stage", "seed", "manifest_sha256", "rows_sha256", "start_sha256")
"""What a run that goes on has in common with its beginning, beside its settings."""
PLACES = ("data",)
"""Settings that say where the data lie; what they hold is compared by its digest."""


class BegunOtherwiseError(TrainingError, ValueError):
    """A run folder that was begun with other data, settings or start; the message says what differs."""


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
    rows_sha256: str = ""
    """Of whole rows; `manifest_sha256`, which older records have alone, leaves structured truth and labels out."""
    start_sha256: str = ""
    """Of the weights and the config of the checkpoint that this stage started from."""

    def with_settings(self, settings: dict[str, Any]) -> "Provenance":
        """The same run with more of its settings told."""
        return replace(self, settings=self.settings | settings)

    def begin(self, folder: Path, write: bool = True) -> None:
        """Note in a run folder what is made there, before the first step; with `write` False only look.

        BegunOtherwiseError when a run was begun there whose data, settings or start differ in what both records name.
        """
        found = read_beginning(folder)
        if found is not None:
            told: dict[str, Any] = json.loads(json.dumps(asdict(self)))
            then = {key: found[key] for key in SAME if key in found} | _compared(found)
            now = {key: told[key] for key in SAME} | _compared(told)
            changed = [
                f"{key}: {then[key]} then, {now[key]} now" for key in then if key in now and then[key] != now[key]
            ]
            if changed:
                raise BegunOtherwiseError(f"{folder} was begun otherwise ({'; '.join(changed)}): choose another --out")
        if write:
            folder.mkdir(parents=True, exist_ok=True)
            self.write(folder)

    def write(self, folder: Path) -> None:
        """Store it in a checkpoint folder."""
        write_json(folder / FILE, asdict(self))


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint folder says about itself, or None for one that was not trained here."""
    file = folder / FILE
    return None if not file.is_file() else dict(json.loads(file.read_text(encoding="utf-8")))


def read_beginning(folder: Path) -> dict[str, Any] | None:
    """What the run in a folder was begun with, or None where none was; older runs say it in their checkpoints alone."""
    stored = [read_provenance(folder), *map(read_provenance, sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")))]
    return next((record for record in stored if record is not None), None)


def _compared(record: dict[str, Any]) -> dict[str, Any]:
    return {f"setting {key}": value for key, value in record["settings"].items() if key not in PLACES}


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
    return Provenance(
        stage=stage,
        seed=seed,
        cases=len(cases),
        manifest_sha256=digest,
        revision=code_revision(),
        settings=settings,
        versions=versions(),
        trained_on=trained_on,
        before=before,
        rows_sha256=rows_digest(map(asdict, cases)),
        start_sha256=checkpoint_digest(model_folder),
    )


def rows_digest(rows: Iterable[dict[str, Any]]) -> str:
    """SHA-256 over whole rows, cases or preference pairs, in any order; their images count by name alone."""
    lines = sorted(json.dumps(row | {"image": Path(row["image"]).name}, sort_keys=True) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 over the weights and the config of a checkpoint folder."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    told = [(file.name, file_digest(file)) for file in files]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


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
