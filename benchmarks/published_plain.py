"""The published preprocessing as a plain computation, and by the library that the published code calls."""

import numpy as np
import torch
import torch.nn.functional as F


def plain_preprocessing(array: np.ndarray) -> torch.Tensor:
    """The published steps one after the other in float64, in the published order of axes (row, column, slice).

    Two percentiles, scale, clip, crop, a blur along every axis (that of an axis which keeps its length has one tap),
    corner-aligned resize, pad.
    """
    data = torch.tensor(np.asarray(array, dtype=np.float64))
    low, high = np.percentile(data.numpy(), 0.5), np.percentile(data.numpy(), 99.5)
    data = ((data - low) / (high - low)).clamp(0, 1)
    inside = data > 0
    for axis in range(3):
        hit = inside.any(dim=(axis + 1) % 3, keepdim=True).any(dim=(axis + 2) % 3, keepdim=True).flatten().nonzero()
        data = data.narrow(axis, int(hit[0]), int(hit[-1] - hit[0]) + 1)
    data = data.permute(1, 2, 0)
    ratio = min(256 / data.shape[0], 256 / data.shape[1])
    target = [int(data.shape[0] * ratio), int(data.shape[1] * ratio), min(data.shape[2], 256)]
    data = data[None, None]
    for axis, count in enumerate(target):
        sigma = max(0.0, (data.shape[2 + axis] / count - 1) / 2)
        reach = int(max(4 * sigma, 0.5) + 0.5)
        offset = torch.arange(-reach, reach + 1, dtype=torch.float64)
        scale = 1 / (max(sigma, 1e-9) * 2**0.5)
        kernel = 0.5 * (torch.erf(scale * (offset + 0.5)) - torch.erf(scale * (offset - 0.5)))
        shape, padding = [1, 1, 1, 1, 1], [0, 0, 0]
        shape[2 + axis], padding[axis] = len(kernel), reach
        data = F.conv3d(data, kernel.view(shape), padding=padding)
    data = F.interpolate(data, target, mode="trilinear", align_corners=True)[0, 0]
    height, width, depth = data.shape
    data = F.pad(data, (0, 256 - depth, 0, 256 - width, 0, 256 - height))
    return data.permute(2, 0, 1).reshape(8, 32, 256, 256)


def monai_preprocessing(data: np.ndarray) -> torch.Tensor:
    """The same steps by the library that the published code calls, which blurs in float32."""
    from monai.transforms import CropForeground, ScaleIntensityRangePercentiles
    from monai.transforms.spatial.functional import resize

    scale = ScaleIntensityRangePercentiles(lower=0.5, upper=99.5, b_min=0.0, b_max=1.0, clip=True)
    image = CropForeground()(scale(torch.tensor(data[None])))[0].permute(1, 2, 0)
    ratio = min(256 / image.shape[0], 256 / image.shape[1])
    target = [int(image.shape[0] * ratio), int(image.shape[1] * ratio), min(image.shape[2], 256)]
    how = {"mode": "trilinear", "align_corners": True, "anti_aliasing": True, "anti_aliasing_sigma": None}
    rest = {"dtype": None, "input_ndim": 3, "lazy": False, "transform_info": None}
    image = resize(image[None], target, **how, **rest)[0]
    image = F.pad(image, (0, 256 - image.shape[2], 0, 256 - image.shape[1], 0, 256 - image.shape[0]))
    return image.permute(2, 0, 1).reshape(8, 32, 256, 256)
