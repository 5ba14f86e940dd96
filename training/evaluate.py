"""Scores of a checkpoint, or of any file of drafts, on a manifest: one table as Markdown and one as JSON.

A failed generation is an empty draft: it scores 0 everywhere and is counted. Every figure is a function of the cases, so
intervals and tests need no second implementation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.green import Judge, Verdict
from training.metrics import ct_labels
from training.metrics import findings as finding_scores
from training.metrics import text as text_scores
from training.metrics.bertscore import bert_scores
from training.metrics.ct_labels import LabelClassifier
from training.metrics.findings import CaseCounts, Stated, compare
from training.metrics.statistics import bootstrap_interval, paired_randomisation

Read = Callable[[str], Sequence[Stated]]


@dataclass(frozen=True)
class ScoredCase:
    """One case with everything that is counted on it; None where a score is not defined or was not asked for."""

    case_id: str
    reference: str
    candidate: str
    truth: tuple[Stated, ...] | None
    counts: CaseCounts | None
    shuffled_counts: CaseCounts | None
    verdict: Verdict | None
    judged: bool
    figures: dict[str, float] = field(default_factory=dict)
    ct_labels: tuple[NDArray[np.bool_], NDArray[np.bool_]] | None = None
    """CT-RATE's 18 labels: (18,) as they are true and (18,) as the draft states them."""


def mean_of(name: str) -> Callable[[Sequence[ScoredCase]], float | None]:
    """A score that is the mean of a figure over the cases that have it."""

    def score(cases: Sequence[ScoredCase]) -> float | None:
        values = [case.figures[name] for case in cases if name in case.figures]
        return float(np.mean(values)) if values else None

    return score


def _counts(cases: Sequence[ScoredCase]) -> list[CaseCounts]:
    return [case.counts for case in cases if case.counts is not None]


def finding_micro_f1(cases: Sequence[ScoredCase]) -> float | None:
    """F1 over all (type, side); None when no truth is known."""
    counts = _counts(cases)
    return finding_scores.micro_f1(counts) if counts else None


def finding_macro_f1(cases: Sequence[ScoredCase]) -> float | None:
    """Mean F1 over types; None when no truth is known."""
    counts = _counts(cases)
    return finding_scores.macro_f1(counts) if counts else None


def shuffled_micro_f1(cases: Sequence[ScoredCase]) -> float | None:
    """F1 of the drafts against the truth of other cases: what the prior alone is worth."""
    counts = [case.shuffled_counts for case in cases if case.shuffled_counts is not None]
    return finding_scores.micro_f1(counts) if counts else None


def green(cases: Sequence[ScoredCase]) -> float | None:
    """Mean GREEN over the answers that could be parsed and the failed drafts, which score 0."""
    scores = [case.verdict.score for case in cases if case.verdict is not None]
    scores += [0.0 for case in cases if case.judged and not case.candidate]
    return float(np.mean(scores)) if scores else None


def abnormal_only(
    score: Callable[[Sequence[ScoredCase]], float | None],
) -> Callable[[Sequence[ScoredCase]], float | None]:
    """A score on the cases that have a finding."""
    return lambda cases: score([case for case in cases if case.truth])


def normal_false_positive_rate(cases: Sequence[ScoredCase]) -> float | None:
    """Share of normal cases with an invented finding."""
    known = [(case.truth, case.counts) for case in cases if case.truth is not None and case.counts is not None]
    return finding_scores.false_positive_rate_on_normals([t for t, _ in known], [c for _, c in known])


def _ct_labels(cases: Sequence[ScoredCase]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]] | None:
    pairs = [case.ct_labels for case in cases if case.ct_labels is not None]
    return (np.stack([true for true, _ in pairs]), np.stack([said for _, said in pairs])) if pairs else None


def ct_label_f1(cases: Sequence[ScoredCase]) -> dict[str, float]:
    """F1 of each of CT-RATE's labels that occurs in the truth."""
    labels = _ct_labels(cases)
    return {} if labels is None else ct_labels.label_f1(*labels)


def ct_label_macro_f1(cases: Sequence[ScoredCase]) -> float | None:
    """Mean F1 over CT-RATE's labels that occur in the truth; None when none does or they were not read."""
    f1 = ct_label_f1(cases)
    return float(np.mean(list(f1.values()))) if f1 else None


