"""What a draft says about the model that wrote it, before the model's own sentences.

A notice is written by the system: it is shown and sent like any other sentence, and it is neither learned from nor counted as
words of the model.
"""

from collections.abc import Mapping
from typing import Any

UNTRAINED = "Untrained model with random weights: this text says nothing about the study."
SYNTHETIC_ONLY = "Model trained on synthetic CTs alone: this text says nothing about a patient."
UNLIKE_TRAINING = "This CT is unlike what the model was trained on; its text may be invented."

NOTICES = frozenset({UNTRAINED, SYNTHETIC_ONLY, UNLIKE_TRAINING})

_OF_MODEL = {"nothing": UNTRAINED, "phantoms": SYNTHETIC_ONLY}
"""By the checkpoint's `trained_on`; a model that was trained on patients needs none."""


def of_draft(trained_on: str, unlike_training: bool) -> list[str]:
    """The notices of a draft, in the order in which they stand."""
    found = [_OF_MODEL[trained_on]] if trained_on in _OF_MODEL else []
    return [*found, UNLIKE_TRAINING] if unlike_training else found


def saw_no_patient(provenance: Mapping[str, Any] | None) -> bool:
    """Whether the model that wrote a draft was trained on no patient, by the draft's stored provenance."""
    return (provenance or {}).get("decoding", {}).get("trained_on") in _OF_MODEL
