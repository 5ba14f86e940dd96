"""Figures of training: SFT and DPO samples a second beside the published way, phantoms a second, memory of attention.

    python benchmarks/training.py [--cases N] [--repeats N] [--threads N] [--json OUT]

The published way, written plainly: every sample loads its NIfTI file as float64, prepares and augments it inside `__getitem__`,
pads text and question to 1,024 tokens and goes through the model alone; a preference pair loads its volume twice. Both ways
train the same weights of the same model on the same PhantomCT-full volumes in one process, interleaved; the ratio and its range
over the repeats are shown, once with everything learning and once with a frozen tower, whose tokens ours stores. What ours
does once and not in every epoch is told apart. The plain way uses our fast preprocessing too, so it is not held back by its own.
"""

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
import torch.nn.functional as F

# Python looks first in this file's folder, where its own name hides the package `training`.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from mu2_model import Mu2ForConditionalGeneration, Mu2Processor  # noqa: E402
from training.collators import IGNORED, PreferenceCollator, SftCollator, VolumeSource, encode_row  # noqa: E402
from training.data import Case, read_manifest  # noqa: E402
from training.phantoms.generate import ImageFormat, Order, generate  # noqa: E402
from training.phantoms.phantom import make_phantom  # noqa: E402
from training.recipes import RECIPES, make_initial  # noqa: E402
from training.shared_encoding import freeze, share_encoding  # noqa: E402
from training.token_cache import TokenCache  # noqa: E402
from training.volumes import VolumeCache  # noqa: E402

PADDED_TOKENS = 1024
BATCH = 8
BETA = 0.1
RATE = 1e-4
ATTENTION_TOKENS, ATTENTION_CHUNKS, ATTENTION_HEADS, ATTENTION_WIDTH = 2048, 4, 12, 768
MATERIALISED, FUSED = "materialised", "fused"


def plain_sample(case: Case, processor: Mu2Processor, answer: str, rng: np.random.Generator) -> dict[str, Any]:
    """What the published `__getitem__` does: load, transform, augment, pad."""
    image: Any = nibabel.load(case.image)
    array = image.get_fdata()
    if rng.random() < 0.5:
        array = np.flip(array, axis=int(rng.integers(2)))
    affine = np.asarray(image.affine)[:, [2, 1, 0, 3]]
    prepared = processor.image_processor.prepare(np.ascontiguousarray(array.transpose(2, 1, 0)), affine)
    row = encode_row(processor, case.question, answer)
    filler = processor.tokenizer.pad_token_id
    ids = torch.full((1, PADDED_TOKENS), int(filler))
    labels = torch.full((1, PADDED_TOKENS), IGNORED)
    mask = torch.zeros(1, PADDED_TOKENS, dtype=torch.long)
    start, stop = len(row.prompt), len(row.prompt) + len(row.answer)
    ids[0, :stop] = torch.tensor(row.prompt + row.answer)
    labels[0, start:stop] = torch.tensor(row.answer)
    mask[0, :stop] = 1
    question = processor.tokenizer(case.question, add_special_tokens=False)["input_ids"]
    question_ids = torch.full((1, PADDED_TOKENS), int(filler))
    question_ids[0, : len(question)] = torch.tensor(question)
    question_mask = torch.zeros(1, PADDED_TOKENS, dtype=torch.long)
    question_mask[0, : len(question)] = 1
    return {
        "pixel_values": prepared.pixel_values[None],
        "chunk_mask": prepared.chunk_mask[None],
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "question_ids": question_ids,
        "question_attention_mask": question_mask,
    }


def log_probability(model: Mu2ForConditionalGeneration, inputs: dict[str, Any], mask: torch.Tensor) -> torch.Tensor:
    """Summed log-probability of the answers (B,)."""
    given = {key: value for key, value in inputs.items() if key not in ("labels", "completion_mask")}
    logits = torch.log_softmax(model(**given).logits[:, :-1].float(), dim=-1)
    chosen = logits.gather(2, inputs["input_ids"][:, 1:, None]).squeeze(2)
    return (chosen * mask[:, 1:]).sum(dim=1)


