"""How near a sentence's best slice is to the finding it tells of, on phantoms, whose label maps know; and what it costs a draft.

    python benchmarks/best_slice.py --data RUNS/held_out [--first 0] [--count 40] [--model DIR] [--plain] [--json OUT]

`--data` is a folder that `python -m training phantoms --format numpy` wrote. Every phantom is drafted as the worker does it.
A sentence counts when it says that a kind of finding is present, on a side where it names one, and the phantom has it there.
Its distance is along the patient, from the slice to the middle of the finding's voxels; a slice cuts a finding when it lies
between the finding's ends. Beside it stand two floors (the volume's middle slice, and the best slices of the same draft's
sentences about other kinds) and, without `--plain`, what was tried and left: attention heat, plain and less the mean of all
sentences; the gradient by the token before the refiner, twice as dear; blanking one slab of tokens after the other.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mu2_model import evidence  # noqa: E402
from mu2_model.draft import Draft  # noqa: E402
from mu2_model.drafter import ReportDrafter  # noqa: E402
from mu2_model.image_processing_mu2 import PreparedVolume, Volume  # noqa: E402
from mu2_model.shipped import shipped_checkpoint  # noqa: E402
from mu2_model.volume_grid import apply_affine  # noqa: E402
from training.data import MANIFEST, Case, read_manifests  # noqa: E402
from training.dense_labels import read_label_maps  # noqa: E402
from training.phantoms.labeler import read  # noqa: E402
from training.phantoms.vocabulary import FINDING_LABELS, Finding, Side  # noqa: E402
from training.volumes import read_volume  # noqa: E402

NEAR_MM = 30.0
BODY_HU = -300
OURS, MIDDLE, OTHERS = "best slice", "middle slice", "best slices of other sentences"


@dataclass
class Measured:
    """One sentence about a finding that is there: where each way shows it, in millimetres along the patient."""

    case: str
    kind: str
    truth: tuple[float, float, float]  # lowest, middle, highest voxel
    shown: dict[str, float] = field(default_factory=dict)


@dataclass
class Encoded:
    """A drafted volume as the ways that were left need it."""

    drafter: ReportDrafter
    prepared: PreparedVolume
    text: dict[str, Tensor]
    ids: Tensor
    ranges: list[tuple[int, int]]

    def slab_places(self, count: int) -> NDArray[np.float64]:
        """Millimetres along the patient of the middle of every slab of slices; NaN where a slab holds none."""
        grid = self.prepared.grid
        assert grid.to_ras is not None
        thick = len(self.prepared.chunk_mask) * grid.chunk_shape[0] / count
        starts = np.arange(count) * thick
        ends = np.minimum(starts + thick, grid.shape[0]) - 1
        index = np.stack([(starts + ends) / 2, np.zeros(count), np.zeros(count)], axis=1)
        return np.where(starts < grid.shape[0], apply_affine(grid.to_ras, index)[:, 2], np.nan)

    def places(self, score_RZ: Tensor) -> list[float]:
        """Where each sentence's largest score lies."""
        along = self.slab_places(score_RZ.shape[1])
        scores = np.where(np.isnan(along), -np.inf, score_RZ.numpy())
        return [float(place) for place in along[scores.argmax(axis=1)]]


