"""Chunks of phantoms with their dense targets, sampled so that rare findings are seen often enough to be learned."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.data import Case, ManifestError
from training.dense_labels import FRACTION_SCALE, GRAZED_FRACTION, LEAST_FRACTION, cell_fractions, read_label_maps
from training.phantoms.vocabulary import FINDING_LABELS, Organ
from training.volumes import VolumeCache, read_volume

ORGANS = max(Organ)
FINDINGS = len(FINDING_LABELS)
"""Classes of the label maps, from value 1 on."""
BRIGHTNESS = 0.03
NOISE = 0.02
FINDING_SHARE = 0.6
"""Share of training chunks that are drawn because of a finding in them."""


@dataclass(frozen=True)
class DenseBatch:
    """Chunks for one step: pixels (L, channels, D, H, W), shares in [0, 1] that organs and findings fill.

    `organs` (L, P, organs) and `findings` (L, P, findings) are of patches, `cells` (L, M, findings) of the finer cells.
    """

    pixels: Tensor
    organs: Tensor
    findings: Tensor
    cells: Tensor


@dataclass(frozen=True)
class DenseCase:
    """One phantom: pixels (C, channels, D, H, W), fractions of patches (C, P, organs + findings) and of cells, both times 255.

    All three are maps of files, so that a set may be larger than memory: a step reads the few chunks that it draws.
    """

    case_id: str
    pixels: NDArray[np.float16]
    fractions: NDArray[np.uint8]
    cells: NDArray[np.uint8]


class DenseData:
    """The phantoms of one split, and which chunks hold which finding."""

    def __init__(
        self,
        cases: list[Case],
        cache: VolumeCache,
        patch: tuple[int, int, int],
        cell: tuple[int, int, int],
    ):
        self.cases = [self._load(case, cache, patch, cell) for case in cases]
        self.chunks = [(index, chunk) for index, case in enumerate(self.cases) for chunk in range(len(case.pixels))]
        # For every finding the chunks that hold it, to draw from.
        self.holding: dict[int, list[tuple[int, int]]] = {}
        for index, chunk in self.chunks:
            present = (self.cases[index].fractions[chunk, :, ORGANS:] >= LEAST_FRACTION * FRACTION_SCALE).any(axis=0)
            for finding in np.flatnonzero(present):
                self.holding.setdefault(int(finding), []).append((index, chunk))

    def _load(
        self, case: Case, cache: VolumeCache, patch: tuple[int, int, int], cell: tuple[int, int, int]
    ) -> DenseCase:
        if Path(case.image).suffix != ".npz":
            raise ManifestError(f"{case.case_id} has no voxel labels: make phantoms with --format numpy")
        pixels = cache.get(case.image).pixels
        patches = _stored(case, cache, patch, with_organs=True)
        return DenseCase(case.case_id, pixels, patches, _stored(case, cache, cell, with_organs=False))

    def batch(self, picked: list[tuple[int, int]]) -> DenseBatch:
        """The picked (case, chunk)."""
        pixels, fractions, cells = (
            torch.from_numpy(np.stack([getattr(self.cases[case], part)[chunk] for case, chunk in picked])).float()
            for part in ("pixels", "fractions", "cells")
        )
        shares = fractions / FRACTION_SCALE
        return DenseBatch(pixels, shares[..., :ORGANS], shares[..., ORGANS:], cells / FRACTION_SCALE)

    def training_batch(self, size: int, rng: np.random.Generator) -> DenseBatch:
        """A batch for one step: chunks with a finding, each kind equally often, and chunks drawn from all."""
        kinds = sorted(self.holding)
        picked = []
        for _ in range(size):
            pool = self.chunks
            if kinds and rng.random() < FINDING_SHARE:
                pool = self.holding[kinds[int(rng.integers(len(kinds)))]]
            picked.append(pool[int(rng.integers(len(pool)))])
        batch = self.batch(picked)
        return replace(batch, pixels=augment(batch.pixels, rng))

    def in_order(self, size: int) -> Iterator[DenseBatch]:
        """All chunks once, in batches."""
        for start in range(0, len(self.chunks), size):
            yield self.batch(self.chunks[start : start + size])


def _stored(case: Case, cache: VolumeCache, patch: tuple[int, int, int], with_organs: bool) -> NDArray[np.uint8]:
    """Fractions of patches (C, P, findings), organs before them or not, computed once."""
    kind = "dense" if with_organs else "findings"
    entry = cache.folder / f"{cache.key(case.image)}.{kind}-{'x'.join(map(str, patch))}.npy"
    if not entry.is_file():
        array, affine = read_volume(case.image)
        grid = cache.processor.prepare(array, affine).grid
        maps = read_label_maps(case.image)
        fractions = cell_fractions(maps.findings, FINDINGS, grid, patch)
        if with_organs:
            fractions = np.concatenate([cell_fractions(maps.organs, ORGANS, grid, patch), fractions], axis=2)
        partial = entry.with_suffix(f".{os.getpid()}.partial")
        with partial.open("wb") as stream:
            np.save(stream, fractions)
        partial.replace(entry)
    return np.load(entry, mmap_mode="r")


def augment(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Noise and brightness of their own for every chunk; nothing that moves left to right."""
    count = pixels.shape[0]
    shift = torch.from_numpy(rng.normal(0, BRIGHTNESS, (count, pixels.shape[1], 1, 1, 1)).astype(np.float32))
    noise = torch.from_numpy(rng.standard_normal(pixels.shape, dtype=np.float32)) * NOISE
    # Air and metal stay at the ends of the window, where a scanner's noise cannot be seen either.
    inside = (pixels > 0) & (pixels < 1)
    return torch.where(inside, (pixels + shift + noise).clamp(0, 1), pixels)


def positives(fractions: Tensor, finer: int = 1) -> tuple[Tensor, Tensor]:
    """Cells with a finding, and cells that are sure to have it or not; both (..., findings) bool.

    In cells `finer` times smaller than patches a finding must fill as many times the share.
    """
    positive = fractions >= LEAST_FRACTION * finer
    return positive, positive | (fractions < GRAZED_FRACTION * finer)
