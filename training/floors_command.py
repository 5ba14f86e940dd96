"""`python -m training floors`: fit the two floors on one set of cases and score them on another."""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track

from training import floors as models
from training.data import Case, read_manifests
from training.metrics.findings import Stated, stated
from training.volumes import read_volume

NOTES = Console(stderr=True)


def _truths(cases: list[Case]) -> list[list[Stated]]:
    unknown = [case.case_id for case in cases if case.findings is None]
    if unknown:
        raise typer.BadParameter(f"{len(unknown)} cases have no structured truth, {unknown[0]} for one: use phantoms")
    return [[stated(finding) for finding in case.findings or ()] for case in cases]


def _histograms(cases: list[Case], what: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    rows = [models.histogram(np.asarray(read_volume(c.image)[0])) for c in track(cases, what, console=NOTES)]
    return np.array(rows)


def floors(
    train: Annotated[list[Path], typer.Option("--train", help="Manifest to fit on; give it again for more.")],
    data: Annotated[list[Path], typer.Option("--data", help="Manifest to score on.")],
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Score the answer without an image and the logistic model on the HU histogram: what any model must beat."""
    fitted, held_out = read_manifests(train), read_manifests(data)
    shared = {case.study_id for case in fitted} & {case.study_id for case in held_out}
    if shared:
        raise typer.BadParameter(f"{len(shared)} studies are in both sets: score on phantoms of another seed")
    known, wanted = _truths(fitted), _truths(held_out)
    text = models.fit_text_only([case.question for case in fitted], known)
    image = models.fit_histogram_model(_histograms(fitted, "histograms to fit"), known)
    said = image.predict(_histograms(held_out, "histograms to score"))
    result = {
        "train_cases": len(fitted),
        "cases": len(held_out),
        "text_only_finding_micro_f1": models.score(wanted, text.predict([case.question for case in held_out])),
        "histogram_finding_micro_f1": models.score(wanted, said),
    }
    if as_json:
        typer.echo(json.dumps(result))
        return
    for name, value in result.items():
        typer.echo(f"{name:30} {value:.3f}" if isinstance(value, float) else f"{name:30} {value}")
