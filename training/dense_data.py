"""Chunks of phantoms with their dense targets, sampled so that rare findings are seen often enough to be learned."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mu2_model import Mu2ImageProcessor
from training.data import Case, ManifestError
from training.dense_labels import FRACTION_SCALE, GRAZED_FRACTION, LEAST_FRACTION, cell_fractions, read_label_maps
from training.phantoms.vocabulary import FINDING_LABELS, Organ
from training.volumes import VolumeCache, read_volume

ORGANS = max(Organ)
FINDINGS = len(FINDING_LABELS)
"""Classes of the label maps, from value 1 on."""
PIXEL_SCALE = 255
BRIGHTNESS = 0.03
NOISE = 0.02
FINDING_SHARE = 0.6
"""Share of training chunks that are drawn because of a finding in them."""


@dataclass(frozen=True)
class DenseCase:
    """One phantom: pixels (C, channels, D, H, W) and fractions (C, P, organs + findings), both times 255.

    Bytes, so that thousands of phantoms stay in memory: a step of one is 1.6 HU in a window of 400, far below the noise.
    """

    case_id: str
    pixels: NDArray[np.uint8]
    fractions: NDArray[np.uint8]


class DenseData:
    """The phantoms of one split, and which chunks hold which finding."""

    def __init__(
        self,
        cases: list[Case],
        cache: VolumeCache,
        patch: tuple[int, int, int],
    ):
        self.cases = [self._load(case, cache, patch) for case in cases]
        self.chunks = [(index, chunk) for index, case in enumerate(self.cases) for chunk in range(len(case.pixels))]
        # For every finding the chunks that hold it, to draw from.
        self.holding: dict[int, list[tuple[int, int]]] = {}
        for index, chunk in self.chunks:
            present = (self.cases[index].fractions[chunk, :, ORGANS:] >= LEAST_FRACTION * FRACTION_SCALE).any(axis=0)
            for finding in np.flatnonzero(present):
                self.holding.setdefault(int(finding), []).append((index, chunk))

    def _load(self, case: Case, cache: VolumeCache, patch: tuple[int, int, int]) -> DenseCase:
        if Path(case.image).suffix != ".npz":
            raise ManifestError(f"{case.case_id} has no voxel labels: make phantoms with --format numpy")
        pixels = cache.get(case.image).pixels
        entry = cache.folder / f"{cache.key(case.image)}.dense-{'x'.join(map(str, patch))}.npy"
        if not entry.is_file():
            fractions = self._fractions(case, cache.processor, patch)
            partial = entry.with_suffix(f".{os.getpid()}.partial")
            with partial.open("wb") as stream:
                np.save(stream, fractions)
            partial.replace(entry)
        grey = np.rint(np.asarray(pixels, dtype=np.float32) * PIXEL_SCALE).astype(np.uint8)
        return DenseCase(case.case_id, grey, np.load(entry))

    def _fractions(self, case: Case, processor: Mu2ImageProcessor, patch: tuple[int, int, int]) -> NDArray[np.uint8]:
        array, affine = read_volume(case.image)
        grid = processor.prepare(array, affine).grid
        maps = read_label_maps(case.image)
        organs = cell_fractions(maps.organs, ORGANS, grid, patch)
        return np.concatenate([organs, cell_fractions(maps.findings, FINDINGS, grid, patch)], axis=2)

    def batch(self, picked: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Pixels (L, channels, D, H, W) and fractions (L, P, classes) in [0, 1] of the picked (case, chunk)."""
        pixels = np.stack([self.cases[case].pixels[chunk] for case, chunk in picked]).astype(np.float32)
        fractions = np.stack([self.cases[case].fractions[chunk] for case, chunk in picked])
        return torch.from_numpy(pixels / PIXEL_SCALE), torch.from_numpy(fractions.astype(np.float32) / FRACTION_SCALE)

    def training_batch(self, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A batch for one step: chunks with a finding, each kind equally often, and chunks drawn from all."""
        kinds = sorted(self.holding)
        picked = []
        for _ in range(size):
            pool = self.chunks
            if kinds and rng.random() < FINDING_SHARE:
                pool = self.holding[kinds[int(rng.integers(len(kinds)))]]
            picked.append(pool[int(rng.integers(len(pool)))])
        pixels, fractions = self.batch(picked)
        return augment(pixels, rng), fractions

    def in_order(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All chunks once, in batches."""
        for start in range(0, len(self.chunks), size):
            yield self.batch(self.chunks[start : start + size])


def augment(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Noise and brightness of their own for every chunk; nothing that moves left to right."""
    count = pixels.shape[0]
    shift = torch.from_numpy(rng.normal(0, BRIGHTNESS, (count, pixels.shape[1], 1, 1, 1)).astype(np.float32))
    noise = torch.from_numpy(rng.standard_normal(pixels.shape, dtype=np.float32)) * NOISE
    # Air and metal stay at the ends of the window, where a scanner's noise cannot be seen either.
    inside = (pixels > 0) & (pixels < 1)
    return torch.where(inside, (pixels + shift + noise).clamp(0, 1), pixels)


def positives(fractions: Tensor) -> tuple[Tensor, Tensor]:
    """Cells with a finding, and cells that are sure to have it or not; both (..., findings) bool."""
    positive = fractions >= LEAST_FRACTION
    return positive, positive | (fractions < GRAZED_FRACTION)
