"""`python -m training mu2-phantom`: the whole recipe of the shipped checkpoint, from seeds to figures.

Each stage is proved before the next one is trusted: held-out cell F1 of the tower, then a linear read-out of findings from its
tokens, then the tokenizer's finding F1, then text. A run that was stopped goes on where it was.
"""

import json
from collections.abc import Callable
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
VISION_RATE, TOKENIZER_RATE, TEXT_RATE, SFT_RATE, DPO_RATE = 1e-3, 1e-3, 1e-3, 3e-4, 1e-5
"""Far above the defaults of fine-tuning: this small model starts from nothing."""
READERS = ["projector", "visual_tokenizer"]
"""Frozen while the language model learns its words, which the tokenizer's questions are made of, and then to read the queries."""
VISION_BATCH = 8
TRAIN_WORDINGS = 4
"""Reports of each training phantom (two of the whole scan, two of single regions), in plain words: the choice between phrases
costs a small model more than the findings do, and it learns them last."""


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
    counts = {"train": train, "validation": validation, "held_out": held_out, "crowded": crowded}
    sets = []
    for name, (number, split) in SETS.items():
        learned = split is Split.TRAIN
        wordings = TRAIN_WORDINGS if learned else 1
        sets.append(PhantomSet(name, number, counts[name], split, wordings, learned, name == "crowded"))
    make_sets(out, tuple(sets), processes=threads)
    cache = out / "cache"
    learn, watch, score = [out / "train"], [out / "validation"], [out / "held_out"]
    seen = [*learn, out / "crowded", *watch]
    shared: dict[str, Any] = {"cache": cache, "threads": threads, "seed": seed}
    trained = {**shared, "cached_tokens": True, "batch": 16}
    tuned = {**trained, "config": "cpu_bf16"}

    def stage(name: str, run: Callable[..., None], *positional: Any, **options: Any) -> Path:
        folder = out / name
        unless_there(folder, lambda: run(*positional, out=folder, **options))
        return folder

    start = stage("init", commands.init, learn, recipe=recipe, seed=seed)
    vision = stage(
        "vision",
        commands.vision,
        start,
        seen,
        steps=vision_steps,
        batch=VISION_BATCH,
        lr=VISION_RATE,
        bf16=True,
        **shared,
    )
    unless_there(
        out, lambda: readout_command(vision, learn, watch, out / "readout.json", cache, threads), "readout.json"
    )
    words = stage(
        "words", commands.sft_command, vision, learn, freeze=READERS, lr=TEXT_RATE, epochs=words_epochs, **tuned
    )
    read = stage(
        "tokenizer",
        tokenizer_stage.tokenizer,
        words,
        seen,
        steps=tokenizer_steps,
        lr=TOKENIZER_RATE,
        bf16=True,
        **trained,
    )
    reader = stage(
        "reader", commands.sft_command, read, learn, freeze=READERS, lr=TEXT_RATE, epochs=reader_epochs, **tuned
    )
    sft = stage("sft", commands.sft_command, reader, learn, lr=SFT_RATE, epochs=sft_epochs, **tuned)
    pairs = out / "pairs.jsonl"
    unless_there(
        out,
        lambda: evaluation_commands.preferences(
            sft, watch, pairs, cache=cache, cached_tokens=True, seed=seed, threads=threads
        ),
        pairs.name,
    )
    scored = [sft]
    if read_pairs(pairs):
        scored = [stage("dpo", commands.dpo, sft, pairs, lr=DPO_RATE, epochs=dpo_epochs, **tuned), sft]
    else:
        commands.NOTES.print(
            "no preference pair was kept, so there is no DPO: the drafts are too much alike or too poor"
        )
    unless_there(scored[0], lambda: novelty(scored[0], [*learn, *watch], cache, threads=threads), FILE)
    evaluation_commands.evaluate_command(
        score, scored, out / "scores", cache=cache, cached_tokens=True, card=True, threads=threads
    )
    commands.NOTES.print(json.dumps({"checkpoint": str(scored[0]), "read_out": str(out / "readout.json")}))
