"""Figures of the model: preprocessing, selection, encoding, drafting, what ships, loading; each beside a plain way in one run.

    python benchmarks/model.py [--only NAME ...] [--json OUT]

The plain way is the published computation written straightforwardly: float64 preprocessing with a blurred resize, a loop over
the selections; where MONAI is installed, which the published code calls, its own transforms stand beside it. Times are
medians of repeats unless a line says otherwise; memory is the peak of a process of its own above what it began with.
"""

import argparse
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import torch
from published_plain import monai_preprocessing, plain_preprocessing
from transformers import Qwen3Config

from mu2_model.configuration_mu2 import Mu2Config, Mu2TokenizerConfig
from mu2_model.drafter import ReportDrafter
from mu2_model.image_processing_mu2 import Mu2ImageProcessor
from mu2_model.inspection import count_parameters
from mu2_model.modeling_mu2 import Mu2ForConditionalGeneration, Mu2Model
from mu2_model.nifti import load_nifti, save_nifti
from mu2_model.shipped import is_shipped, shipped_checkpoint
from mu2_model.untrained import make_untrained
from mu2_model.visual_tokenizer import TokenSelection
from worker import pipeline
from worker.core.settings import Settings
from worker.demo import study as demo_study
from worker.imaging import study
from worker.inference.reporter import questions

SLICES, SIDE = 300, 512
QUESTION = "Describe the findings."


def ct_like(slices: int = SLICES, side: int = SIDE) -> np.ndarray:
    """A smooth body with noise in int16 Hounsfield units, air around it."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    inside = (rows / 0.7) ** 2 + (columns / 0.85) ** 2 < 1
    volume = np.full((slices, side, side), -1000, np.int16)
    for index in range(slices):
        volume[index][inside] = generator.normal(40, 25, int(inside.sum()))
        volume[index, side // 3 : side // 2, side // 4 : side // 2] -= np.int16(600)
    return volume


def affine(slice_mm: float = 1.0) -> np.ndarray:
    matrix = np.diag([0.0, 0.0, 0.0, 1.0])
    matrix[2, 0], matrix[1, 1], matrix[0, 2] = slice_mm, -0.75, -0.75
    return matrix


def peak_of(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and GB that the peak stood above the memory before."""
    gc.collect()
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")
    before = int(status.read_text().split("VmRSS:")[1].split()[0])
    start = time.perf_counter()
    function()
    seconds = time.perf_counter() - start
    peak = int(status.read_text().split("VmHWM:")[1].split()[0])
    return seconds, (peak - before) / 1e6


PARTS: dict[str, Callable[[Path], object]] = {
    "plain, loaded": lambda folder: plain_preprocessing(np.load(folder / "ct.npy", mmap_mode="r")),
    "MONAI, loaded": lambda folder: monai_preprocessing(np.load(folder / "ct.npy").astype(np.float64)),
    "published, loaded": lambda folder: Mu2ImageProcessor(form="published").prepare(ARRAY, None),
    "hounsfield, loaded": lambda folder: Mu2ImageProcessor().prepare(ARRAY, affine()),
    "plain, from .nii.gz": lambda folder: plain_preprocessing(
        nibabel.load(folder / "ct.nii.gz").get_fdata().transpose(2, 1, 0)
    ),
    "published, from .nii.gz": lambda folder: Mu2ImageProcessor(form="published").prepare(
        *load_nifti(folder / "ct.nii.gz")
    ),
    "hounsfield, from .nii.gz": lambda folder: Mu2ImageProcessor().prepare(*load_nifti(folder / "ct.nii.gz")),
    "load 1.7B": lambda folder: load_and_touch(folder / "large"),
}
ARRAY = np.zeros(0)


def load_and_touch(folder: Path) -> None:
    """Load the weights and read each once: mapped pages count when they are first used."""
    model = Mu2ForConditionalGeneration.from_pretrained(folder, dtype="auto")
    for parameter in model.parameters():
        parameter.view(-1)[::1024].sum()


