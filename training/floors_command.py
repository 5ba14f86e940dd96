"""`python -m training floors`: fit the two floors on one set of cases and score them on another."""

import json
from pathlib import Path
from typing import Annotated

import typer

from training import fitted_floors
from training.commands import DEFAULT_CACHE, Cache
from training.data import read_manifests
from training.metrics.statistics import RESAMPLES
from training.tables import shown


def floors(
    train: Annotated[list[Path], typer.Option("--train", help="Manifest to fit on; give it again for more.")],
    data: Annotated[list[Path], typer.Option("--data", help="Manifest to score on.")],
    cache: Cache = DEFAULT_CACHE,
    resamples: Annotated[int, typer.Option(min=10, help="Bootstrap resamples.")] = RESAMPLES,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Score the answer without an image and the logistic model on the HU histogram: what any model must beat."""
    fitted, held_out = read_manifests(train), read_manifests(data)
    try:
        fitted_floors.refuse_shared_studies(fitted, held_out)
        text_only, histogram = fitted_floors.fit(fitted, cache).figures(held_out, cache, resamples)
    except fitted_floors.FloorError as error:
        raise typer.BadParameter(str(error)) from error
    result = {
        "train_cases": len(fitted),
        "cases": len(held_out),
        "text_only_finding_micro_f1": text_only["finding_micro_f1"],
        "histogram_finding_micro_f1": histogram["finding_micro_f1"],
        "floors": [text_only, histogram],
    }
    if as_json:
        typer.echo(json.dumps(result))
        return
    typer.echo(f"fitted on {len(fitted)} cases, scored on {len(held_out)}; finding_micro_f1 (95 % interval):")
    for row in (text_only, histogram):
        interval = row["intervals"].get("finding_micro_f1")
        typer.echo(f"{row['name']:24} {shown(row['finding_micro_f1'], interval)}")
