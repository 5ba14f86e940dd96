"""The vision stage: the tower learns dense phantom labels, so that what follows has something to read.

A plain binary loss on rare findings falls by predicting nothing. Here findings get a focal loss with class weights and a soft
Dice loss, organs a plain one beside them, chunks are drawn around findings, and the held-out cell F1 is watched, never
the loss alone.
"""

import json
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
from mu2_model.vision_tower import Mu2VisionTower, patchify
from training.data import Case
from training.dense_data import FINDINGS, ORGANS, DenseData, positives
from training.phantoms.vocabulary import FINDING_LABELS
from training.recipes import STAGES, write_json
from training.volumes import VolumeCache

FOCAL_GAMMA = 2.0
FOCAL_BIAS = -3.0
"""Starting logit of a finding: a prior of 5 %, so that the first steps are not spent on saying no."""
POSITIVE_WEIGHT = 4.0
WHITENING_FLOOR = 1e-4
"""Components of less variance, as a share of the largest, are noise and are not blown up to unit variance."""
WHITENING_CHUNKS = 64
PATCH_BATCH, POOL_CHUNKS, POOL_STEPS = 4096, 160, 40
"""Patches a step of the warm-up, chunks they are drawn from, and steps before other chunks take their place."""
PATCH_RATE = 3e-3
HEAD_FILE = "dense_head.safetensors"
STATE_FILE = "vision_state.pt"
HISTORY_FILE = "vision_history.json"


class DenseModel(nn.Module):
    """A vision tower and a linear head per patch: organ logits, then finding logits."""

    def __init__(self, tower: Mu2VisionTower, width: int):
        super().__init__()
        self.tower = tower
        self.head = nn.Linear(width, ORGANS + FINDINGS)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.bias[ORGANS:] = FOCAL_BIAS

    def forward(self, pixels: Tensor) -> Tensor:
        """(L, channels, D, H, W) to logits (L, P, organs + findings)."""
        return self.head(self.tower(pixels))

    def patchwise(self, patches: Tensor, places: Tensor) -> Tensor:
        """Logits (n, classes) of single patches (n, voxels) at places (n,) of a chunk: the tower without its attention."""
        tower = self.tower
        blocks: Any = tower.blocks
        x = tower.patch_embedding(patches) + tower.position_embedding[0, places]
        for block in blocks:
            x = x + block.fc2(F.gelu(block.fc1(block.norm2(x))))
        return self.head(tower.norm(x))

    @torch.no_grad()
    def silence_attention(self) -> None:
        """Set the attention's output to zero, so that the whole tower says what `patchwise` says; it learns from there."""
        blocks: Any = self.tower.blocks
        for block in blocks:
            block.output.weight.zero_()
            block.output.bias.zero_()


@torch.no_grad()
def whiten_patches(tower: Mu2VisionTower, pixels: Tensor) -> None:
    """Start the patch embedding with the principal components of patches (L, channels, D, H, W), scaled to unit variance.

    Patches share one large mean and vary mostly by it: from random weights 1,200 steps were spent on little else. With fewer
    channels than components the rest keeps its random start.
    """
    patches = patchify(pixels, tower.patch_size).flatten(0, 1)
    patches = patches[patches.amax(dim=1) > 0]
    mean = patches.mean(dim=0)
    values, vectors = torch.linalg.eigh(torch.cov((patches - mean).T))
    count = min(tower.patch_embedding.out_features, patches.shape[1])
    scale = (values[-count:].clamp(min=float(values[-1]) * WHITENING_FLOOR)).rsqrt()
    weight = (vectors[:, -count:] * scale).T.flip(0)
    tower.patch_embedding.weight[:count] = weight
    tower.patch_embedding.bias[:count] = -weight @ mean


@dataclass(frozen=True)
class CellScore:
    """Held-out score of the dense findings: F1 over all cells, its mean over the kinds that occur, and each kind's."""

    micro_f1: float
    macro_f1: float
    f1_of: dict[str, float]
    organ_f1: float

    def line(self) -> str:
        """One line for the log."""
        kinds = " ".join(f"{name}={value:.2f}" for name, value in self.f1_of.items())
        return f"cell F1 {self.micro_f1:.3f} (macro {self.macro_f1:.3f}, organs {self.organ_f1:.3f}): {kinds}"


