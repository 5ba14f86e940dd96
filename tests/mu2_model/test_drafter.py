"""Arrays and questions to drafts, with a tiny untrained checkpoint."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForImageTextToText, AutoProcessor

from mu2_model.decoding import SETTINGS
from mu2_model.drafter import Progress, ReportDrafter
from mu2_model.errors import CheckpointError, DeadlineExceededError, QuestionError, VolumeError
from mu2_model.processing_mu2 import Mu2Processor
from mu2_model.untrained import make_untrained
from tests.mu2_model.small_volumes import affine, body

QUESTION = "Describe the findings."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_untrained(tmp_path_factory.mktemp("untrained"), seed=0)


@pytest.fixture(scope="module")
def drafter(folder: Path) -> ReportDrafter:
    return ReportDrafter.from_pretrained(folder)


def other_body() -> NDArray[np.int16]:
    hu = body()
    hu[:12, 20:50, 20:50] = -850
    return hu


def test_a_draft_has_sentences_confidence_counts_and_times(drafter: ReportDrafter) -> None:
    (draft,) = drafter.draft([(body(), affine())], [QUESTION])
    assert draft.text and draft.sentences
    assert all(sentence.confidence < 0 for sentence in draft.sentences)
    assert draft.generated_tokens > 0 and draft.prompt_tokens > 16
    assert set(draft.stage_seconds) == {"prepare", "encode", "generate", "split"}


def test_the_same_input_gives_the_same_draft(drafter: ReportDrafter) -> None:
    texts = [drafter.draft([(body(), affine())], [QUESTION])[0].text for _ in range(2)]
    assert texts[0] == texts[1]


def test_confidence_is_the_mean_log_probability_of_the_tokens(drafter: ReportDrafter) -> None:
    (draft,) = drafter.draft([(body(), affine())], [QUESTION], max_new_tokens=6)
    batch = drafter.processor((body(), affine()), questions=QUESTION)
    with torch.inference_mode():
        ids = drafter.model.generate(**batch, max_new_tokens=6, do_sample=False)
        logits = drafter.model(**{**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
    prompt = batch["input_ids"].shape[1]
    chosen = torch.log_softmax(logits[0, prompt - 1 : -1], dim=-1).gather(1, ids[0, prompt:, None]).squeeze(1)
    assert len(draft.sentences) == 1
    assert draft.sentences[0].confidence == pytest.approx(float(chosen.mean()), abs=1e-4)


def test_a_batch_drafts_what_each_volume_drafts_alone(drafter: ReportDrafter) -> None:
    volumes = [(body(), affine()), (other_body(), affine())]
    questions = [QUESTION, "Describe the abdomen in this CT scan please."]
    together = drafter.draft(volumes, questions)
    alone = [drafter.draft([volume], [question])[0] for volume, question in zip(volumes, questions, strict=True)]
    assert [draft.text for draft in together] == [draft.text for draft in alone]
    assert together[0].text != together[1].text


def test_samples_of_a_volume_differ_repeat_by_seed_and_encode_once(drafter: ReportDrafter) -> None:
    calls: list[int] = []
    hook = drafter.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    drafts = drafter.draft([(body(), affine())], [QUESTION], settings="varied", samples=4)
    hook.remove()
    again = drafter.draft([(body(), affine())], [QUESTION], settings="varied", samples=4)
    assert len({draft.text for draft in drafts}) == 4 and len(calls) == 1
    assert [draft.text for draft in drafts] == [draft.text for draft in again]


def test_sampling_leaves_the_random_state_of_the_process_alone(drafter: ReportDrafter) -> None:
    before = torch.random.get_rng_state()
    drafter.draft([(body(), affine())], [QUESTION], settings="published", max_new_tokens=2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_several_questions_about_one_array_encode_it_once(drafter: ReportDrafter) -> None:
    seen: list[int] = []
    hook = drafter.model.model.vision_tower.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    array = body()
    chunks = len(drafter.processor.image_processor.prepare(array, affine()).chunk_mask)
    drafter.draft([(array, affine())] * 3, [QUESTION, "chest", "abdomen"], max_new_tokens=2)
    hook.remove()
    assert seen == [chunks]


def test_a_passed_deadline_stops_generation(drafter: ReportDrafter) -> None:
    with pytest.raises(DeadlineExceededError, match=r"after its 0\.001 seconds"):
        drafter.draft([(body(), affine())], [QUESTION], deadline_seconds=0.001)


def test_the_deadline_is_checked_between_tokens(drafter: ReportDrafter, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("mu2_model.decoding.time.monotonic", lambda: now[0])
    made: list[int] = []

    def listen(progress: Progress) -> None:
        if progress.stage == "generate":
            made.append(progress.done)
            now[0] += 1

    with pytest.raises(DeadlineExceededError):
        drafter.draft([(body(), affine())], [QUESTION], deadline_seconds=3.5, progress=listen)
    assert made == [1, 2, 3, 4]


def test_progress_streams_stages_and_growing_text(drafter: ReportDrafter) -> None:
    heard: list[Progress] = []
    (draft,) = drafter.draft([(body(), affine())], [QUESTION], progress=heard.append)
    assert list(dict.fromkeys(p.stage for p in heard)) == ["prepare", "encode", "generate"]
    lengths = [len(p.texts[0]) for p in heard if p.stage == "generate"]
    assert lengths == sorted(lengths) and heard[-1].texts[0].strip() == draft.text


def test_a_draft_that_reaches_its_limit_says_so(drafter: ReportDrafter) -> None:
    (draft,) = drafter.draft([(body(), affine())], [QUESTION], max_new_tokens=3)
    assert draft.truncated and draft.generated_tokens == 3
    assert draft.repairs == ["the draft was cut after 3 tokens"]


def test_repairs_of_the_volume_are_in_its_draft_alone(drafter: ReportDrafter) -> None:
    padded = body()
    padded[:, 0] = -3000
    first, second = drafter.draft([(padded, affine()), (body(), affine())], [QUESTION, QUESTION])
    assert any("padding" in repair for repair in first.repairs)
    assert not any("padding" in repair for repair in second.repairs)


def test_out_of_memory_surfaces_as_itself(drafter: ReportDrafter, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(drafter.model.model, "encode_chunks", full)
    with pytest.raises(torch.OutOfMemoryError):
        drafter.draft([(body(), affine())], [QUESTION])


@pytest.mark.parametrize("question", ["", "   ", "what is <im_patch> this"])
def test_a_question_that_cannot_be_asked_is_refused(question: str, drafter: ReportDrafter) -> None:
    with pytest.raises(QuestionError):
        drafter.draft([(body(), affine())], [question])


def test_a_question_or_a_volume_of_another_kind_is_refused(drafter: ReportDrafter) -> None:
    with pytest.raises(QuestionError, match="not a NoneType"):
        drafter.draft([(body(), affine())], [None])  # type: ignore[list-item]
    for volume in (body(), [body(), affine()], (body(),)):
        with pytest.raises(VolumeError, match=r"a volume is a pair \(array, affine\)"):
            drafter.draft([volume], [QUESTION])  # type: ignore[list-item]
    with pytest.raises(VolumeError, match=r"a volume is a pair \(array, affine\), not a ndarray"):
        drafter.processor([body(), affine()], questions=[QUESTION])  # type: ignore[list-item]


def test_a_question_longer_than_the_prompt_is_refused_not_cut(drafter: ReportDrafter) -> None:
    with pytest.raises(QuestionError, match="at most 256 fit"):
        drafter.draft([(body(), affine())], ["lung " * 300])


def test_a_prompt_without_room_in_the_context_is_refused(
    drafter: ReportDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafter.model.config.get_text_config(), "max_position_embeddings", 20)
    with pytest.raises(QuestionError, match="no room in a context of 20"):
        drafter.draft([(body(), affine())], [QUESTION])


def test_a_draft_ends_where_the_context_ends(drafter: ReportDrafter, monkeypatch: pytest.MonkeyPatch) -> None:
    (short,) = drafter.draft([(body(), affine())], [QUESTION], max_new_tokens=1)
    monkeypatch.setattr(drafter.model.config.get_text_config(), "max_position_embeddings", short.prompt_tokens + 5)
    (draft,) = drafter.draft([(body(), affine())], [QUESTION], max_new_tokens=40)
    assert draft.truncated and draft.generated_tokens == 5


def test_one_array_under_two_affines_is_two_volumes(drafter: ReportDrafter) -> None:
    array = body()
    turned = affine() @ np.diag([1.0, 1.0, -1.0, 1.0])
    first, second = drafter.draft([(array, affine()), (array, turned)], [QUESTION, QUESTION])
    assert (first.text, second.text) == (
        drafter.draft([(array, affine())], [QUESTION])[0].text,
        drafter.draft([(array, turned)], [QUESTION])[0].text,
    )
    assert first.sentences[0].confidence != second.sentences[0].confidence


def test_a_bad_volume_is_refused(drafter: ReportDrafter) -> None:
    with pytest.raises(VolumeError):
        drafter.draft([(np.zeros((30, 40, 40), np.int16), affine())], [QUESTION])


def test_volumes_and_questions_must_match_in_number(drafter: ReportDrafter) -> None:
    with pytest.raises(QuestionError, match="1 volumes, but 2 questions"):
        drafter.draft([(body(), affine())], [QUESTION, QUESTION])


def test_several_greedy_samples_are_refused(drafter: ReportDrafter) -> None:
    with pytest.raises(QuestionError, match="varied"):
        drafter.draft([(body(), affine())], [QUESTION], samples=2)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"settings": "gredy"}, "there are greedy, published, varied"),
        ({"samples": 0, "settings": "varied"}, "at least one of each"),
        ({"max_new_tokens": 0}, "at least one of each"),
    ],
)
def test_a_draft_that_cannot_be_decoded_is_refused(asked: dict, message: str, drafter: ReportDrafter) -> None:
    with pytest.raises(QuestionError, match=message):
        drafter.draft([(body(), affine())], ["Describe the findings."], **asked)


def test_the_published_settings_are_known_by_name() -> None:
    settings = SETTINGS["published"]
    assert (settings.temperature, settings.top_p, settings.top_k, settings.repetition_penalty) == (0.7, 0.8, 20, 1.1)


def test_the_checkpoint_says_that_it_is_untrained(drafter: ReportDrafter) -> None:
    assert drafter.trained_on == "nothing" and drafter.model_name == "mu2-untrained"


def test_the_weights_hash_is_that_of_the_file(drafter: ReportDrafter, folder: Path) -> None:
    assert drafter.weights_hash == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_the_same_seed_writes_the_same_weights(folder: Path, tmp_path: Path) -> None:
    again = make_untrained(tmp_path / "again", seed=0)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    other = make_untrained(tmp_path / "other", seed=1)
    assert (other / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        ReportDrafter.from_pretrained(tmp_path)


def test_a_checkpoint_with_a_missing_tensor_is_refused(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    state = model.state_dict()
    del state["model.projector.fc1.bias"]
    model.save_pretrained(tmp_path, state_dict=state)
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.projector\.fc1\.bias"):
        ReportDrafter.from_pretrained(tmp_path)


def test_the_processor_of_a_checkpoint_is_found_by_the_auto_class(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, Mu2Processor)
    batch = processor([(body(), affine())] * 2, questions=[QUESTION, "chest"])
    assert sorted(batch) == sorted(processor.model_input_names)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"][1, 0] == 0 and batch["question_attention_mask"][1, -1] == 0


def test_warming_up_runs_the_whole_model_without_a_volume(
    drafter: ReportDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    parts = {
        "tower": drafter.model.model.vision_tower,
        "projector": drafter.model.model.projector,
        "head": drafter.model.lm_head,
    }
    handles = [part.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, part in parts.items()]
    drafter.warm_up()
    for handle in handles:
        handle.remove()
    assert set(ran) == set(parts)


def test_a_thinking_model_drafts_no_thoughts(drafter: ReportDrafter, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "<think>secret</think> Findings: Clear."
    monkeypatch.setattr(drafter.processor.tokenizer, "decode", lambda ids, **_: text[: 8 * len(ids)])
    (draft,) = drafter.draft([(body(), affine())], [QUESTION])
    assert draft.text == "Findings: Clear." and [s.text for s in draft.sentences] == ["Clear."]


@pytest.mark.parametrize(
    ("text", "report"),
    [("Perhaps cancer. Or not", ""), ("Perhaps cancer.</think> Findings: Clear.", "Findings: Clear.")],
)
def test_what_follows_a_prompt_that_begins_to_think_is_no_report_until_the_thought_ends(
    text: str, report: str, drafter: ReportDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = drafter.processor.tokenizer
    template = "{% for message in messages %}{{ message.content }}{% endfor %}<|assistant|><think>\n"
    monkeypatch.setattr(drafter.processor, "chat_template", None)
    monkeypatch.setattr(tokenizer, "chat_template", template)
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **_: text[: 8 * len(ids)])
    (draft,) = drafter.draft([(body(), affine())], [QUESTION])
    assert draft.text == report and [s.text for s in draft.sentences] == report.split()[1:]
