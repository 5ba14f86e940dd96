"""BERTScore from a local model folder: the raw F, the rescaled F, and the floor that unrelated texts reach."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bert_score import BERTScorer
from transformers import AutoConfig

from training.errors import TrainingError

ROBERTA_LARGE_LAYER = 17
ROBERTA_LARGE_FLOOR = 0.8315
"""Mean F of random sentence pairs under roberta-large, layer 17: what bert-score's own baseline file holds for English."""


class BertModelMissingError(TrainingError, LookupError):
    """BERTScore needs a model folder on this machine; the message says which."""


@dataclass(frozen=True)
class BertScores:
    """F of every case, and the same rescaled so that the floor is 0."""

    raw: list[float]
    rescaled: list[float]
    floor: float


def bert_scores(
    references: Sequence[str], candidates: Sequence[str], folder: Path, shuffled_floor: bool = False
) -> BertScores:
    """BERTScore F by bert-score with the model in `folder`.

    The floor is the published one of roberta-large, or with `shuffled_floor` the mean F of candidates against other cases'
    references, which any model has. Empty drafts score 0. BertModelMissingError when the folder holds no model.
    """
    if not (folder / "config.json").is_file():
        raise BertModelMissingError(f"no model in {folder}: copy roberta-large there, or leave BERTScore out")
    depth = int(AutoConfig.from_pretrained(folder).num_hidden_layers)
    scorer = BERTScorer(model_type=str(folder), num_layers=min(ROBERTA_LARGE_LAYER, depth), rescale_with_baseline=False)
    raw = _scores(scorer, references, candidates)
    floor = ROBERTA_LARGE_FLOOR
    if shuffled_floor:
        others = _scores(scorer, [*references[1:], references[0]], candidates)
        floor = sum(others) / len(others)
    return BertScores(raw, [(score - floor) / (1 - floor) for score in raw], floor)


def _scores(scorer: BERTScorer, references: Sequence[str], candidates: Sequence[str]) -> list[float]:
    present = [index for index, text in enumerate(candidates) if text.strip()]
    scores = [0.0] * len(candidates)
    if present:
        _, _, f = scorer.score([candidates[i] for i in present], [references[i] for i in present])
        for index, value in zip(present, f.tolist(), strict=True):
            scores[index] = float(value)
    return scores
