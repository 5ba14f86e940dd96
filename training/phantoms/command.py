"""`python -m training phantoms`: make phantoms, the demo study, or pictures to look at."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training.phantoms import demo
from training.phantoms.contact_sheet import write_sheet
from training.phantoms.generate import MOST_WORDINGS, SEEDS_A_SET, ImageFormat, Order, Split, generate
from training.phantoms.phantom import make_phantom

NOTES = Console(stderr=True)
SHEET_PHANTOMS = 8
"""Phantoms on one contact sheet."""


def phantoms(
    out: Annotated[Path | None, typer.Option(help="Folder for images, labels and manifest.jsonl.")] = None,
    count: Annotated[int, typer.Option(min=1, max=SEEDS_A_SET, help="How many phantoms.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Which set; sets of two seeds share no phantom.")] = 0,
    full: Annotated[bool, typer.Option("--full/--core", help="All 25 findings, or the 12 of PhantomCT-core.")] = False,
    image_format: Annotated[ImageFormat, typer.Option("--format", help="How images are stored.")] = ImageFormat.NIFTI,
    labels: Annotated[
        bool, typer.Option(help="Store organ and finding labels a voxel (numpy has them always).")
    ] = False,
    split: Annotated[Split, typer.Option(help="Split written to the manifest.")] = Split.TRAIN,
    wordings: Annotated[
        int, typer.Option(min=1, max=MOST_WORDINGS, help="Reports of each phantom, in other words.")
    ] = 1,
    plain: Annotated[bool, typer.Option("--plain", help="One phrase for each thing that is said.")] = False,
    crowded: Annotated[
        bool, typer.Option("--crowded", help="Six to ten findings in each, to teach a tower; never to score.")
    ] = False,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes; by default one a core.")] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Draw a contact sheet of the first phantoms to this picture.")
    ] = None,
    demo_folder: Annotated[
        Path | None, typer.Option("--demo", help="Write the demo study there, nothing else.")
    ] = None,
) -> None:
    """Make synthetic CTs whose findings are known: the same seed gives the same bytes.

    Stops and goes on: what a folder already holds is not made again.
    """
    if demo_folder is not None:
        written = demo.write_demo(demo_folder)
        NOTES.print(f"{len(written)} files in {demo_folder}")
        return
    if out is None and sheet is None:
        raise typer.BadParameter("say where: --out FOLDER, --sheet PICTURE or --demo FOLDER")
    if crowded and split is not Split.TRAIN:
        raise typer.BadParameter("crowded phantoms are no part of the benchmark: they are for --split train alone")
    if sheet is not None:
        first = seed * SEEDS_A_SET
        drawn = [
            make_phantom(first + number, full=full, crowded=crowded) for number in range(min(count, SHEET_PHANTOMS))
        ]
        write_sheet(drawn, sheet)
        NOTES.print(f"{len(drawn)} phantoms drawn in {sheet}")
    if out is not None:
        _generate(Order(out, count, seed, full, image_format, labels, split, wordings, plain, crowded), processes)


def _generate(order: Order, processes: int | None) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=NOTES) as progress:
            task = progress.add_task("phantoms", total=order.count)
            for done in generate(order, processes):
                progress.update(task, completed=done)
    except FileExistsError as error:
        raise typer.BadParameter(str(error)) from error
    NOTES.print(f"{order.count} phantoms in {order.folder}")
