"""Chains of stages that can stop and go on: a stage whose result is there is not run again, a begun one is resumed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from training import commands
from training.phantoms.generate import ImageFormat, Order, Split, generate

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class PhantomSet:
    """One set of phantoms of a chain: folder, seed (sets of two seeds share no phantom), size, reports of each phantom."""

    name: str
    seed: int
    count: int
    split: Split
    wordings: int = 1
    plain: bool = False
    crowded: bool = False


def make_sets(out: Path, sets: tuple[PhantomSet, ...], full: bool = False, processes: int | None = None) -> None:
    """Make what is missing of the sets, with voxel labels."""
    for wanted in sets:
        order = Order(
            out / wanted.name,
            wanted.count,
            wanted.seed,
            full,
            ImageFormat.NUMPY,
            split=wanted.split,
            wordings=wanted.wordings,
            plain=wanted.plain,
            crowded=wanted.crowded,
        )
        with commands.progress_bar() as bar:
            task = bar.add_task(wanted.name, total=wanted.count)
            for done in generate(order, processes):
                bar.update(task, completed=done)


def unless_there(folder: Path, run: Callable[[], None], file: str = WEIGHTS) -> None:
    """Run a stage unless its last file exists; every stage writes its weights last of all that the next one reads."""
    if (folder / file).is_file():
        commands.NOTES.print(f"{folder.name}: there already")
        return
    run()
