"""`python -m training ablate`: the publication's arms on PhantomCT, several seeds, one shared frozen tower and token cache.

Arms: baseline, +RPE, +DTS, +DMTP, full, full + DPO, and "legacy": the published tokenizer with its quirks. All begin with the
tower and the language model of one checkpoint; projector and tokenizer alone are new with every arm and seed. What is done
is kept: a finished arm is read, a begun one resumed, and a folder that was begun with other options is refused.
"""

import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mu2_model import Mu2Config, Mu2ForConditionalGeneration, Mu2Processor
from mu2_model.configuration_mu2 import ABLATIONS
from training import ablation_report, commands, evaluation_commands, tokenizer_stage
from training.data import Case, file_digest, manifest_digest, read_manifests
from training.drafting import read_drafts
from training.evaluate import Evaluation
from training.model_card import SCORES_FILE
from training.phantom_model import DPO_RATE, TEXT_RATE, TOKENIZER_RATE
from training.pipeline import WEIGHTS, unless_there
from training.recipes import write_json

LEGACY, DPO = "legacy", "+DPO"
ARMS = (*ABLATIONS, DPO, LEGACY)
SIZES = ("num_layers", "num_attention_heads", "num_query_tokens", "num_selected_tokens", "max_relative_positions")
RESULT, REPORT, OPTIONS = "ablation.json", "ablation.md", "options.json"


def arm_config(arm: str, config: Mu2Config) -> Mu2Config:
    """The shared checkpoint's config with the tokenizer of an arm, of the same sizes."""
    tokenizer = config.tokenizer.to_dict()
    parts: dict[str, Any] = {"text_config": config.text_config, "vision_config": config.vision.to_dict()}
    if arm != LEGACY:
        name = "full" if arm == DPO else arm
        config.tokenizer_config = Mu2Config.ablation(name, tokenizer_config=tokenizer, **parts).tokenizer
        return config
    # Only the tokenizer is the published one: placement and preprocessing stay, so that the arms see the same input.
    sizes = {key: tokenizer[key] for key in SIZES}
    config.tokenizer_config = Mu2Config.legacy(tokenizer_config=sizes, **parts).tokenizer
    return config


