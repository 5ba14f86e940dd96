"""`python -m training mu2-phantom`: the whole recipe of the shipped checkpoint, from seeds to figures.

Each stage is proved before the next one is trusted: held-out cell F1 of the tower, then a linear read-out of findings from its
tokens, then the tokenizer's finding F1, then text. A run that was stopped goes on where it was.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mu2_model.novelty import FILE
from training import commands, evaluation_commands, tokenizer_stage
from training.novelty import novelty
from training.phantoms.generate import Split
from training.pipeline import PhantomSet, make_sets, unless_there
from training.preferences import read_pairs
from training.readout import readout_command

SETS = {
    "train": (1, Split.TRAIN),
    "validation": (2, Split.VALIDATION),
    "held_out": (3, Split.TEST),
    "crowded": (4, Split.TRAIN),
}
"""Seeds: preferences are drafted on the validation set; the held-out set is looked at once, by `evaluate`. The crowded set
teaches the tower and the tokenizer what is rare; no text is learned from it."""
SEEN = ("train", "crowded", "validation")
"""Sets with structured truth, which tower and tokenizer learn from and are watched on."""
READ_OUT = "readout.json"
VISION_RATE, TOKENIZER_RATE, TEXT_RATE, SFT_RATE, DPO_RATE = 1e-3, 1e-3, 1e-3, 3e-4, 1e-5
"""Far above the defaults of fine-tuning: this small model starts from nothing."""
READERS = ["projector", "visual_tokenizer"]
"""Frozen while the language model learns its words, which the tokenizer's questions are made of, and then to read the queries."""
VISION_BATCH, BATCH = 8, 16
"""Of the tower, and of the stages behind it."""
TRAIN_WORDINGS = 4
"""Reports of each training phantom (two of the whole scan, two of single regions), in plain words: the choice between phrases
costs a small model more than the findings do, and it learns them last."""


@dataclass(frozen=True)
class Run:
    """One run of the recipe: its folder, and what all of its stages share.

    A step that trains returns the folder that the next one starts from.
    """

    out: Path
    seed: int
    threads: int | None

    @property
    def shared(self) -> dict[str, Any]:
        """Options of every stage that reads volumes."""
        return {"cache": self.out / "cache", "threads": self.threads}

    @property
    def trained(self) -> dict[str, Any]:
        """Options of the stages behind the tower, which learn on its stored tokens."""
        return {**self.shared, "cached_tokens": True, "seed": self.seed, "batch": BATCH}

    @property
    def tuned(self) -> dict[str, Any]:
        """Options of the stages that learn text."""
        return {**self.trained, "config": "cpu_bf16"}

    def sets(self, *names: str) -> list[Path]:
        """Folders of sets, by their names in `SETS`."""
        return [self.out / name for name in names]

    def stage(self, name: str, run: Callable[..., None], *positional: Any, **options: Any) -> Path:
        """Run a stage into the folder of its name, unless its weights are there."""
        folder = self.out / name
        unless_there(folder, lambda: run(*positional, out=folder, **options))
        return folder

    def make_phantoms(self, counts: dict[str, int]) -> None:
        """Make what is missing of the sets; those that are learned from say things in plain words, several times."""
        sets = []
        for name, (number, split) in SETS.items():
            learned = split is Split.TRAIN
            wordings = TRAIN_WORDINGS if learned else 1
            sets.append(PhantomSet(name, number, counts[name], split, wordings, learned, name == "crowded"))
        make_sets(self.out, tuple(sets), processes=self.threads)

    def teach_tower(self, recipe: str, steps: int) -> Path:
        """Make an untrained model of the recipe's sizes and teach its tower the voxel labels."""
        start = self.stage("init", commands.init, self.sets("train"), recipe=recipe, seed=self.seed)
        options = {"steps": steps, "batch": VISION_BATCH, "lr": VISION_RATE, "bf16": True, "seed": self.seed}
        return self.stage("vision", commands.vision, start, self.sets(*SEEN), **options, **self.shared)

    def prove_tower(self, vision: Path) -> None:
        """Write what a linear read-out finds in the tower's tokens."""
        report, (learn, watch) = self.out / READ_OUT, (self.sets("train"), self.sets("validation"))
        unless_there(self.out, lambda: readout_command(vision, learn, watch, report, **self.shared), READ_OUT)

    def teach_tokenizer(self, model: Path, steps: int) -> Path:
        """Teach projector and μ² tokenizer the structured truth."""
        options = {"steps": steps, "lr": TOKENIZER_RATE, "bf16": True}
        return self.stage("tokenizer", tokenizer_stage.tokenizer, model, self.sets(*SEEN), **options, **self.trained)

    def teach_text(self, name: str, model: Path, rate: float, epochs: float, freeze: list[str] | None = None) -> Path:
        """Teach the reports to all behind the tower but the parts that are frozen."""
        options = {"freeze": freeze, "lr": rate, "epochs": epochs}
        return self.stage(name, commands.sft_command, model, self.sets("train"), **options, **self.tuned)

    def prefer(self, sft: Path, epochs: float) -> Path | None:
        """DPO on preferences among the model's own drafts; None when no pair of drafts was told apart."""
        pairs = self.out / "pairs.jsonl"
        options = {**self.shared, "cached_tokens": True, "seed": self.seed}
        watch = self.sets("validation")
        unless_there(self.out, lambda: evaluation_commands.preferences(sft, watch, pairs, **options), pairs.name)
        if not read_pairs(pairs):
            commands.NOTES.print(
                "no preference pair was kept, so there is no DPO: the drafts are too much alike or too poor"
            )
            return None
        return self.stage("dpo", commands.dpo, sft, pairs, lr=DPO_RATE, epochs=epochs, **self.tuned)

    def learn_ordinary(self, model: Path) -> None:
        """Store in the checkpoint what ordinary volumes look like to it."""
        unless_there(model, lambda: novelty(model, self.sets("train", "validation"), **self.shared), FILE)

    def score(self, models: list[Path]) -> None:
        """Score the models on the held-out set, test the first against the second, and write each one's card."""
        options = {**self.shared, "cached_tokens": True, "card": True}
        evaluation_commands.evaluate_command(self.sets("held_out"), models, self.out / "scores", **options)


