"""Words against their libraries on stored examples, findings by hand, statistics against known cases."""

from pathlib import Path

import pytest
import sacrebleu
import torch
from bert_score import score as library_bert_score
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from nltk.translate.meteor_score import meteor_score
from rouge_score.rouge_scorer import RougeScorer
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import RobertaProcessing
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from training.metrics import findings, text
from training.metrics.bertscore import BertModelMissingError, bert_scores
from training.metrics.findings import Stated, compare
from training.metrics.statistics import bootstrap_interval, paired_randomisation

REFERENCE = "There is a 3.5 cm cyst in the left kidney. The liver is normal."
CANDIDATES = (
    "A cyst of 3.5 cm is in the left kidney. Normal liver.",
    "The lungs are clear.",
    "There is a 3.5 cm cyst in the left kidney. The liver is normal.",
)


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_words_are_counted_as_their_libraries_count(candidate: str) -> None:
    assert text.bleu4([REFERENCE], [candidate]) * 100 == pytest.approx(
        sacrebleu.corpus_bleu([candidate], [[REFERENCE]]).score
    )
    smoothing = SmoothingFunction().method3
    expected = sentence_bleu([REFERENCE.split()], candidate.split(), (1.0,), smoothing_function=smoothing)
    assert text.bleu1(REFERENCE, candidate) == pytest.approx(expected)
    library = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(REFERENCE, candidate)
    assert text.rouge(REFERENCE, candidate) == {kind: value.fmeasure for kind, value in library.items()}


def test_stored_values_do_not_drift() -> None:
    scores = text.rouge(REFERENCE, CANDIDATES[0])
    # 12 of 15 and 13 stemmed words are shared.
    assert scores["rouge1"] == pytest.approx(24 / 28)
    assert text.bleu1(REFERENCE, CANDIDATES[2]) == 1.0
    assert text.bleu1(REFERENCE, "") == 0.0


def wordnet_or_skip() -> None:
    if not (text.WORDNET_FOLDER / "data.noun").is_file():
        pytest.skip("Debian's wordnet-base is not installed: METEOR has no synonyms")


def test_meteor_is_nltks_and_knows_synonyms() -> None:
    wordnet_or_skip()
    value = text.meteor(REFERENCE, CANDIDATES[0])
    expected = meteor_score([text.words(REFERENCE)], text.words(CANDIDATES[0]), wordnet=text.wordnet())
    assert value == pytest.approx(expected)
    assert 0.4 < value < 1
    assert text.meteor("a tumor of the kidney", "a neoplasm of the kidney") > text.meteor(
        "a tumor of the kidney", "a bridge of the kidney"
    )


def test_meteor_without_wordnet_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(text.WordNetMissingError, match="wordnet-base"):
        text.wordnet(tmp_path)


