"""The vision stage: the tower learns dense phantom labels, so that what follows has something to read.

A plain binary loss on rare findings falls by predicting nothing. Here findings get a focal loss with class weights and a soft
Dice loss, organs a plain one beside them, chunks are drawn around findings, and the held-out cell F1 is watched, never
the loss alone.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mu2_model import Mu2ForConditionalGeneration, Mu2Processor
from mu2_model.configuration_mu2 import Mu2VisionConfig
from mu2_model.vision_tower import ConvolutionStem, Mu2VisionTower, patch_boxes
from training.data import Case
from training.dense_data import FINDINGS, ORGANS, DenseBatch, DenseData, positives
from training.phantoms.vocabulary import FINDING_LABELS
from training.recipes import STAGES
from training.resumable import Resumable
from training.volumes import VolumeCache

FOCAL_GAMMA = 2.0
FOCAL_BIAS = -3.0
"""Starting logit of a finding: a prior of 5 %, so that the first steps are not spent on saying no."""
POSITIVE_WEIGHT = 4.0
LEAST_CELLS = 4.0
"""A kind with fewer cells in a batch, or none, weighs as if it had these."""
HEAD_FILE = "dense_head.safetensors"


@dataclass(frozen=True)
class DenseLogits:
    """What the heads say: patches (L, P, organs + findings), boxes (L, N, findings), cells (L, M, findings), float32."""

    patches: Tensor
    boxes: Tensor
    cells: Tensor


class DenseModel(nn.Module):
    """A vision tower with three linear heads, all thrown away later.

    One names organs and findings of every patch. One names the findings of every box that the projector pools: what comes
    after sees the means of boxes alone, so a finding in one patch must survive the mean. One stands on the level of the
    stem before the last, whose cells are finer than patches: a small lesion fills its cell there and teaches the
    convolutions without a detour (deep supervision, Lee et al. 2015).
    """

    def __init__(self, tower: Mu2VisionTower, config: Mu2VisionConfig, box: int):
        super().__init__()
        if not isinstance(tower.patch_embedding, ConvolutionStem):
            raise ValueError("the vision stage trains a tower with a convolution stem: set stem_channels")
        self.tower, self.grid, self.box = tower, config.patch_grid, box
        self.patch_head = nn.Linear(config.hidden_size, ORGANS + FINDINGS)
        self.box_head = nn.Linear(config.hidden_size, FINDINGS)
        self.cell_head = nn.Linear(config.stem_channels[-2], FINDINGS)
        for head in (self.patch_head, self.box_head, self.cell_head):
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
            with torch.no_grad():
                head.bias[-FINDINGS:] = FOCAL_BIAS

    def forward(self, pixels: Tensor) -> DenseLogits:
        """Logits of chunks (L, channels, D, H, W)."""
        stem: Any = self.tower.patch_embedding
        maps = stem.levels(pixels)
        tokens = self.tower.attend(stem.tokens(maps))
        boxes = self.box_head(patch_boxes(tokens, self.grid, self.box).mean(dim=2))
        cells = self.cell_head(maps[-2].flatten(2).transpose(1, 2))
        return DenseLogits(self.patch_head(tokens).float(), boxes.float(), cells.float())

    def box_fractions(self, fractions: Tensor) -> Tensor:
        """The largest share that a finding fills of any patch of a box: (L, P, findings) to (L, N, findings)."""
        return patch_boxes(fractions, self.grid, self.box).amax(dim=2)


@dataclass(frozen=True)
class CellScore:
    """Held-out score of the dense findings: F1 over all cells, its mean over the kinds that occur, and each kind's."""

    micro_f1: float
    macro_f1: float
    f1_of: dict[str, float]
    organ_f1: float
    box_f1: float

    def line(self) -> str:
        """One line for the log."""
        kinds = " ".join(f"{name}={value:.2f}" for name, value in self.f1_of.items())
        sums = f"macro {self.macro_f1:.3f}, boxes {self.box_f1:.3f}, organs {self.organ_f1:.3f}"
        return f"cell F1 {self.micro_f1:.3f} ({sums}): {kinds}"


