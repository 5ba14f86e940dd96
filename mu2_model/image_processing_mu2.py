"""From a CT array in Hounsfield units and its affine to the model input; the same code for training and serving.

Two forms: "hounsfield" (default: RAS, set spacing, HU windows as channels) and "published" (percentiles, crop, no spacing).
Arrays are (slice, row, column) and keep their native type until a slab of slices is resampled.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from mu2_model.errors import VolumeError
from mu2_model.published_preprocessing import prepare_published
from mu2_model.volume_grid import (
    MAX_IN_PLANE_MM,
    MAX_SLICE_MM,
    Matrix,
    VolumeGrid,
    check_affine,
    closest_axes,
    orientation_affine,
    triangle_weights,
)

Volume = tuple[NDArray[Any], Matrix | None]

AIR_HU, DENSEST_HU = -1024.0, 3071.0
# Any CT of a patient holds air or lung; without one voxel below this the array is not in Hounsfield units.
MUST_REACH_BELOW_HU = -200.0
BODY_HU = -500.0
BODY_FRACTION = 0.005
OBLIQUE_DEGREES = 5.0
SLAB_SLICES = 32
SUBSAMPLE = 4

# (level, width) in HU: lung, soft tissue, bone.
DEFAULT_WINDOWS = ((-600.0, 1500.0), (40.0, 400.0), (400.0, 1800.0))


@dataclass(frozen=True)
class PreparedVolume:
    """One volume as the model takes it.

    `pixel_values` (C, channels, D, H, W) in [0, 1], `chunk_mask` (C,), where the grid lies in the patient, and what was done
    to the input that a reader of the draft should know.
    """

    pixel_values: Tensor
    chunk_mask: Tensor
    grid: VolumeGrid
    repairs: tuple[str, ...]


class Mu2ImageProcessor(BaseImageProcessor):
    """Turns volumes into `pixel_values` and `chunk_mask`.

    `size`: rows and columns of the input; `chunk_slices`: slices of a chunk; `max_slices`: slices of the longest input;
    `slice_mm`: distance of slices; `windows`: (level, width) in HU, one channel each; `form`: "hounsfield" or "published".
    """

    model_input_names = ["pixel_values", "chunk_mask"]

    def __init__(
        self,
        size: int = 256,
        chunk_slices: int = 32,
        max_slices: int = 256,
        slice_mm: float = 3.0,
        windows: Sequence[Sequence[float]] = DEFAULT_WINDOWS,
        min_slices: int = 4,
        form: str = "hounsfield",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if form not in ("hounsfield", "published"):
            raise ValueError(f"form is 'hounsfield' or 'published', not {form!r}")
        if max_slices % chunk_slices:
            raise ValueError(f"max_slices {max_slices} is not a multiple of chunk_slices {chunk_slices}")
        self.size, self.chunk_slices, self.max_slices = size, chunk_slices, max_slices
        self.slice_mm, self.min_slices, self.form = slice_mm, min_slices, form
        self.windows = [[float(level), float(width)] for level, width in windows]

    @property
    def num_channels(self) -> int:
        """Channels of the input: one per window; one in the published form."""
        return 1 if self.form == "published" else len(self.windows)

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """`preprocess`."""
        return self.preprocess(images, **kwargs)

    def preprocess(
        self,
        images: Volume | Sequence[Volume],
        device: torch.device | str = "cpu",
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Volumes (array, affine), one or a list, to pixel_values (B, C, channels, D, H, W) and chunk_mask (B, C).

        Raises VolumeError for an array or affine that no trustworthy input can be made from.
        """
        volumes = [images] if isinstance(images, tuple) else list(images)
        prepared = [self.prepare(array, affine, device=device) for array, affine in volumes]
        return BatchFeature(collate(prepared), tensor_type=return_tensors)

    def prepare(self, hu: Any, affine: Any, device: torch.device | str = "cpu") -> PreparedVolume:
        """One volume; the result is equal on every device to within 1e-4."""
        array = check_array(hu, self.min_slices)
        if self.form == "published":
            pixels, to_source, shape, repairs = prepare_published(array, self.size, self.max_slices, device)
            channels = pixels[None]
            to_ras = None if affine is None else check_affine(affine) @ to_source
            length = self.max_slices
        else:
            channels, to_source, shape, repairs = self._resample(array, check_affine(affine), device)
            to_ras = np.asarray(affine, dtype=np.float64) @ to_source
            length = math.ceil(shape[0] / self.chunk_slices) * self.chunk_slices
        chunk_shape = (self.chunk_slices, self.size, self.size)
        padded = channels.new_zeros(channels.shape[0], length, self.size, self.size)
        padded[:, : shape[0], : shape[1], : shape[2]] = channels
        chunks = padded.unflatten(1, (-1, self.chunk_slices)).transpose(0, 1).contiguous()
        live = torch.arange(chunks.shape[0], device=chunks.device) * self.chunk_slices < shape[0]
        grid = VolumeGrid(shape, chunk_shape, (array.shape[0], array.shape[1], array.shape[2]), to_source, to_ras)
        return PreparedVolume(chunks, live, grid, tuple(repairs))

    def _resample(
        self, array: NDArray[Any], affine: Matrix, device: torch.device | str
    ) -> tuple[Tensor, Matrix, tuple[int, int, int], list[str]]:
        order, flip, tilt = closest_axes(affine)
        oriented = array.transpose(order)[tuple(slice(None, None, -1 if f else 1) for f in flip)]
        spacing = np.linalg.norm(affine[:3, :3], axis=0)[list(order)]
        check_spacing(spacing)
        repairs = (
            [f"the volume is tilted by {tilt:.0f} degrees against the patient axes"] if tilt > OBLIQUE_DEGREES else []
        )
        rows, columns = body_box(oriented)
        pixel_mm = max((rows[1] - rows[0]) * spacing[1], (columns[1] - columns[0]) * spacing[2]) / self.size
        slice_mm = self.slice_mm
        if oriented.shape[0] * spacing[0] > slice_mm * self.max_slices:
            slice_mm = oriented.shape[0] * spacing[0] / self.max_slices
            repairs.append(
                f"the volume is longer than {self.max_slices} slices of {self.slice_mm:g} mm; sampled every {slice_mm:.1f} mm"
            )
        starts = (0.0, float(rows[0]), float(columns[0]))
        extents = (oriented.shape[0], rows[1] - rows[0], columns[1] - columns[0])
        limits = (self.max_slices, self.size, self.size)
        steps = (slice_mm / spacing[0], pixel_mm / spacing[1], pixel_mm / spacing[2])
        shape = [
            min(limit, max(1, math.ceil(n / step - 1e-6)))
            for n, step, limit in zip(extents, steps, limits, strict=True)
        ]
        weights = [triangle_weights(*args) for args in zip(oriented.shape, shape, steps, starts, strict=True)]
        resampled = self._apply(oriented, [weight.to(device) for weight in weights], repairs)
        to_oriented = np.diag([*steps, 1.0])
        to_oriented[:3, 3] = [start + step / 2 - 0.5 for start, step in zip(starts, steps, strict=True)]
        to_source = orientation_affine(order, flip, (array.shape[0], array.shape[1], array.shape[2])) @ to_oriented
        return self._window(resampled), to_source, (shape[0], shape[1], shape[2]), repairs

    def _apply(self, oriented: NDArray[Any], weights: list[Tensor], repairs: list[str]) -> Tensor:
        over_slices, over_rows, over_columns = weights
        # Only the body's box is turned into floats and multiplied; the whole plane is still looked at.
        rows, columns = used_columns(over_rows), used_columns(over_columns)
        over_rows, over_columns = over_rows[:, rows].contiguous(), over_columns[:, columns].contiguous()
        out = over_rows.new_zeros(over_slices.shape[0], over_rows.shape[0], over_columns.shape[0])
        # Fewer slices first when there will be fewer: everything after costs by the slice.
        fewer = over_slices.shape[0] < oriented.shape[0]
        boxes = over_rows.new_zeros(over_slices.shape[0], over_rows.shape[1], over_columns.shape[1]) if fewer else None
        seen = _Seen()
        for first in range(0, oriented.shape[0], SLAB_SLICES):
            slab = torch.from_numpy(np.ascontiguousarray(oriented[first : first + SLAB_SLICES])).to(over_rows.device)
            slab = seen.look(slab)[:, rows, columns].float().clamp_(AIR_HU, DENSEST_HU)
            share = over_slices[:, first : first + SLAB_SLICES]
            reached = used_columns(share.T)
            if boxes is None:
                slab = over_rows @ slab @ over_columns.T
            target = out if boxes is None else boxes
            target[reached] += (share[reached] @ slab.flatten(1)).unflatten(1, slab.shape[1:])
        if seen.lowest > MUST_REACH_BELOW_HU:
            raise VolumeError(
                f"the lowest value is {seen.lowest:.0f}: a CT in Hounsfield units holds air (below {MUST_REACH_BELOW_HU:.0f}). "
                "Apply slope and intercept, or this is not a CT"
            )
        repairs += seen.repairs(oriented.size)
        return out if boxes is None else over_rows @ boxes @ over_columns.T

    def _window(self, hu: Tensor) -> Tensor:
        channels = hu.new_empty(len(self.windows), *hu.shape)
        for channel, (level, width) in enumerate(self.windows):
            torch.sub(hu, level - width / 2, out=channels[channel])
            channels[channel].div_(width).clamp_(0, 1)
        return channels


