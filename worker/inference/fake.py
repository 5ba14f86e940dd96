"""Canned text in place of a model, for tests and for trying the plumbing; it says so in every report."""

from collections.abc import Sequence

from worker.core.errors import ModelError
from worker.core.report import Provenance, Section, Sentence
from worker.core.settings import ModelSettings
from worker.inference.reporter import CtVolume, Deadline, Drafted, Explained, questions

CANNED = "Canned text of the fake reporter; no model has seen this study."


class FakeReporter:
    """Writes the same sentences about the same volumes, whatever they show."""

    name = "fake"
    version = "1"
    weights_sha256 = ""
    is_broken = False

    def __init__(self, model: ModelSettings) -> None:
        self._model = model

    def draft(self, volumes: Sequence[CtVolume], deadline: Deadline) -> Drafted:
        """Names what it was given: slices, rows and columns; raises `ModelBusyError` past the deadline."""
        deadline.check()
        asked = questions(volumes, self._model)
        sentences = [Sentence(Section.FINDINGS, CANNED)]
        for question in asked:
            slices, rows, columns = volumes[question.volume].hu.shape
            text = f"The volume has {slices} slices of {rows} by {columns} voxels."
            sentences.append(Sentence(Section.FINDINGS, text, confidence=0.0, region=question.region))
        sentences.append(Sentence(Section.IMPRESSION, CANNED))
        provenance = Provenance(self.name, self.version, self.weights_sha256, prompt=self._model.question)
        return Drafted(tuple(sentences), provenance)

    def explain(self, volumes: Sequence[CtVolume], deadline: Deadline) -> list[Explained]:
        """Raises `ModelError`: canned text comes from nowhere."""
        raise ModelError("the fake reporter looks at nothing, so there is no evidence")

    def close(self) -> None:
        """Holds nothing."""