def finding_loss(logits: Tensor, fractions: Tensor, finer: int = 1) -> Tensor:
    """Focal loss (Lin et al. 2017, eq. 5, positives weighted) plus soft Dice (Milletari et al. 2016), both on sure cells.

    `logits` and `fractions` are (L, P, findings), of cells `finer` times smaller than patches. Dice is a mean over the kinds
    that the batch holds.
    """
    positive, sure = positives(fractions, finer)
    target, weight = positive.float(), sure.float()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = torch.sigmoid(logits)
    miss = torch.where(positive, 1 - probability, probability)
    scale = torch.where(positive, POSITIVE_WEIGHT, 1.0)
    present = target.sum(dim=(0, 1))
    focal = (scale * miss**FOCAL_GAMMA * entropy * weight).sum(dim=(0, 1))
    # Over all cells together one heart outweighs a hundred nodules; a kind counts by the root of its cells.
    focal = (focal / present.clamp(min=LEAST_CELLS).sqrt()).sum() / present.sum().clamp(min=LEAST_CELLS).sqrt()
    probability = probability * weight
    overlap = 2 * (probability * target).sum(dim=(0, 1))
    total = probability.sum(dim=(0, 1)) + present
    held = present > 0
    dice = (1 - (overlap + 1) / (total + 1))[held].mean() if bool(held.any()) else logits.sum() * 0
    return focal + dice


