"""`python -m training`: data and training stages. Each takes a checkpoint folder and writes another."""

import logging
import os
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mu2_model import Mu2Config, Mu2ForConditionalGeneration, Mu2Processor
from training import run_config, sft
from training.adapters import abdomen_atlas, amos_mm, ct_rate
from training.collators import VolumeSource
from training.data import SHOWN, SPLITS, Case, check, cut_validation, read_manifests, write_manifest
from training.dpo import train_dpo
from training.preferences import read_pairs
from training.provenance import collect
from training.recipes import RECIPES, make_initial
from training.token_cache import TokenCache
from training.vision import VisionSettings, train_vision
from training.volumes import VolumeCache

NOTES = Console(stderr=True)
ATLAS = "abdomen-atlas"
ADAPTERS = {"amos-mm": amos_mm.read, "ct-rate": ct_rate.read, ATLAS: abdomen_atlas.read}


def require_checkpoint(folder: Path) -> Path:
    """The folder of a checkpoint; BadParameter for another, which transformers would take for a name on a hub."""
    if not (folder / "config.json").is_file():
        raise typer.BadParameter(f"no checkpoint in {folder}: there is no config.json")
    return folder


Data = Annotated[list[Path], typer.Option("--data", help="Manifest or its folder; give it again for more.")]
Model = Annotated[Path, typer.Option("--model", help="Checkpoint folder to start from.", callback=require_checkpoint)]
Out = Annotated[Path, typer.Option("--out", help="Folder for the result; a run that was stopped goes on there.")]
Cache = Annotated[Path, typer.Option("--cache", help="Folder for preprocessed volumes and tower tokens.")]
Config = Annotated[str, typer.Option("--config", help="Config file, or the name of one that ships.")]
Check = Annotated[bool, typer.Option("--check", help="Build the arguments, estimate the memory, train nothing.")]
Lora = Annotated[int | None, typer.Option(min=1, help="Rank of LoRA on the decoder; all weights learn without it.")]
CachedTokens = Annotated[bool, typer.Option("--cached-tokens", help="Freeze the tower, train on its stored tokens.")]
Freeze = Annotated[
    list[str] | None,
    typer.Option("--freeze", help="Part that stays as it is: projector, visual_tokenizer, language_model."),
]
Rate = Annotated[float | None, typer.Option("--lr", help="Learning rate; the stage's default otherwise.")]
Epochs = Annotated[float | None, typer.Option(help="Epochs; the stage's default otherwise.")]
Batch = Annotated[int | None, typer.Option(help="Batch of one device.")]
Seed = Annotated[int, typer.Option(help="Seed of weights and order.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores without it.")]
DEFAULT_CACHE = Path("runs/cache")
VALIDATION_SHARE = 0.1
"""Of the training patients of a public set, held out of SFT so that preferences can be drafted on them."""


def progress_bar() -> Progress:
    """A bar with time left, on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=NOTES)


def use_threads(threads: int | None) -> None:
    """Bound torch's threads; two trainings on one machine otherwise wait for each other."""
    import torch

    logging.getLogger("transformers").setLevel(logging.WARNING)
    if threads is not None:
        torch.set_num_threads(threads)


def check_data(
    data: Data, contents: Annotated[bool, typer.Option(help="Compare files of equal length.")] = True
) -> None:
    """Look for missing files, duplicates, leakage across splits and empty text in manifests."""
    report = check(read_manifests(data), contents)
    typer.echo(report.text())
    raise typer.Exit(0 if report.ok else 1)


def import_data(
    name: Annotated[str, typer.Argument(help="Data set: " + ", ".join(ADAPTERS))],
    root: Annotated[Path, typer.Argument(help="Its folder, in its published layout.")],
    out: Annotated[Path, typer.Argument(help="Manifest to write.")],
    validation: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the training patients to hold out for preferences.")
    ] = VALIDATION_SHARE,
    lists: Annotated[
        abdomen_atlas.Lists, typer.Option(help="Of Abdomen Atlas: test CTs of the same hospitals or of others.")
    ] = abdomen_atlas.Lists.IID,
) -> None:
    """Make a manifest from a public data set in its published folder layout."""
    if name not in ADAPTERS:
        raise typer.BadParameter(f"no data set is called {name}; there are {', '.join(ADAPTERS)}")
    published = ADAPTERS[name](root)
    if name == ATLAS:
        published = abdomen_atlas.read(root, lists)
        left_out = abdomen_atlas.unlisted(root, lists)
        if left_out:
            shown = ", ".join(left_out[:SHOWN])
            NOTES.print(f"in no {lists.upper()} list, so left out: {len(left_out)} CTs, the first are {shown}")
    cases = list(cut_validation(published, validation))
    write_manifest(cases, out)
    counts = Counter(case.split for case in cases)
    parts = ", ".join(f"{split} {counts[split]}" for split in SPLITS)
    NOTES.print(f"{len(cases)} cases in {out} ({parts}); now run `python -m training check --data {out}`")


