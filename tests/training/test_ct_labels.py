"""CT-RATE's 18 labels by a classifier in a local folder: found by name, read in batches, scored beside the published truth."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import BertProcessing
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from training import tables
from training.data import Case
from training.drafting import DraftedCase
from training.evaluation_commands import score_drafts
from training.metrics.ct_labels import LABELS, LabelClassifier, LabelModelMissingError, label_f1, micro_f1

WORDS = ("The", "heart", "is", "large", "normal", "A", "nodule", "effusion", "on", "both", "sides", ".")
TEXTS = ("The heart is large .", "A nodule on both sides .", "effusion", "The heart is normal . A nodule .")


def save_classifier(folder: Path, labels: dict[int, str] | None, count: int = 18) -> BertForSequenceClassification:
    """A tiny BERT with random weights, loud enough that its labels differ from text to text."""
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    vocabulary = {word: index for index, word in enumerate((*special, *WORDS))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=32, **names).save_pretrained(folder)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=34,
        num_labels=count,
        initializer_range=0.5,
        **({} if labels is None else {"id2label": labels, "label2id": {n: i for i, n in labels.items()}}),
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("radbert")
    save_classifier(path, None)
    return path


def test_labels_are_those_that_the_model_gives_more_than_half(folder: Path) -> None:
    classifier = LabelClassifier.from_pretrained(folder)
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        alone = [model(**classifier.tokenizer(text, return_tensors="pt")).logits[0] > 0 for text in TEXTS]
    read = classifier.read(TEXTS)
    assert read.tolist() == torch.stack(alone).tolist()
    assert len({tuple(row) for row in read.tolist()}) > 1


def test_an_empty_draft_states_no_label(folder: Path) -> None:
    classifier = LabelClassifier.from_pretrained(folder)
    read = classifier.read(["", TEXTS[0], " "])
    assert not read[0].any() and not read[2].any()
    assert read[1].tolist() == classifier.read([TEXTS[0]])[0].tolist()


def test_a_long_report_is_cut_where_the_model_ends(folder: Path) -> None:
    assert LabelClassifier.from_pretrained(folder).read([" ".join(WORDS * 20)]).shape == (1, 18)


def test_labels_are_found_by_their_names_in_any_order(folder: Path, tmp_path: Path) -> None:
    names = dict(enumerate(reversed([label.replace(" ", "_").upper() for label in LABELS])))
    save_classifier(tmp_path, names)
    in_order = LabelClassifier.from_pretrained(folder).read(TEXTS)
    assert LabelClassifier.from_pretrained(tmp_path).read(TEXTS).tolist() == in_order[:, ::-1].tolist()


def test_more_labels_than_the_18_are_left_alone(tmp_path: Path) -> None:
    save_classifier(tmp_path, dict(enumerate([*LABELS, "Tree in bud", "Thymic remnant"])), 20)
    assert LabelClassifier.from_pretrained(tmp_path).columns == tuple(range(18))


def test_a_folder_without_the_18_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabelModelMissingError, match="no model"):
        LabelClassifier.from_pretrained(tmp_path)
    save_classifier(tmp_path, None, count=2)
    with pytest.raises(LabelModelMissingError, match="2 labels"):
        LabelClassifier.from_pretrained(tmp_path)


def test_f1_is_counted_by_label_and_over_all() -> None:
    truth, said = np.zeros((3, 18), bool), np.zeros((3, 18), bool)
    truth[:2, 0], said[:3, 0] = True, True  # both found, one invented
    truth[0, 1] = True  # missed
    said[0, 2] = True  # never true: no F1 of its own, an error over all
    assert label_f1(truth, said) == {LABELS[0]: pytest.approx(0.8), LABELS[1]: 0.0}
    assert micro_f1(truth, said) == pytest.approx(4 / 7)
    assert micro_f1(np.zeros_like(truth), np.zeros_like(said)) == 0.0


def drafted(classes: dict[str, int] | None) -> list[DraftedCase]:
    case = Case("c", "/c.nii.gz", "Report?", TEXTS[0], "test", "p", "s", labels=classes)
    return [DraftedCase(replace(case, case_id=str(n), answer=text), (text,)) for n, text in enumerate(TEXTS)]


def test_published_labels_are_the_truth_where_a_case_has_them(folder: Path) -> None:
    classifier = LabelClassifier.from_pretrained(folder)
    none = dict.fromkeys(LABELS, 0)
    result = score_drafts("x", drafted({**none, LABELS[0]: 1}), None, None, classifier)
    figures = result.figures("command", 10)
    assert set(figures["ct_label_f1"]) == {LABELS[0]}
    said = classifier.read(TEXTS)[:, 0].sum()
    assert figures["ct_label_macro_f1"] == pytest.approx(2 * said / (said + 4))
    assert f"ct_label_f1: {LABELS[0]}" in tables.full_table(figures)


def test_without_published_labels_the_reference_is_read_and_the_note_says_so(folder: Path) -> None:
    result = score_drafts("x", drafted(None), None, None, LabelClassifier.from_pretrained(folder))
    assert result.scores()["ct_label_macro_f1"] == result.scores()["ct_label_micro_f1"] == 1.0
    assert any("reads in the references" in note for note in result.notes)


def test_without_a_classifier_the_labels_are_left_out_with_the_reason() -> None:
    result = score_drafts("x", drafted(dict.fromkeys(LABELS, 0)), None, None)
    assert result.scores()["ct_label_macro_f1"] is None
    assert any("--radbert" in note for note in result.notes)
    assert not any("18 labels" in note for note in score_drafts("x", drafted(None), None, None).notes)
