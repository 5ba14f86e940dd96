"""What the scanner adds to the body: table, partial volume along the slice, noise with CT's spectrum, whole Hounsfield units."""

import numpy as np
from numpy.typing import NDArray

from training.phantoms.canvas import Grid
from training.phantoms.case import Case
from training.phantoms.shapes import Field

TABLE_RADIUS_MM, TABLE_THICKNESS_MM, TABLE_HALF_WIDTH_MM = 420.0, 24.0, 200.0
NOISE_STREAM = 1000
LOWEST_HU, HIGHEST_HU = -1024, 3071
"""The range of 12 stored bits with an intercept of -1024."""


def table_section(grid: Grid, top_mm: float) -> tuple[Field, Field]:
    """Share of each pixel (rows, columns) that is the table's shell and its foam; `top_mm` is the depth of its middle."""
    y = (grid.origin[1] + grid.pixel_mm * np.arange(grid.rows)).astype(np.float32)[:, None]
    x = (grid.origin[0] + grid.pixel_mm * np.arange(grid.columns)).astype(np.float32)[None, :]
    dy = y - np.float32(top_mm - TABLE_RADIUS_MM)
    under = np.sqrt(x * x + dy * dy) - np.float32(TABLE_RADIUS_MM)
    width = np.abs(x) - np.float32(TABLE_HALF_WIDTH_MM)
    plate = np.maximum(np.maximum(-under, under - np.float32(TABLE_THICKNESS_MM)), width)
    edge = np.float32(grid.pixel_mm)
    whole = np.clip(np.float32(0.5) - plate / edge, 0.0, 1.0)
    foam = np.clip(np.float32(0.5) - (plate + np.float32(2.5)) / edge, 0.0, 1.0)
    return whole - foam, foam


def add_table(hu: Field, case: Case) -> None:
    """Lay the table behind the body, in place; where body is, none is drawn."""
    _, sy, _ = case.habitus.build.scale
    low, high = case.scan.span
    backs = [b + y for z, _, b, _, y in case.body.trunk.profile if low - 40.0 <= z <= high + 40.0]
    shell, foam = table_section(case.scan.grid, (max(backs) + case.habitus.fat_mm + 6.0) * sy)
    air = np.clip(-(hu + np.float32(700.0)) / np.float32(300.0), 0.0, 1.0)
    behind = np.arange(hu.shape[1]) >= int(0.5 * hu.shape[1])
    air *= behind[None, :, None]
    hu += air * (shell * (np.float32(-250.0) - hu) + foam * (np.float32(-900.0) - hu))


def _box(values: NDArray[np.int32], reach: int) -> NDArray[np.int32]:
    """Sums over squares of 2 reach + 1 pixels, exact in integers; the result is 2 reach smaller each way."""
    size = 2 * reach + 1
    rows = np.cumsum(np.pad(values, ((1, 0), (0, 0))), axis=0, dtype=np.int32)
    summed = rows[size:] - rows[:-size]
    columns = np.cumsum(np.pad(summed, ((0, 0), (1, 0))), axis=1, dtype=np.int32)
    return columns[:, size:] - columns[:, :-size]


def noise_slice(seed: int, number: int, rows: int, columns: int, sharpness: float) -> Field:
    """Band-passed noise of standard deviation 1 for one slice: little at low frequencies, as filtered back-projection leaves it.

    Each slice has its own random numbers, so that any slice can be made alone.
    """
    rng = np.random.default_rng([seed, NOISE_STREAM, number])
    wide = 4
    white = rng.integers(-127, 128, size=(rows + 2 * wide, columns + 2 * wide), dtype=np.int16).astype(np.int32)
    center = white[wide:-wide, wide:-wide]
    fine = _box(white, 1)[wide - 1 : 1 - wide, wide - 1 : 1 - wide]
    broad = _box(white, wide)
    a, b, c = sharpness, (1.0 - 0.6 * sharpness) / 3.0, -0.5 / 9.0 / 3.0
    # Weights of the three overlapping squares give the variance of their sum.
    variance = (a + b + c) ** 2 + 8 * (b + c) ** 2 + 72 * c**2
    scale = 1.0 / (np.sqrt(variance) * np.sqrt((255.0**2 - 1.0) / 12.0))
    return np.asarray(
        np.float32(a * scale) * center + np.float32(b * scale) * fine + np.float32(c * scale) * broad, dtype=np.float32
    )


def add_noise(hu: Field, outside: NDArray[np.bool_], case: Case, first: int) -> None:
    """Add noise to slices that start at number `first`, in place: most in the middle of the body, half of it outside."""
    grid = case.scan.grid
    y = (np.arange(grid.rows, dtype=np.float32) / np.float32(grid.rows) - np.float32(0.5))[:, None]
    x = (np.arange(grid.columns, dtype=np.float32) / np.float32(grid.columns) - np.float32(0.5))[None, :]
    sigma = np.float32(case.scan.noise_hu) * np.maximum(np.float32(1.0) - np.float32(1.6) * (x * x + y * y), 0.3)
    for number in range(hu.shape[0]):
        noise = noise_slice(case.seed, first + number, grid.rows, grid.columns, case.scan.sharpness)
        noise *= np.where(outside[number], np.float32(0.5), np.float32(1.0))
        hu[number] += sigma * noise


def whole_units(hu: Field) -> NDArray[np.int16]:
    """Rounded Hounsfield units within the range that CT stores."""
    return np.clip(np.rint(hu), LOWEST_HU, HIGHEST_HU).astype(np.int16)