def init(
    data: Data,
    out: Out,
    recipe: Annotated[str, typer.Option(help="Sizes: " + ", ".join(RECIPES))] = "phantom",
    ablation: Annotated[str, typer.Option(help="baseline, +RPE, +DTS, +DMTP or full.")] = "full",
    seed: Seed = 0,
) -> None:
    """Make an untrained checkpoint whose vocabulary comes from the training split."""
    if recipe not in RECIPES:
        raise typer.BadParameter(f"no recipe is called {recipe}; there are {', '.join(RECIPES)}")
    make_initial(RECIPES[recipe], read_manifests(data), out, seed, ablation)
    NOTES.print(f"untrained checkpoint in {out}")


def vision(
    model: Model,
    data: Data,
    out: Out,
    cache: Cache = DEFAULT_CACHE,
    steps: Annotated[int, typer.Option(min=1, help="Steps on chunks.")] = VisionSettings.steps,
    batch: Annotated[int, typer.Option(min=1)] = VisionSettings.batch_size,
    lr: Annotated[float, typer.Option()] = VisionSettings.learning_rate,
    score_every: Annotated[int, typer.Option(min=1)] = VisionSettings.score_every,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    seed: Seed = 0,
    threads: Threads = None,
) -> None:
    """Teach the vision tower the voxel labels of phantoms (`phantoms --format numpy`); watch the held-out cell F1."""
    use_threads(threads)
    settings = VisionSettings(steps, batch, lr, score_every=score_every, seed=seed, bf16=bf16)
    cases = read_manifests(data)
    provenance = collect("vision", seed, cases, vars(settings), model)
    provenance.begin(out)
    with progress_bar() as bar:
        train_vision(model, cases, cache, out, settings, bar)
    provenance.write(out)


def volume_source(folder: Path, cache: Path, paths: list[str], cached_tokens: bool) -> VolumeSource:
    """Preprocessed volumes of a checkpoint's processor, filled; with `cached_tokens` also the tower's tokens."""
    processor = Mu2Processor.from_pretrained(folder)
    volumes = VolumeCache(cache, processor.image_processor)
    preparation = volumes.prepare(paths)
    NOTES.print(preparation.text())
    if preparation.bad:
        raise typer.BadParameter(f"{len(preparation.bad)} volumes cannot be used: correct the manifest, then run again")
    if not cached_tokens:
        return VolumeSource(volumes)
    model = Mu2ForConditionalGeneration.from_pretrained(folder).eval()
    model.model.vision_tower.float()  # weights that were stored in half precision are run in whole
    tokens = TokenCache(cache / "tokens", volumes, model)
    NOTES.print(f"{tokens.fill(paths, model)} volumes encoded by the tower, the others were stored")
    return VolumeSource(volumes, tokens)


def report_check(
    stage: str,
    model: Path,
    run: run_config.RunConfig,
    arguments: Any,
    frozen: tuple[str, ...],
    lora_rank: int | None,
) -> None:
    """What `--check` prints; the machine it runs on need not have the config's devices."""
    longest = Mu2Processor.from_pretrained(model).image_processor.max_slices
    estimate = run_config.estimate_memory(Mu2Config.from_pretrained(model), run, arguments, frozen, lora_rank, longest)
    each = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    typer.echo(
        f"{stage}: {run.path.name}, {run.strategy}, {run.processes} processes, {each * run.processes} cases a step"
    )
    typer.echo(
        f"learning rate {arguments.learning_rate:g}, {arguments.num_train_epochs:g} epochs, "
        f"bf16 {bool(run.training.get('bf16'))}"
    )
    typer.echo(estimate.text(run.hardware.get("memory_gib")))


