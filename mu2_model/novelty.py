"""How unlike its training data a volume is: a Gaussian over what the vision tower makes of a volume.

A volume becomes the mean and the standard deviation of its pooled tower tokens; the score is its Mahalanobis distance to the
training volumes (Lee et al. 2018, arXiv 1807.03888), with a covariance shrunk to the identity (Ledoit and Wolf 2004), over a
threshold that was set on volumes kept apart. It tells other kinds of images; a rare disease in an ordinary CT it does not tell.
Shape letters: L live chunks, N pooled tokens of a chunk, W vision width, F = 2 W features.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mu2_model.errors import CheckpointError

FILE = "novelty.safetensors"
_FACTS = "novelty"
_SMALLEST_DEVIATION = 1e-4


@dataclass(frozen=True, eq=False)
class Novelty:
    """What a checkpoint knows of its training data: centre (F,), whitening (F, F) and the threshold.

    `fitted` volumes gave the Gaussian, `calibrated` others the threshold, and of `checked` others again the share
    `false_alarms` lies above it.
    """

    centre: Tensor
    whitening: Tensor
    threshold: float
    fitted: int
    calibrated: int
    checked: int
    false_alarms: float

    def score(self, tokens_LNW: Tensor) -> float:
        """Distance of a volume divided by the threshold: above 1 it is unlike the training data."""
        return self.distance(features(tokens_LNW)) / self.threshold

    def distance(self, features_F: Tensor) -> float:
        """Mahalanobis distance of a volume's features, root mean square over them."""
        whitened = (features_F.double().cpu() - self.centre.double()) @ self.whitening.double()
        return float(whitened.square().mean().sqrt())

    def save(self, folder: Path) -> Path:
        """Write it into a checkpoint folder."""
        facts = {
            "threshold": self.threshold,
            "fitted": self.fitted,
            "calibrated": self.calibrated,
            "checked": self.checked,
            "false_alarms": self.false_alarms,
        }
        tensors = {"centre": self.centre.float().contiguous(), "whitening": self.whitening.float().contiguous()}
        save_file(tensors, folder / FILE, metadata={_FACTS: json.dumps(facts)})
        return folder / FILE

    @classmethod
    def load(cls, folder: Path, vision_width: int) -> "Novelty | None":
        """That of a checkpoint folder, None when it has none; CheckpointError when it does not fit the tower's width."""
        file = folder / FILE
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as stored:
                facts: dict[str, Any] = json.loads((stored.metadata() or {})[_FACTS])
                novelty = cls(stored.get_tensor("centre"), stored.get_tensor("whitening"), **facts)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{FILE} cannot be read; make it again with `python -m training novelty`") from error
        if novelty.centre.shape != (2 * vision_width,):
            raise CheckpointError(
                f"{FILE} knows {len(novelty.centre)} features, a tower of width {vision_width} makes {2 * vision_width}; "
                "make it again with `python -m training novelty`"
            )
        return novelty


class PooledTokens:
    """Listens at the projector's first weight and keeps what comes in: pooled tower tokens (L, N, W) of the live chunks."""

    def __init__(self) -> None:
        self._seen: list[Tensor] = []

    def listen(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """The hook."""
        self._seen.append(args[0].detach())

    def of_volumes(self, chunk_mask: Tensor) -> Iterator[Tensor]:
        """The tokens of each volume's chunks that hold slices; `chunk_mask` is (V, C)."""
        mask = chunk_mask.bool().cpu()
        tokens = torch.cat(self._seen)
        if len(tokens) == mask.numel():  # empty chunks were encoded, too
            tokens = tokens[mask.flatten().to(tokens.device)]
        yield from tokens.split(mask.sum(dim=1).tolist())


def features(tokens_LNW: Tensor) -> Tensor:
    """Mean and standard deviation of every channel over all tokens of a volume: (F,) in float32."""
    tokens = tokens_LNW.float().flatten(0, 1)
    return torch.cat((tokens.mean(dim=0), tokens.std(dim=0, correction=0)))


def fit(training: Tensor, held_out: Tensor, quantile: float) -> Novelty:
    """Fit on features (n, F) of training volumes; the first half of the held-out ones gives the threshold, the rest checks it.

    `quantile` of the calibrating volumes lie at or below the threshold. Raises ValueError for fewer than two volumes of a kind.
    """
    if min(len(training), len(held_out)) < 2:
        raise ValueError(f"{len(training)} training and {len(held_out)} held-out volumes: two of each are needed")
    rows = training.double()
    centre, deviation = rows.mean(dim=0), rows.std(dim=0).clamp_min(_SMALLEST_DEVIATION)
    covariance = _shrunk_covariance((rows - centre) / deviation)
    root = torch.linalg.cholesky(covariance)
    identity = torch.eye(len(centre), dtype=torch.float64)
    whitening = torch.linalg.solve_triangular(root, identity, upper=False).T / deviation[:, None]
    unscaled = Novelty(centre.float(), whitening.float(), 1.0, len(rows), 0, 0, math.nan)
    distances = torch.tensor([unscaled.distance(row) for row in held_out], dtype=torch.float64)
    half = (len(distances) + 1) // 2
    calibrating, checking = distances[:half], distances[half:]
    threshold = float(torch.quantile(calibrating, quantile, interpolation="higher"))
    false_alarms = float((checking > threshold).double().mean())
    return Novelty(
        unscaled.centre, unscaled.whitening, threshold, len(rows), len(calibrating), len(checking), false_alarms
    )


def _shrunk_covariance(rows: Tensor) -> Tensor:
    """Covariance of centred rows (n, F), pulled to a multiple of the identity as far as the rows are too few to tell.

    Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices" (2004), lemma 3.2 ff.
    """
    count, width = rows.shape
    sample = rows.T @ rows / count
    scale = sample.diagonal().mean()
    identity = torch.eye(width, dtype=rows.dtype)
    spread = (sample - scale * identity).square().sum()
    error = (rows.square().sum(dim=1).square().sum() / count - sample.square().sum()) / count
    share = float((error / spread).clamp(0, 1)) if spread > 0 else 1.0
    # An exact fit would make a direction that no training volume moved in infinitely novel.
    share = max(share, 1e-3)
    return share * scale * identity + (1 - share) * sample
