from pathlib import Path

import pytest
import torch

from mu2_model import Mu2ForConditionalGeneration, Mu2Processor
from training.collators import IGNORED, LengthError, PreferenceCollator, SftCollator, VolumeSource, check_lengths
from training.data import Case
from training.shared_encoding import freeze, share_encoding
from training.token_cache import TokenCache
from training.volumes import VolumeCache


@pytest.fixture(scope="module")
def processor(world: Path) -> Mu2Processor:
    return Mu2Processor.from_pretrained(world / "init")


@pytest.fixture(scope="module")
def source(world: Path, processor: Mu2Processor, tmp_path_factory: pytest.TempPathFactory) -> VolumeSource:
    return VolumeSource(VolumeCache(tmp_path_factory.mktemp("cache"), processor.image_processor))


def rows(cases: list[Case]) -> list[dict[str, str]]:
    return [{"image": case.image, "question": case.question, "completion": case.answer} for case in cases]


def pairs(cases: list[Case]) -> list[dict[str, str]]:
    other = "FINDINGS: The lungs are clear. IMPRESSION: Normal."
    return [
        {"image": case.image, "question": case.question, "chosen": case.answer, "rejected": other} for case in cases
    ]


def test_only_the_answer_and_its_end_are_learned(
    processor: Mu2Processor, source: VolumeSource, cases: list[Case]
) -> None:
    batch = SftCollator(processor, source)(rows(cases[:2]))
    learned = batch["input_ids"][0][batch["labels"][0] != IGNORED]
    text = processor.tokenizer.decode(learned)
    assert text.endswith(processor.tokenizer.eos_token)
    assert text.startswith("FINDINGS")
    assert int((batch["input_ids"][0] == processor.image_token_id).sum()) == processor.num_image_tokens


def test_two_questions_about_one_volume_load_it_once(
    processor: Mu2Processor, source: VolumeSource, cases: list[Case]
) -> None:
    asked = rows([cases[0], cases[0], cases[1]])
    asked[1]["question"] = "Is there a nodule?"
    batch = SftCollator(processor, source)(asked)
    assert batch["pixel_values"].shape[0] == 2
    assert batch["question_volumes"].tolist() == [0, 0, 1]
    assert batch["prompt_questions"].tolist() == [0, 1, 2]


def test_a_preference_pair_holds_its_volume_once(
    processor: Mu2Processor, source: VolumeSource, cases: list[Case]
) -> None:
    batch = PreferenceCollator(processor, source)(pairs(cases[:3]))
    assert batch["input_ids"].shape[0] == 6
    assert batch["pixel_values"].shape[0] == 3
    assert batch["prompt_questions"].tolist() == [0, 1, 2, 0, 1, 2]
    chosen = batch["input_ids"][0][batch["completion_mask"][0] == 1]
    assert "nodule" in processor.tokenizer.decode(chosen)


def test_a_row_that_does_not_fit_is_an_error_not_a_cut(
    processor: Mu2Processor, source: VolumeSource, cases: list[Case]
) -> None:
    with pytest.raises(LengthError, match="max_length is 20"):
        SftCollator(processor, source, max_length=20)(rows(cases[:1]))
    with pytest.raises(LengthError, match="row 1 takes"):
        check_lengths(processor, [("Hm?", "No."), ("Hm?", "nodule " * 60)], 50)


def test_sharing_changes_no_logit(
    world: Path, processor: Mu2Processor, source: VolumeSource, cases: list[Case]
) -> None:
    model = Mu2ForConditionalGeneration.from_pretrained(world / "init").eval()
    batch = SftCollator(processor, source)(rows([cases[0], cases[1]]))
    plain = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values", "chunk_mask", "question_ids")}
    with torch.no_grad():
        alone = model(**plain, question_attention_mask=batch["question_attention_mask"]).logits
        share_encoding(model)
        shared = model(**batch).logits
    torch.testing.assert_close(shared, alone, atol=1e-5, rtol=0)


def test_stored_tokens_give_the_logits_of_volumes(
    world: Path, processor: Mu2Processor, source: VolumeSource, cases: list[Case], tmp_path: Path
) -> None:
    model = Mu2ForConditionalGeneration.from_pretrained(world / "init").eval()
    share_encoding(model)
    tokens = TokenCache(tmp_path, source.volumes, model)
    tokens.fill([case.image for case in cases], model)
    stored = SftCollator(processor, VolumeSource(source.volumes, tokens))(rows(cases))
    fresh = SftCollator(processor, source)(rows(cases))
    assert "pixel_values" not in stored
    with torch.no_grad():
        torch.testing.assert_close(model(**stored).logits, model(**fresh).logits, atol=5e-3, rtol=0)


def test_gradients_reach_every_learning_part_under_a_mixed_batch(
    world: Path, processor: Mu2Processor, source: VolumeSource, cases: list[Case]
) -> None:
    model = Mu2ForConditionalGeneration.from_pretrained(world / "init").train()
    share_encoding(model)
    model(**SftCollator(processor, source)(rows(cases))).loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()}
    assert without == set()


def test_freezing_the_language_model_leaves_projector_and_tokenizer(world: Path) -> None:
    model = Mu2ForConditionalGeneration.from_pretrained(world / "init")
    learning = freeze(model, ("vision_tower", "language_model"))
    parts = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert parts == {"projector", "visual_tokenizer"}
    assert 0 < learning < sum(p.numel() for p in model.parameters())