def finding_loss(logits: Tensor, fractions: Tensor) -> Tensor:
    """Focal loss (Lin et al. 2017, eq. 5, positives weighted) plus soft Dice (Milletari et al. 2016), both on sure cells.

    `logits` and `fractions` are (L, P, findings); Dice counts only the kinds that the batch holds.
    """
    positive, sure = positives(fractions)
    target, weight = positive.float(), sure.float()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = torch.sigmoid(logits)
    miss = torch.where(positive, 1 - probability, probability)
    scale = torch.where(positive, POSITIVE_WEIGHT, 1.0)
    focal = (scale * miss**FOCAL_GAMMA * entropy * weight).sum() / target.sum().clamp(min=1)
    probability = probability * weight
    overlap = 2 * (probability * target).sum(dim=(0, 1))
    total = probability.sum(dim=(0, 1)) + target.sum(dim=(0, 1))
    held = target.sum(dim=(0, 1)) > 0
    dice = (1 - (overlap + 1) / (total + 1))[held].mean() if bool(held.any()) else logits.sum() * 0
    return focal + dice


def dense_loss(logits: Tensor, fractions: Tensor) -> Tensor:
    """The loss of a batch: findings as above, organs by their share of the cell."""
    organs = F.binary_cross_entropy_with_logits(logits[..., :ORGANS], fractions[..., :ORGANS], reduction="none")
    # Summed over the organs: as a mean they were 25 times too weak, and after 200 steps not one was known.
    return finding_loss(logits[..., ORGANS:], fractions[..., ORGANS:]) + organs.sum(dim=-1).mean()


@torch.no_grad()
def score_cells(model: DenseModel, data: DenseData, batch_size: int = 32, threshold: float = 0.5) -> CellScore:
    """Cell F1 of a split at one threshold; cells that a finding only grazes do not count."""
    model.eval()
    counts = torch.zeros(3, FINDINGS)
    organ_counts = torch.zeros(3)
    for pixels, fractions in data.in_order(batch_size):
        predicted = torch.sigmoid(model(pixels)) > threshold
        positive, sure = positives(fractions[..., ORGANS:])
        said = predicted[..., ORGANS:] & sure
        counts += torch.stack([(said & positive), (said & ~positive), (~said & positive)]).sum(dim=(1, 2))
        organ, said = fractions[..., :ORGANS] > threshold, predicted[..., :ORGANS]
        organ_counts += torch.stack([(said & organ), (said & ~organ), (~said & organ)]).sum(dim=(1, 2, 3))
    model.train()
    occurring = (counts[0] + counts[2]) > 0
    names = [kind.value for kind in FINDING_LABELS]
    f1 = f1_score(counts)
    f1_of = {names[k]: float(f1[k]) for k in range(FINDINGS) if occurring[k]}
    macro = float(np.mean(list(f1_of.values()))) if f1_of else 0.0
    return CellScore(float(f1_score(counts.sum(dim=1))), macro, f1_of, float(f1_score(organ_counts)))


def f1_score(counts: Tensor) -> Tensor:
    """F1 from (true positive, false positive, false negative, ...): 0 where nothing was there and nothing was said.

    >>> float(f1_score(torch.tensor([3.0, 1.0, 1.0])))
    0.75
    """
    return 2 * counts[0] / (2 * counts[0] + counts[1] + counts[2]).clamp(min=1)


@dataclass(frozen=True)
class VisionSettings:
    """How long and how fast the vision stage trains: `patch_steps` on single patches, then `steps` of `batch_size` chunks."""

    steps: int = 4000
    patch_steps: int = 3000
    batch_size: int = STAGES["vision"].batch_size
    learning_rate: float = STAGES["vision"].learning_rate
    weight_decay: float = STAGES["vision"].weight_decay
    warmup_ratio: float = STAGES["vision"].warmup_ratio
    score_every: int = 250
    save_every: int = 25
    seed: int = 0


