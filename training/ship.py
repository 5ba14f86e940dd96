"""`python -m training ship`: stores a trained checkpoint as the package's own, in bfloat16, with its card.

What ships is held to what is promised of it: made from phantoms, able to tell other CTs, small enough for a repository.
"""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from mu2_model import Mu2ForConditionalGeneration, Mu2Processor, novelty, shipped
from training.commands import NOTES, Model
from training.fitted_floors import FILE as FLOORS_FILE
from training.model_card import SCORES_FILE, write_card
from training.provenance import FILE as PROVENANCE_FILE

LARGEST_BYTES = 20_000_000


def ship(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="Folder to write, emptied first.")] = shipped.FOLDER,
) -> None:
    """Make mu2-phantom of a checkpoint trained on phantoms; scores and provenance come along."""
    loaded = Mu2ForConditionalGeneration.from_pretrained(model, dtype="float32")
    if loaded.config.trained_on != "phantoms":
        raise typer.BadParameter(f"{model} was trained on {loaded.config.trained_on}: mu2-phantom knows phantoms alone")
    if not (model / novelty.FILE).is_file():
        raise typer.BadParameter(f"{model} cannot tell CTs unlike its own: run `python -m training novelty` first")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    loaded.bfloat16().save_pretrained(partial)
    Mu2Processor.from_pretrained(model).save_pretrained(partial)
    for name in (novelty.FILE, PROVENANCE_FILE, SCORES_FILE, FLOORS_FILE):
        if (model / name).is_file():
            shutil.copy(model / name, partial / name)
    write_card(partial)
    size = folder_bytes(partial)
    if size > LARGEST_BYTES:
        shutil.rmtree(partial)
        raise typer.BadParameter(
            f"{size / 1e6:.1f} MB are too many for the repository: {LARGEST_BYTES / 1e6:.0f} at most"
        )
    for file in partial.iterdir():
        file.chmod(0o644)  # safetensors writes for its owner alone
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    NOTES.print(f"{out}: {size / 1e6:.1f} MB")


def folder_bytes(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