def run_part(name: str, folder: Path) -> tuple[float, float]:
    """One part in a process of its own; returns seconds and peak GB."""
    command = [sys.executable, __file__, "--part", name, "--folder", str(folder)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, peak = json.loads(out.splitlines()[-1])
    return seconds, peak


def preprocessing(folder: Path) -> list[dict]:
    array = ct_like()
    np.save(folder / "ct.npy", array)
    save_nifti(folder / "ct.nii.gz", array, affine())
    rows = []
    if importlib.util.find_spec("monai"):
        library, ours = run_part("MONAI, loaded", folder), run_part("published, loaded", folder)
        rows.append(
            {
                "figure": "preprocessing 512x512x300 int16, published, loaded, against the library that was published",
                "plain": f"{library[0]:.1f} s, {library[1]:.2f} GB",
                "ours": f"{ours[0]:.2f} s, {ours[1]:.2f} GB",
                "ratio": f"{library[0] / ours[0]:.0f}x faster, {ours[1] / library[1]:.2f} of the memory",
            }
        )
    for where in ("loaded", "from .nii.gz"):
        plain = run_part(f"plain, {where}", folder)
        for form in ("published", "hounsfield"):
            ours = [run_part(f"{form}, {where}", folder) for _ in range(3)]
            seconds = statistics.median(second for second, _ in ours)
            peak = statistics.median(gigabytes for _, gigabytes in ours)
            rows.append(
                {
                    "figure": f"preprocessing 512x512x300 int16, {form}, {where}",
                    "plain": f"{plain[0]:.1f} s, {plain[1]:.2f} GB",
                    "ours": f"{seconds:.2f} s, {peak:.2f} GB",
                    "ratio": f"{plain[0] / seconds:.0f}x faster, {peak / plain[1]:.2f} of the memory",
                }
            )
    return rows


def selection(folder: Path) -> list[dict]:
    torch.manual_seed(0)
    module = TokenSelection(Mu2TokenizerConfig(), 2048)
    tokens = torch.randn(1, 8, 256, 2048)

    def loop() -> torch.Tensor:
        flat = tokens.flatten(1, 2)
        weights = torch.softmax(module.score(flat) / module.temperature(), dim=1)
        return torch.stack([(weights[:, :, k, None] * flat).sum(dim=1) for k in range(1024)], dim=1)

    with torch.inference_mode():
        difference = float((loop() - module(tokens)[0]).abs().max())
        slow, fast = timed(loop, 2, warm_up=False), timed(lambda: module(tokens), 5)
    return [
        {
            "figure": f"DTS of 2,048 tokens to 1,024 (largest difference {difference:.0e})",
            "plain": f"{slow:.2f} s",
            "ours": f"{fast:.3f} s",
            "ratio": f"{slow / fast:.0f}x faster",
        }
    ]


def timed(function: Callable[[], object], repeats: int = 3, warm_up: bool = True) -> float:
    if warm_up:
        function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def encoder(folder: Path) -> list[dict]:
    """The encoder at full width; on a CPU with 2 of its 12 vision blocks and 1 of 4 tokenizer layers, on a GPU whole."""
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    config = Mu2Config(
        vision_config={"num_hidden_layers": 12 if gpu else 2},
        tokenizer_config={"num_layers": 4 if gpu else 1},
        text_config=Qwen3Config(hidden_size=2048, num_hidden_layers=1, vocab_size=1000, head_dim=128),
    )
    model = Mu2Model(config).to(device, dtype).eval()
    question = torch.ones(1, 12, dtype=torch.long, device=device)
    seconds: dict[int, float] = {}
    volumes = {n: Mu2ImageProcessor().prepare(ct_like(n, 128), affine(3.0), device=device) for n in (120, 256)}
    with torch.inference_mode():
        for _ in range(3):
            for slices, prepared in volumes.items():
                given = (prepared.pixel_values[None], question, None, prepared.chunk_mask[None])
                taken = timed(lambda given=given: model.get_image_features(*given), 1, warm_up=gpu)
                # The shortest of three: a busy machine only ever adds.
                seconds[slices] = min(taken, seconds.get(slices, taken))
    return [
        {
            "figure": f"encoder time of 120 slices against 256 ({config.vision.num_hidden_layers} vision blocks, {device})",
            "plain": f"{seconds[256]:.2f} s",
            "ours": f"{seconds[120]:.2f} s",
            "ratio": f"{100 * seconds[120] / seconds[256]:.0f} %",
        }
    ]


def drafting(folder: Path) -> list[dict]:
    drafter = ReportDrafter.from_pretrained(make_untrained(folder / "untrained"))
    drafter.warm_up()
    volumes = [(ct_like(100, 256) - np.int16(index), affine(3.0)) for index in range(8)]
    one, eight, single, together = [], [], [], []
    for _ in range(3):
        singles = [drafter.draft([volumes[0]], [QUESTION], settings="varied") for _ in range(8)]
        one.append(statistics.median(drafts[0].stage_seconds["encode"] for drafts in singles))
        eight.append(drafter.draft([volumes[0]], [QUESTION], settings="varied", samples=8)[0].stage_seconds["encode"])
        single.append(tokens_per_second([drafter.draft([volume], [QUESTION])[0] for volume in volumes], alone=True))
        together.append(tokens_per_second(drafter.draft(volumes, [QUESTION] * 8), alone=False))
    return [
        {
            "figure": "encoder time of 8 samples of one volume against one draft (tiny model)",
            "plain": f"{1000 * statistics.median(one):.1f} ms",
            "ours": f"{1000 * statistics.median(eight):.1f} ms",
            "ratio": f"{statistics.median(eight) / statistics.median(one):.2f}",
        },
        {
            "figure": "tokens/s of a batch of 8 against 8 single drafts (tiny model)",
            "plain": f"{statistics.median(single):.0f}/s",
            "ours": f"{statistics.median(together):.0f}/s",
            "ratio": f"{statistics.median(together) / statistics.median(single):.1f}x",
        },
    ]


def shipped(folder: Path) -> list[dict]:
    """The demo's study through mu2-phantom: what `mu2 demo` waits for."""
    if not is_shipped():
        return [
            {
                "figure": "a draft of the demo study by mu2-phantom",
                "plain": "not measured",
                "ours": "not measured",
                "ratio": "this installation came without mu2-phantom",
            }
        ]
    settings = Settings()
    files = [path for path in demo_study.FOLDER.iterdir() if path.suffix == ".dcm"]
    volumes = study.build_study(files, pipeline.rules(settings.imaging)).volumes
    asked = questions(volumes, settings.model)
    drafter = ReportDrafter.from_pretrained(shipped_checkpoint(), dtype=torch.float32)
    drafter.warm_up()
    given = [(volumes[q.volume].hu, volumes[q.volume].affine) for q in asked], [q.text for q in asked]
    seconds, tokens = [], 0
    for _ in range(5):
        start = time.perf_counter()
        tokens = sum(draft.generated_tokens for draft in drafter.draft(*given))
        seconds.append(time.perf_counter() - start)
    size = sum(file.stat().st_size for file in shipped_checkpoint().iterdir())
    return [
        {
            "figure": f"a draft of the demo study by mu2-phantom ({len(asked)} regions, {tokens} tokens, "
            f"{torch.get_num_threads()} threads), and its size",
            "plain": "goals 5 s, 20 MB",
            "ours": f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})",
            "ratio": f"{size / 1e6:.1f} MB",
        }
    ]


