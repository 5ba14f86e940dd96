"""The values a drafter returns."""

from dataclasses import dataclass, field

from mu2_model.evidence import SentenceEvidence
from mu2_model.evidence_slice import Point


@dataclass(frozen=True)
class DraftSentence:
    """One sentence: its section, its text, the mean log-probability of its tokens and which tokens [first, last) they are."""

    section: str
    text: str
    confidence: float
    token_range: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Draft:
    """One drafted report; `stage_seconds` are those of the whole batch it was drafted in.

    `token_ids` are the generated tokens without the end token; `evidence` and `best_slices`, one entry per sentence, only
    when asked for. A best slice is a point of it in RAS millimetres (see `mu2_model.evidence_slice`), None where there is none.
    `novelty` says how far the volume is from those the model was trained on, 1 at the threshold; None when the checkpoint
    does not know (see `mu2_model.novelty`).
    """

    sentences: tuple[DraftSentence, ...]
    text: str
    prompt_tokens: int
    generated_tokens: int
    truncated: bool
    repairs: list[str] = field(default_factory=list)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    token_ids: tuple[int, ...] = ()
    evidence: tuple[SentenceEvidence, ...] | None = None
    best_slices: tuple[Point | None, ...] | None = None
    novelty: float | None = None

    @property
    def unlike_training(self) -> bool:
        """Whether the volume is so unlike the training data that the text may be invented."""
        return self.novelty is not None and self.novelty > 1


@dataclass(frozen=True)
class Progress:
    """Where a batch is: `done` of `total` volumes or tokens in a stage; `texts` holds the drafts so far."""

    stage: str
    done: int
    total: int
    texts: tuple[str, ...] = ()
