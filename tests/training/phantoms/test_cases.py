"""How often findings occur, and the limits of size and contrast that fix the difficulty."""

from collections import Counter

import pytest

from training.phantoms.case import Case
from training.phantoms.disease import draw_case
from training.phantoms.prevalence import SIDED
from training.phantoms.vocabulary import CORE, FindingType, Side

CASES = 1200


@pytest.fixture(scope="module", params=[False, True], ids=["core", "full"])
def cases(request: pytest.FixtureRequest) -> list[Case]:
    return [draw_case(50_000 + seed, full=request.param) for seed in range(CASES)]


def kinds_of(cases: list[Case]) -> tuple[FindingType, ...]:
    return tuple(FindingType) if cases[0].full else CORE


def test_about_a_third_of_the_cases_is_normal(cases: list[Case]) -> None:
    assert 0.29 <= sum(not case.findings for case in cases) / CASES <= 0.38


def test_every_finding_is_in_three_to_fifteen_percent_of_the_cases(cases: list[Case]) -> None:
    seen = Counter(kind for case in cases for kind in {finding.kind for finding in case.findings})
    shares = {kind: seen[kind] / CASES for kind in kinds_of(cases)}
    assert set(seen) == set(shares)
    # Half a percent for the chance of 1,200 draws.
    assert all(0.025 <= share <= 0.155 for share in shares.values()), shares


def test_no_case_has_more_than_five_findings_or_one_twice(cases: list[Case]) -> None:
    for case in cases:
        keys = [finding.key for finding in case.findings]
        assert len(keys) <= 5
        assert len(set(keys)) == len(keys)


def test_paired_findings_have_a_side_and_the_others_have_none(cases: list[Case]) -> None:
    for case in cases:
        assert all((finding.side is Side.NONE) != (finding.kind in SIDED) for finding in case.findings)


def test_left_and_right_are_equally_frequent(cases: list[Case]) -> None:
    sides = Counter(finding.side for case in cases for finding in case.findings)
    assert 0.85 <= sides[Side.LEFT] / sides[Side.RIGHT] <= 1.18


def test_sizes_and_densities_keep_the_limits_of_core_and_full(cases: list[Case]) -> None:
    findings = [finding for case in cases for finding in case.findings]
    if cases[0].full:
        sizes = [finding.size_mm or 0 for finding in findings if finding.kind is FindingType.LUNG_NODULE]
        assert 4 <= min(sizes) < 8
        assert max(sizes) <= 30
    else:
        assert all(finding.size_mm is None or finding.size_mm >= 10 for finding in findings)
        assert all(finding.density in ("", "hyperdense") for finding in findings)


def test_hepatic_lesions_differ_from_the_liver_as_the_difficulty_says(cases: list[Case]) -> None:
    lesions = [(c, f) for c in cases for f in c.findings if f.kind is FindingType.HEPATIC_LESION]
    least = 15.0 if cases[0].full else 40.0
    assert len(lesions) > 20
    assert all(least <= abs(finding.hu - case.liver_hu) <= 80.0 for case, finding in lesions)


def test_pancreatic_masses_are_as_dark_as_the_difficulty_says_but_no_darker_than_water() -> None:
    for case in (draw_case(seed, full=True) for seed in range(1500)):
        for mass in (finding for finding in case.findings if finding.kind is FindingType.PANCREATIC_MASS):
            assert 15.0 <= case.tissue.pancreas - mass.hu <= 80.0
            assert mass.hu >= 5.0


def test_cysts_are_water_whatever_their_organ_is(cases: list[Case]) -> None:
    kinds = {FindingType.HEPATIC_CYST: 12.0, FindingType.RENAL_CYST: 14.0}
    cysts = [finding for case in cases for finding in case.findings if finding.kind in kinds]
    assert len(cysts) > 20
    assert all(0.0 <= cyst.hu <= kinds[cyst.kind] for cyst in cysts)


def test_crowded_cases_have_many_findings_and_are_never_normal() -> None:
    crowded = [draw_case(60_000 + seed, crowded=True) for seed in range(40)]
    assert min(len(case.findings) for case in crowded) >= 3
    assert sum(len(case.findings) for case in crowded) / len(crowded) > 6


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="must be 0 or more"):
        draw_case(-1)
