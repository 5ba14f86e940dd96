"""A small body that every test of drafting shares, as an array in Hounsfield units and an affine."""

import numpy as np
from numpy.typing import NDArray


def affine(slice_mm: float = 2.0, pixel_mm: float = 1.5) -> NDArray[np.float64]:
    """Axial slices from feet to head, rows to posterior, columns to left, as scanners store them."""
    matrix = np.zeros((4, 4))
    matrix[2, 0], matrix[1, 1], matrix[0, 2], matrix[3, 3] = slice_mm, -pixel_mm, -pixel_mm, 1
    matrix[:3, 3] = (70.0, 60.0, -40.0)
    return matrix


def body(shape: tuple[int, int, int] = (30, 80, 96)) -> NDArray[np.int16]:
    """Air, a soft block that fills part of the plane, and one dense spot off every centre."""
    hu = np.full(shape, -1000, np.int16)
    hu[:, shape[1] // 8 : -shape[1] // 4, shape[2] // 8 : -shape[2] // 8] = 40
    hu[20:24, 30:36, 60:66] = 900
    return hu
