"""The tokenizer stage: projector and μ² tokenizer learn the structured truth, before a language model reads them.

From the text loss alone a tokenizer that starts from nothing learns to route what fills a scan, and nothing of what lies in one
token of four hundred: on perfect tokens 700 steps named every ascites and not one nodule. Here a linear head over all the
query tokens names the findings that the question asks for. The head is thrown away; a language model finds the queries in order.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.progress import Progress
from torch import Tensor, nn

from mu2_model import Mu2ForConditionalGeneration, Mu2Processor
from training.collators import Mu2Collator, VolumeSource
from training.commands import (
    DEFAULT_CACHE,
    NOTES,
    Cache,
    CachedTokens,
    Data,
    Model,
    Out,
    Seed,
    Threads,
    progress_bar,
    use_threads,
    volume_source,
)
from training.data import Case, ManifestError, read_manifests
from training.metrics.findings import Stated, compare, kind_f1, micro_f1, stated
from training.provenance import collect
from training.resumable import Resumable
from training.shared_encoding import encode_shared

LEAST_CASES = 2
"""Targets of fewer cases are not learned."""
POSITIVE_WEIGHT = 3.0
TYPICAL_MM = 20.0
SIZE_WEIGHT = 0.3
DROPOUT = 0.1
"""Of what the head reads: it is wide, and learned 1,400 phantoms by heart in 500 steps."""

Key = tuple[str, str, str]
"""(type, side, place); an empty place stands for the finding wherever it is."""


def keys_of(finding: Stated) -> set[Key]:
    """The targets that a finding sets."""
    return {(finding.kind, finding.side, ""), (finding.kind, finding.side, finding.place)}


def choose_keys(cases: Sequence[Case]) -> list[Key]:
    """The targets that occur often enough, in a fixed order."""
    counts = Counter(key for case in cases for f in case.findings or () for key in keys_of(stated(f)))
    return sorted(key for key, count in counts.items() if count >= LEAST_CASES)


@dataclass(frozen=True)
class Targets:
    """What is asked of a batch: presence (B, keys) 0 or 1, log size (B, keys), and where a size is known (B, keys)."""

    present: Tensor
    log_size: Tensor
    sized: Tensor


def targets_of(cases: Sequence[Case], keys: Sequence[Key]) -> Targets:
    """The targets of cases, from their structured truth."""
    column = {key: index for index, key in enumerate(keys)}
    present, log_size, sized = (torch.zeros(len(cases), len(keys)) for _ in range(3))
    for row, case in enumerate(cases):
        for finding in map(stated, case.findings or ()):
            for index in (column[key] for key in keys_of(finding) if key in column):
                present[row, index] = 1
                if finding.size_mm:
                    sized[row, index] = 1
                    log_size[row, index] = float(np.log(finding.size_mm / TYPICAL_MM))
    return Targets(present, log_size, sized)


class TokenizerModel(nn.Module):
    """The inner μ²LLM and a linear head over its query tokens: presence and log size of every target."""

    def __init__(self, mu2: Mu2ForConditionalGeneration, keys: int):
        super().__init__()
        self.inner = mu2.model
        self.keys = keys
        queries = mu2.config.tokenizer.num_query_tokens
        self.norm, self.dropout = nn.LayerNorm(mu2.config.hidden_size), nn.Dropout(DROPOUT)
        self.head = nn.Linear(queries * mu2.config.hidden_size, 2 * keys)

    def forward(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits and log sizes (B, keys) of a collated batch."""
        rows = inputs["prompt_questions"]
        pooled: Any = encode_shared(
            self.inner, {k: v for k, v in inputs.items() if k != "prompt_questions"}
        ).pooler_output
        logits, sizes = self.head(self.dropout(self.norm(pooled[rows])).flatten(1)).float().split(self.keys, dim=1)
        return logits, sizes

    def loss(self, inputs: dict[str, Any], targets: Targets) -> Tensor:
        """Binary cross-entropy over the targets, positives weighted, and the error of the log sizes of what is there."""
        logits, sizes = self(inputs)
        weight = 1 + (POSITIVE_WEIGHT - 1) * targets.present
        presence = F.binary_cross_entropy_with_logits(logits, targets.present, weight=weight, reduction="sum")
        size = (F.smooth_l1_loss(sizes, targets.log_size, reduction="none") * targets.sized).sum()
        return (presence + SIZE_WEIGHT * size) / len(targets.present)


@dataclass(frozen=True)
class TokenizerSettings:
    """How long and how fast the stage trains."""

    steps: int = 2000
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_ratio: float = 0.03
    score_every: int = 250
    seed: int = 0
    bf16: bool = False


