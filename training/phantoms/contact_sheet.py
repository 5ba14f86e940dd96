"""Draws phantoms to look at: three planes through each finding, soft-tissue and lung window, findings outlined."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from training.phantoms.phantom import Phantom
from training.phantoms.vocabulary import FINDING_LABELS, Finding

SOFT_WINDOW = (40.0, 400.0)
LUNG_WINDOW = (-600.0, 1500.0)
"""(center, width) in HU."""
PANEL_PIXELS = 216
CAPTION_PIXELS = 16
OUTLINE = (255, 170, 40)


def windowed(hu: NDArray[np.int16], window: tuple[float, float]) -> NDArray[np.uint8]:
    """Grey values of a slice in a window (center, width)."""
    center, width = window
    return np.clip((hu - (center - 0.5 * width)) * (255.0 / width), 0, 255).astype(np.uint8)


def outlined(grey: NDArray[np.uint8], marked: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Red, green, blue with the rim of the marked pixels drawn just outside of them."""
    padded = np.pad(marked, 1)
    grown = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    picture = np.repeat(grey[:, :, None], 3, axis=2)
    picture[grown & ~marked] = OUTLINE
    return picture


def middle_of(phantom: Phantom, finding: Finding | None) -> tuple[int, int, int]:
    """The labelled voxel nearest the middle of a finding's label, or the middle of the volume without one."""
    shape = phantom.hu.shape
    if finding is not None:
        voxels = np.argwhere(phantom.labels.findings == FINDING_LABELS[finding.kind])
        if finding.side:
            # Columns grow towards the patient's left.
            x = phantom.case.scan.grid.origin[0] + phantom.case.scan.grid.pixel_mm * voxels[:, 2]
            voxels = voxels[(x > 0.0) == (finding.side == "left")]
        if len(voxels):
            nearest = np.argmin(((voxels - np.median(voxels, axis=0)) ** 2).sum(axis=1))
            k, j, i = (int(value) for value in voxels[nearest])
            return k, j, i
    return shape[0] // 2, shape[1] // 2, shape[2] // 2


def _panel(
    phantom: Phantom, plane: int, at: tuple[int, int, int], window: tuple[float, float], *, mark: bool
) -> Image.Image:
    grid = phantom.case.scan.grid
    take = [slice(None)] * 3
    index: list[slice | int] = list(take)
    index[plane] = at[plane]
    hu, marked = phantom.hu[tuple(index)], phantom.labels.findings[tuple(index)] > 0
    if plane != 0:
        hu, marked = hu[::-1], marked[::-1]
    height = hu.shape[0] * (grid.slice_mm if plane != 0 else grid.pixel_mm)
    width = hu.shape[1] * grid.pixel_mm
    scale = PANEL_PIXELS / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    grey = np.asarray(Image.fromarray(windowed(hu, window)).resize(size, Image.Resampling.BILINEAR))
    shown = np.asarray(Image.fromarray(marked.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)) > 0
    panel = Image.new("RGB", (PANEL_PIXELS, PANEL_PIXELS))
    drawn = outlined(grey, shown) if mark else np.repeat(grey[:, :, None], 3, axis=2)
    panel.paste(Image.fromarray(drawn), ((PANEL_PIXELS - size[0]) // 2, (PANEL_PIXELS - size[1]) // 2))
    return panel


def caption(finding: Finding | None) -> str:
    """One line that names a finding."""
    if finding is None:
        return "normal"
    size = f"{finding.size_mm} mm" if finding.size_mm is not None else finding.degree
    words = (finding.density, finding.side.value, finding.kind.value.replace("_", " "), finding.place, size)
    return " ".join(word for word in words if word)


def draw_row(phantom: Phantom, *, at_most: int = 3) -> Image.Image:
    """One phantom: for each of its first findings a soft-tissue and a lung row of axial, coronal and sagittal panels."""
    shown: list[Finding | None] = list(phantom.findings[:at_most]) or [None]
    width = 6 * PANEL_PIXELS
    picture = Image.new("RGB", (width, len(shown) * (PANEL_PIXELS + CAPTION_PIXELS)))
    pen = ImageDraw.Draw(picture)
    scan = phantom.case.scan
    for row, finding in enumerate(shown):
        top = row * (PANEL_PIXELS + CAPTION_PIXELS)
        head = f"seed {phantom.case.seed}  {scan.crop}  {scan.phase.value}  noise {scan.noise_hu:.0f} HU"
        pen.text((4, top + 2), f"{head}  |  {caption(finding)}", fill=(230, 230, 230))
        at = middle_of(phantom, finding)
        for plane in range(3):
            for column, window in enumerate((SOFT_WINDOW, LUNG_WINDOW)):
                # Outlined in the lung window only, so that the soft-tissue panels show the bare image.
                panel = _panel(phantom, plane, at, window, mark=column == 1)
                picture.paste(panel, ((2 * plane + column) * PANEL_PIXELS, top + CAPTION_PIXELS))
    return picture


def write_sheet(phantoms: list[Phantom], path: Path, *, at_most: int = 3) -> None:
    """Write a picture with one row a phantom and finding.

    Raises ValueError without a phantom.
    """
    if not phantoms:
        raise ValueError("a contact sheet needs at least one phantom")
    rows = [draw_row(phantom, at_most=at_most) for phantom in phantoms]
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)))
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
