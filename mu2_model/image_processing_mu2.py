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
from mu2_model.resampling import Resampling, triangle_weights
from mu2_model.volume_grid import (
    MAX_IN_PLANE_MM,
    MAX_SLICE_MM,
    Matrix,
    VolumeGrid,
    check_affine,
    closest_axes,
    orientation_affine,
)

Volume = tuple[NDArray[Any], Matrix | None]

# Whole numbers, so that arrays of integers stay what they are.
AIR_HU, DENSEST_HU = -1024, 3071
# Any CT of a patient holds air or lung; without one voxel below this the array is not in Hounsfield units.
MUST_REACH_BELOW_HU = -200.0
BODY_HU = -500.0
BODY_FRACTION = 0.005
OBLIQUE_DEGREES = 5.0
# A slab of floats fits a processor's cache.
SLAB_SLICES = 8
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
        prepared = [self.prepare(*as_pair(volume), device=device) for volume in volumes]
        return BatchFeature(collate(prepared), tensor_type=return_tensors)

    def prepare(self, hu: Any, affine: Any, device: torch.device | str = "cpu") -> PreparedVolume:
        """One volume; the result is equal on every device to within 1e-4."""
        array = check_array(hu, self.min_slices)
        chunk_shape = (self.chunk_slices, self.size, self.size)
        if self.form == "published":
            image, to_source, shape, repairs = prepare_published(array, self.size, self.max_slices, device)
            matrix = None if affine is None else check_affine(affine)
            repairs = [*published_doubts(array, matrix), *repairs]
            to_ras = None if matrix is None else matrix @ to_source
            chunks = image.view(-1, 1, *chunk_shape)
        else:
            image, to_source, shape, repairs = self._resample(array, check_affine(affine), device)
            to_ras = np.asarray(affine, dtype=np.float64) @ to_source
            chunks = image.new_zeros(math.ceil(shape[0] / self.chunk_slices), self.num_channels, *chunk_shape)
            for chunk, part in zip(chunks, image.split(self.chunk_slices), strict=True):
                self._fill(chunk[:, : part.shape[0], : part.shape[1], : part.shape[2]], part)
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
        # Turning the weights round instead of the array leaves the array as it lies in memory.
        weights = [weight.flip(1) if turned else weight for weight, turned in zip(weights, flip, strict=True)]
        resampled = resample_hu(array.transpose(order), weights, device, repairs)
        to_oriented = np.diag([*steps, 1.0])
        to_oriented[:3, 3] = [start + step / 2 - 0.5 for start, step in zip(starts, steps, strict=True)]
        to_source = orientation_affine(order, flip, (array.shape[0], array.shape[1], array.shape[2])) @ to_oriented
        return resampled, to_source, (shape[0], shape[1], shape[2]), repairs

    def _fill(self, channels: Tensor, image: Tensor) -> None:
        """Write an image (slices, rows, columns) into the channels (channels, slices, rows, columns) of a chunk."""
        for channel, (level, width) in zip(channels, self.windows, strict=True):
            torch.sub(image, level - width / 2, out=channel)
            channel.div_(width).clamp_(0, 1)


def resample_hu(
    array: NDArray[Any], weights: Sequence[Tensor], device: torch.device | str, repairs: list[str]
) -> Tensor:
    """Resample an array by one matrix per axis; what was out of range is replaced and said in `repairs`.

    The array keeps its type until a slab of slices is on its way. Raises VolumeError when no voxel is air, or every one is.
    """
    over_slices = weights[0].to(device)
    rows, columns = Resampling(weights[1], device), Resampling(weights[2], device)
    # Fewer slices first when there will be fewer: everything after costs by the slice.
    fewer = over_slices.shape[0] < array.shape[0]
    height, width = rows.reach.stop - rows.reach.start, columns.reach.stop - columns.reach.start
    plane = (height, width) if fewer else (rows.count, columns.count)
    out = over_slices.new_zeros(over_slices.shape[0], *plane)
    seen = _Seen()
    for first in range(0, array.shape[0], SLAB_SLICES):
        # Torch shares an array's memory only when it is contiguous and may be written to.
        part = np.require(array[first : first + SLAB_SLICES], requirements=["C", "W"])
        # The whole plane is looked at, but the body's box alone becomes floats.
        slab = seen.look(torch.from_numpy(part).to(over_slices.device))[:, rows.reach, columns.reach].float()
        if not fewer:
            slab = columns.columns(rows.rows(slab))
        share = over_slices[:, first : first + SLAB_SLICES]
        reached = (share != 0).any(dim=1).nonzero().flatten().tolist()
        target = slice(reached[0], reached[-1] + 1)
        out.view(len(out), -1)[target].addmm_(share[target], slab.flatten(1))
    seen.check()
    repairs += seen.repairs(array.size)
    return columns.columns(rows.rows(out)) if fewer else out


