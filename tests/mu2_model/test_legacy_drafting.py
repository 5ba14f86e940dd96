"""A converted published checkpoint drafts like any other."""

from pathlib import Path

import numpy as np
import pytest

from mu2_model.convert_weights import convert_checkpoint
from mu2_model.drafter import ReportDrafter
from mu2_model.inspection import model_info
from tests.mu2_model.published_reference import Published, write_checkpoint
from tests.mu2_model.small_volumes import body

SMALL = Published(
    layers=1, vision_layers=1, image_size=(8, 32, 32), patch_size=(2, 8, 8), vocabulary=60, queries=6, selected=8
)


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> ReportDrafter:
    folder = tmp_path_factory.mktemp("converted")
    tensors = {name: tensor.float() for name, tensor in SMALL.tensors().items()}
    write_checkpoint(folder / "src", SMALL, tensors)
    convert_checkpoint(folder / "src", folder / "dst")
    return ReportDrafter.from_pretrained(folder / "dst")


def test_a_converted_checkpoint_drafts_without_an_affine(drafter: ReportDrafter) -> None:
    (draft,) = drafter.draft([(body(), None)], ["w1 w2 w3"], max_new_tokens=8)
    assert draft.generated_tokens > 0 and draft.prompt_tokens == SMALL.queries + 3


def test_prompts_of_different_length_are_drafted_as_alone(drafter: ReportDrafter) -> None:
    volumes = [(body(), None), (np.flip(body(), axis=1).copy(), None)]
    questions = ["w1 w2 w3", "w7 w8"]
    together = drafter.draft(volumes, questions, max_new_tokens=8)
    alone = [drafter.draft([v], [q], max_new_tokens=8)[0] for v, q in zip(volumes, questions, strict=True)]
    assert [draft.token_ids for draft in together] == [draft.token_ids for draft in alone]


def test_evidence_of_a_volume_without_affine_has_no_place_in_millimetres(drafter: ReportDrafter) -> None:
    (draft,) = drafter.draft([(body(), None)], ["w1 w2 w3"], max_new_tokens=8, evidence=True)
    assert draft.evidence is not None and all(evidence.to_ras is None for evidence in draft.evidence)


def test_info_says_what_was_converted(drafter: ReportDrafter, tmp_path: Path) -> None:
    info = model_info(drafter.folder)
    assert (info["preset"], info["model_version"], info["positions"]) == ("legacy", "published", "relative")
