"""`python -m training`: preference pairs from a model and a judge, and the evaluation of a checkpoint."""

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mu2_model import Mu2ForConditionalGeneration, Mu2Processor
from mu2_model.decoding import SETTINGS, DecodeSettings
from mu2_model.shipped import shipped_checkpoint
from training import fitted_floors, tables
from training.collators import VolumeSource
from training.commands import (
    DEFAULT_CACHE,
    NOTES,
    Cache,
    CachedTokens,
    Data,
    Model,
    Seed,
    Threads,
    progress_bar,
    require_checkpoint,
    use_threads,
)
from training.data import Case, read_manifests
from training.drafting import DraftedCase, Drafter, write_drafts
from training.endpoint import Endpoint
from training.evaluate import Evaluation, Options, evaluate
from training.green import EndpointJudge, Judge, ModelJudge, PhantomJudge
from training.metrics.ct_labels import LabelClassifier
from training.metrics.findings import Stated, stated
from training.metrics.statistics import RESAMPLES
from training.model_card import SCORES_FILE, write_card
from training.phantoms import labeler
from training.preferences import SAMPLES, PairRules, make_pairs, write_pairs
from training.provenance import PHANTOM_SETS
from training.recipes import write_json
from training.token_cache import TokenCache
from training.volumes import VolumeCache

JudgeName = Annotated[
    str | None,
    typer.Option(
        help="phantom (where nothing is named, of phantoms alone), none, model:FOLDER, or an endpoint as URL#MODEL "
        "(key in OPENAI_API_KEY)."
    ),
]
PHANTOM, NOBODY = "phantom", "none"
UNJUDGED = "GREEN left out: not all cases are phantoms, so a judge has to be named by --judge"
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first cases.")]
Split = Annotated[
    str | None,
    typer.Option(help="Only this split; without it the held-out one, or all where the manifests hold one alone."),
]


def read_phantom_report(text: str) -> list[Stated]:
    """The findings of a phantom report by the labeler."""
    return [stated(finding.to_dict()) for finding in labeler.read(text).findings]


def held_out_cases(data: Sequence[Path], split: str | None, held_out: Sequence[str]) -> list[Case]:
    """The cases of a split. Without a name those of the first of `held_out` that is there, or all where there is one split.

    BadParameter when there are several and none of `held_out`: what a model was trained on neither scores it nor makes its
    preferences.
    """
    cases = read_manifests(data, split)
    splits = {case.split for case in cases}
    if len(splits) > 1:
        chosen = next((name for name in held_out if name in splits), None)
        if chosen is None:
            raise typer.BadParameter(
                f"the manifests hold {' and '.join(sorted(splits))} but no {held_out[0]} cases: name a split by --split, "
                "or hold patients out by `import --validation`"
            )
        cases = [case for case in cases if case.split == chosen]
    if not cases:
        raise typer.BadParameter(f"no {split or ''} cases in {', '.join(map(str, data))}")
    return cases


def make_judge(name: str, device: str = "cpu") -> Judge | None:
    """A judge by the name it has on the command line; None for "none"."""
    if name == NOBODY:
        return None
    if name == PHANTOM:
        return PhantomJudge(read_phantom_report)
    if name.startswith("model:"):
        return ModelJudge.from_pretrained(require_checkpoint(Path(name.removeprefix("model:"))), device)
    url, mark, model = name.partition("#")
    if not mark or not url.startswith(("http://", "https://")):
        raise typer.BadParameter(f"{name!r} is no judge: phantom, none, model:FOLDER or URL#MODEL")
    return EndpointJudge(Endpoint(url, model))


def judge_for(name: str | None, cases: Sequence[Case], device: str = "cpu") -> Judge | None:
    """The judge that was asked for; where none was named, the phantom judge of phantoms and nobody of other cases.

    BadParameter for the phantom judge of other cases: it knows the words of phantom reports, and takes all else for normal.
    """
    strange = next((case for case in cases if not case.source.startswith(PHANTOM_SETS)), None)
    if name == PHANTOM and strange is not None:
        told = f"case {strange.case_id} is of {strange.source or 'no named set'}"
        raise typer.BadParameter(
            f"the phantom judge reads reports of phantoms alone, and {told}: name another by --judge"
        )
    if name is None:
        name = PHANTOM if strange is None else NOBODY
    return make_judge(name, device)