class TokenizerTraining(Resumable[TokenizerModel, TokenizerSettings]):
    """One run of the stage; its folder holds the newest state, so that a killed run goes on where it was."""

    def __init__(self, model_folder: Path, out: Path, settings: TokenizerSettings, keys: list[Key]):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.keys = out, keys
        self.mu2 = Mu2ForConditionalGeneration.from_pretrained(model_folder, dtype="float32")
        self.processor = Mu2Processor.from_pretrained(model_folder)
        torch.manual_seed(settings.seed)
        model = TokenizerModel(self.mu2, len(keys))
        self.mu2.model.vision_tower.requires_grad_(False)
        learned = [*self.mu2.model.projector.parameters(), *self.mu2.model.visual_tokenizer.parameters()]
        # The question's embeddings are read by the aggregator and belong to the language model, which has not begun.
        self.mu2.model.language_model.requires_grad_(False)
        learned += [*model.norm.parameters(), *model.head.parameters()]
        super().__init__("tokenizer", out, model, learned, settings)
        self.resume()

    def precision(self) -> torch.autocast:
        """The context that the model runs in."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bf16)

    def one_step(self, cases: Sequence[Case], collate: Mu2Collator) -> float:
        """One optimiser step; batch and dropout are drawn by seed and step, so a resumed run sees the same ones."""
        rng = np.random.default_rng((self.settings.seed, self.step))
        count = min(self.settings.batch_size, len(cases))
        picked = [cases[int(index)] for index in rng.choice(len(cases), count, replace=False)]
        with torch.random.fork_rng(devices=[]), self.precision():
            torch.manual_seed(int(rng.integers(2**31)))
            loss = self.model.loss(inputs_of(picked, collate), targets_of(picked, self.keys))
        return self.descend(loss)

    @torch.no_grad()
    def score(self, cases: Sequence[Case], collate: Mu2Collator) -> dict[str, Any]:
        """Finding F1 over (type, side) of held-out cases, as of a report: micro, and of every type."""
        self.model.eval()
        counts = []
        for start in range(0, len(cases), 32):
            batch = cases[start : start + 32]
            with self.precision():
                logits, _ = self.model(inputs_of(batch, collate))
            for case, row in zip(batch, logits > 0, strict=True):
                said = [Stated(*key[:2]) for key, yes in zip(self.keys, row, strict=True) if yes and not key[2]]
                counts.append(compare([stated(f) for f in case.findings or ()], said))
        self.model.train()
        return {"finding_micro_f1": micro_f1(counts), "finding_f1_by_type": kind_f1(counts)}

    def run(
        self,
        cases: Sequence[Case],
        held_out: Sequence[Case],
        source: VolumeSource,
        progress: Progress,
        stop_at: int | None = None,
    ) -> None:
        """Train to the end (or to step `stop_at`), scoring the held-out cases and saving on the way."""
        collate = Mu2Collator(self.processor, source)
        task = progress.add_task("tokenizer", total=self.settings.steps, completed=self.step)
        losses: list[float] = []
        while self.step < min(self.settings.steps, stop_at or self.settings.steps):
            losses.append(self.one_step(cases, collate))
            progress.update(task, completed=self.step)
            if self.step % self.settings.score_every == 0 or self.step == self.settings.steps:
                scores = self.score(held_out, collate)
                self.history.append({"step": self.step, "loss": float(np.mean(losses)), **scores})
                kinds = " ".join(f"{kind}={value:.2f}" for kind, value in scores["finding_f1_by_type"].items())
                told = (
                    f"step {self.step} loss {np.mean(losses):.3f} finding F1 {scores['finding_micro_f1']:.3f}: {kinds}"
                )
                progress.console.print(told)
                losses = []
                self.save()
        self.mu2.save_pretrained(self.out)
        self.processor.save_pretrained(self.out)


def inputs_of(cases: Sequence[Case], collate: Mu2Collator) -> dict[str, Any]:
    """The image side of a batch."""
    return collate.image_side([{"image": case.image, "question": case.question} for case in cases])


def tokenizer(
    model: Model,
    data: Data,
    out: Out,
    cache: Cache = DEFAULT_CACHE,
    cached_tokens: CachedTokens = False,
    steps: Annotated[int, typer.Option(min=1)] = TokenizerSettings.steps,
    batch: Annotated[int, typer.Option(min=1)] = TokenizerSettings.batch_size,
    lr: Annotated[float, typer.Option()] = TokenizerSettings.learning_rate,
    score_every: Annotated[int, typer.Option(min=1)] = TokenizerSettings.score_every,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    seed: Seed = 0,
    threads: Threads = None,
) -> None:
    """Teach projector and μ² tokenizer the structured truth of the training split; watch the held-out finding F1."""
    use_threads(threads)
    cases = read_manifests(data)
    if any(case.findings is None for case in cases):
        raise ManifestError("the tokenizer stage needs cases with structured truth: use phantoms, or sft-align")
    train = [case for case in cases if case.split == "train"]
    held_out = [case for case in cases if case.split == "validation"]
    settings = TokenizerSettings(steps, batch, lr, score_every=score_every, seed=seed, bf16=bf16)
    provenance = collect("tokenizer", seed, train, asdict(settings), model)
    keys = choose_keys(train)
    if not keys:
        raise ManifestError(f"no finding is in {LEAST_CASES} training cases: make more phantoms")
    source = volume_source(model, cache, [case.image for case in cases], cached_tokens)
    provenance.begin(out)
    with progress_bar() as bar:
        training = TokenizerTraining(model, out, settings, keys)
        training.run(train, held_out, source, bar)
    provenance.write(out)
    NOTES.print(f"projector and tokenizer in {out}")
