"""Where a model input lies in the patient: orientation, crop and resampling as one invertible map.

Arrays are indexed (slice, row, column); affines map (slice, row, column, 1) to RAS millimetres.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mu2_model.errors import VolumeError

Matrix = NDArray[np.float64]

# Output axes (slice, row, column) point to superior, anterior, right: RAS read backwards, as arrays are.
RAS_AXIS_OF_OUTPUT = (2, 1, 0)
MIN_SPACING_MM, MAX_IN_PLANE_MM, MAX_SLICE_MM = 0.05, 10.0, 15.0
# Below this an affine maps a volume onto a plane.
MIN_DETERMINANT = 1e-6


@dataclass(frozen=True)
class VolumeGrid:
    """The model input's grid in the patient: index (slice, row, column) to array index and to RAS millimetres."""

    shape: tuple[int, int, int]  # voxels that hold image
    chunk_shape: tuple[int, int, int]  # voxels of a chunk, padding included
    source_shape: tuple[int, int, int]
    to_source: Matrix  # 4x4, model index to index in the array as given
    to_ras: Matrix | None  # 4x4, model index to RAS millimetres; None when no affine was given (published form)

    @property
    def spacing_mm(self) -> tuple[float, float, float] | None:
        """Distance of neighbouring voxels along (slice, row, column)."""
        if self.to_ras is None:
            return None
        lengths = np.linalg.norm(self.to_ras[:3, :3], axis=0)
        return float(lengths[0]), float(lengths[1]), float(lengths[2])

    def patch_centres(self, patch_size: tuple[int, int, int]) -> Matrix:
        """Model indices (chunks of the volume, patches, 3) of the centres of all patches, ordered (slice, row, column)."""
        chunks = math.ceil(self.shape[0] / self.chunk_shape[0])
        axes = [
            np.arange(size // patch) * patch + (patch - 1) / 2
            for size, patch in zip(self.chunk_shape, patch_size, strict=True)
        ]
        centres = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(1, -1, 3)
        shift = np.zeros((chunks, 1, 3))
        shift[:, 0, 0] = np.arange(chunks) * self.chunk_shape[0]
        return centres + shift

    def patch_centres_mm(self, patch_size: tuple[int, int, int]) -> Matrix:
        """RAS millimetres (chunks, patches, 3) of the centres of all patches; VolumeError without an affine."""
        if self.to_ras is None:
            raise VolumeError("the volume came without an affine, so nothing of it has a place in millimetres")
        return apply_affine(self.to_ras, self.patch_centres(patch_size))

    def ras_to_index(self, points_mm: Matrix) -> Matrix:
        """Model indices of points (..., 3) in RAS millimetres."""
        if self.to_ras is None:
            raise VolumeError("the volume came without an affine, so nothing of it has a place in millimetres")
        return apply_affine(np.linalg.inv(self.to_ras).astype(np.float64), points_mm)


def apply_affine(affine: Matrix, points: Matrix) -> Matrix:
    """Map points (..., 3) by a 4x4 affine."""
    return points @ affine[:3, :3].T + affine[:3, 3]


def check_affine(affine: object) -> Matrix:
    """The affine as a 4x4 float64 matrix.

    Raises VolumeError when it is absent, not finite, transposed, singular or of impossible spacing.
    """
    if affine is None:
        raise VolumeError(
            "no affine: without it there is no spacing and no left and right; pass the 4x4 matrix to RAS mm"
        )
    try:
        matrix = np.asarray(affine, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise VolumeError(f"an affine is a 4x4 matrix of numbers, not {type(affine).__name__}") from error
    if matrix.shape != (4, 4):
        raise VolumeError(f"the affine has shape {matrix.shape}, not (4, 4)")
    if not np.isfinite(matrix).all():
        raise VolumeError("the affine holds values that are not finite")
    if not np.array_equal(matrix[3], (0, 0, 0, 1)):
        raise VolumeError(f"the affine's last row is {matrix[3].tolist()}, not [0, 0, 0, 1]: is it transposed?")
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    if (spacing <= 0).any() or abs(np.linalg.det(matrix[:3, :3] / np.maximum(spacing, 1e-12))) < MIN_DETERMINANT:
        raise VolumeError("the affine is singular: two array axes point the same way or one has no length")
    if (spacing < MIN_SPACING_MM).any():
        raise VolumeError(f"voxel spacing {np.round(spacing, 4).tolist()} mm: below {MIN_SPACING_MM} mm, not a CT")
    return matrix


def closest_axes(affine: Matrix) -> tuple[tuple[int, int, int], tuple[bool, bool, bool], float]:
    """How to permute and flip array axes so that they point superior, anterior, right.

    Returns for every output axis the array axis it comes from and whether that is flipped, and the largest angle in degrees
    that remains between an array axis and its anatomical axis.
    """
    direction = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    rows = direction[list(RAS_AXIS_OF_OUTPUT)]
    order = max(itertools.permutations(range(3)), key=lambda p: sum(abs(rows[out, p[out]]) for out in range(3)))
    cosines = [float(rows[out, order[out]]) for out in range(3)]
    tilt = math.degrees(math.acos(min(1.0, min(abs(cosine) for cosine in cosines))))
    return (order[0], order[1], order[2]), (cosines[0] < 0, cosines[1] < 0, cosines[2] < 0), tilt


def orientation_affine(
    order: tuple[int, int, int], flip: tuple[bool, bool, bool], source_shape: tuple[int, int, int]
) -> Matrix:
    """4x4 map from indices of the permuted and flipped array to indices of the array as given."""
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for out, source in enumerate(order):
        matrix[source, out] = -1 if flip[out] else 1
        matrix[source, 3] = source_shape[source] - 1 if flip[out] else 0
    return matrix