class _Seen:
    """What was out of range in the slabs looked at so far."""

    def __init__(self) -> None:
        self.broken = self.padding = self.dense = 0
        self.lowest = math.inf

    def look(self, slab: Tensor) -> Tensor:
        """Count, and replace what is not finite by air."""
        if slab.dtype.is_floating_point:
            finite = torch.isfinite(slab)
            self.broken += int((~finite).sum())
            slab = torch.where(finite, slab, AIR_HU)
        low, high = float(slab.min()), float(slab.max())
        self.lowest = min(self.lowest, low)
        self.padding += int((slab < AIR_HU).sum()) if low < AIR_HU else 0
        self.dense += int((slab > DENSEST_HU).sum()) if high > DENSEST_HU else 0
        return slab

    def repairs(self, voxels: int) -> list[str]:
        """A sentence for each kind of value that was replaced."""
        kinds = (
            (self.broken, f"not finite, set to {AIR_HU:.0f} HU"),
            (self.padding, f"below {AIR_HU:.0f} HU (padding), set to {AIR_HU:.0f} HU"),
            (self.dense, f"above {DENSEST_HU:.0f} HU (metal), set to {DENSEST_HU:.0f} HU"),
        )
        return [f"{100 * count / voxels:.2g} % of the voxels were {what}" for count, what in kinds if count]