@pytest.fixture(scope="module")
def tiny_roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roberta")
    words = sorted({word for sentence in (REFERENCE, *CANDIDATES) for word in sentence.replace(".", " .").split()})
    vocabulary = {word: index for index, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    special |= {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=64, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=66,
    )
    RobertaModel(config).save_pretrained(folder)
    return folder


def test_bertscore_is_the_librarys_with_the_floor_taken_off(tiny_roberta: Path) -> None:
    references = [REFERENCE] * 3
    ours = bert_scores(references, CANDIDATES, tiny_roberta)
    _, _, library = library_bert_score(list(CANDIDATES), references, model_type=str(tiny_roberta), num_layers=2)
    assert ours.raw == pytest.approx(library.tolist(), abs=1e-5)
    assert ours.raw[2] == pytest.approx(1.0, abs=1e-4)
    assert ours.rescaled[2] == pytest.approx(1.0, abs=1e-3)
    assert ours.floor == 0.8315


def test_bertscore_gives_an_empty_draft_nothing_and_needs_a_model(tiny_roberta: Path, tmp_path: Path) -> None:
    assert bert_scores([REFERENCE, REFERENCE], ["", CANDIDATES[0]], tiny_roberta).raw[0] == 0.0
    with pytest.raises(BertModelMissingError, match="roberta-large"):
        bert_scores([REFERENCE], [REFERENCE], tmp_path)


NODULE = Stated("lung_nodule", "left", "upper lobe", 12)
BIG = Stated("lung_nodule", "left", "lower lobe", 25)
CYST = Stated("hepatic_cyst", "", "segment IV", 30)
STONE = Stated("renal_calculus", "right", "lower pole", 10)


def test_findings_match_by_type_and_side_and_the_nearest_in_size() -> None:
    counts = compare([NODULE, BIG, CYST], [Stated("lung_nodule", "left", "lower lobe", 24), CYST, STONE])
    assert {true for true, _ in counts.matched} == {BIG, CYST}
    assert counts.invented == (STONE,)
    assert counts.missed == (NODULE,)


def test_f1_counts_positives_only() -> None:
    cases = [compare([NODULE, CYST], [NODULE]), compare([], []), compare([STONE], [STONE, CYST])]
    assert findings.micro_f1(cases) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert findings.kind_f1(cases) == {"hepatic_cyst": 0.0, "lung_nodule": 1.0, "renal_calculus": 1.0}
    assert findings.macro_f1(cases) == pytest.approx(2 / 3)


def test_side_place_and_size_are_scored_apart() -> None:
    wrong_side = compare([NODULE], [Stated("lung_nodule", "right", "upper lobe", 12)])
    right = compare(
        [NODULE, CYST], [Stated("lung_nodule", "left", "lower lobe", 14), Stated("hepatic_cyst", "", "", 50)]
    )
    assert findings.side_accuracy([wrong_side, right]) == 0.5
    assert findings.place_accuracy([right]) == 0.0
    assert findings.size_accuracy([right]) == 0.5


def test_recall_is_given_by_size_and_false_positives_on_normals() -> None:
    counts = [compare([NODULE, CYST], [CYST]), compare([], [STONE]), compare([], [])]
    assert findings.recall_by_size(counts) == {"below_10_mm": None, "10_to_20_mm": 0.0, "above_20_mm": 1.0}
    assert findings.false_positive_rate_on_normals([[NODULE, CYST], [], []], counts) == 0.5


def test_f1_is_given_by_size_and_an_invented_finding_counts_where_it_could_be() -> None:
    small = Stated("lung_nodule", "right", "", 8)
    effusion = Stated("pleural_effusion", "left")
    counts = [compare([NODULE, BIG, small], [NODULE, small]), compare([], [Stated("lung_nodule", "left", "", 22)])]
    assert findings.f1_by_size(counts) == {"below_10_mm": 1.0, "10_to_20_mm": 1.0, "above_20_mm": 0.0}
    unsized = [*counts, compare([], [Stated("lung_nodule", "left")]), compare([], [effusion])]
    bands = findings.f1_by_size(unsized)
    assert (bands["below_10_mm"], bands["10_to_20_mm"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert findings.f1_by_size([compare([CYST], [])])["below_10_mm"] is None


def mean(values: list[float]) -> float:  # type: ignore[misc]
    return sum(values) / len(values)


def test_the_interval_holds_the_mean_and_narrows_with_cases() -> None:
    few, many = [0.0, 1.0] * 10, [0.0, 1.0] * 200
    low, high = bootstrap_interval(few, mean) or (0, 0)
    lower, higher = bootstrap_interval(many, mean) or (0, 0)
    assert low < 0.5 < high
    assert higher - lower < high - low
    # 1.96 standard errors of a fair coin.
    assert higher - lower == pytest.approx(2 * 1.96 * 0.5 / 400**0.5, rel=0.1)


def test_the_paired_test_sees_a_difference_and_none_where_there_is_none() -> None:
    better, worse = [1.0] * 12, [0.0] * 12
    difference, p = paired_randomisation(better, worse, mean)
    assert difference == 1.0
    assert p < 0.01
    assert paired_randomisation(better, better, mean) == (0.0, 1.0)
    with pytest.raises(ValueError, match="the same cases"):
        paired_randomisation(better, worse[:3], mean)


def test_the_paired_test_keeps_its_level() -> None:
    # Two systems right on five cases each of ten, disjoint: exchangeable, so p is large.
    first = [1.0] * 5 + [0.0] * 5
    assert paired_randomisation(first, first[::-1], mean)[1] > 0.5