def mu2_phantom(
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")] = Path("runs/phantom"),
    train: Annotated[int, typer.Option(min=8, help="Phantoms to train on.")] = 4000,
    crowded: Annotated[int, typer.Option(min=8, help="Crowded ones for tower and tokenizer.")] = 2000,
    validation: Annotated[int, typer.Option(min=8, help="Phantoms to watch, and to draft preferences on.")] = 200,
    held_out: Annotated[int, typer.Option(min=8, help="Phantoms to score on.")] = 500,
    vision_steps: Annotated[int, typer.Option(min=1)] = 12000,
    tokenizer_steps: Annotated[int, typer.Option(min=1)] = 1500,
    words_epochs: Annotated[float, typer.Option()] = 0.7,
    reader_epochs: Annotated[float, typer.Option()] = 2,
    sft_epochs: Annotated[float, typer.Option()] = 1,
    dpo_epochs: Annotated[float, typer.Option()] = 2,
    recipe: Annotated[str, typer.Option(help="Sizes.")] = "phantom",
    seed: commands.Seed = 0,
    threads: commands.Threads = None,
) -> None:
    """Make mu2-phantom: phantoms, tower, read-out, words, tokenizer, SFT, preferences, DPO, evaluation against SFT."""
    run = Run(out, seed, threads)
    run.make_phantoms({"train": train, "crowded": crowded, "validation": validation, "held_out": held_out})
    vision = run.teach_tower(recipe, vision_steps)
    run.prove_tower(vision)
    words = run.teach_text("words", vision, TEXT_RATE, words_epochs, freeze=READERS)
    read = run.teach_tokenizer(words, tokenizer_steps)
    reader = run.teach_text("reader", read, TEXT_RATE, reader_epochs, freeze=READERS)
    sft = run.teach_text("sft", reader, SFT_RATE, sft_epochs)
    dpo = run.prefer(sft, dpo_epochs)
    scored = [sft] if dpo is None else [dpo, sft]
    run.learn_ordinary(scored[0])
    run.score(scored)
    commands.NOTES.print(json.dumps({"checkpoint": str(scored[0]), "read_out": str(out / READ_OUT)}))
