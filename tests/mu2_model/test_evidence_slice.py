"""The best slice of a sentence: found with the draft, in the patient's space."""

import numpy as np
import pytest
import torch

from mu2_model import drafting_stages, evidence_slice
from mu2_model.drafter import ReportDrafter
from mu2_model.evidence_slice import best_slices
from mu2_model.untrained import make_untrained
from tests.mu2_model.small_volumes import affine, body

QUESTION = "Describe the findings."


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> ReportDrafter:
    return ReportDrafter.from_pretrained(make_untrained(tmp_path_factory.mktemp("untrained")))


def test_best_slices_come_only_when_asked_for_and_are_timed(drafter: ReportDrafter) -> None:
    (plain,) = drafter.draft([(body(), affine())], [QUESTION], max_new_tokens=12)
    (asked,) = drafter.draft([(body(), affine())], [QUESTION], max_new_tokens=12, best_slices=True)
    assert plain.best_slices is None and "slices" not in plain.stage_seconds
    assert asked.text == plain.text and asked.stage_seconds["slices"] > 0
    assert asked.best_slices is not None and len(asked.best_slices) == len(asked.sentences) > 0
    assert None not in asked.best_slices


def test_best_slice_lies_in_the_image_and_not_in_its_padding(drafter: ReportDrafter) -> None:
    hu, to_ras = body((8, 80, 96)), affine(4.0)
    (draft,) = drafter.draft([(hu, to_ras)], [QUESTION], max_new_tokens=12, best_slices=True)
    for point in draft.best_slices or ():
        assert point is not None
        index = np.linalg.solve(to_ras, [*point, 1.0])[:3]
        assert (index > -0.5).all() and (index < np.array(hu.shape) - 0.5).all()


def test_best_slice_goes_through_the_middle_of_the_box_with_the_largest_pull(
    drafter: ReportDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = drafter.processor.image_processor.prepare(body(), affine()).grid

    def first_and_last(*given: object) -> list[torch.Tensor]:
        boxes = torch.eye(drafter.model.config.tokens_per_chunk)
        return [boxes[None, 0], boxes[None, -1]]

    monkeypatch.setattr(evidence_slice, "pulls", first_and_last)
    monkeypatch.setattr(
        drafting_stages, "best_slices", lambda *given: best_slices(*given[:6], [(0, 1), (1, 2)], given[7])
    )
    (draft,) = drafter.draft([(body(), affine())], [QUESTION], max_new_tokens=12, best_slices=True)
    # Boxes of 2 x 2 x 2 patches of (4, 16, 16) voxels: the first of all, and the last of a grid of 2 x 2 x 2.
    ends = np.minimum(np.array([15.0, 63.0, 63.0]), np.array(grid.shape) - 1.0)
    patches = grid.patch_centres_mm((4, 16, 16))[0].reshape(4, 4, 4, 3)
    assert draft.best_slices is not None and draft.best_slices[0] is not None and draft.best_slices[1] is not None
    assert np.allclose(draft.best_slices[0], patches[:2, :2, :2].mean(axis=(0, 1, 2)))
    index = grid.ras_to_index(np.array(draft.best_slices[1]))
    assert (index > [7, 31, 31]).all() and (index <= ends).all()


def test_pull_is_the_slope_of_the_sentence_by_the_refined_token(drafter: ReportDrafter) -> None:
    (draft,) = drafter.draft([(body(), affine())], [QUESTION], max_new_tokens=12)
    prepared = drafter.processor.image_processor.prepare(body(), affine())
    text = dict(drafter.processor.encode_text([drafter.processor.build_prompt(QUESTION)], [QUESTION]).items())
    model, ids, ranges = drafter.model.model, torch.tensor(draft.token_ids), [s.token_range for s in draft.sentences]
    with torch.inference_mode():
        tokens = model.encode_chunks(prepared.pixel_values[None], prepared.chunk_mask[None])[0]
    found = evidence_slice.pulls(drafter.model, tokens, prepared.chunk_mask, text, ids, ranges, lambda: False)
    box, (first, last) = 3, ranges[-1]

    def log_probability(step: float, axis: int) -> float:
        def move(module: torch.nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            moved = output.clone()
            moved[0, 0, box, axis] += step
            return moved

        with torch.inference_mode(), model.visual_tokenizer.refiner.register_forward_hook(move):
            features = model.gather_tokens(
                tokens[None], text["question_ids"], text["question_attention_mask"], prepared.chunk_mask[None]
            )
            said = evidence_slice.token_log_probabilities(drafter.model, features, text, ids)
        return float(said[first:last].double().sum())

    slopes = [(log_probability(0.5, axis) - log_probability(-0.5, axis)) for axis in range(tokens.shape[-1])]
    assert len(found) == len(ranges) and float(found[-1][0, box]) == pytest.approx(np.linalg.norm(slopes), rel=0.05)


def test_best_slices_are_the_same_alone_and_in_a_batch(drafter: ReportDrafter) -> None:
    volumes, questions = (
        [(body(), affine()), (body((8, 80, 96)), affine(4.0))],
        [QUESTION, "Describe the chest, all of it."],
    )
    together = drafter.draft(volumes, questions, max_new_tokens=12, best_slices=True)
    for volume, question, draft in zip(volumes, questions, together, strict=True):
        (alone,) = drafter.draft([volume], [question], max_new_tokens=12, best_slices=True)
        assert alone.text == draft.text and alone.best_slices is not None and draft.best_slices is not None
        assert np.allclose(np.array(alone.best_slices), np.array(draft.best_slices))


@pytest.mark.parametrize("why", ["memory", "time"])
def test_draft_without_the_memory_or_the_time_for_slices_has_none_and_is_not_lost(
    drafter: ReportDrafter, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    def short(*given: object) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError

    if why == "memory":
        monkeypatch.setattr(evidence_slice, "pulls", short)
    else:
        monkeypatch.setattr(drafting_stages.Deadline, "has_passed", lambda deadline: True)
        monkeypatch.setattr(drafting_stages.Deadline, "check", lambda deadline: None)
    (draft,) = drafter.draft([(body(), affine())], [QUESTION], max_new_tokens=12, best_slices=True)
    assert draft.sentences and draft.best_slices == (None,) * len(draft.sentences)