def dpo_loss(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """DPO of log-probabilities (2 n,), chosen first."""
    margin = (policy - reference).chunk(2)
    return -F.logsigmoid(BETA * (margin[0] - margin[1])).mean()


class Bench:
    """Both ways over the same cases; a way is a function that trains once over all of them."""

    def __init__(self, folder: Path, count: int):
        for _ in generate(Order(folder / "data", count, 941, full=True, image_format=ImageFormat.NIFTI), 1):
            pass
        self.cases = read_manifest(folder / "data")
        start = make_initial(RECIPES["phantom"], self.cases, folder / "init")
        self.processor = Mu2Processor.from_pretrained(start)
        self.models = [Mu2ForConditionalGeneration.from_pretrained(start, dtype="float32") for _ in range(4)]
        for shared in self.models[:2]:
            share_encoding(shared)
        volumes = VolumeCache(folder / "cache", self.processor.image_processor)
        self.source = VolumeSource(volumes)
        began = time.perf_counter()
        self.source.volumes.prepare(case.image for case in self.cases)
        self.preparation_seconds = time.perf_counter() - began
        tokens = TokenCache(folder / "tokens", volumes, self.models[0])
        began = time.perf_counter()
        tokens.fill([case.image for case in self.cases], self.models[0])
        self.encoding_seconds = time.perf_counter() - began
        self.stored = VolumeSource(volumes, tokens)
        self.other = self.cases[0].answer

    def freeze_towers(self) -> None:
        """From here on the tower of every model stays as it is."""
        for model in self.models:
            freeze(model, ("vision_tower",))
        self.source = self.stored

    def _step(self, model: Mu2ForConditionalGeneration, loss: torch.Tensor) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def rows(self, *names: str) -> list[dict[str, Any]]:
        """Rows for the collators."""
        texts = {"completion": lambda c: c.answer, "chosen": lambda c: c.answer, "rejected": lambda c: self.other}
        return [
            {"image": c.image, "question": c.question, **{name: texts[name](c) for name in names}} for c in self.cases
        ]

    def ours_sft(self) -> None:
        collate, rows = SftCollator(self.processor, self.source), self.rows("completion")
        for start in range(0, len(rows), BATCH):
            self._step(self.models[0], self.models[0](**collate(rows[start : start + BATCH])).loss)

    def plain_sft(self) -> None:
        rng = np.random.default_rng(0)
        for case in self.cases:
            self._step(self.models[2], self.models[2](**plain_sample(case, self.processor, case.answer, rng)).loss)

    def ours_dpo(self) -> None:
        policy, reference = self.models[:2]
        collate, rows = PreferenceCollator(self.processor, self.source), self.rows("chosen", "rejected")
        for start in range(0, len(rows), BATCH // 2):
            batch = collate(rows[start : start + BATCH // 2])
            with torch.no_grad():
                fixed = log_probability(reference, dict(batch), batch["completion_mask"])
            self._step(policy, dpo_loss(log_probability(policy, dict(batch), batch["completion_mask"]), fixed))

    def plain_dpo(self) -> None:
        policy, reference = self.models[2:]
        rng = np.random.default_rng(0)
        for case in self.cases:
            pair = [plain_sample(case, self.processor, answer, rng) for answer in (case.answer, self.other)]
            masks = [(sample["labels"] != IGNORED).long() for sample in pair]
            with torch.no_grad():
                fixed = torch.cat([log_probability(reference, s, m) for s, m in zip(pair, masks, strict=True)])
            sides = torch.cat([log_probability(policy, s, m) for s, m in zip(pair, masks, strict=True)])
            self._step(policy, dpo_loss(sides, fixed))


def seconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def compare(name: str, ours: Callable[[], None], plain: Callable[[], None], count: int, repeats: int) -> dict[str, Any]:
    """Samples a second of both ways, interleaved, and the ratio with its range."""
    pairs = [(seconds(ours), seconds(plain)) for _ in range(repeats)]
    ratios = [slow / fast for fast, slow in pairs]
    figures = {
        "name": name,
        "ours_per_second": count / statistics.median(fast for fast, _ in pairs),
        "plain_per_second": count / statistics.median(slow for _, slow in pairs),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }
    print(
        f"{name}: {figures['ours_per_second']:.2f} samples/s, published way {figures['plain_per_second']:.2f}, "
        f"ratio {figures['ratio']:.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
    )
    return figures


def peak_mib() -> int:
    """Highest resident memory since it was last reset, MiB (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024


def attention_peak(kind: str) -> int:
    """MiB that one forward and backward pass of attention over a ViT-B chunk batch adds in this process."""
    width = ATTENTION_WIDTH // ATTENTION_HEADS
    shape = (ATTENTION_CHUNKS, ATTENTION_HEADS, ATTENTION_TOKENS, width)
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Forget the peak of the imports.
    before = peak_mib()
    if kind == FUSED:
        out = F.scaled_dot_product_attention(query, key, value)
    else:
        out = torch.softmax(query @ key.transpose(2, 3) / width**0.5, dim=-1) @ value
    out.sum().backward()
    return peak_mib() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--attention", choices=(MATERIALISED, FUSED), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if options.attention:
        print(attention_peak(options.attention))
        return
    began = time.perf_counter()
    for seed in range(942_000_000, 942_000_000 + 8):
        make_phantom(seed)
    figures: dict[str, Any] = {"phantoms_per_second": 8 / (time.perf_counter() - began)}
    print(f"phantoms (core, one process): {figures['phantoms_per_second']:.2f} a second")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.cases)
        figures["preparation_seconds_a_volume"] = bench.preparation_seconds / options.cases
        print(f"preparing a volume for the cache, once: {figures['preparation_seconds_a_volume']:.3f} s")
        figures["encoding_seconds_a_volume"] = bench.encoding_seconds / options.cases
        print(f"encoding a volume by the tower, once: {figures['encoding_seconds_a_volume']:.3f} s")
        for part in ("everything learns", "frozen tower"):
            if part == "frozen tower":
                bench.freeze_towers()
            sft = compare(f"SFT, {part}", bench.ours_sft, bench.plain_sft, options.cases, options.repeats)
            dpo = compare(f"DPO, {part}", bench.ours_dpo, bench.plain_dpo, options.cases, options.repeats)
            figures[part] = {"sft": sft, "dpo": dpo}
    peaks = {}
    for kind in (FUSED, MATERIALISED):
        command = [sys.executable, __file__, "--attention", kind, "--threads", str(options.threads)]
        peaks[kind] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    figures["attention_peak_mib"] = peaks
    print(
        f"attention of {ATTENTION_CHUNKS} chunks of {ATTENTION_TOKENS} tokens, forward and backward: "
        f"{peaks[FUSED]} MiB fused, {peaks[MATERIALISED]} MiB materialised"
    )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