class VisionTraining:
    """One run of the vision stage; its folder holds the newest state, so that a killed run goes on where it was."""

    def __init__(self, model_folder: Path, out: Path, settings: VisionSettings):
        self.out, self.settings = out, settings
        self.out.mkdir(parents=True, exist_ok=True)
        self.mu2 = Mu2ForConditionalGeneration.from_pretrained(model_folder)
        self.processor = Mu2Processor.from_pretrained(model_folder)
        vision = self.mu2.config.vision
        self.patch = (vision.patch_size[0], vision.patch_size[1], vision.patch_size[2])
        torch.manual_seed(settings.seed)
        self.model = DenseModel(self.mu2.model.vision_tower, vision.hidden_size)
        head = model_folder / HEAD_FILE
        if head.is_file():
            self.model.head.load_state_dict(load_file(head))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.98)
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self._resume()

    def _rate(self, step: int) -> float:
        warmup = max(1, int(self.settings.warmup_ratio * self.settings.steps))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + float(np.cos(np.pi * min(1.0, (step - warmup) / max(1, self.settings.steps - warmup)))))

    def _resume(self) -> None:
        file = self.out / STATE_FILE
        if not file.is_file():
            return
        state = torch.load(file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]
        self.history = json.loads(state["history"])

    def _save(self) -> None:
        partial = self.out / f"{STATE_FILE}.partial"
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "step": self.step,
                "history": json.dumps(self.history),
            },
            partial,
        )
        partial.replace(self.out / STATE_FILE)
        write_json(self.out / HISTORY_FILE, {"settings": asdict(self.settings), "history": self.history})

    def one_step(self, data: DenseData) -> float:
        """One optimiser step; the batch is drawn by seed and step, so a resumed run sees the same ones."""
        rng = np.random.default_rng((self.settings.seed, self.step))
        pixels, fractions = data.training_batch(self.settings.batch_size, rng)
        loss = dense_loss(self.model(pixels), fractions)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return float(loss.detach())

    def warm_up(self, data: DenseData, progress: Progress) -> None:
        """Teach embedding, positions and MLPs on single patches of many volumes, before attention joins.

        A step of eight chunks holds eight bodies whose patches are alike; 4,096 patches of 160 chunks say more and cost less.
        """
        settings = self.settings
        rng = np.random.default_rng((settings.seed, 1))
        whiten_patches(self.model.tower, data.training_batch(WHITENING_CHUNKS, rng)[0])
        self.model.silence_attention()
        if not settings.patch_steps:
            return
        optimizer = torch.optim.Adam(self.model.parameters(), lr=PATCH_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PATCH_RATE, total_steps=settings.patch_steps)
        task = progress.add_task("patches", total=settings.patch_steps)
        for step in range(settings.patch_steps):
            if step % POOL_STEPS == 0:
                pixels, fractions = data.training_batch(min(POOL_CHUNKS, 4 * len(data.chunks)), rng)
                patches, targets = patchify(pixels, self.patch).flatten(0, 1), fractions.flatten(0, 1)
                holding = np.flatnonzero(positives(targets[:, ORGANS:])[0].any(dim=1).numpy())
            drawn = rng.integers(len(patches), size=min(PATCH_BATCH, len(patches)))
            if len(holding):
                drawn[: len(drawn) // 4] = rng.choice(holding, len(drawn) // 4)
            index = torch.from_numpy(drawn)
            logits = self.model.patchwise(patches[index], index % fractions.shape[1])
            loss = dense_loss(logits[None], targets[index][None])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], 1.0)
            optimizer.step()
            schedule.step()
            progress.update(task, completed=step + 1)
        progress.console.print(f"after {settings.patch_steps} steps on patches: loss {float(loss.detach()):.3f}")

    def run(self, data: DenseData, held_out: DenseData, progress: Progress, stop_at: int | None = None) -> None:
        """Train to the end (or to step `stop_at`), scoring the held-out split and saving on the way."""
        if self.step == 0:
            self.warm_up(data, progress)
        if self.step == 0:
            score = score_cells(self.model, held_out)
            self.history.append({"step": 0, **asdict(score)})
            progress.console.print(f"step 0 {score.line()}")
            self._save()
        task = progress.add_task("vision", total=self.settings.steps, completed=self.step)
        losses: list[float] = []
        while self.step < min(self.settings.steps, stop_at or self.settings.steps):
            losses.append(self.one_step(data))
            progress.update(task, completed=self.step)
            if self.step % self.settings.score_every == 0 or self.step == self.settings.steps:
                score = score_cells(self.model, held_out)
                self.history.append({"step": self.step, "loss": float(np.mean(losses)), **asdict(score)})
                progress.console.print(f"step {self.step} loss {np.mean(losses):.3f} {score.line()}")
                losses = []
                self._save()
            elif self.step % self.settings.save_every == 0:
                self._save()
        self.export()

    def export(self) -> None:
        """Write the checkpoint folder: the μ²LLM with the trained tower, and the dense head beside it."""
        self.mu2.save_pretrained(self.out)
        self.processor.save_pretrained(self.out)
        save_file(self.model.head.state_dict(), self.out / HEAD_FILE)


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
        chosen = [case for case in cases if case.split == split]
        splits[split] = DenseData(chosen, cache, training.patch)
    training.run(splits["train"], splits["validation"], progress)
    return training