def ct_label_micro_f1(cases: Sequence[ScoredCase]) -> float | None:
    """F1 over all of CT-RATE's labels at once; None when they were not read."""
    labels = _ct_labels(cases)
    return None if labels is None else ct_labels.micro_f1(*labels)


SCORES: dict[str, Callable[[Sequence[ScoredCase]], float | None]] = {
    "finding_micro_f1": finding_micro_f1,
    "finding_macro_f1": finding_macro_f1,
    "finding_micro_f1_abnormal_only": abnormal_only(finding_micro_f1),
    "side_accuracy": lambda cases: finding_scores.side_accuracy(_counts(cases)),
    "place_accuracy": lambda cases: finding_scores.place_accuracy(_counts(cases)),
    "size_accuracy": lambda cases: finding_scores.size_accuracy(_counts(cases)),
    "normal_false_positive_rate": normal_false_positive_rate,
    "shuffled_finding_micro_f1": shuffled_micro_f1,
    "green": green,
    "rouge1": mean_of("rouge1"),
    "rouge2": mean_of("rouge2"),
    "rougeL": mean_of("rougeL"),
    "bleu1": mean_of("bleu1"),
    "meteor": mean_of("meteor"),
    "bertscore": mean_of("bertscore"),
    "bertscore_rescaled": mean_of("bertscore_rescaled"),
    "ct_label_macro_f1": ct_label_macro_f1,
    "ct_label_micro_f1": ct_label_micro_f1,
}
"""Every score with an interval, by the key it has in the JSON."""
FINDING_SCORES = (
    "finding_micro_f1",
    "finding_macro_f1",
    "finding_micro_f1_abnormal_only",
    "side_accuracy",
    "normal_false_positive_rate",
    "shuffled_finding_micro_f1",
)
"""Scores of whoever names findings and writes no text, as the floors do."""


def finding_figures(name: str, cases: Sequence[ScoredCase], resamples: int) -> dict[str, Any]:
    """The finding scores alone, under the keys that a model's have."""
    intervals = {key: bootstrap_interval(cases, SCORES[key], resamples) for key in FINDING_SCORES}
    return {
        "name": name,
        "cases": len(cases),
        **{key: SCORES[key](cases) for key in FINDING_SCORES},
        **by_kind_and_size(cases),
        "intervals": {key: interval for key, interval in intervals.items() if interval is not None},
    }


def by_kind_and_size(cases: Sequence[ScoredCase]) -> dict[str, dict[str, Any]]:
    """F1 of every type, F1 and recall of every band of size."""
    counts = _counts(cases)
    return {
        "finding_f1_by_type": finding_scores.kind_f1(counts),
        "finding_f1_by_size": finding_scores.f1_by_size(counts),
        "recall_by_size": finding_scores.recall_by_size(counts),
    }


@dataclass(frozen=True)
class Evaluation:
    """All that was counted on one set of drafts."""

    name: str
    cases: tuple[ScoredCase, ...]
    notes: tuple[str, ...]
    judge: str

    def scores(self) -> dict[str, float | None]:
        """Every score by its key."""
        return {name: score(self.cases) for name, score in SCORES.items()}

    def figures(self, command: str, resamples: int) -> dict[str, Any]:
        """The JSON of the evaluation."""
        failed = sum(1 for case in self.cases if not case.candidate)
        judged = [case for case in self.cases if case.judged and case.candidate]
        unparsed = sum(1 for case in judged if case.verdict is None)
        drafts = {case.candidate for case in self.cases}
        intervals = {name: bootstrap_interval(self.cases, score, resamples) for name, score in SCORES.items()}
        return {
            "name": self.name,
            "command": command,
            "cases": len(self.cases),
            "failed": failed,
            "judge": self.judge,
            "green_unparsed_rate": unparsed / len(judged) if judged else None,
            **self.scores(),
            "bleu4": text_scores.bleu4([c.reference for c in self.cases], [c.candidate for c in self.cases]),
            "distinct_report_ratio": len(drafts) / len(self.cases),
            **by_kind_and_size(self.cases),
            "ct_label_f1": ct_label_f1(self.cases),
            "intervals": {name: interval for name, interval in intervals.items() if interval is not None},
            "notes": list(self.notes),
        }

    def against(self, other: "Evaluation", name: str = "finding_micro_f1") -> tuple[float, float]:
        """Difference to another system in a score, and its p by paired randomisation."""
        return paired_randomisation(self.cases, other.cases, SCORES[name])


