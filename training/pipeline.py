"""Chains of stages that can stop and go on: a stage whose result is there is not run again, a begun one is resumed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from training import commands
from training.phantoms.generate import ImageFormat, Order, Split, generate

WEIGHTS = "model.safetensors"
TOWER = "model.vision_tower."


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


def take_tower(initial: Path, vision: Path) -> None:
    """Give an untrained checkpoint the trained vision tower of another of the same sizes; ValueError when they differ."""
    weights, trained = load_file(initial / WEIGHTS), load_file(vision / WEIGHTS)
    tower = {name: tensor for name, tensor in trained.items() if name.startswith(TOWER)}
    for name, tensor in tower.items():
        if name not in weights or weights[name].shape != tensor.shape:
            raise ValueError(f"{name} does not fit: {initial.name} and {vision.name} are of different sizes")
    partial = initial / f"{WEIGHTS}.partial"
    save_file(weights | tower, partial, metadata={"format": "pt"})
    partial.replace(initial / WEIGHTS)