class _Seen:
    """What was out of range in the slabs looked at so far."""

    def __init__(self) -> None:
        self.broken = self.padding = self.dense = 0
        self.lowest, self.highest = math.inf, -math.inf

    def look(self, slab: Tensor) -> Tensor:
        """Count what is out of range, and bring it into the range; what is not finite becomes air."""
        low, high = (float(value) for value in torch.aminmax(slab))
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = torch.isfinite(slab)
            self.broken += int((~finite).sum())
            slab = torch.where(finite, slab, AIR_HU)
            low, high = (float(value) for value in torch.aminmax(slab))
        self.lowest, self.highest = min(self.lowest, low), max(self.highest, high)
        self.padding += int((slab < AIR_HU).sum()) if low < AIR_HU else 0
        self.dense += int((slab > DENSEST_HU).sum()) if high > DENSEST_HU else 0
        return slab.clamp(AIR_HU, DENSEST_HU) if low < AIR_HU or high > DENSEST_HU else slab

    def check(self) -> None:
        """VolumeError when no voxel was air, or none was anything else."""
        if self.lowest > MUST_REACH_BELOW_HU:
            raise VolumeError(
                f"the lowest value is {self.lowest:.0f}: a CT in Hounsfield units holds air (below "
                f"{MUST_REACH_BELOW_HU:.0f}). Apply slope and intercept, or this is not a CT"
            )
        if self.highest <= BODY_HU:
            raise VolumeError(f"no voxel above {BODY_HU:.0f} HU: the volume holds air and no body")

    def repairs(self, voxels: int) -> list[str]:
        """A sentence for each kind of value that was replaced."""
        kinds = (
            (self.broken, f"not finite, set to {AIR_HU:.0f} HU"),
            (self.padding, f"below {AIR_HU:.0f} HU (padding), set to {AIR_HU:.0f} HU"),
            (self.dense, f"above {DENSEST_HU:.0f} HU (metal), set to {DENSEST_HU:.0f} HU"),
        )
        return [f"{_percent(count / voxels)} of the voxels were {what}" for count, what in kinds if count]


def _percent(share: float) -> str:
    """A share in percent, never as "1e+02 %".

    >>> _percent(0.471), _percent(0.000092), _percent(1e-8)
    ('47 %', '0.0092 %', 'less than 0.001 %')
    """
    if share < 1e-5:
        return "less than 0.001 %"
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def as_pair(volume: Any) -> Volume:
    """An array and its affine; VolumeError for anything but the two together."""
    if not isinstance(volume, tuple) or len(volume) != 2:
        raise VolumeError(f"a volume is a pair (array, affine), not a {type(volume).__name__}")
    return volume


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


def published_doubts(array: NDArray[Any], affine: Matrix | None) -> list[str]:
    """What the published form neither needs nor corrects, and a reader of its draft should know all the same."""
    doubts = []
    if not (_is_ct(array[::SUBSAMPLE, ::SUBSAMPLE, ::SUBSAMPLE]) or _is_ct(array)):
        doubts.append(
            f"the values are not Hounsfield units of a CT, which reach below {MUST_REACH_BELOW_HU:.0f} (air) and above "
            f"{BODY_HU:.0f} (body)"
        )
    if affine is None:
        return [*doubts, "no affine: left, right and size are unknown"]
    try:
        check_spacing(np.linalg.norm(affine[:3, :3], axis=0))
    except VolumeError as error:
        doubts.append(f"{error}; the published form does not correct spacing")
    return doubts


def _is_ct(array: NDArray[Any]) -> bool:
    return bool((array <= MUST_REACH_BELOW_HU).any() and (array > BODY_HU).any())


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
