"""From one model and a judge to preference pairs: several drafts a case, scored, the best and the worst kept.

Cases come from a split that SFT did not train on. A pair is kept when both drafts could be judged, the scores differ by the
margin and neither draft is much longer than the other, so that DPO does not learn length.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from training.data import ManifestError
from training.dpo import PreferencePair
from training.drafting import DraftedCase
from training.green import Judge

SAMPLES = 8
MARGIN = 0.1
MAX_LENGTH_RATIO = 1.5


@dataclass(frozen=True)
class PairRules:
    """What makes a pair; the defaults are those of the method's publication where it gives one."""

    margin: float = MARGIN
    max_length_ratio: float = MAX_LENGTH_RATIO


@dataclass(frozen=True)
class PairReport:
    """Why cases gave a pair or none."""

    outcomes: dict[str, int]

    def text(self) -> str:
        """The report to read."""
        return ", ".join(f"{outcome}: {count}" for outcome, count in sorted(self.outcomes.items()))


def make_pairs(
    drafted_cases: Iterable[DraftedCase],
    judge: Judge,
    rules: PairRules = PairRules(),
) -> tuple[list[PreferencePair], PairReport]:
    """Judge the drafts of every case and keep the pairs that obey the rules."""
    pairs: list[PreferencePair] = []
    outcomes: Counter[str] = Counter()
    for drafted in drafted_cases:
        outcome, pair = pick_pair(drafted, judge, rules)
        outcomes[outcome] += 1
        if pair is not None:
            pairs.append(pair)
    return pairs, PairReport(dict(outcomes))


def pick_pair(drafted: DraftedCase, judge: Judge, rules: PairRules) -> tuple[str, PreferencePair | None]:
    """The best and the worst draft of one case, or the reason why there is no pair."""
    case = drafted.case
    texts = list(dict.fromkeys(text for text in drafted.texts if text))
    if len(texts) < 2:
        return "fewer than two different drafts", None
    judged = [(judge.judge(case.answer, text), text) for text in texts]
    scored = sorted((verdict.score, text) for verdict, text in judged if verdict is not None)
    if len(scored) < 2:
        return "fewer than two drafts could be judged", None
    (low, rejected), (high, chosen) = scored[0], scored[-1]
    if high - low < rules.margin:
        return "margin too small", None
    words = sorted((len(chosen.split()), len(rejected.split())))
    if words[1] >= rules.max_length_ratio * max(1, words[0]):
        return "lengths too different", None
    return "pair", PreferencePair(case.case_id, case.image, case.question, chosen, rejected, high, low, case.source)


def write_pairs(pairs: Sequence[PreferencePair], path: Path) -> None:
    """One pair a line."""
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    partial.replace(path)


def read_pairs(path: Path) -> list[PreferencePair]:
    """Pairs as `write_pairs` wrote them, or as `mu2 study export-training` did; ManifestError when a line is none."""
    if not path.is_file():
        raise ManifestError(f"no preference pairs in {path}: make them with `python -m training preferences`")
    pairs = []
    # Not splitlines: a text may hold other ends of lines, such as U+2028, which JSON does not escape.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            known = {key: row[key] for key in ("case_id", "image", "question", "chosen", "rejected")}
        except (json.JSONDecodeError, KeyError) as error:
            raise ManifestError(f"{path.name} line {number} is no preference pair: {error!r}") from error
        # A radiologist's correction has no scores: the signed text is the better one.
        scores = (float(row.get("chosen_score", 1.0)), float(row.get("rejected_score", 0.0)))
        image = str((path.parent / known.pop("image")).resolve())
        source = str(row.get("source", ""))
        pairs.append(
            PreferencePair(**known, image=image, chosen_score=scores[0], rejected_score=scores[1], source=source)
        )
    return pairs