def source_maker(
    cache: Path, cases: Sequence[Case], cached_tokens: bool
) -> Callable[[Mu2ForConditionalGeneration, Mu2Processor], VolumeSource]:
    """How a drafter gets its volumes: from the cache, or as the tower's stored tokens."""

    def make(model: Mu2ForConditionalGeneration, processor: Mu2Processor) -> VolumeSource:
        volumes = VolumeCache(cache, processor.image_processor)
        if not cached_tokens:
            return VolumeSource(volumes)
        bad = volumes.prepare(case.image for case in cases).bad
        tokens = TokenCache(cache / "tokens", volumes, model)
        tokens.fill([case.image for case in cases if case.image not in bad], model)
        return VolumeSource(volumes, tokens)

    return make


def draft_with_bar(drafter: Drafter, cases: Sequence[Case], what: str) -> list[DraftedCase]:
    """Drafts of all cases, with time left on stderr."""
    drafted = []
    with progress_bar() as bar:
        task = bar.add_task(what, total=len(cases))
        for row in drafter.draft(cases):
            drafted.append(row)
            bar.advance(task)
    return drafted


def preferences(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="File for the pairs.")],
    cache: Cache = DEFAULT_CACHE,
    cached_tokens: CachedTokens = False,
    judge: JudgeName = None,
    split: Split = None,
    limit: Limit = None,
    samples: Annotated[int, typer.Option(min=2, help="Drafts of a case.")] = SAMPLES,
    margin: Annotated[float, typer.Option(help="Least difference of scores.")] = PairRules.margin,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    device: Device = "cpu",
    seed: Seed = 0,
    threads: Threads = None,
) -> None:
    """Draft every case several times (T=1.0, top_p=0.9), judge the drafts, keep the best and the worst."""
    use_threads(threads)
    cases = held_out_cases(data, split, ("validation",))[:limit]
    asked = judge_for(judge, cases, device)
    if asked is None:
        raise typer.BadParameter("preferences need a judge: name one by --judge")
    varied = SETTINGS["varied"]
    settings = DecodeSettings(sample=True, temperature=varied.temperature, top_p=varied.top_p, seed=seed)
    drafter = Drafter(model, source_maker(cache, cases, cached_tokens), settings, samples, batch, device=device)
    drafted = draft_with_bar(drafter, cases, "drafts")
    pairs, report = make_pairs(drafted, asked, PairRules(margin))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_pairs(pairs, out)
    NOTES.print(f"{len(pairs)} pairs in {out}; {report.text()}")


def score_drafts(
    name: str,
    drafted: Sequence[DraftedCase],
    judge: Judge | None,
    bert_folder: Path | None,
    classifier: LabelClassifier | None = None,
) -> Evaluation:
    """Score the first draft of every case; cases with structured truth are read by the labeler."""
    references = [
        (
            row.case.case_id,
            row.case.answer,
            None if row.case.findings is None else [stated(f) for f in row.case.findings],
        )
        for row in drafted
    ]
    known = all(truth is not None for _, _, truth in references)
    options = Options(read_phantom_report if known else None, judge, bert_folder, classifier)
    classes = [row.case.labels for row in drafted]
    return evaluate(name, references, [row.texts[0] for row in drafted], options, classes)


