"""A picture of a sentence's evidence: the slices with the most heat, windowed for soft tissue, with the heat over them.

Slices are shown as radiologists read them: the patient's right on the left, front at the top.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mu2_model.evidence import SentenceEvidence
from mu2_model.image_processing_mu2 import PreparedVolume

HEAT_COLOUR = np.array([255.0, 120.0, 0.0])
STRONGEST_OVERLAY = 0.6
CAPTION_LINES = 3
PANEL_PIXELS = 384
CAPTION_PIXELS = 20
SOFT_TISSUE_CHANNEL = 1


def draw_evidence(
    path: Path | str, prepared: PreparedVolume, evidence: SentenceEvidence, sentence: str, slices: int = 3
) -> None:
    """Write a PNG with the `slices` hottest rows of patches, each by its middle slice, and the sentence under them."""
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
    canvas = Image.new("RGB", (PANEL_PIXELS * len(panels), height + CAPTION_LINES * CAPTION_PIXELS), "black")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=14)
    for position, (panel, place) in enumerate(panels):
        canvas.paste(panel, (position * PANEL_PIXELS, 0))
        draw.text((position * PANEL_PIXELS + 6, 4), place, fill="white", font=font)
    support = "" if evidence.supported else "  (weakly supported by the image)"
    figure = f"drop {evidence.drop:+.3f}, at random {evidence.control_drop:+.3f} nats per token{support}"
    for line, words in enumerate((sentence, "where the model looked: " + figure, "R is on the left of every slice")):
        if line == 2 and prepared.grid.to_ras is None:
            words = "no affine: left and right are unknown"
        draw.text((6, height + line * CAPTION_PIXELS + 2), words, fill="white", font=font)
    canvas.save(path, format="PNG")


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
