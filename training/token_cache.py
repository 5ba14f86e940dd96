"""Tokens of a frozen vision tower on disk, computed once: projector, tokenizer and language model train on them."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mu2_model import Mu2ForConditionalGeneration
from training.shared_encoding import tower_tokens
from training.volumes import VolumeCache


def tower_digest(model: Mu2ForConditionalGeneration) -> str:
    """SHA-256 of the tower's weights: tokens of another tower are other entries."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.model.vision_tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to(torch.float32).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class TokenCache:
    """Pooled tower tokens (C, N, W) in half precision, an entry for each volume and tower; holds no model once filled."""

    def __init__(self, folder: Path | str, volumes: VolumeCache, model: Mu2ForConditionalGeneration):
        self.folder, self.volumes = Path(folder), volumes
        self.folder.mkdir(parents=True, exist_ok=True)
        self.digest = tower_digest(model)

    def entry(self, path: str) -> Path:
        """Where a volume's tokens are."""
        return self.folder / f"{self.volumes.key(path)}.{self.digest}.npy"

    def fill(self, paths: Iterable[str], model: Mu2ForConditionalGeneration) -> int:
        """Encode every volume that has no entry; returns how many were encoded."""
        made = 0
        for path in dict.fromkeys(paths):
            entry = self.entry(path)
            if entry.is_file():
                continue
            volume = self.volumes.get(path)
            pixels = torch.from_numpy(np.asarray(volume.pixels[: volume.live_chunks], dtype=np.float32))
            tokens = tower_tokens(model, pixels.to(model.device)).float().cpu().numpy().astype(np.float16)
            partial = entry.with_suffix(f".{os.getpid()}.partial")
            with partial.open("wb") as stream:
                np.save(stream, tokens)
            partial.replace(entry)
            made += 1
        return made

    def tokens(self, path: str) -> Tensor:
        """A volume's tokens (C, N, W) in float32; FileNotFoundError when `fill` has not seen it."""
        return torch.from_numpy(np.load(self.entry(path)).astype(np.float32))

    def stack(self, paths: list[str]) -> dict[str, Tensor]:
        """`tower_tokens` (V, C, N, W) padded by empty chunks and `chunk_mask` (V, C)."""
        rows = [self.tokens(path) for path in paths]
        longest = max(len(row) for row in rows)
        stacked = torch.zeros(len(rows), longest, *rows[0].shape[1:])
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for index, row in enumerate(rows):
            stacked[index, : len(row)] = row
            mask[index, : len(row)] = True
        return {"tower_tokens": stacked, "chunk_mask": mask}
