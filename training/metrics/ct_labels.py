"""The 18 abnormality labels of CT-RATE, read from reports by a local RadBERT, and their F1 (Hamamci et al. 2024)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from training.errors import TrainingError

LABELS = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
)
"""As the columns of the published CSV are named, in their order."""
THRESHOLD = 0.5
LONGEST_TOKENS = 512
BATCH = 16


class LabelModelMissingError(TrainingError, LookupError):
    """The 18 labels need a classifier in a folder on this machine; the message says what is wrong with the one named."""


@dataclass(frozen=True)
class LabelClassifier:
    """A sequence classifier with a sigmoid a label."""

    model: Any
    tokenizer: Any
    columns: tuple[int, ...]  # where the model has each of LABELS

    @classmethod
    def from_pretrained(cls, folder: Path, device: str = "cpu") -> "LabelClassifier":
        """A Hugging Face folder such as RadBERT fine-tuned on CT-RATE; LabelModelMissingError when it is none for these labels.

        Labels are found by their names; a model without names must have exactly 18, in the published order.
        """
        if not (folder / "config.json").is_file():
            raise LabelModelMissingError(f"no model in {folder}: copy a RadBERT fine-tuned on CT-RATE there")
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval().to(device)
        names = [str(model.config.id2label[index]).casefold().replace("_", " ") for index in range(model.num_labels)]
        columns: list[int] = []
        if all(label.casefold() in names for label in LABELS):
            columns = [names.index(label.casefold()) for label in LABELS]
        elif model.num_labels == len(LABELS) and all(name.startswith("label ") for name in names):
            columns = list(range(len(LABELS)))
        if not columns:
            raise LabelModelMissingError(
                f"{folder.name} has {model.num_labels} labels that are not the 18 of CT-RATE: name them in its id2label"
            )
        return cls(model, AutoTokenizer.from_pretrained(folder), tuple(columns))

    @torch.inference_mode()
    def read(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """(n, 18): which labels each report states; an empty one states none."""
        said = np.zeros((len(texts), len(LABELS)), dtype=bool)
        present = [index for index, text in enumerate(texts) if text.strip()]
        for start in range(0, len(present), BATCH):
            rows = present[start : start + BATCH]
            inputs = self.tokenizer(
                [texts[row] for row in rows],
                padding=True,
                truncation=True,
                max_length=min(LONGEST_TOKENS, self.tokenizer.model_max_length),
                return_tensors="pt",
            ).to(self.model.device)
            probability = torch.sigmoid(self.model(**inputs).logits.float())[:, list(self.columns)]
            said[rows] = (probability > THRESHOLD).cpu().numpy()
        return said


def published(classes: Mapping[str, int] | None) -> NDArray[np.bool_] | None:
    """(18,) from the labels of a manifest's case; None when it does not hold all of them.

    >>> published({"Cardiomegaly": 1}) is None
    True
    """
    if classes is None or any(label not in classes for label in LABELS):
        return None
    return np.array([bool(classes[label]) for label in LABELS])


def label_f1(truth: NDArray[np.bool_], said: NDArray[np.bool_]) -> dict[str, float]:
    """F1 of each label that occurs in the truth, over (n, 18)."""
    found, wrong = (truth & said).sum(axis=0), (truth ^ said).sum(axis=0)
    occurring = np.flatnonzero(truth.any(axis=0))
    return {LABELS[column]: float(2 * found[column] / (2 * found[column] + wrong[column])) for column in occurring}


def micro_f1(truth: NDArray[np.bool_], said: NDArray[np.bool_]) -> float:
    """F1 over all labels at once; 0 where nothing was there and nothing was said."""
    found, wrong = int((truth & said).sum()), int((truth ^ said).sum())
    return 2 * found / (2 * found + wrong) if found + wrong else 0.0
