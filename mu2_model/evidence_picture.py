"""A picture of a sentence's evidence: the slices with the most heat, windowed for soft tissue, with the heat over them.

Slices are shown as radiologists read them: the patient's right on the left, front at the top.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mu2_model.evidence import SentenceEvidence
from mu2_model.image_processing_mu2 import PreparedVolume

HEAT_COLOUR = np.array([255.0, 120.0, 0.0])
STRONGEST_OVERLAY = 0.6
PANEL_PIXELS = 384
LINE_PIXELS = 20
MARGIN_PIXELS = 6
SOFT_TISSUE_CHANNEL = 1


def draw_evidence(
    path: Path | str, prepared: PreparedVolume, evidence: SentenceEvidence, sentence: str, slices: int = 3
) -> None:
    """Write a PNG with the `slices` hottest rows of patches, each by its middle slice, and the whole sentence under them."""
    channel = min(SOFT_TISSUE_CHANNEL, prepared.pixel_values.shape[1] - 1)
    volume = prepared.pixel_values[:, channel].flatten(0, 1).float().cpu().numpy()
    thickness = volume.shape[0] // evidence.heat.shape[0]
    order = np.argsort(evidence.heat.sum(axis=(1, 2)))[::-1][:slices]
    strongest = float(evidence.heat.max()) or 1.0
    panels = []
    for row in sorted(int(index) for index in order):
        index = min(row * thickness + thickness // 2, prepared.grid.shape[0] - 1)
        panels.append((_panel(volume[index], evidence.heat[row] / strongest, prepared), _place(prepared, index)))
    height = max(panel.height for panel, _ in panels)
    width = PANEL_PIXELS * len(panels)
    font = ImageFont.load_default(size=14)
    lines = [
        line
        for text in (sentence, _figure(evidence), _side(prepared))
        for line in wrap(text, width - 2 * MARGIN_PIXELS, font.getlength)
    ]
    canvas = Image.new("RGB", (width, height + len(lines) * LINE_PIXELS), "black")
    draw = ImageDraw.Draw(canvas)
    for position, (panel, place) in enumerate(panels):
        canvas.paste(panel, (position * PANEL_PIXELS, 0))
        draw.text((position * PANEL_PIXELS + MARGIN_PIXELS, 4), place, fill="white", font=font)
    for row, line in enumerate(lines):
        draw.text((MARGIN_PIXELS, height + row * LINE_PIXELS + 2), line, fill="white", font=font)
    canvas.save(path, format="PNG")


def _figure(evidence: SentenceEvidence) -> str:
    support = "" if evidence.supported else " (weakly supported by the image)"
    figure = f"drop {evidence.drop:+.3f}, at random up to {evidence.control_drop:+.3f} nats per token"
    return f"where the model looked: {figure}{support}"


def _side(prepared: PreparedVolume) -> str:
    known = prepared.grid.to_ras is not None
    return "R is on the left of every slice" if known else "no affine: left and right are unknown"


def wrap(text: str, width: float, length: Callable[[str], float]) -> list[str]:
    """The text in lines of at most `width` by `length`; a word that is longer stands alone.

    >>> wrap("No acute findings.", 10, len)
    ['No acute', 'findings.']
    """
    lines: list[str] = []
    for word in text.split():
        if lines and length(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _panel(plane: NDArray[np.float32], heat: NDArray[np.float32], prepared: PreparedVolume) -> Image.Image:
    enlarged = Image.fromarray(heat.astype(np.float32)).resize(
        (plane.shape[1], plane.shape[0]), Image.Resampling.BILINEAR
    )
    share = np.clip(np.asarray(enlarged), 0, 1)[..., None] * STRONGEST_OVERLAY
    colour = (1 - share) * (plane[..., None] * 255.0) + share * HEAT_COLOUR
    rows, columns = prepared.grid.shape[1:]
    colour = colour[:rows, :columns]
    if prepared.grid.to_ras is not None:
        # Rows run to the front and columns to the patient's right.
        colour = colour[::-1, ::-1]
    panel = Image.fromarray(np.ascontiguousarray(colour).astype(np.uint8))
    panel.thumbnail((PANEL_PIXELS, PANEL_PIXELS))
    scale = PANEL_PIXELS / max(panel.size)
    return panel.resize((round(panel.width * scale), round(panel.height * scale)), Image.Resampling.BICUBIC)


def _place(prepared: PreparedVolume, index: int) -> str:
    if prepared.grid.to_ras is None:
        return f"slice {index}"
    return f"slice {index}, z = {float((prepared.grid.to_ras @ [index, 0, 0, 1])[2]):.0f} mm"