def main() -> None:
    """Drafts, measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--plain", action="store_true", help="without the ways that were left")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cases = read_manifests([options.data / MANIFEST])[options.first : options.first + options.count]
    drafter = ReportDrafter.from_pretrained(options.model or shipped_checkpoint(), dtype=torch.float32)
    drafter.warm_up()
    measured: list[Measured] = []
    shares: list[float] = []
    for case in cases:
        volume = read_volume(case.image)
        (draft,) = drafter.draft([volume], [case.question], best_slices=True)
        spent = draft.stage_seconds
        shares.append(spent["slices"] / (sum(spent.values()) - spent["slices"]))
        measured += measure(drafter, case, volume, draft, options.plain)
    table = summarise(measured)
    print(f"{len(measured)} sentences about findings that are there, of {len(cases)} phantoms")
    for way, row in table.items():
        print(f"{way:42} " + "  ".join(f"{name} {value}" for name, value in row.items()))
    low, middle, high = np.quantile(shares, [0.25, 0.5, 0.75])
    print(
        f"time of a draft: +{100 * middle:.0f} % ({100 * low:.0f}-{100 * high:.0f}), {torch.get_num_threads()} threads"
    )
    if options.json:
        options.json.write_text(json.dumps({"table": table, "time_share": float(middle)}, indent=1))


def measure(drafter: ReportDrafter, case: Case, volume: Volume, draft: Draft, plain: bool) -> list[Measured]:
    """The sentences of a draft that tell of a finding which the phantom has."""
    array, affine = volume
    middle = float(apply_affine(affine, (np.array(array.shape) - 1) / 2)[2])
    ways = {} if plain else left_ways(drafter, case, volume, draft)
    found = []
    for number, (sentence, point) in enumerate(zip(draft.sentences, draft.best_slices or (), strict=True)):
        present = read(sentence.text).findings
        truth = extent(case.image, array, affine, present[0]) if present else None
        if truth is None or point is None:
            continue
        shown = {OURS: point[2], MIDDLE: middle} | {way: places[number] for way, places in ways.items()}
        found.append(Measured(case.case_id, present[0].kind.value, truth, shown))
    return found


def extent(image: str, array: NDArray[Any], affine: NDArray[np.float64], finding: Finding) -> tuple[float, ...] | None:
    """Lowest, middle and highest voxel of a kind of finding along the patient, on its side; None where there is none."""
    voxels = np.argwhere(read_label_maps(image).findings == FINDING_LABELS[finding.kind])
    places = apply_affine(affine, voxels.astype(np.float64))
    if finding.side is not Side.NONE and len(places):
        middle = apply_affine(affine, np.argwhere(array > BODY_HU).mean(axis=0))[0]
        left = places[:, 0] < middle
        places = places[left if finding.side is Side.LEFT else ~left]
    along = places[:, 2]
    return (float(along.min()), float(along.mean()), float(along.max())) if len(along) else None


def left_ways(drafter: ReportDrafter, case: Case, volume: Volume, draft: Draft) -> dict[str, list[float]]:
    """Where the ways that were tried and left show every sentence."""
    text = dict(drafter.processor.encode_text([drafter.processor.build_prompt(case.question)], [case.question]).items())
    ranges = [sentence.token_range for sentence in draft.sentences]
    prepared = drafter.processor.image_processor.prepare(*volume)
    encoded = Encoded(drafter, prepared, text, torch.tensor(draft.token_ids), ranges)
    with torch.no_grad():
        tokens = drafter.model.model.encode_chunks(prepared.pixel_values[None], prepared.chunk_mask[None])[0]
        heat_RZ = attention(encoded)
        blanked_RZ = blanked(encoded, tokens)
    return {
        "attention": encoded.places(heat_RZ),
        "attention less the mean of all sentences": encoded.places(heat_RZ - heat_RZ.mean(dim=0)),
        "gradient before the refiner": encoded.places(unrefined(encoded, tokens)),
        "one slab of tokens blanked": encoded.places(blanked_RZ),
    }


def unrefined(encoded: Encoded, tokens_CNH: Tensor) -> Tensor:
    """Largest gradient (R, slabs of tokens) of each sentence by a token of the projector."""
    model, mask = encoded.drafter.model, encoded.prepared.chunk_mask
    tokens_BCNH = tokens_CNH[None].clone().requires_grad_()
    features = model.model.gather_tokens(
        tokens_BCNH, encoded.text["question_ids"], encoded.text["question_attention_mask"], mask[None]
    )
    found = evidence.token_log_probabilities(model, features, encoded.text, encoded.ids)
    norms = [
        torch.autograd.grad(found[first:last].sum(), tokens_BCNH, retain_graph=True)[0][0].norm(dim=-1)
        for first, last in encoded.ranges
    ]
    deep = model.config.projector_grid[0] // model.config.tokenizer.projector_pooling_size
    return torch.stack(norms).unflatten(2, (deep, -1)).amax(dim=-1).flatten(1)


def attention(encoded: Encoded) -> Tensor:
    """Heat (R, slabs of patches) of `mu2_model.evidence`."""
    model, prepared = encoded.drafter.model, encoded.prepared
    pixels, mask = prepared.pixel_values[None], prepared.chunk_mask[None]
    maps = evidence._encode(model, pixels, mask, encoded.text, output_maps=True)
    looked_TQ = evidence._attention_to_image(model, maps, encoded.text, encoded.ids)
    heat_RQ = torch.stack([looked_TQ[first:last].mean(dim=0) for first, last in encoded.ranges])
    heat = heat_RQ @ evidence._query_to_patches(model, maps)
    _, height, width = model.config.vision.patch_grid
    return heat.unflatten(1, (-1, height * width)).sum(dim=2)


def blanked(encoded: Encoded, tokens_CNH: Tensor) -> Tensor:
    """Drop of log-probability (R, slabs of tokens) when a slab is filled with the mean of the others at each place."""
    model, mask = encoded.drafter.model, encoded.prepared.chunk_mask
    deep = model.config.projector_grid[0] // model.config.tokenizer.projector_pooling_size
    slabs_ZPH = tokens_CNH.unflatten(1, (deep, -1)).flatten(0, 1)

    def said(slabs: Tensor) -> Tensor:
        tokens = slabs.unflatten(0, (-1, deep)).flatten(1, 2)
        features = model.model.gather_tokens(
            tokens[None], encoded.text["question_ids"], encoded.text["question_attention_mask"], mask[None]
        )
        found = evidence.token_log_probabilities(model, features, encoded.text, encoded.ids)
        return torch.stack([found[first:last].sum() for first, last in encoded.ranges])

    before = said(slabs_ZPH)
    drops = []
    for slab in range(len(slabs_ZPH)):
        changed = slabs_ZPH.clone()
        changed[slab] = slabs_ZPH.mean(dim=0)
        drops.append(before - said(changed))
    return torch.stack(drops, dim=1)


def summarise(measured: list[Measured]) -> dict[str, dict[str, float]]:
    """Median and mean distance, share within NEAR_MM and share of slices that cut the finding, of every way."""
    pairs: dict[str, list[tuple[float, tuple[float, float, float]]]] = {}
    for one in measured:
        for way, place in one.shown.items():
            pairs.setdefault(way, []).append((place, one.truth))
        others = [two for two in measured if two.case == one.case and two.kind != one.kind]
        pairs.setdefault(OTHERS, []).extend((two.shown[OURS], one.truth) for two in others)
    table = {}
    for way, shown in pairs.items():
        places, truths = np.array([place for place, _ in shown]), np.array([truth for _, truth in shown])
        distance = np.abs(places - truths[:, 1])
        cuts = (places >= truths[:, 0] - 1e-6) & (places <= truths[:, 2] + 1e-6)
        table[way] = {
            "median mm": round(float(np.median(distance)), 1),
            "mean mm": round(float(distance.mean()), 1),
            f"within {NEAR_MM:.0f} mm": round(float((distance <= NEAR_MM).mean()), 2),
            "cuts it": round(float(cuts.mean()), 2),
        }
    return table


if __name__ == "__main__":
    main()
