"""`python -m training smoke`: phantoms, vision, sft-align, sft, preferences, dpo, evaluate, one after another at toy size.

It shows that every stage takes what the one before wrote, on a CPU in minutes. Its scores mean nothing.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from training import commands, evaluation_commands
from training.errors import TrainingError
from training.phantoms.generate import Split
from training.pipeline import PhantomSet, make_sets
from training.preferences import read_pairs

SETS = (PhantomSet("train", 901, 24, Split.TRAIN), PhantomSet("held_out", 902, 12, Split.VALIDATION))
"""Seeds that no other run uses."""
VISION_STEPS = 30
ALIGN_EPOCHS, SFT_EPOCHS = 5, 60
RATE = 3e-3
SAMPLES = 6


class SmokeError(TrainingError, RuntimeError):
    """A stage that ran but left nothing for the next one; the message says which."""


def smoke(
    out: Annotated[Path, typer.Option("--out", help="Folder for everything; what it holds is not made again.")],
    threads: commands.Threads = None,
) -> None:
    """Run every stage at toy size, one after another, and say how long each took."""
    times: dict[str, float] = {}

    def stage(name: str, run: Callable[[], None]) -> None:
        start = time.monotonic()
        run()
        times[name] = time.monotonic() - start
        commands.NOTES.print(f"{name}: {times[name]:.0f} s")

    train, held_out, cache = [out / "train"], [out / "held_out"], out / "cache"
    shared: dict[str, Any] = {"cache": cache, "cached_tokens": True, "threads": threads}
    stage("phantoms", lambda: make_sets(out, SETS))
    stage("init", lambda: commands.init(train, out / "init", "smoke"))
    stage(
        "vision",
        lambda: commands.vision(
            out / "init",
            [*train, *held_out],
            out / "vision",
            cache,
            VISION_STEPS,
            lr=RATE,
            score_every=VISION_STEPS,
            threads=threads,
        ),
    )
    stage(
        "sft-align",
        lambda: commands.sft_align(out / "vision", train, out / "align", lr=RATE, epochs=ALIGN_EPOCHS, **shared),
    )
    stage("sft", lambda: commands.sft_command(out / "align", train, out / "sft", lr=RATE, epochs=SFT_EPOCHS, **shared))
    pairs = out / "pairs.jsonl"
    stage(
        "preferences",
        lambda: evaluation_commands.preferences(out / "sft", held_out, pairs, samples=SAMPLES, **shared),
    )
    if not read_pairs(pairs):
        raise SmokeError("preferences: no pair was kept, so dpo has nothing to learn from")
    stage("dpo", lambda: commands.dpo(out / "sft", pairs, out / "dpo", **shared))
    both = [out / "dpo", out / "sft"]
    stage(
        "evaluate",
        lambda: evaluation_commands.evaluate_command(held_out, both, out / "scores", resamples=100, **shared),
    )
    typer.echo(", ".join(f"{name} {seconds:.0f} s" for name, seconds in times.items()))
    typer.echo(f"all stages ran in {sum(times.values()):.0f} s; the scores of a toy mean nothing")