def make_arm(arm: str, start: Path, folder: Path, seed: int) -> None:
    """Write an arm's first checkpoint: `start` with a new projector and tokenizer, drawn from the seed."""
    shared = Mu2ForConditionalGeneration.from_pretrained(start, dtype="float32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Mu2ForConditionalGeneration(arm_config(arm, Mu2Config.from_pretrained(start)))
    model.model.vision_tower.load_state_dict(shared.model.vision_tower.state_dict())
    model.model.language_model.load_state_dict(shared.model.language_model.state_dict())
    model.lm_head.load_state_dict(shared.lm_head.state_dict())
    model.generation_config = shared.generation_config
    model.save_pretrained(folder)
    Mu2Processor.from_pretrained(start).save_pretrained(folder)


def run_arm(
    arm: str, seed: int, data: list[Path], preference_data: list[Path], held_out: list[Path], options: dict[str, Any]
) -> Path:
    """Train and score one arm with one seed; returns the folder of its scores."""
    folder = options["out"] / f"{arm.strip('+')}-{seed}"
    scores: Path = folder / "scores"
    if (scores / SCORES_FILE).is_file():
        return scores
    shared = {"cache": options["cache"], "threads": options["threads"], "cached_tokens": True}
    trained = {**shared, "seed": seed, "batch": 16}
    tuned = {**trained, "config": "cpu_bf16" if options["bf16"] else "cpu"}
    sft = folder / "sft"
    if arm == DPO:
        # DPO goes on from the arm "full" of the same seed.
        sft, model, pairs = options["out"] / f"full-{seed}" / "sft", folder / "dpo", folder / "pairs.jsonl"
        unless_there(
            folder,
            lambda: evaluation_commands.preferences(sft, preference_data, pairs, seed=seed, **shared),
            pairs.name,
        )
        epochs = options["dpo_epochs"]
        unless_there(model, lambda: commands.dpo(sft, pairs, model, lr=DPO_RATE, epochs=epochs, **tuned))
    else:
        start, read, model = folder / "init", folder / "tokenizer", sft
        unless_there(start, lambda: make_arm(arm, options["start"], start, seed))
        unless_there(
            read,
            lambda: tokenizer_stage.tokenizer(
                start,
                [*data, *preference_data],
                read,
                lr=TOKENIZER_RATE,
                steps=options["tokenizer_steps"],
                bf16=options["bf16"],
                **trained,
            ),
        )
        unless_there(
            sft, lambda: commands.sft_command(read, data, sft, lr=TEXT_RATE, epochs=options["sft_epochs"], **tuned)
        )
    evaluation_commands.evaluate_command(held_out, [model], scores, train=data, **shared)
    return scores


def scored_again(scores: Path, arm: str, cases: Sequence[Case]) -> Evaluation:
    """The drafts of a finished arm, scored case by case: what intervals and tests over several seeds are made of."""
    [drafts] = scores.glob("*.jsonl")
    return evaluation_commands.score_drafts(
        arm, read_drafts(drafts, cases), evaluation_commands.make_judge("phantom"), None
    )


def same_options(out: Path, asked: dict[str, Any]) -> None:
    """Refuse to mix arms that were trained in two ways in one folder."""
    kept = out / OPTIONS
    if kept.is_file():
        found = json.loads(kept.read_text(encoding="utf-8"))
        changed = [
            f"{key}: {found.get(key)} then, {value} now" for key, value in asked.items() if found.get(key) != value
        ]
        if changed:
            raise typer.BadParameter(f"{out} was begun otherwise ({'; '.join(changed)}): choose another --out")
    write_json(kept, asked)


def ablate(
    start: Annotated[Path, typer.Option(help="Checkpoint whose trained tower and language model all arms share.")],
    data: commands.Data,
    held_out: Annotated[list[Path], typer.Option("--held-out", help="Manifest to score on.")],
    preference_data: Annotated[list[Path], typer.Option("--preference-data", help="Manifest to draft preferences on.")],
    out: commands.Out,
    cache: commands.Cache = commands.DEFAULT_CACHE,
    arms: Annotated[list[str] | None, typer.Option("--arm", help="Only these arms: " + ", ".join(ARMS))] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds, from 0.")] = 3,
    tokenizer_steps: Annotated[int, typer.Option(min=1)] = 1000,
    sft_epochs: Annotated[float, typer.Option()] = 1,
    dpo_epochs: Annotated[float, typer.Option()] = 1,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    threads: commands.Threads = None,
) -> None:
    """Train and score every arm; stop it at any time and start it again with the same options."""
    chosen: Sequence[str] = arms or ARMS
    unknown = set(chosen) - set(ARMS)
    if unknown:
        raise typer.BadParameter(f"no arm is called {', '.join(sorted(unknown))}; there are {', '.join(ARMS)}")
    out.mkdir(parents=True, exist_ok=True)
    trained = {"tokenizer_steps": tokenizer_steps, "sft_epochs": sft_epochs, "dpo_epochs": dpo_epochs, "bf16": bf16}
    cases = evaluation_commands.held_out_cases(held_out, None, ("test", "validation"))
    digests = {"data": manifest_digest(read_manifests(data)), "held_out": manifest_digest(cases)}
    digests["start"] = file_digest(start / WEIGHTS)
    same_options(out, {**trained, **digests, "preference_data": manifest_digest(read_manifests(preference_data))})
    options = {"out": out, "cache": cache, "start": start, "threads": threads, **trained}
    command = shlex.join(["python", "-m", "training", *sys.argv[1:]])
    figures: dict[str, list[dict[str, Any]]] = defaultdict(list)
    runs: dict[str, list[Evaluation]] = defaultdict(list)
    for seed in range(seeds):
        for arm in chosen:
            scores = run_arm(arm, seed, data, preference_data, held_out, options)
            figures[arm].append(json.loads((scores / SCORES_FILE).read_text(encoding="utf-8")))
            runs[arm].append(scored_again(scores, arm, cases))
        rows = [ablation_report.arm_row(arm, runs[arm], figures[arm]) for arm in chosen]
        tests = ablation_report.compare_arms(runs)
        write_json(out / RESULT, {"command": command, "arms": rows, "tests": tests})
        (out / REPORT).write_text(ablation_report.report(command, rows, tests), encoding="utf-8")
        typer.echo((out / REPORT).read_text(encoding="utf-8"))
