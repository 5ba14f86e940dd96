"""The published preprocessing: percentiles to [0, 1], crop to what is above zero, in-plane resize; no HU, no spacing.

Kept so that released weights see what they were trained on. Same result as MONAI's ScaleIntensityRangePercentiles,
CropForeground and anti-aliased resize in float64, to float32 precision, at a fraction of the time and memory.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mu2_model.errors import VolumeError
from mu2_model.resampling import Resampling, corner_weights, used_columns
from mu2_model.volume_grid import Matrix

LOWER_PERCENT, UPPER_PERCENT = 0.5, 99.5
# Differences of values up to here, and one over them, are ordinary float32 numbers.
LARGEST_VALUE = 1e37
# A slab of floats fits a processor's cache.
SLAB_SLICES = 8
# Every so many values along each axis are sorted to know about where a percentile lies, give or take so many ranks of them.
SAMPLE_STEPS = (3, 7, 7)
SAMPLE_MARGIN = 0.002


def prepare_published(
    array: NDArray[Any], size: int, max_slices: int, device: torch.device | str
) -> tuple[Tensor, Matrix, tuple[int, int, int], list[str]]:
    """Returns the image (max_slices, size, size) in [0, 1], the map to source indices, the shape it fills, and repairs.

    The image lies at the low ends; the rest is zero. Raises VolumeError when no value is finite, or nearly all
    are one.
    """
    repairs: list[str] = []
    if array.dtype.kind == "f" and not (usable := usable_values(array)).all():
        if not usable.any():
            raise VolumeError("no value of the array is finite")
        array = np.where(usable, array, array[usable].min())
        repairs.append(f"values that are not finite or beyond {LARGEST_VALUE:g} were set to the lowest value")
    low, high = percentiles(array, (LOWER_PERCENT, UPPER_PERCENT))
    if high <= low:
        raise VolumeError(f"nearly all values of the array are {low:g}: there is no image in it")
    box = foreground_box(array, low)
    cropped = array[tuple(slice(first, last) for first, last in box)]
    depth, height, width = cropped.shape
    ratio = min(size / height, size / width)
    shape = (min(depth, max_slices), max(1, int(height * ratio)), max(1, int(width * ratio)))
    if depth > max_slices:
        repairs.append(f"{depth} slices were resampled to {max_slices}")
    image = torch.zeros(max_slices, size, size, device=device)
    scale_and_resize(cropped, (low, 1 / (high - low)), shape, image)
    to_source = np.eye(4)
    for axis, (source, count) in enumerate(zip(cropped.shape, shape, strict=True)):
        to_source[axis, axis] = (source - 1) / (count - 1) if count > 1 else 1.0
        to_source[axis, 3] = box[axis][0]
    return image, to_source, shape, repairs


def usable_values(array: NDArray[Any]) -> NDArray[np.bool_]:
    """Which floats are finite, and small enough that float32 can reckon with them."""
    if array.dtype.itemsize == 2:
        return np.isfinite(array)
    return (array >= -LARGEST_VALUE) & (array <= LARGEST_VALUE)


def scale_and_resize(
    source: NDArray[Any], low_and_scale: tuple[float, float], shape: tuple[int, int, int], image: Tensor
) -> None:
    """Scale, clip to [0, 1] and resize to `shape`, into the low ends of an image that holds zeros.

    A slab goes all the way before the next is read, so that nothing but source and image is as large as a volume.
    """
    low, scale = low_and_scale
    depth, height, width = source.shape
    slices, rows, columns = shape
    over_rows = Resampling(corner_weights(height, rows), image.device)
    over_columns = Resampling(corner_weights(width, columns), image.device)
    over_slices = corner_weights(depth, slices).to(image.device)
    # Whole rows of the image, padding included: rows side by side in memory are one matrix for the product over slices.
    resized = image.new_zeros(SLAB_SLICES, rows, image.shape[2])
    target = image.flatten(1)[:, : rows * image.shape[2]]
    for first in range(0, depth, SLAB_SLICES):
        part = np.require(source[first : first + SLAB_SLICES], requirements=["C", "W"])
        slab = torch.from_numpy(part).to(image.device, torch.float32, copy=True)
        slab.sub_(low).mul_(scale).clamp_(0, 1)
        if slices == depth:
            over_columns.columns(over_rows.rows(slab), out=image[first : first + len(slab), :rows, :columns])
            continue
        made = resized[: len(slab)]
        over_columns.columns(over_rows.rows(slab), out=made[:, :, :columns])
        share = over_slices[:, first : first + SLAB_SLICES]
        reached = used_columns(share.T)
        target[reached].addmm_(share[reached], made.flatten(1))


def percentiles(array: NDArray[Any], percents: tuple[float, ...]) -> tuple[float, ...]:
    """Percentiles of all values with linear interpolation, exact."""
    steps = [min(step, size) for step, size in zip(SAMPLE_STEPS, array.shape, strict=True)]
    sample = np.sort(array[tuple(slice(None, None, step) for step in steps)], axis=None)
    # Comparing and counting leave the interpreter's lock.
    with ThreadPoolExecutor(len(percents)) as threads:
        return tuple(threads.map(lambda percent: percentile(array, percent, sample), percents))


def percentile(array: NDArray[Any], percent: float, sample: NDArray[Any]) -> float:
    """One percentile; a sorted sample says between which two values it lies, so only what is between them is sorted."""
    rank = percent / 100 * (array.size - 1)
    ranks = (math.floor(rank), math.ceil(rank))
    first, last = (int((percent / 100 + sign * SAMPLE_MARGIN) * (sample.size - 1)) for sign in (-1, 1))
    found = ordered_values(array, ranks, sample[first], sample[last]) if first > 0 and last < sample.size else None
    if found is None:
        # The sample misled, or is too small for its margin.
        found = tuple(np.partition(array, ranks, axis=None)[list(ranks)].tolist())
    below, above = found
    return below + (rank - ranks[0]) * (above - below)


def ordered_values(array: NDArray[Any], ranks: tuple[int, int], low: Any, high: Any) -> tuple[float, float] | None:
    """The values at two ranks of the sorted array; None when they do not both lie in [low, high]."""
    upto_low, between = 0, []
    for part in array:
        upto_low += int(np.count_nonzero(part <= low))
        between.append(part[(part > low) & (part < high)])
    inside = np.concatenate(between)
    wanted = [rank - upto_low for rank in ranks]
    if wanted[0] < 0 and ranks[0] < sum(int(np.count_nonzero(part < low)) for part in array):
        return None
    if wanted[1] >= inside.size and ranks[1] >= sum(int(np.count_nonzero(part <= high)) for part in array):
        return None
    # Values equal to an end are counted, not sorted: often a tenth of a CT is one value.
    if sought := [index for index in wanted if 0 <= index < inside.size]:
        inside.partition(sought)
    first, second = (low if index < 0 else high if index >= inside.size else inside[index] for index in wanted)
    return float(first), float(second)


def foreground_box(array: NDArray[Any], threshold: float) -> list[tuple[int, int]]:
    """First and after-last index, per axis, of the voxels above the threshold; the whole axis when there are none."""
    if array.dtype.kind in "iu":
        # The same for whole numbers, and compared in their own type.
        threshold = math.floor(threshold)
    slices = np.zeros(array.shape[0], dtype=bool)
    plane = np.zeros(array.shape[1:], dtype=bool)
    for index, part in enumerate(array):
        above = part > threshold
        slices[index] = above.any()
        plane |= above
    box = []
    for hit, length in zip((slices, plane.any(axis=1), plane.any(axis=0)), array.shape, strict=True):
        inside = np.flatnonzero(hit)
        box.append((int(inside[0]), int(inside[-1]) + 1) if inside.size else (0, length))
    return box
