"""A picture of a volume to look at: three planes through its middle, with window and orientation letters."""

import tempfile
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from worker.core.errors import StoreUnavailableError
from worker.imaging.volume import Volume


@dataclass(frozen=True)
class Window:
    """Display window in Hounsfield units."""

    level: float
    width: float


SOFT_TISSUE = Window(40, 400)
BRAIN = Window(40, 80)

_PANEL_PIXELS = 380
_MARGIN_PIXELS = 22
_GREY, _PALE = 24, 200
_PLANES: tuple[tuple[str, int, tuple[str, str, str, str]], ...] = (
    ("axial", 0, ("A", "P", "R", "L")),
    ("coronal", 1, ("S", "I", "R", "L")),
    ("sagittal", 2, ("S", "I", "A", "P")),
)
"""Name, the axis it cuts (of inferior, posterior, left), and letters at top, bottom, left and right."""


def draw(volume: Volume, window: Window | None = None) -> Image.Image:
    """Three planes through the middle of a volume, in the radiologist's convention: patient's right on the viewer's left.

    All planes share one scale, so that a wrong spacing shows. The window is brain for a head alone, else soft tissue.
    """
    window = window or (BRAIN if volume.regions == ("head",) else SOFT_TISSUE)
    array, spacing = towards_inferior_posterior_left(volume)
    extents = np.array(array.shape) * spacing
    scale = _PANEL_PIXELS / float(extents.max())
    panels = []
    for name, axis, letters in _PLANES:
        plane = array[(slice(None),) * axis + (array.shape[axis] // 2,)]
        height_mm, width_mm = np.delete(extents, axis)
        size = (max(1, round(width_mm * scale)), max(1, round(height_mm * scale)))
        picture = Image.fromarray(_grey(plane, window)).resize(size, Image.Resampling.BILINEAR)
        panels.append(_frame(picture, name, letters))
    height = max(panel.height for panel in panels) + _MARGIN_PIXELS
    sheet = Image.new("L", (sum(panel.width for panel in panels), height), _GREY)
    left = 0
    for panel in panels:
        sheet.paste(panel, (left, (height - _MARGIN_PIXELS - panel.height) // 2))
        left += panel.width
    note = (
        f"window {window.level:g}/{window.width:g} HU   "
        f"{' x '.join(map(str, volume.hu.shape))}   {' x '.join(f'{mm:.2f}' for mm in volume.spacing_mm)} mm"
    )
    ImageDraw.Draw(sheet).text((8, height - _MARGIN_PIXELS + 4), note, fill=_PALE, font=_font(12))
    return sheet


def write(volume: Volume, path: Path | str, window: Window | None = None) -> None:
    """Write `draw`'s picture as PNG, whole or not at all; it holds no text about the patient.

    Raises StoreUnavailableError when the file cannot be written.
    """
    path = Path(path)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".preview-") as folder:
            unfinished = Path(folder) / "preview.png"
            draw(volume, window).save(unfinished, format="PNG", compress_level=3)
            unfinished.replace(path)
    except OSError as error:
        raise StoreUnavailableError.of("the preview cannot be written", error) from error


def towards_inferior_posterior_left(volume: Volume) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """A view of the voxels whose axes grow to the patient's inferior, posterior and left, and their spacing in mm.

    An oblique volume is turned by quarter turns only, to the nearest axes.
    """
    directions = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    order = max(
        permutations(range(3)), key=lambda axes: sum(abs(directions[2 - i, axis]) for i, axis in enumerate(axes))
    )
    array = volume.hu.transpose(order)
    for place, axis in enumerate(order):
        if directions[2 - place, axis] > 0:
            array = np.flip(array, axis=place)
    return array, np.array(volume.spacing_mm)[list(order)]


def _grey(plane: NDArray[np.float32], window: Window) -> NDArray[np.uint8]:
    low = window.level - window.width / 2
    grey: NDArray[np.uint8] = np.clip((plane - low) * (255.0 / window.width), 0, 255).astype(np.uint8)
    return grey


def _frame(picture: Image.Image, name: str, letters: tuple[str, str, str, str]) -> Image.Image:
    margin = _MARGIN_PIXELS
    panel = Image.new("L", (picture.width + 2 * margin, picture.height + 2 * margin), _GREY)
    panel.paste(picture, (margin, margin))
    pen = ImageDraw.Draw(panel)
    top, bottom, left, right = letters
    centre, middle = panel.width / 2, panel.height / 2
    for letter, at in (
        (top, (centre, margin / 2)),
        (bottom, (centre, panel.height - margin / 2)),
        (left, (margin / 2, middle)),
        (right, (panel.width - margin / 2, middle)),
    ):
        pen.text(at, letter, fill=255, font=_font(15), anchor="mm")
    pen.text((margin, margin / 2), name, fill=_PALE, font=_font(12), anchor="lm")
    return panel


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
