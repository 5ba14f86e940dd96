"""Image–text contrast: the vision tower learns from reports alone, where no voxel is labelled.

In a batch every volume must find its own report among all, and every report its volume (Radford et al. 2021, section 2.3).
Shape letters: B volumes, C chunks of a volume, N pooled tokens of a chunk, W vision width, S text tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor, nn

from mu2_model import Mu2ForConditionalGeneration, Mu2Processor
from training.commands import DEFAULT_CACHE, NOTES, Cache, Data, Model, Out, Seed, Threads, progress_bar, use_threads
from training.data import Case, read_manifests
from training.provenance import collect
from training.recipes import STAGES
from training.resumable import Resumable
from training.volumes import VolumeCache, stack_volumes

TEMPERATURE = 0.07
"""Starting temperature, and the bound of its inverse, both as published."""
LARGEST_SCALE = 100.0
TEXT_HEADS = 4
LONGEST_TEXT = 512
HEAD_FILE = "contrast_head.safetensors"


class TextTower(nn.Module):
    """One transformer layer over the checkpoint's own tokens, then their mean; it serves the training and is not shipped."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(LONGEST_TEXT, width))
        self.layer = nn.TransformerEncoderLayer(
            width, TEXT_HEADS, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, S) ids and mask to (B, W)."""
        x = self.embedding(ids) + self.position[: ids.shape[1]]
        x = self.norm(self.layer(x, src_key_padding_mask=mask == 0)) * mask[:, :, None]
        return x.sum(dim=1) / mask.sum(dim=1, keepdim=True)


def centred(width: int) -> nn.Sequential:
    """A linear head whose outputs have mean 0 and variance 1 over the batch.

    Bodies are alike and so are reports: without it all vectors pointed one way and the loss stayed at the log of the batch.
    """
    return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width, affine=False))


class ContrastModel(nn.Module):
    """The vision tower, pooled as the projector pools it, then by one learned question over a volume; a text tower beside it."""

    def __init__(self, mu2: Mu2ForConditionalGeneration):
        super().__init__()
        width = mu2.config.vision.hidden_size
        self.tower, self.pool = mu2.model.vision_tower, mu2.model.projector.pool
        self.text = TextTower(mu2.lm_head.out_features, width)
        self.query = nn.Parameter(torch.zeros(width))
        self.image_head, self.text_head = centred(width), centred(width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / TEMPERATURE)))

    def embed_volumes(self, pixels: Tensor, chunk_mask: Tensor) -> Tensor:
        """(B, C, channels, D, H, W) and (B, C) to unit vectors (B, W); empty chunks are not seen."""
        live = self.pool(self.tower(pixels[chunk_mask]))
        tokens = live.new_zeros(*chunk_mask.shape, *live.shape[1:])
        tokens = tokens.masked_scatter(chunk_mask[:, :, None, None], live)
        scores = (tokens @ self.query / math.sqrt(live.shape[-1])).masked_fill(~chunk_mask[:, :, None], -torch.inf)
        weights = torch.softmax(scores.flatten(1), dim=1)
        return F.normalize(self.image_head((weights[:, :, None] * tokens.flatten(1, 2)).sum(dim=1)), dim=-1)

    def embed_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, S) to unit vectors (B, W)."""
        return F.normalize(self.text_head(self.text(ids, mask)), dim=-1)

    def loss(self, images: Tensor, texts: Tensor, same: Tensor) -> Tensor:
        """Cross-entropy both ways; `same` (B, B) marks reports in equal words, each of which is a right answer."""
        logits = self.log_scale.exp().clamp(max=LARGEST_SCALE) * images @ texts.T
        target = same / same.sum(dim=1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@dataclass(frozen=True)
class RetrievalScore:
    """How often a held-out volume finds its report and a report its volume; equal words count as found."""

    recall_1: float
    recall_5: float
    chance_1: float  # of a blind guess
    cases: int

    def line(self) -> str:
        """One line for the log."""
        return f"recall@1 {self.recall_1:.3f} (chance {self.chance_1:.3f}), recall@5 {self.recall_5:.3f}"


def retrieval(images: Tensor, texts: Tensor, same: Tensor) -> RetrievalScore:
    """Recall in both directions of unit vectors (n, W); `same` (n, n) marks reports in equal words."""
    similarity, count = images @ texts.T, len(images)
    hits = {}
    for k in (1, 5):
        ways = [
            same.gather(1, way.topk(min(k, count), dim=1).indices).any(dim=1).float().mean()
            for way in (similarity, similarity.T)
        ]
        hits[k] = float(torch.stack(ways).mean())
    return RetrievalScore(hits[1], hits[5], float(same.float().mean()), count)


class ReportData:
    """Volumes of one split with their reports; of several texts about a volume the longest is its report."""

    def __init__(self, cases: Sequence[Case], cache: VolumeCache, processor: Mu2Processor):
        if len({case.image for case in cases}) < 2:
            raise ValueError("contrast needs two volumes or more in each of the splits train and validation")
        longest: dict[str, str] = {}
        for case in cases:
            longest[case.image] = max(longest.get(case.image, ""), case.answer.strip(), key=len)
        self.images, self.texts = list(longest), list(longest.values())
        self.cache, self.tokenizer = cache, processor.tokenizer

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """`pixel_values`, `chunk_mask`, `ids`, `mask` and `same` of these rows."""
        texts = [self.texts[row] for row in rows]
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        encoded = [ids[:LONGEST_TEXT] for ids in encoded]
        width = max(map(len, encoded))
        ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
        for row, tokens in enumerate(encoded):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return {
            **stack_volumes([self.cache.get(self.images[row]) for row in rows]),
            "ids": ids,
            "mask": mask,
            "same": equal_words(texts),
        }


def equal_words(texts: Sequence[str]) -> Tensor:
    """(n, n) True where two texts are the same words."""
    number = {text: index for index, text in enumerate(dict.fromkeys(" ".join(text.split()) for text in texts))}
    named = torch.tensor([number[" ".join(text.split())] for text in texts])
    return named[:, None] == named[None]


@dataclass(frozen=True)
class ContrastSettings:
    """How long and how fast: `batch_size` volumes a step, each beside its report; larger batches are harder questions."""

    steps: int = 2000
    batch_size: int = 16
    learning_rate: float = STAGES["vision"].learning_rate
    weight_decay: float = STAGES["vision"].weight_decay
    warmup_ratio: float = STAGES["vision"].warmup_ratio
    score_every: int = 250
    save_every: int = 50
    seed: int = 0


class ContrastTraining(Resumable[ContrastModel, ContrastSettings]):
    """One run; its folder holds the newest state, so that a killed run goes on where it was."""

    def __init__(self, model_folder: Path, out: Path, settings: ContrastSettings, device: str = "cpu"):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.device = out, torch.device(device)
        self.mu2 = Mu2ForConditionalGeneration.from_pretrained(model_folder, dtype="float32")
        self.processor = Mu2Processor.from_pretrained(model_folder)
        torch.manual_seed(settings.seed)
        model = ContrastModel(self.mu2).to(self.device)
        super().__init__("contrast", out, model, model.parameters(), settings)
        self.resume(self.device)

    def _embed(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        given = {name: tensor.to(self.device) for name, tensor in batch.items()}
        images = self.model.embed_volumes(given["pixel_values"], given["chunk_mask"])
        return images, self.model.embed_texts(given["ids"], given["mask"]), given["same"]

    def one_step(self, data: ReportData) -> float:
        """One optimiser step; the batch is drawn by seed and step, so a resumed run sees the same ones."""
        rng = np.random.default_rng((self.settings.seed, self.step))
        rows = rng.choice(len(data.images), min(self.settings.batch_size, len(data.images)), replace=False)
        images, texts, same = self._embed(data.batch(rows.tolist()))
        loss = self.model.loss(images, texts, same.float())
        return self.descend(loss)

    @torch.no_grad()
    def score(self, data: ReportData) -> RetrievalScore:
        """Retrieval among all volumes of a split."""
        self.model.eval()
        rows, size = list(range(len(data.images))), self.settings.batch_size
        parts = [self._embed(data.batch(rows[start : start + size])) for start in range(0, len(rows), size)]
        self.model.train()
        images, texts = (torch.cat([part[side] for part in parts]).cpu() for side in (0, 1))
        return retrieval(images, texts, equal_words(data.texts))

    def run(self, data: ReportData, held_out: ReportData, progress: Progress, stop_at: int | None = None) -> None:
        """Train to the end (or to step `stop_at`), scoring the held-out split and saving on the way."""
        task = progress.add_task("contrast", total=self.settings.steps, completed=self.step)
        losses: list[float] = []
        last = min(self.settings.steps, stop_at or self.settings.steps)
        while self.step < last:
            losses.append(self.one_step(data))
            progress.update(task, completed=self.step)
            if self.step % self.settings.score_every == 0 or self.step == self.settings.steps:
                score, loss = self.score(held_out), float(np.mean(losses))
                self.history.append({"step": self.step, "loss": loss, **asdict(score)})
                progress.console.print(f"step {self.step} loss {loss:.3f} {score.line()}")
                losses = []
            if self.step % self.settings.save_every == 0 or self.step == last:
                self.save()
        self.export()

    def export(self) -> None:
        """Write the checkpoint folder: the μ²LLM with the trained tower, and the rest of the contrast beside it."""
        self.mu2.save_pretrained(self.out)
        self.processor.save_pretrained(self.out)
        head = {name: value for name, value in self.model.state_dict().items() if not name.startswith("tower.")}
        save_file({name: value.contiguous() for name, value in head.items()}, self.out / HEAD_FILE)


def train_contrast(
    model_folder: Path,
    cases: Sequence[Case],
    cache_folder: Path,
    out: Path,
    settings: ContrastSettings,
    progress: Progress,
    device: str = "cpu",
) -> ContrastTraining:
    """Train a checkpoint's tower on volumes and reports of the training split; score it on the validation split."""
    training = ContrastTraining(model_folder, out, settings, device)
    cache = VolumeCache(cache_folder, training.processor.image_processor)
    splits = {
        split: ReportData([case for case in cases if case.split == split], cache, training.processor)
        for split in ("train", "validation")
    }
    training.run(splits["train"], splits["validation"], progress)
    return training


def contrast(
    model: Model,
    data: Data,
    out: Out,
    cache: Cache = DEFAULT_CACHE,
    steps: Annotated[int, typer.Option(min=1)] = ContrastSettings.steps,
    batch: Annotated[int, typer.Option(min=2, help="Volumes of a step.")] = ContrastSettings.batch_size,
    lr: Annotated[float, typer.Option()] = ContrastSettings.learning_rate,
    score_every: Annotated[int, typer.Option(min=1)] = ContrastSettings.score_every,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Seed = 0,
    threads: Threads = None,
) -> None:
    """Teach the vision tower by image–text contrast, where volumes have reports and no voxel labels; watch the retrieval."""
    use_threads(threads)
    settings = ContrastSettings(steps, batch, lr, score_every=score_every, seed=seed)
    cases = read_manifests(data)
    provenance = collect("contrast", seed, cases, vars(settings), model)
    provenance.begin(out)
    with progress_bar() as bar:
        trained = train_contrast(model, cases, cache, out, settings, bar, device)
    provenance.write(out)
    NOTES.print(f"checkpoint in {out}; held out: {trained.history[-1]}")
