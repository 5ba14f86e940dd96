"""The published preprocessing: percentiles to [0, 1], crop to what is above zero, in-plane resize; no HU, no spacing.

Kept so that released weights see what they were trained on. Same result as MONAI's ScaleIntensityRangePercentiles,
CropForeground and anti-aliased resize in float64, to float32 precision, at a fraction of the time and memory.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mu2_model.volume_grid import Matrix, corner_weights

LOWER_PERCENT, UPPER_PERCENT = 0.5, 99.5
SLAB_SLICES = 32
# Up to this range integer values are counted instead of sorted.
COUNTABLE_VALUES = 1 << 17


def prepare_published(
    array: NDArray[Any], size: int, max_slices: int, device: torch.device | str
) -> tuple[Tensor, Matrix, tuple[int, int, int], list[str]]:
    """Returns the image (slices, rows, columns) in [0, 1], the map to source indices, its shape, and repairs."""
    repairs: list[str] = []
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        array = np.nan_to_num(array, nan=float(np.nanmin(array[np.isfinite(array)])))
        repairs.append("values that are not finite were set to the lowest value")
    low, high = percentiles(array, (LOWER_PERCENT, UPPER_PERCENT))
    box = foreground_box(array, low)
    cropped = array[tuple(slice(first, last) for first, last in box)]
    depth, height, width = cropped.shape
    ratio = min(size / height, size / width)
    shape = (min(depth, max_slices), int(height * ratio), int(width * ratio))
    if depth > max_slices:
        repairs.append(f"{depth} slices were resampled to {max_slices}")
    over_rows = corner_weights(height, shape[1]).to(device)
    over_columns = corner_weights(width, shape[2]).to(device)
    image = torch.empty(depth, shape[1], shape[2], device=device)
    scale = 1 / (high - low) if high > low else 1.0
    for first in range(0, depth, SLAB_SLICES):
        slab = torch.from_numpy(np.ascontiguousarray(cropped[first : first + SLAB_SLICES])).to(device).float()
        slab = slab.sub_(low).mul_(scale).clamp_(0, 1)
        image[first : first + SLAB_SLICES] = over_rows @ slab @ over_columns.T
    if depth > max_slices:
        over_slices = corner_weights(depth, max_slices).to(device)
        image = (over_slices @ image.flatten(1)).unflatten(1, image.shape[1:])
    to_source = np.eye(4)
    for axis, (source, count) in enumerate(zip(cropped.shape, shape, strict=True)):
        to_source[axis, axis] = (source - 1) / (count - 1) if count > 1 else 1.0
        to_source[axis, 3] = box[axis][0]
    return image, to_source, shape, repairs


def percentiles(array: NDArray[Any], percents: tuple[float, ...]) -> tuple[float, ...]:
    """Percentiles of all values with linear interpolation, exact; integers are counted slice by slice."""
    ranks = [percent / 100 * (array.size - 1) for percent in percents]
    wanted = sorted({int(np.floor(rank)) for rank in ranks} | {int(np.ceil(rank)) for rank in ranks})
    low, high = array.min(), array.max()
    if array.dtype.kind in "iu" and int(high) - int(low) < COUNTABLE_VALUES:
        counts = np.zeros(int(high) - int(low) + 1, dtype=np.int64)
        for part in array:
            counts += np.bincount((part.astype(np.int32) - int(low)).ravel(), minlength=counts.size)
        found = (np.searchsorted(counts.cumsum(), wanted, side="right") + int(low)).tolist()
    else:
        found = np.partition(array, wanted, axis=None)[wanted].tolist()
    value = dict(zip(wanted, map(float, found), strict=True))
    below, above = [int(np.floor(rank)) for rank in ranks], [int(np.ceil(rank)) for rank in ranks]
    return tuple(
        value[lower] + (rank - lower) * (value[upper] - value[lower])
        for rank, lower, upper in zip(ranks, below, above, strict=True)
    )


def foreground_box(array: NDArray[Any], threshold: float) -> list[tuple[int, int]]:
    """First and after-last index, per axis, of the voxels above the threshold; the whole axis when there are none."""
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
