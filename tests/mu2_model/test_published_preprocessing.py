"""The published preprocessing against a plain float64 computation with the same steps."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mu2_model.errors import VolumeError
from mu2_model.image_processing_mu2 import Mu2ImageProcessor
from mu2_model.published_preprocessing import percentiles
from tests.mu2_model.small_volumes import affine, body


def plain(array: NDArray, size: int, longest: int) -> NDArray[np.float64]:
    """Percentiles, crop, Gaussian anti-aliasing and corner-aligned linear resize, axis by axis, in float64."""
    data = array.astype(np.float64)
    low, high = np.percentile(data, 0.5), np.percentile(data, 99.5)
    data = np.clip((data - low) / (high - low), 0, 1)
    inside = np.argwhere(data > 0)
    first, last = inside.min(axis=0), inside.max(axis=0) + 1
    data = data[first[0] : last[0], first[1] : last[1], first[2] : last[2]]
    ratio = min(size / data.shape[1], size / data.shape[2])
    target = [min(data.shape[0], longest), int(data.shape[1] * ratio), int(data.shape[2] * ratio)]
    for axis, count in enumerate(target):
        data = np.moveaxis(resize_line(np.moveaxis(data, axis, 0), count), 0, axis)
    out = np.zeros((longest, size, size))
    out[: data.shape[0], : data.shape[1], : data.shape[2]] = data
    return out


def resize_line(data: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    from math import erf

    source = data.shape[0]
    sigma = max(0.0, (source / count - 1) / 2)
    if sigma:
        reach = int(max(4 * sigma, 0.5) + 0.5)
        blurred = np.zeros_like(data)
        for index in range(source):
            for other in range(max(0, index - reach), min(source, index + reach + 1)):
                edge = [(other - index + half) / (sigma * 2**0.5) for half in (0.5, -0.5)]
                blurred[index] += 0.5 * (erf(edge[0]) - erf(edge[1])) * data[other]
        data = blurred
    out = np.empty((count, *data.shape[1:]))
    for index in range(count):
        position = index * (source - 1) / (count - 1)
        below = min(int(position), source - 2) if source > 1 else 0
        share = position - below
        out[index] = (1 - share) * data[below] + share * data[min(below + 1, source - 1)]
    return out


@pytest.mark.parametrize("shape", [(20, 60, 48), (70, 50, 60), (12, 24, 20)])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_the_result_is_that_of_the_plain_computation(shape: tuple[int, int, int], dtype: type) -> None:
    generator = np.random.default_rng(0)
    array = (generator.normal(0, 400, shape) - 300).astype(dtype)
    array[:2], array[:, :5], array[:, :, -4:] = -3000, -3000, -3000
    image = Mu2ImageProcessor(size=32, chunk_slices=8, max_slices=64, form="published")
    pixels = image.prepare(array, None).pixel_values
    assert pixels.shape == (8, 1, 8, 32, 32)
    assert np.abs(pixels.numpy().reshape(64, 32, 32) - plain(array, 32, 64)).max() < 1e-5


def test_percentiles_of_integers_and_floats_are_exact() -> None:
    values = np.random.default_rng(1).integers(-2000, 3000, (7, 30, 31)).astype(np.int16)
    expected = [np.percentile(values.astype(np.float64), percent) for percent in (0.5, 50, 99.5)]
    assert np.allclose(percentiles(values, (0.5, 50, 99.5)), expected)
    assert np.allclose(percentiles(values.astype(np.float32), (0.5, 50, 99.5)), expected)


@pytest.mark.parametrize("percent", [0.5, 50.0, 99.5])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_percentiles_are_exact_whatever_the_sample_says(percent: float, dtype: type) -> None:
    generator = np.random.default_rng(2)
    plateau = np.full((12, 40, 40), -1024, dtype)
    plateau[:, 10:30, 10:30] = generator.normal(40, 300, (12, 20, 20))
    # Every sampled place lies: the sample says nothing about the rest.
    misleading = generator.normal(0, 100, (12, 40, 40)).astype(dtype)
    misleading[::3, ::7, ::7] = 5000
    for array in (plateau, misleading, np.full((12, 40, 40), 7, dtype)):
        assert percentiles(array, (percent,))[0] == pytest.approx(np.percentile(array.astype(np.float64), percent))


@pytest.mark.parametrize("thin", [1, 2])
def test_a_foreground_of_one_line_is_prepared(thin: int) -> None:
    array = np.zeros((64, 64, 64), np.int16)
    array[:, :, :thin] = 100
    image = Mu2ImageProcessor(size=16, chunk_slices=8, max_slices=64, form="published")
    pixels = image.prepare(array, None).pixel_values
    assert torch.isfinite(pixels).all() and 0.5 < float(pixels.max()) <= 1


def test_values_that_are_not_finite_become_the_lowest_one_and_are_said() -> None:
    array = np.random.default_rng(3).normal(0, 100, (16, 20, 20)).astype(np.float32)
    lowest = array.copy()
    array[3, 4, 5], array[3, 4, 6] = np.nan, np.inf
    lowest[3, 4, 5:7] = np.delete(array.ravel(), [3 * 400 + 85, 3 * 400 + 86]).min()
    image = Mu2ImageProcessor(size=16, chunk_slices=8, max_slices=16, form="published")
    prepared = image.prepare(array, None)
    assert "values that are not finite or beyond 1e+37 were set to the lowest value" in prepared.repairs
    assert torch.allclose(prepared.pixel_values, image.prepare(lowest, None).pixel_values)
    with pytest.raises(VolumeError, match="no value of the array is finite"):
        image.prepare(np.full((16, 20, 20), np.nan, np.float32), None)


@pytest.mark.parametrize("huge", [1e300, 3e38])
def test_values_too_large_for_the_computation_are_replaced_and_said(huge: float) -> None:
    array = np.random.default_rng(3).normal(0, 100, (16, 20, 20))
    array[:, :2], array[:, 2:4] = huge, -huge
    image = Mu2ImageProcessor(size=16, chunk_slices=8, max_slices=16, form="published")
    for dtype in (np.float64, np.float32) if huge < 1e39 else (np.float64,):
        prepared = image.prepare(array.astype(dtype), None)
        assert torch.isfinite(prepared.pixel_values).all() and float(prepared.pixel_values.std()) > 0.1
        assert any("beyond 1e+37" in repair for repair in prepared.repairs)


def test_a_place_in_the_published_input_is_mapped_back_to_the_array() -> None:
    array = np.full((16, 64, 64), -1000, np.int16)
    array[2:14, 10:58, 8:56] = 0
    array[6:9, 30:42, 36:48] = 3000
    image = Mu2ImageProcessor(size=32, chunk_slices=8, max_slices=16, form="published")
    prepared = image.prepare(array, None)
    flat = prepared.pixel_values.flatten(0, 2)
    index = torch.nonzero(flat == flat.max()).double().mean(dim=0).numpy()
    source = prepared.grid.to_source[:3, :3] @ index + prepared.grid.to_source[:3, 3]
    assert np.abs(source - [7, 35.5, 41.5]).max() < 1


@pytest.mark.parametrize("value", [0.0, 7.0, 1e20])
def test_a_constant_array_is_refused(value: float) -> None:
    image = Mu2ImageProcessor(size=16, chunk_slices=8, max_slices=8, form="published")
    with pytest.raises(VolumeError, match="there is no image in it"):
        image.prepare(np.full((8, 16, 16), value), None)


def test_what_the_published_form_does_not_correct_is_said() -> None:
    image = Mu2ImageProcessor(size=16, chunk_slices=8, max_slices=32, form="published")
    photo = np.random.default_rng(0).integers(0, 256, (30, 40, 40)).astype(np.uint8)
    assert image.prepare(body(), affine()).repairs == ()
    assert image.prepare(body(), None).repairs == ("no affine: left, right and size are unknown",)
    (thick,) = image.prepare(body(), affine(slice_mm=50)).repairs
    assert thick.startswith("slices 50.0 mm apart") and "the published form does not correct spacing" in thick
    (coarse,) = image.prepare(body(), affine(pixel_mm=12)).repairs
    assert coarse.startswith("pixels of 12.0 mm")
    for array in (photo, body() + 2000, np.minimum(body(), -600)):
        (doubt,) = image.prepare(array, affine()).repairs
        assert doubt.startswith("the values are not Hounsfield units")


def test_a_ct_whose_air_lies_between_the_sampled_voxels_is_one() -> None:
    image = Mu2ImageProcessor(size=16, chunk_slices=8, max_slices=32, form="published")
    array = np.full((8, 40, 40), 40, np.int16)
    array[1::4] = -1000
    assert image.prepare(array, affine()).repairs == ()


def test_far_too_many_slices_are_resampled_as_by_the_plain_computation() -> None:
    array = np.random.default_rng(4).integers(-1000, 1000, (500, 24, 20)).astype(np.int16)
    image = Mu2ImageProcessor(size=16, chunk_slices=8, max_slices=32, form="published")
    prepared = image.prepare(array, None)
    assert "500 slices were resampled to 32" in prepared.repairs
    assert np.abs(prepared.pixel_values.numpy().reshape(32, 16, 16) - plain(array, 16, 32)).max() < 1e-5