def _sft(stage: str, options: dict[str, Any]) -> None:
    use_threads(options["threads"])
    run = run_config.load_config(options["config"])
    build = run_config.arguments_to_check if options["check"] else run_config.trainer_arguments
    arguments = build(
        stage,
        run,
        options["out"],
        learning_rate=options["lr"],
        num_train_epochs=options["epochs"],
        per_device_train_batch_size=options["batch"],
        seed=options["seed"],
    )
    frozen = (*sft.FROZEN[stage], *(options["freeze"] or ()), *(("vision_tower",) if options["cached_tokens"] else ()))
    if options["check"]:
        report_check(stage, options["model"], run, arguments, frozen, options["lora"])
        return
    cases = read_manifests(options["data"], "train")
    paths = [case.image for case in cases]
    source = volume_source(options["model"], options["cache"], paths, options["cached_tokens"])
    settings = run.training | {"data": [str(path) for path in options["data"]]}
    provenance = collect(stage, options["seed"], cases, settings, options["model"])
    lora = None if options["lora"] is None else sft.LoraSettings(options["lora"], 2 * options["lora"])
    sft.train_sft(stage, options["model"], cases, source, arguments, provenance, lora=lora, frozen=frozen)


def sft_align(
    model: Model,
    data: Data,
    out: Out,
    config: Config = "cpu",
    cache: Cache = DEFAULT_CACHE,
    cached_tokens: CachedTokens = False,
    lr: Rate = None,
    epochs: Epochs = None,
    batch: Batch = None,
    seed: Seed = 0,
    threads: Threads = None,
    check: Check = False,
) -> None:
    """Teach projector and μ² tokenizer; vision tower and language model stay as they are."""
    _sft("sft-align", {**locals(), "lora": None, "freeze": None})


def sft_command(
    model: Model,
    data: Data,
    out: Out,
    config: Config = "cpu",
    cache: Cache = DEFAULT_CACHE,
    cached_tokens: CachedTokens = False,
    lora: Lora = None,
    freeze: Freeze = None,
    lr: Rate = None,
    epochs: Epochs = None,
    batch: Batch = None,
    seed: Seed = 0,
    threads: Threads = None,
    check: Check = False,
) -> None:
    """Fine-tune the whole model, or LoRA on the decoder beside projector and tokenizer."""
    _sft("sft", locals())


def dpo(
    model: Model,
    pairs: Annotated[Path, typer.Option(help="Preference pairs, one JSON a line.")],
    out: Out,
    config: Config = "cpu",
    cache: Cache = DEFAULT_CACHE,
    cached_tokens: CachedTokens = False,
    lora: Lora = None,
    lr: Rate = None,
    epochs: Epochs = None,
    batch: Batch = None,
    beta: Annotated[float | None, typer.Option(help="Pull to the reference model.")] = None,
    seed: Seed = 0,
    threads: Threads = None,
    check: Check = False,
) -> None:
    """Direct preference optimisation on pairs, against an explicit reference."""
    use_threads(threads)
    run = run_config.load_config(config)
    build = run_config.arguments_to_check if check else run_config.trainer_arguments
    arguments = build(
        "dpo",
        run,
        out,
        learning_rate=lr,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch,
        beta=beta,
        seed=seed,
    )
    frozen = ("vision_tower",) if cached_tokens else ()
    if check:
        report_check("dpo", model, run, arguments, frozen, lora)
        return
    chosen = read_pairs(pairs)
    source = volume_source(model, cache, [pair.image for pair in chosen], cached_tokens)
    as_cases = [Case(p.case_id, p.image, p.question, p.chosen, "train", p.case_id, p.case_id, p.source) for p in chosen]
    provenance = collect("dpo", seed, as_cases, run.training, model)
    adapters = None if lora is None else sft.LoraSettings(lora, 2 * lora)
    train_dpo(model, chosen, source, arguments, provenance, lora=adapters, frozen=frozen)


def launch(
    stage: Annotated[list[str], typer.Argument(help="The stage and its options, after --.")],
    config: Config = "gpu",
    machine_rank: Annotated[int, typer.Option(help="Rank of this machine.")] = 0,
    main_address: Annotated[str | None, typer.Option(help="Address of machine 0.")] = None,
    main_port: Annotated[int | None, typer.Option(help="Port of machine 0.")] = None,
) -> None:
    """Run a stage on every device of a config file: `launch --config a100x4_fsdp2 -- sft --model ... --data ...`."""
    run = run_config.load_config(config)
    settings = run.launch | {"machine_rank": machine_rank}
    if main_address is not None:
        settings |= {"main_process_ip": main_address, "main_process_port": main_port}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "accelerate.yaml"
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "-m", "training"]
        command += [*stage, "--config", str(run.path)]
        NOTES.print(shlex.join(command))
        raise typer.Exit(subprocess.run(command, env=os.environ.copy(), check=False).returncode)


def mount(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("check")(check_data)
    app.command("import")(import_data)
    app.command("init")(init)
    app.command("vision")(vision)
    app.command("sft-align")(sft_align)
    app.command("sft")(sft_command)
    app.command("dpo")(dpo)
    app.command("launch")(launch)