def dense_loss(model: DenseModel, batch: DenseBatch) -> Tensor:
    """The loss of a batch: findings of patches, boxes and cells as above, organs by their share of the patch."""
    logits = model(batch.pixels)
    organs = F.binary_cross_entropy_with_logits(logits.patches[..., :ORGANS], batch.organs, reduction="none")
    found = finding_loss(logits.patches[..., ORGANS:], batch.findings)
    found = found + finding_loss(logits.boxes, model.box_fractions(batch.findings))
    found = found + finding_loss(logits.cells, batch.cells, batch.cells.shape[1] // batch.findings.shape[1])
    # Summed over the organs: as a mean they were 25 times too weak, and after 200 steps not one was known.
    return found + organs.sum(dim=-1).mean()


@torch.no_grad()
def score_cells(model: DenseModel, data: DenseData, batch_size: int = 32, threshold: float = 0.5) -> CellScore:
    """Cell F1 of a split at one threshold; cells that a finding only grazes do not count."""
    model.eval()
    counts, boxes, organ_counts = torch.zeros(3, FINDINGS), torch.zeros(3, FINDINGS), torch.zeros(3, ORGANS)
    for batch in data.in_order(batch_size):
        logits = model(batch.pixels)
        patches, boxed = torch.sigmoid(logits.patches) > threshold, torch.sigmoid(logits.boxes) > threshold
        counts += _counts(patches[..., ORGANS:], *positives(batch.findings))
        boxes += _counts(boxed, *positives(model.box_fractions(batch.findings)))
        organs = batch.organs > threshold
        organ_counts += _counts(patches[..., :ORGANS], organs, torch.ones_like(organs))
    model.train()
    occurring = (counts[0] + counts[2]) > 0
    names = [kind.value for kind in FINDING_LABELS]
    f1 = f1_score(counts)
    f1_of = {names[k]: float(f1[k]) for k in range(FINDINGS) if occurring[k]}
    macro = float(np.mean(list(f1_of.values()))) if f1_of else 0.0
    micro, box, organ = (float(f1_score(part.sum(dim=1))) for part in (counts, boxes, organ_counts))
    return CellScore(micro, macro, f1_of, organ, box)


def _counts(said: Tensor, positive: Tensor, sure: Tensor) -> Tensor:
    """True positives, false positives, false negatives of every class among the sure cells: (3, classes)."""
    said = said & sure
    return torch.stack([(said & positive), (said & ~positive), (~said & positive)]).sum(dim=(1, 2))


def f1_score(counts: Tensor) -> Tensor:
    """F1 from (true positive, false positive, false negative, ...): 0 where nothing was there and nothing was said.

    >>> float(f1_score(torch.tensor([3.0, 1.0, 1.0])))
    0.75
    """
    return 2 * counts[0] / (2 * counts[0] + counts[1] + counts[2]).clamp(min=1)


@dataclass(frozen=True)
class VisionSettings:
    """How long and how fast the vision stage trains."""

    steps: int = 4000
    batch_size: int = STAGES["vision"].batch_size
    learning_rate: float = STAGES["vision"].learning_rate
    weight_decay: float = STAGES["vision"].weight_decay
    warmup_ratio: float = STAGES["vision"].warmup_ratio
    score_every: int = 250
    save_every: int = 25
    seed: int = 0
    bf16: bool = False
    """Run tower and heads in bfloat16, weights stay float32: half the time on a processor that has it."""


class VisionTraining(Resumable[DenseModel, VisionSettings]):
    """One run of the vision stage; its folder holds the newest state, so that a killed run goes on where it was."""

    def __init__(self, model_folder: Path, out: Path, settings: VisionSettings):
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.mu2 = Mu2ForConditionalGeneration.from_pretrained(model_folder)
        self.processor = Mu2Processor.from_pretrained(model_folder)
        vision = self.mu2.config.vision
        self.patch = (vision.patch_size[0], vision.patch_size[1], vision.patch_size[2])
        self.cell = vision.level_patch(-2)
        torch.manual_seed(settings.seed)
        box = self.mu2.config.tokenizer.projector_pooling_size
        model = DenseModel(self.mu2.model.vision_tower, vision, box)
        head = model_folder / HEAD_FILE
        if head.is_file():
            model.load_state_dict(load_file(head), strict=False)
        super().__init__("vision", out, model, model.parameters(), settings)
        self.resume()

    def precision(self) -> torch.autocast:
        """The context that the model runs in."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bf16)

    def one_step(self, data: DenseData) -> float:
        """One optimiser step; the batch is drawn by seed and step, so a resumed run sees the same ones."""
        rng = np.random.default_rng((self.settings.seed, self.step))
        batch = data.training_batch(self.settings.batch_size, rng)
        with self.precision():
            loss = dense_loss(self.model, batch)
        return self.descend(loss)

    def run(self, data: DenseData, held_out: DenseData, progress: Progress, stop_at: int | None = None) -> None:
        """Train to the end (or to step `stop_at`), scoring the held-out split and saving on the way."""
        task = progress.add_task("vision", total=self.settings.steps, completed=self.step)
        losses: list[float] = []
        while self.step < min(self.settings.steps, stop_at or self.settings.steps):
            losses.append(self.one_step(data))
            progress.update(task, completed=self.step)
            if self.step % self.settings.score_every == 0 or self.step == self.settings.steps:
                with self.precision():
                    score = score_cells(self.model, held_out)
                self.history.append({"step": self.step, "loss": float(np.mean(losses)), **asdict(score)})
                progress.console.print(f"step {self.step} loss {np.mean(losses):.3f} {score.line()}")
                losses = []
                self.save()
            elif self.step % self.settings.save_every == 0:
                self.save()
        self.export()

    def export(self) -> None:
        """Write the checkpoint folder: the μ²LLM with the trained tower, and the dense head beside it."""
        self.mu2.save_pretrained(self.out)
        self.processor.save_pretrained(self.out)
        heads = {name: tensor for name, tensor in self.model.state_dict().items() if "head." in name}
        save_file(heads, self.out / HEAD_FILE)


def train_vision(
    model_folder: Path,
    cases: list[Case],
    cache_folder: Path,
    out: Path,
    settings: VisionSettings,
    progress: Progress,
) -> VisionTraining:
    """Train a checkpoint's tower on the training split of phantoms and score it on the validation split."""
    training = VisionTraining(model_folder, out, settings)
    cache = VolumeCache(cache_folder, training.processor.image_processor)
    splits = {}
    for split in ("train", "validation"):
        # A phantom may have several reports, but it has one volume.
        chosen = {case.image: case for case in cases if case.split == split}
        splits[split] = DenseData(list(chosen.values()), cache, training.patch, training.cell)
    training.run(splits["train"], splits["validation"], progress)
    return training