def check_array(hu: Any, min_slices: int) -> NDArray[Any]:
    """The array as numbers indexed (slice, row, column); VolumeError when it is not a volume."""
    array = np.asarray(hu)
    if array.ndim != 3:
        raise VolumeError(f"an array of shape {array.shape} is not a volume: (slice, row, column) is needed")
    if array.dtype.kind not in "iuf":
        raise VolumeError(f"an array of type {array.dtype} does not hold Hounsfield units")
    if min(array.shape) < min_slices:
        raise VolumeError(f"an array of shape {array.shape}: at least {min_slices} voxels along each axis are needed")
    # Torch has no unsigned 16-bit arithmetic and reads neither half-bytes-swapped nor long double arrays.
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int32 if array.dtype.itemsize == 2 else np.int64)
    if array.dtype.kind == "f" and array.dtype.itemsize not in (2, 4, 8):
        array = array.astype(np.float64)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def check_spacing(spacing_mm: NDArray[np.float64]) -> None:
    """VolumeError when voxels (slice, row, column) are too far apart to draft from."""
    if spacing_mm[0] > MAX_SLICE_MM:
        raise VolumeError(
            f"slices {spacing_mm[0]:.1f} mm apart: what lies between cannot be known above {MAX_SLICE_MM:g} mm"
        )
    if max(spacing_mm[1:]) > MAX_IN_PLANE_MM:
        raise VolumeError(f"pixels of {max(spacing_mm[1:]):.1f} mm: more than {MAX_IN_PLANE_MM:g} mm is not a CT slice")


def used_columns(weights: Tensor) -> slice:
    """The source values, first to last, that any weight (count, source) reaches."""
    used = (weights != 0).any(dim=0).nonzero().squeeze(1)
    return slice(int(used[0]), int(used[-1]) + 1)


def body_box(oriented: NDArray[Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns (first, after last) that hold the body, or the whole plane when nothing does."""
    body = oriented[::SUBSAMPLE, ::SUBSAMPLE, ::SUBSAMPLE] > BODY_HU

    def span(fraction: NDArray[np.float64], length: int) -> tuple[int, int]:
        hit = np.flatnonzero(fraction > BODY_FRACTION)
        if not hit.size:
            return 0, length
        return max(0, int(hit[0] - 1) * SUBSAMPLE), min(length, int(hit[-1] + 2) * SUBSAMPLE)

    return span(body.mean(axis=(0, 2)), oriented.shape[1]), span(body.mean(axis=(0, 1)), oriented.shape[2])


def collate(prepared: Sequence[PreparedVolume]) -> dict[str, Tensor]:
    """Stack volumes of different length: pixel_values (B, C, ...) padded with empty chunks, chunk_mask (B, C)."""
    longest = max(volume.pixel_values.shape[0] for volume in prepared)
    first = prepared[0].pixel_values
    pixels = first.new_zeros(len(prepared), longest, *first.shape[1:])
    mask = torch.zeros(len(prepared), longest, dtype=torch.bool, device=first.device)
    for row, volume in enumerate(prepared):
        pixels[row, : volume.pixel_values.shape[0]] = volume.pixel_values
        mask[row, : volume.chunk_mask.shape[0]] = volume.chunk_mask
    return {"pixel_values": pixels, "chunk_mask": mask}