@dataclass(frozen=True)
class Options:
    """What to count: a reader of phantom reports, a judge, a folder for BERTScore, a reader of CT-RATE's labels."""

    read: Read | None = None
    judge: Judge | None = None
    bert_folder: Path | None = None
    classifier: LabelClassifier | None = None
    shuffle_seed: int = 0


def evaluate(
    name: str,
    references: Sequence[tuple[str, str, Sequence[Stated] | None]],
    candidates: Sequence[str],
    options: Options,
    classes: Sequence[Mapping[str, int] | None] = (),
) -> Evaluation:
    """Score drafts: `references` are (case id, text, true findings or None), `candidates` the drafts in the same order.

    `classes` are the whole-volume labels of the cases as a data set publishes them, in the same order or empty.
    """
    notes = []
    use_meteor = True
    try:
        text_scores.wordnet()
    except text_scores.WordNetMissingError as missing:
        use_meteor = False
        notes.append(f"METEOR left out: {missing}")
    figures = [_text_figures(ref, cand, use_meteor) for (_, ref, _), cand in zip(references, candidates, strict=True)]
    if options.bert_folder is not None:
        bert = bert_scores([text for _, text, _ in references], candidates, options.bert_folder)
        notes.append(f"BERTScore rescaled by a floor of {bert.floor:.4f}")
        for row, raw, rescaled in zip(figures, bert.raw, bert.rescaled, strict=True):
            row |= {"bertscore": raw, "bertscore_rescaled": rescaled}
    said = [tuple(options.read(text)) if options.read else () for text in candidates]
    labels, note = _read_labels([text for _, text, _ in references], candidates, classes, options.classifier)
    notes += note
    other = derangement(len(candidates), options.shuffle_seed)
    cases = []
    for index, ((case_id, reference, truth), candidate) in enumerate(zip(references, candidates, strict=True)):
        known = None if truth is None or options.read is None else tuple(truth)
        cases.append(
            ScoredCase(
                case_id=case_id,
                reference=reference,
                candidate=candidate,
                truth=known,
                counts=None if known is None else compare(known, said[index]),
                shuffled_counts=None if known is None else compare(known, said[other[index]]),
                verdict=None if options.judge is None or not candidate else options.judge.judge(reference, candidate),
                judged=options.judge is not None,
                figures=figures[index],
                ct_labels=labels[index] if labels else None,
            )
        )
    return Evaluation(name, tuple(cases), tuple(notes), "" if options.judge is None else options.judge.name)


def _read_labels(
    references: Sequence[str],
    candidates: Sequence[str],
    classes: Sequence[Mapping[str, int] | None],
    classifier: LabelClassifier | None,
) -> tuple[list[tuple[NDArray[np.bool_], NDArray[np.bool_]]], list[str]]:
    """(true, stated) labels of every case and what to note about them; the truth is the published one where it is known."""
    known = [ct_labels.published(row) for row in classes]
    if classifier is None:
        reason = "CT-RATE's 18 labels left out: name a folder of RadBERT by --radbert"
        return [], [reason] if any(row is not None for row in known) else []
    said, read = classifier.read(candidates), classifier.read(references)
    if known and all(row is not None for row in known):
        return [(true, drafted) for true, drafted in zip(known, said, strict=True) if true is not None], []
    return list(zip(read, said, strict=True)), ["CT-RATE's 18 labels are those that RadBERT reads in the references"]


def _text_figures(reference: str, candidate: str, use_meteor: bool) -> dict[str, float]:
    figures = {"bleu1": text_scores.bleu1(reference, candidate), **text_scores.rouge(reference, candidate)}
    if use_meteor:
        figures["meteor"] = text_scores.meteor(reference, candidate) if candidate else 0.0
    return figures


def derangement(count: int, seed: int = 0) -> list[int]:
    """For every case another one: a shuffled ring, so that no case meets its own draft (one case alone does)."""
    ring = np.random.default_rng(seed).permutation(count).tolist()
    following = {case: ring[(place + 1) % count] for place, case in enumerate(ring)}
    return [following[case] for case in range(count)]
