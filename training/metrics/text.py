"""BLEU, ROUGE and METEOR, each by the library that the published figures were counted with."""

import math
import re
import warnings
from collections.abc import Sequence
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import nltk
import sacrebleu
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu
from nltk.translate.meteor_score import meteor_score
from rouge_score.rouge_scorer import RougeScorer

from training.errors import TrainingError

ROUGE_KINDS = ("rouge1", "rouge2", "rougeL")
WORDNET_FOLDER = Path("/usr/share/wordnet")
"""Where Debian's wordnet-base puts the database files."""
LEXNAMES = 45


def bleu4(references: Sequence[str], candidates: Sequence[str]) -> float:
    """Corpus BLEU-4 by sacrebleu with its default tokenizer, 0 to 1."""
    return float(sacrebleu.corpus_bleu(list(candidates), [list(references)]).score) / 100


def bleu1(reference: str, candidate: str) -> float:
    """BLEU-1 of one case by NLTK with smoothing method 3 on words split at spaces, as published; 0 for an empty draft."""
    if not candidate.split():
        return 0.0
    smoothing = SmoothingFunction().method3
    return float(corpus_bleu([[reference.split()]], [candidate.split()], (1.0,), smoothing_function=smoothing))


def rouge(reference: str, candidate: str) -> dict[str, float]:
    """F measure of ROUGE-1, -2 and -L with the stemmer on, as `rouge-score` counts them."""
    scores = _rouge_scorer().score(reference, candidate)
    return {kind: float(scores[kind].fmeasure) for kind in ROUGE_KINDS}


@cache
def _rouge_scorer() -> RougeScorer:
    return RougeScorer(list(ROUGE_KINDS), use_stemmer=True)


def words(text: str) -> list[str]:
    """Words, numbers and marks of a text in small letters, as METEOR takes them.

    >>> words("A 3.5 cm cyst.")
    ['a', '3.5', 'cm', 'cyst', '.']
    """
    return re.findall(r"\d+(?:\.\d+)?|\w+|[^\w\s]", text.lower())


class WordNetMissingError(TrainingError, LookupError):
    """METEOR needs WordNet's database files, which are not there; the message says how to get them."""


class DebianWordNet(WordNetCorpusReader):  # type: ignore[misc]
    """WordNet from Debian's files. They lack `lexnames`, a list of file names that METEOR never reads."""

    def open(self, file: str) -> Any:
        """A database file; a list of the right length for `lexnames`."""
        if file == "lexnames":
            return StringIO("".join(f"{number:02d}\tlexfile{number:02d}\t0\n" for number in range(LEXNAMES)))
        return super().open(file)

    def map_wn(self, version: str = "wordnet") -> None:
        """Nothing: maps between versions serve other languages, and need files that Debian does not ship."""


@cache
def wordnet(folder: Path = WORDNET_FOLDER) -> WordNetCorpusReader:
    """The WordNet database; WordNetMissingError when it is not installed."""
    if not (folder / "data.noun").is_file():
        raise WordNetMissingError(f"no WordNet in {folder}: install Debian's wordnet-base, or leave METEOR out")
    # NLTK opens files below its data path alone.
    if str(folder) not in nltk.data.path:
        nltk.data.path.append(str(folder))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The multilingual functions are not available")
        return DebianWordNet(str(folder), None)


def meteor(reference: str, candidate: str) -> float:
    """METEOR of one case by NLTK with WordNet synonyms; WordNetMissingError without the database."""
    score = float(meteor_score([words(reference)], words(candidate), wordnet=wordnet()))
    return 0.0 if math.isnan(score) else score
