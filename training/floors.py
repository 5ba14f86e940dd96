"""Two floors that a model must beat: the best answer without an image, and a logistic model on the histogram of HU.

Neither knows where anything is. What they reach on held-out phantoms is what the benchmark gives away for nothing, and every
table shows it beside the model.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.metrics.findings import Stated, compare, micro_f1

Key = tuple[str, str]
"""(type, side) of a finding."""
BIN_EDGES_HU = np.concatenate([[-2000.0], np.arange(-1010.0, 260.0, 10.0), np.arange(260.0, 1300.0, 80.0), [5000.0]])
RIDGE = 3.0
"""Weight of the penalty on squared coefficients; features have deviation 1."""
NEWTON_STEPS = 25
THRESHOLDS = np.linspace(0.02, 0.8, 40)


def histogram(hu: NDArray[np.int16]) -> NDArray[np.float64]:
    """Log share of the voxels in each HU bin of one volume; what lies beyond the outer edges counts in the outer bins."""
    lowest, highest = int(BIN_EDGES_HU[0]), int(BIN_EDGES_HU[-1])
    whole = np.clip(np.floor(hu), lowest, highest - 1).astype(np.int64) - lowest
    # The edges are whole HU: counting every HU and adding up is twenty times faster than sorting voxels into bins.
    each = np.bincount(whole.ravel(), minlength=highest - lowest)
    counts = np.add.reduceat(each, BIN_EDGES_HU[:-1].astype(np.int64) - lowest)
    return np.asarray(np.log10(counts / hu.size + 1e-6))


def keys_of(truths: Sequence[Sequence[Stated]]) -> list[Key]:
    """Every (type, side) of the truths, the most frequent first."""
    counted = Counter(key for truth in truths for key in {finding.key for finding in truth})
    return [key for key, _ in sorted(counted.items(), key=lambda item: (-item[1], item[0]))]


def score(truths: Sequence[Sequence[Stated]], said: Sequence[Sequence[Key]]) -> float:
    """Finding micro-F1 of predicted (type, side)."""
    return micro_f1([compare(t, [Stated(*key) for key in keys]) for t, keys in zip(truths, said, strict=True)])


@dataclass(frozen=True)
class TextOnly:
    """A model without an image: it says the same in every case that is asked about with the same words."""

    answers: dict[str, tuple[Key, ...]]

    def predict(self, questions: Sequence[str]) -> list[tuple[Key, ...]]:
        """Its answer to each question; nothing to one that it has never met."""
        return [self.answers.get(question, ()) for question in questions]


def fit_text_only(questions: Sequence[str], truths: Sequence[Sequence[Stated]]) -> TextOnly:
    """For each question the set of most frequent findings with the highest micro-F1 on the training cases."""
    answers = {}
    for question in sorted(set(questions)):
        asked = [truth for other, truth in zip(questions, truths, strict=True) if other == question]
        ranked = keys_of(asked)
        scores = [score(asked, [ranked[:number]] * len(asked)) for number in range(len(ranked) + 1)]
        answers[question] = tuple(ranked[: int(np.argmax(scores))])
    return TextOnly(answers)


def fit_logistic(
    features: NDArray[np.float64], present: NDArray[np.bool_], ridge: float = RIDGE
) -> NDArray[np.float64]:
    """Coefficients of a ridge-penalised logistic regression by Newton's method.

    `features` (cases, columns) holds a column of ones, which is not penalised, as its last.
    """
    penalty = np.full(features.shape[1], ridge)
    penalty[-1] = 1e-6
    weights = np.zeros(features.shape[1])
    for _ in range(NEWTON_STEPS):
        probability = 1.0 / (1.0 + np.exp(-np.clip(features @ weights, -30.0, 30.0)))
        gradient = features.T @ (probability - present) + penalty * weights
        curvature = (features * (probability * (1.0 - probability))[:, None]).T @ features + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        weights -= step
        if np.abs(step).max() < 1e-6:
            break
    return weights


@dataclass(frozen=True)
class HistogramModel:
    """One logistic regression for each (type, side) on standardised histograms, with one common threshold."""

    keys: tuple[Key, ...]
    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]
    weights: NDArray[np.float64]
    threshold: float

    def probabilities(self, histograms: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probability of every key (cases, keys)."""
        scaled = (histograms - self.mean) / self.deviation
        features = np.hstack([scaled, np.ones((len(scaled), 1))])
        return np.asarray(1.0 / (1.0 + np.exp(-np.clip(features @ self.weights.T, -30.0, 30.0))))

    def predict(self, histograms: NDArray[np.float64]) -> list[tuple[Key, ...]]:
        """Findings whose probability reaches the threshold."""
        likely = self.probabilities(histograms) >= self.threshold
        return [tuple(key for key, yes in zip(self.keys, row, strict=True) if yes) for row in likely]


def fit_histogram_model(
    histograms: NDArray[np.float64], truths: Sequence[Sequence[Stated]], tuning_share: float = 0.25
) -> HistogramModel:
    """Fit on the first part of the training cases, choose the threshold with the best micro-F1 on the rest.

    Raises ValueError with fewer than 8 cases.
    """
    if len(truths) < 8:
        raise ValueError(f"a histogram model needs 8 cases or more, not {len(truths)}")
    fitted = len(truths) - max(1, int(tuning_share * len(truths)))
    keys = tuple(keys_of(truths[:fitted]))
    mean = histograms[:fitted].mean(axis=0)
    deviation = np.maximum(histograms[:fitted].std(axis=0), 1e-3)
    features = np.hstack([(histograms[:fitted] - mean) / deviation, np.ones((fitted, 1))])
    weights = []
    for key in keys:
        present = np.array([any(finding.key == key for finding in truth) for truth in truths[:fitted]])
        weights.append(fit_logistic(features, present))
    stacked = np.array(weights).reshape(len(keys), features.shape[1])
    models = [HistogramModel(keys, mean, deviation, stacked, float(threshold)) for threshold in THRESHOLDS]
    scores = [score(truths[fitted:], model.predict(histograms[fitted:])) for model in models]
    return models[int(np.argmax(scores))]
