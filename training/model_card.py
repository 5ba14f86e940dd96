"""The card of a checkpoint, written from what the run stored and the evaluation counted; no figure is typed by hand."""

import json
from pathlib import Path
from typing import Any

from mu2_model.novelty import Novelty
from training.provenance import read_provenance

SCORES_FILE = "evaluation.json"
LEARNED_FROM = {
    "nothing": "Its language was trained on nothing yet: its text is random.",
    "phantoms": "Trained on PhantomCT phantoms only, synthetic CTs of a procedural generator; it has never seen a patient.",
    "patients": "Trained on the data named below.",
}
"""By `trained_on` of the config."""
LIMITS = (
    "Scores on phantoms say whether the system learns; they say nothing about patients. Every draft is machine-written, needs "
    "a radiologist's reading and signature, and is not for clinical use without local approval."
)
SHOWN_SCORES = (
    "cases",
    "failed",
    "finding_micro_f1",
    "finding_macro_f1",
    "side_accuracy",
    "size_accuracy",
    "normal_false_positive_rate",
    "green",
    "rouge1",
    "meteor",
    "bleu4",
    "shuffled_finding_micro_f1",
    "distinct_report_ratio",
)


def card(folder: Path) -> str:
    """The card's text for a checkpoint folder."""
    run = read_provenance(folder) or {}
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = config.get("model_name", folder.name)
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: transformers",
        "tags: [computed-tomography, radiology-report]",
        "---",
    ]
    lines += [f"# {name}", "", "A μ²LLM checkpoint: a CT volume and a question in, a draft report out.", ""]
    lines += [f"{LEARNED_FROM[config.get('trained_on', 'nothing')]} {LIMITS}", ""]
    if run:
        lines += ["## Made by", "", "| stage | cases | seed | manifest (SHA-256) | code |", "|---|---|---|---|---|"]
        for stage in [*run.get("before", []), run]:
            row = (stage["stage"], stage["cases"], stage["seed"], stage["manifest_sha256"][:12], stage["revision"][:12])
            lines.append("| " + " | ".join(str(value) for value in row) + " |")
        lines += ["", "Settings and package versions of every stage are in `training_run.json`.", ""]
    known = Novelty.load(folder, config["vision_config"]["hidden_size"])
    if known is not None:
        lines += _novelty(known)
    scores = folder / SCORES_FILE
    if scores.is_file():
        lines += _scores(json.loads(scores.read_text(encoding="utf-8")))
    return "\n".join(lines)


def _novelty(known: Novelty) -> list[str]:
    return [
        "## Unlike its training data",
        "",
        "A CT unlike those it was trained on is drafted and flagged, by the distance of its tower tokens to those of "
        f"{known.fitted} training volumes. The threshold was set on {known.calibrated} other volumes; of {known.checked} more "
        f"{known.false_alarms:.1%} are flagged though they are of the same kind. A rare disease in an ordinary CT is not told.",
        "",
    ]


def _scores(told: dict[str, Any]) -> list[str]:
    floors: list[dict[str, Any]] = told.get("floors", [])
    names = "".join(f" {floor['name']} |" for floor in floors)
    lines = [
        "## Scores",
        "",
        f"Printed by `{told['command']}`.",
        "",
        f"| score | value | 95 % interval |{names}",
        "|---|---|---|" + "---|" * len(floors),
    ]
    intervals = told.get("intervals", {})
    for name in SHOWN_SCORES:
        if told.get(name) is None:
            continue
        low_high = intervals.get(name)
        interval = "" if low_high is None else f"{low_high[0]:.3f} to {low_high[1]:.3f}"
        beside = "".join(f" {_shown(floor.get(name))} |" for floor in floors)
        lines.append(f"| {name} | {_shown(told[name])} | {interval} |{beside}")
    if told.get("floors_missing"):
        lines += ["", f"No floors: {told['floors_missing']}."]
    return [*lines, ""]


def _shown(value: Any) -> str:
    if value is None:
        return "—"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def write_card(folder: Path) -> Path:
    """Write README.md into the checkpoint folder."""
    file = folder / "README.md"
    file.write_text(card(folder), encoding="utf-8")
    return file
