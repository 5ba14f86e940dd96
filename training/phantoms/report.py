"""Writes the report of a case: Findings by region, then the Impression. It states what was painted and nothing else."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from training.phantoms import phrases
from training.phantoms.case import Case
from training.phantoms.vocabulary import Finding, FindingType, Region, Side

WORDING_STREAM = 300
CHOICE = re.compile(r"\[([^\[\]]*)\]")
BOTH_IN_ONE = 0.6
ABSENCE_SHARE = 0.5
"""How often two sides share a sentence, and how often the absence of a neighbouring finding is stated."""


@dataclass(frozen=True)
class Text:
    """A report in parts."""

    findings: tuple[tuple[Region, tuple[str, ...]], ...]
    impression: tuple[str, ...]

    def __str__(self) -> str:
        lines = ["FINDINGS:"]
        lines += [f"{region.value.capitalize()}: {' '.join(sentences)}" for region, sentences in self.findings]
        lines += ["IMPRESSION:", " ".join(self.impression)]
        return "\n".join(lines)


def region_of(finding: Finding, scanned: Iterable[Region]) -> Region:
    """The scanned region whose section a finding is written in."""
    home = {
        "mediastinal": Region.CHEST,
        "ascending aorta": Region.CHEST,
        "retroperitoneal": Region.ABDOMEN,
        "infrarenal aorta": Region.ABDOMEN,
        "pelvic": Region.PELVIS,
        "left ilium": Region.PELVIS,
        "right ilium": Region.PELVIS,
    }
    regions = tuple(scanned)
    if finding.place in home:
        return home[finding.place]
    if finding.kind in (FindingType.VERTEBRAL_FRACTURE, FindingType.LYTIC_LESION):
        wanted = Region.CHEST if finding.place.startswith("T") else Region.ABDOMEN
        return wanted if wanted in regions else regions[0]
    return next(
        region
        for region, topics in phrases.TOPICS.items()
        if region in regions and any(finding.kind in kinds for kinds, _ in topics)
    )


class Writer:
    """Chooses wordings with one stream of random numbers, or, without one, always the first, and fills them in."""

    def __init__(self, rng: np.random.Generator | None) -> None:
        self.rng = rng

    def pick(self, count: int) -> int:
        """A number below `count`; 0 in plain words."""
        return 0 if self.rng is None else int(self.rng.integers(count))

    def happens(self, share: float) -> bool:
        """Whether an optional turn is taken; never in plain words."""
        return self.rng is not None and bool(self.rng.random() < share)

    def choose(self, wordings: tuple[str, ...]) -> str:
        """One wording with its bracketed choices made."""
        chosen = wordings[self.pick(len(wordings))]
        while match := CHOICE.search(chosen):
            options = match[1].split("|")
            chosen = chosen[: match.start()] + options[self.pick(len(options))] + chosen[match.end() :]
        return chosen

    def size(self, size_mm: int | None) -> str:
        """A size in millimetres or centimetres, both exact."""
        if size_mm is None:
            return ""
        return f"{size_mm / 10:.1f} cm" if self.happens(0.3) else f"{size_mm} mm"

    def sentence(self, wordings: tuple[str, ...], finding: Finding, other: Finding | None = None) -> str:
        """A sentence about a finding (and the same kind on the other side)."""
        filled = self.choose(wordings).format(
            size=self.size(finding.size_mm),
            other=self.size(other.size_mm) if other is not None else "",
            side=finding.side.value,
            place=finding.place,
            degree=finding.degree,
            density=finding.density,
        )
        filled = re.sub(r"\ba (?=(?:8\d?|11|18)[ .])", "an ", " ".join(filled.split()))
        return filled[0].upper() + filled[1:]


def _region_sentences(writer: Writer, region: Region, findings: list[Finding]) -> tuple[str, ...]:
    sentences: list[str] = []
    for kinds, normal in phrases.TOPICS[region]:
        present = [finding for finding in findings if finding.kind in kinds]
        if not present:
            sentences.append(writer.choose(normal))
            continue
        sentences += _present(writer, present)
        found = {finding.kind for finding in present}
        absent = [kind for kind in kinds if kind not in found and kind in phrases.ABSENT]
        for kind in absent:
            if writer.happens(ABSENCE_SHARE):
                sentences.append(writer.choose(phrases.ABSENT[kind]))
    return tuple(sentences)


def _present(writer: Writer, present: list[Finding]) -> list[str]:
    sentences = []
    told: set[tuple[str, str]] = set()
    for finding in present:
        if finding.key in told:
            continue
        other = next((f for f in present if f.kind is finding.kind and f.side is Side.LEFT), None)
        shared = finding.side is Side.RIGHT and finding.kind in phrases.BILATERAL and other is not None
        if shared and other is not None and writer.happens(BOTH_IN_ONE):
            sentences.append(writer.sentence(phrases.BILATERAL[finding.kind], finding, other))
            told.add(other.key)
        else:
            sentences.append(writer.sentence(phrases.PRESENT[finding.kind], finding))
        told.add(finding.key)
    return sentences


def compose(case: Case, regions: tuple[Region, ...] | None = None, wording: int | None = 0) -> Text:
    """The report of a case in parts, of all its regions or of some.

    The words depend on the seed, the regions asked for, so that a report by region reads as one piece, and the number of the
    wording: the same truth in other words. Without a number the words are plain: one phrase for each thing that is said.

    Raises ValueError for a region that was not scanned.
    """
    wanted = case.scan.regions if regions is None else regions
    missing = [region.value for region in wanted if region not in case.scan.regions]
    if missing:
        raise ValueError(f"the scan does not show {', '.join(missing)}; it shows {', '.join(case.scan.regions)}")
    asked = [list(Region).index(region) for region in wanted] if regions is not None else []
    rng = None
    if wording is not None:
        rng = np.random.default_rng([case.seed, WORDING_STREAM + wording, int(case.full), *asked])
    writer = Writer(rng)
    by_region = {region: [f for f in case.findings if region_of(f, case.scan.regions) is region] for region in wanted}
    findings = tuple((region, _region_sentences(writer, region, by_region[region])) for region in wanted)
    told = [finding for region in wanted for finding in by_region[region]]
    if not told:
        names = [region.value for region in wanted]
        listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        return Text(findings, (writer.choose(phrases.NOTHING).format(regions=listed),))
    return Text(findings, tuple(writer.sentence(phrases.IN_SHORT[finding.kind], finding) for finding in told))


def write(case: Case, regions: tuple[Region, ...] | None = None, wording: int | None = 0) -> str:
    """The report of a case as text: `FINDINGS:`, a line a region, `IMPRESSION:`, a line; `wording` chooses the words.

    Raises ValueError for a region that was not scanned.
    """
    return str(compose(case, regions, wording))
