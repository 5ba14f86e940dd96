"""The linear read-out: what a logistic model finds in a tower's stored tokens, before any language model is trained.

For each (type, side) the tokens of a volume become their mean and maximum over the volume's two halves, left and right. A tower
whose tokens do not tell the findings here will not tell them to a language model.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mu2_model import Mu2Config
from training import floors
from training.commands import NOTES, use_threads, volume_source
from training.data import Case, ManifestError, read_manifests
from training.metrics.findings import Stated, compare, kind_f1, micro_f1, stated
from training.recipes import write_json
from training.token_cache import TokenCache

THRESHOLDS = np.linspace(0.05, 0.9, 35)
RIDGE = 10.0


@dataclass(frozen=True)
class ReadOut:
    """Scores of the read-out on held-out cases."""

    cases: int
    micro_f1: float
    f1_of: dict[str, float]


def features(tokens: TokenCache, cases: Sequence[Case], pooled_grid: tuple[int, int, int]) -> NDArray[np.float64]:
    """Mean and maximum of every channel over the left and over the right half of each volume: (cases, 4 W)."""
    rows = []
    for case in cases:
        chunks = tokens.tokens(case.image).numpy()
        grid = chunks.reshape(len(chunks), *pooled_grid, chunks.shape[-1])
        half = pooled_grid[2] // 2
        sides = (grid[..., :half, :], grid[..., half:, :])
        parts = [reduce(side, axis=(0, 1, 2, 3)) for side in sides for reduce in (np.mean, np.max)]
        rows.append(np.concatenate(parts))
    return np.asarray(rows, dtype=np.float64)


def read_out(
    fitted: NDArray[np.float64],
    truths: Sequence[Sequence[Stated]],
    held_out: NDArray[np.float64],
    wanted: Sequence[Sequence[Stated]],
) -> ReadOut:
    """Fit on three quarters of the training cases, choose one threshold on the last, score the held-out ones."""
    cut = len(truths) - max(1, len(truths) // 4)
    mean, deviation = fitted[:cut].mean(axis=0), np.maximum(fitted[:cut].std(axis=0), 1e-3)

    def scaled(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.hstack([(rows - mean) / deviation, np.ones((len(rows), 1))])

    keys = floors.keys_of(truths[:cut])
    weights = []
    for key in keys:
        present = np.array([any(finding.key == key for finding in truth) for truth in truths[:cut]])
        weights.append(floors.fit_logistic(scaled(fitted[:cut]), present, RIDGE))
    stacked = np.array(weights).reshape(len(keys), fitted.shape[1] + 1)

    def said(rows: NDArray[np.float64], threshold: float) -> list[list[Stated]]:
        likely = 1 / (1 + np.exp(-np.clip(scaled(rows) @ stacked.T, -30, 30))) >= threshold
        return [[Stated(*key) for key, yes in zip(keys, row, strict=True) if yes] for row in likely]

    def score(threshold: float) -> float:
        guesses = said(fitted[cut:], threshold)
        return micro_f1([compare(t, s) for t, s in zip(truths[cut:], guesses, strict=True)])

    best = max(THRESHOLDS, key=score)
    counts = [compare(t, s) for t, s in zip(wanted, said(held_out, float(best)), strict=True)]
    return ReadOut(len(wanted), micro_f1(counts), kind_f1(counts))


def readout_command(
    model: Path, train: list[Path], data: list[Path], out: Path, cache: Path, threads: int | None = None
) -> None:
    """Read findings out of a checkpoint's tower tokens and write the scores; ManifestError without structured truth."""
    use_threads(threads)
    learned, watched = read_manifests(train), read_manifests(data)
    source = volume_source(model, cache, [case.image for case in [*learned, *watched]], cached_tokens=True)
    config = Mu2Config.from_pretrained(model)
    size = config.tokenizer.projector_pooling_size
    depth, height, width = config.projector_grid
    if source.tokens is None or any(case.findings is None for case in [*learned, *watched]):
        raise ManifestError("the read-out needs cases with structured truth: use phantoms")
    truths = [[[stated(f) for f in case.findings or ()] for case in cases] for cases in (learned, watched)]
    pooled = (depth // size, height // size, width // size)
    rows = [features(source.tokens, cases, pooled) for cases in (learned, watched)]
    result = read_out(rows[0], truths[0], rows[1], truths[1])
    write_json(out, {"cases": result.cases, "finding_micro_f1": result.micro_f1, "finding_f1_by_type": result.f1_of})
    NOTES.print(json.dumps({"linear read-out, finding_micro_f1": round(result.micro_f1, 3), "cases": result.cases}))