def evaluate_command(
    data: Data,
    model: Annotated[
        list[Path] | None, typer.Option(help="Checkpoint, mu2-phantom without it; give two to compare them.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for drafts, JSON and Markdown.")] = None,
    cache: Cache = DEFAULT_CACHE,
    cached_tokens: CachedTokens = False,
    judge: JudgeName = None,
    bert: Annotated[Path | None, typer.Option(help="Folder of roberta-large for BERTScore.")] = None,
    radbert: Annotated[Path | None, typer.Option(help="Folder of RadBERT for CT-RATE's 18 labels.")] = None,
    split: Split = None,
    limit: Limit = None,
    batch: Annotated[int, typer.Option(min=1)] = 16,
    resamples: Annotated[int, typer.Option(min=10, help="Bootstrap resamples.")] = RESAMPLES,
    train: Annotated[
        list[Path] | None,
        typer.Option("--train", help="Manifest to fit the floors on; what the checkpoint remembers without it."),
    ] = None,
    published: Annotated[str | None, typer.Option(help="CT-RATE, AMOS-MM or Abdomen Atlas 3.0: show its rows.")] = None,
    card: Annotated[bool, typer.Option(help="Write scores and card into the checkpoint folder.")] = False,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Draft every case greedily and score it; with two checkpoints also test whether the first is better."""
    use_threads(threads)
    command = shlex.join(["python", "-m", "training", *sys.argv[1:]])
    cases = held_out_cases(data, split, ("test", "validation"))[:limit]
    asked = judge_for(judge, cases, device)
    classifier = None if radbert is None else LabelClassifier.from_pretrained(radbert, device)
    results, figures = [], []
    for folder in model or [shipped_checkpoint()]:
        require_checkpoint(folder)
        drafter = Drafter(folder, source_maker(cache, cases, cached_tokens), batch_size=batch, device=device)
        drafted = draft_with_bar(drafter, cases, folder.name)
        if out is not None:
            # Before they are scored: a judge that fails costs no draft.
            out.mkdir(parents=True, exist_ok=True)
            write_drafts(drafted, out / f"{folder.name}.jsonl")
        result = score_drafts(folder.name, drafted, asked, bert, classifier)
        if asked is None and judge is None:
            result = replace(result, notes=(*result.notes, UNJUDGED))
        told = result.figures(command, resamples) | floors_beside(folder, train or [], cases, cache, resamples, card)
        results.append(result)
        figures.append(told)
        if card:
            write_json(folder / SCORES_FILE, told)
            write_card(folder)
    report = report_of(results, figures, published)
    if out is not None:
        write_json(out / SCORES_FILE, report["figures"])
        (out / "evaluation.md").write_text(report["markdown"], encoding="utf-8")
    typer.echo(json.dumps(report["figures"], ensure_ascii=False) if as_json else report["markdown"])


def floors_beside(
    folder: Path, train: Sequence[Path], cases: Sequence[Case], cache: Path, resamples: int, keep: bool
) -> dict[str, Any]:
    """What stands beside a checkpoint's scores: {"floors": two rows}, or {"floors_missing": why}.

    With `keep` fitted floors are stored in the checkpoint folder.
    """
    try:
        fitted = fitted_floors.find(folder, train, cache)
        rows = fitted.figures(cases, cache, resamples)
    except fitted_floors.FloorError as error:
        return {"floors": [], "floors_missing": str(error)}
    if keep:
        fitted.save(folder)
    return {"floors": rows}


def report_of(results: Sequence[Evaluation], figures: list[dict[str, Any]], published: str | None) -> dict[str, Any]:
    """One system: its figures at the top level. Two: a list, and the paired tests of the first against the second."""
    parts = [tables.table_1(figures, published), tables.table_2(figures)]
    parts += [tables.full_table(told) for told in figures]
    told: dict[str, Any] = figures[0]
    if len(results) == 2:
        tests = {}
        for score in ("finding_micro_f1", "green", "rouge1"):
            difference, p = results[0].against(results[1], score)
            tests[score] = {"difference": difference, "p": p}
            parts.append(f"{results[0].name} minus {results[1].name} in {score}: {difference:+.3f}, p = {p:.4f}")
        told = {"systems": figures, "paired_tests": tests}
    parts += [f"{note}." for note in dict.fromkeys(note for told in figures for note in told["notes"])]
    parts.append(f"Made by `{figures[0]['command']}`. Phantoms say nothing about patients.")
    return {"markdown": "\n\n".join(parts), "figures": told}


def mount(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("preferences")(preferences)
    app.command("evaluate")(evaluate_command)
