"""`python -m training synthesize`: price first, then questions, answers and narratives from reports."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from training.data import read_manifests, write_manifest
from training.endpoint import Endpoint, EndpointError, Price
from training.synthesize import AnswerStore, Synthesizer

NOTES = Console(stderr=True)
app = typer.Typer()


@app.command()
def synthesize(
    data: Annotated[list[Path], typer.Option("--data", help="Manifest with reports; give it again for more.")],
    out: Annotated[Path, typer.Option("--out", help="Manifest to write; answers are stored beside it.")],
    base_url: Annotated[str, typer.Option(help="OpenAI-compatible endpoint, up to /v1.")] = "https://api.openai.com/v1",
    endpoint_model: Annotated[str, typer.Option(help="Model to ask there.")] = "gpt-4o-mini",
    names: Annotated[Path | None, typer.Option(help="Names to take out of every text, one a line.")] = None,
    rate: Annotated[float, typer.Option(min=0.001, help="Requests a second at most.")] = 5.0,
    threads: Annotated[int, typer.Option(min=1, help="Reports at once.")] = 4,
    price_in: Annotated[float, typer.Option(help="US dollars for a million tokens in.")] = Price.input_per_million,
    price_out: Annotated[float, typer.Option(help="US dollars for a million tokens out.")] = Price.output_per_million,
    budget: Annotated[float, typer.Option(help="US dollars; a run that would cost more does not start.")] = 10.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first reports.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, ask nothing.")] = False,
) -> None:
    """Make questions with thinking and answer, and a narrative, from every report.

    The key is read from OPENAI_API_KEY.
    """
    cases = read_manifests(data)[:limit]
    listed = [] if names is None else names.read_text(encoding="utf-8-sig").splitlines()
    endpoint = Endpoint(base_url, endpoint_model, requests_per_second=rate)
    worker = Synthesizer(endpoint, AnswerStore(out.with_suffix(".answers")), listed)
    price = Price(price_in, price_out)
    estimate = worker.estimate(cases, price)
    typer.echo(f"{len(cases)} reports: {estimate.text()}")
    if dry_run:
        return
    if estimate.dollars > budget:
        typer.echo(f"more than the budget of {budget:.2f}: raise --budget or set --limit", err=True)
        raise typer.Exit(1)
    try:
        with Progress(console=NOTES) as bar:
            task = bar.add_task("reports", total=len(cases))
            made = list(worker.run(cases, threads, lambda: bar.advance(task)))
    except EndpointError as error:
        typer.echo(f"stopped: {error}. What was answered is stored: the same command goes on from there", err=True)
        raise typer.Exit(1) from error
    write_manifest(made, out)
    spent = worker.spent
    paid = price.cost(spent.prompt_tokens, spent.completion_tokens)
    typer.echo(f"{len(made)} cases in {out}; {spent.requests} requests, {spent.stored} stored, {paid:.2f} US dollars")
    for reason, count in sorted(spent.dropped.items()):
        typer.echo(f"left out, {reason}: {count}")