def tokens_per_second(drafts: list, alone: bool) -> float:
    seconds = [draft.stage_seconds["generate"] for draft in drafts]
    return sum(draft.generated_tokens for draft in drafts) / (sum(seconds) if alone else seconds[0])


def large_config() -> Mu2Config:
    """The 1.7B size: Qwen3-1.7B under the corrected tokenizer."""
    text = Qwen3Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    return Mu2Config(text_config=text, image_token_id=151935)


def large_model() -> Mu2ForConditionalGeneration:
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Mu2ForConditionalGeneration(large_config()).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def loading(folder: Path) -> list[dict]:
    large_model().save_pretrained(folder / "large")
    weights = sum(file.stat().st_size for file in (folder / "large").glob("*.safetensors")) / 1e9
    seconds, peak = run_part("load 1.7B", folder)
    return [
        {
            "figure": f"loading {count_parameters(large_config())['total'] / 1e9:.2f} B parameters in bf16",
            "plain": f"{weights:.2f} GB of weights",
            "ours": f"{peak:.2f} GB peak, {seconds:.1f} s",
            "ratio": f"{peak / weights:.2f} of the weights",
        }
    ]


def gpu(folder: Path) -> list[dict]:
    """Decoding at the 1.7B size, eager against a compiled static cache, as a share of what memory bandwidth allows."""
    if not torch.cuda.is_available():
        return [
            {
                "figure": "1.7B in bf16: tokens/s, seconds per study, share of the bandwidth limit, eager and compiled",
                "plain": "not measured",
                "ours": "not measured",
                "ratio": "needs a CUDA device, and torch finds none",
            }
        ]
    model = large_model().cuda()
    buffer = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    copied = timed(lambda: buffer.clone(), 10)
    bandwidth = 2 * buffer.numel() / copied
    weights = 2 * sum(p.numel() for p in model.model.language_model.parameters())
    prompt = torch.cat((torch.full((1, 256), 151935), torch.arange(1, 65)[None]), dim=1).cuda()
    pixels = torch.rand(1, 8, 3, 32, 256, 256, device="cuda")
    given = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    rows = []
    with torch.inference_mode():
        encode = timed(lambda: model.get_image_features(pixels, prompt[:, -64:]))
        features = model.get_image_features(pixels, prompt[:, -64:])
        for name, options in (("eager", {}), ("compiled", {"cache_implementation": "static"})):

            def draft(count: int, options: dict = options) -> None:
                encoded = {"image": type(features)(pooler_output=features.pooler_output)}
                model.generate(
                    **given, mm_encoder_outputs=encoded, max_new_tokens=count, min_new_tokens=count, **options
                )

            rate = 200 / (timed(lambda: draft(256)) - timed(lambda: draft(56)))
            rows.append(
                {
                    "figure": f"1.7B in bf16 on {torch.cuda.get_device_name()}, {name}",
                    "plain": f"{bandwidth / weights:.0f} tokens/s by bandwidth",
                    "ours": f"{rate:.0f} tokens/s, {encode + 256 / rate:.2f} s per study",
                    "ratio": f"{100 * rate * weights / bandwidth:.0f} % of the limit",
                }
            )
    return rows


FIGURES = {
    "preprocessing": preprocessing,
    "selection": selection,
    "encoder": encoder,
    "drafting": drafting,
    "shipped": shipped,
    "loading": loading,
    "gpu": gpu,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        global ARRAY
        if "loaded" in arguments.part:
            ARRAY = np.load(arguments.folder / "ct.npy")
        print(json.dumps(peak_of(lambda: PARTS[arguments.part](arguments.folder))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            for row in FIGURES[name](Path(folder)):
                rows.append(row)
                print(f"{row['figure']}\n    plain {row['plain']} | ours {row['ours']} | {row['ratio']}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
