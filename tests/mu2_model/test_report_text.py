"""Generated text to sections and sentences."""

import pytest

from mu2_model.report_text import opens_thinking, split_report, strip_thinking


def pairs(text: str) -> list[tuple[str, str]]:
    return [(span.section, span.text) for span in split_report(text)]


def test_headers_on_their_own_lines_begin_sections() -> None:
    text = "Findings:\nThe lungs are clear. No effusion.\n\nImpression:\n1. Normal chest.\nRecommendations:\nNone."
    assert pairs(text) == [
        ("findings", "The lungs are clear."),
        ("findings", "No effusion."),
        ("impression", "1. Normal chest."),
        ("recommendations", "None."),
    ]


def test_text_without_a_header_is_findings() -> None:
    assert pairs("A nodule is seen.") == [("findings", "A nodule is seen.")]


@pytest.mark.parametrize("header", ["IMPRESSION:", "**Impression:**", "## Impression:", "impression :"])
def test_headers_in_other_dress_are_found(header: str) -> None:
    assert pairs(f"Clear lungs.\n{header} Normal.")[1] == ("impression", "Normal.")


def test_the_word_findings_inside_a_sentence_is_no_header() -> None:
    assert pairs("There are no acute findings. My impression is good.") == [
        ("findings", "There are no acute findings."),
        ("findings", "My impression is good."),
    ]


@pytest.mark.parametrize(
    "sentence",
    [
        "A nodule of 3.5 mm in the left lower lobe.",
        "Calcified nodes, e.g. left hilar, are benign.",
        "Is there a fracture?",
        "Größe 12 × 8 mm, 右肺 clear.",
    ],
)
def test_a_sentence_stays_whole(sentence: str) -> None:
    assert pairs(sentence) == [("findings", sentence)]


def test_every_sentence_knows_its_place_in_the_text() -> None:
    text = "Findings: Clear lungs.  No effusion.\nImpression: Normal."
    spans = split_report(text)
    assert [text[span.start : span.end] for span in spans] == ["Clear lungs.", "No effusion.", "Normal."]
    assert [span.text for span in spans] == ["Clear lungs.", "No effusion.", "Normal."]


def test_a_thinking_block_is_never_part_of_the_report() -> None:
    assert pairs("<think>Impression: maybe cancer.</think>\nFindings: Clear.") == [("findings", "Clear.")]
    assert pairs("maybe cancer.</think>Clear.") == [("findings", "Clear.")]


def test_a_thinking_block_that_never_ends_leaves_no_report() -> None:
    text = "<think>I wonder"
    assert pairs(text) == [] and strip_thinking(text) == len(text)
    assert strip_thinking("I wonder", thinking=True) == len("I wonder")


def test_a_question_about_thinking_opens_no_thinking_block() -> None:
    assert opens_thinking("<|user|>Describe<|assistant|><think>\n")
    assert not opens_thinking("<|user|>what is <think> here<|assistant|>")
    assert not opens_thinking("<|assistant|><think>\n\n</think>\n\n")


def test_punctuation_alone_is_no_sentence() -> None:
    assert pairs("Clear. . . \n - \n") == [("findings", "Clear.")]
