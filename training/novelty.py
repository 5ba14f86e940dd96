"""`python -m training novelty`: teaches a checkpoint to tell volumes that are unlike its training data.

The training split gives the Gaussian of `mu2_model.novelty`; half of the validation split gives the threshold, the other half
counts its false alarms, which are stored beside it.
"""

from collections.abc import Iterable
from typing import Annotated

import torch
import typer
from torch import Tensor

from mu2_model.novelty import Novelty, features, fit
from training.commands import DEFAULT_CACHE, NOTES, Cache, Data, Model, Threads, use_threads, volume_source
from training.data import ManifestError, read_manifests
from training.token_cache import TokenCache

QUANTILE = 0.99


def novelty(
    model: Model,
    data: Data,
    cache: Cache = DEFAULT_CACHE,
    quantile: Annotated[float, typer.Option(min=0.5, max=1.0, help="Share of ordinary volumes to pass.")] = QUANTILE,
    threads: Threads = None,
) -> None:
    """Store in a checkpoint folder what ordinary volumes look like to its tower: split train fits, validation checks."""
    use_threads(threads)
    cases = read_manifests(data)
    paths = {split: _volumes(c.image for c in cases if c.split == split) for split in ("train", "validation")}
    if min(map(len, paths.values())) < 2:
        counts = ", ".join(f"{len(found)} volumes of {split}" for split, found in paths.items())
        raise ManifestError(f"{counts}: name data of both splits, each by --data")
    source = volume_source(model, cache, [*paths["train"], *paths["validation"]], cached_tokens=True)
    assert source.tokens is not None
    made = fit(_features(source.tokens, paths["train"]), _features(source.tokens, paths["validation"]), quantile)
    made.save(model)
    NOTES.print(text(made))


def text(made: Novelty) -> str:
    """What was fitted, in a sentence."""
    return (
        f"fitted on {made.fitted} volumes; threshold from {made.calibrated} others; "
        f"{made.false_alarms:.1%} of {made.checked} more lie above it"
    )


def _volumes(paths: Iterable[str]) -> list[str]:
    """Every volume once: one may be asked several questions."""
    return list(dict.fromkeys(paths))


def _features(tokens: TokenCache, paths: list[str]) -> Tensor:
    return torch.stack([features(tokens.tokens(path)) for path in paths])
