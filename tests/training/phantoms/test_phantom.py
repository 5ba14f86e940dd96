"""The voxels: what is labelled is there, where and as large as the truth says, the same every time."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from training.phantoms.case import Case
from training.phantoms.disease import draw_case
from training.phantoms.phantom import Phantom, make_phantom, render
from training.phantoms.scanner import noise_slice
from training.phantoms.vocabulary import CORE, FINDING_LABELS, Finding, FindingType, Organ, Side


def first_with(kind: FindingType, *, full: bool = False, start: int = 0) -> tuple[Case, Finding]:
    for seed in range(start, start + 3000):
        case = draw_case(seed, full=full)
        for finding in case.findings:
            if finding.kind is kind:
                return case, finding
    raise AssertionError(f"no case with {kind}")


def voxels_of(phantom: Phantom, finding: Finding) -> np.ndarray:
    """Patient coordinates (LPS, mm; heights from the first slice) of a finding's voxels, on its side."""
    index = np.argwhere(phantom.labels.findings == FINDING_LABELS[finding.kind])
    grid = phantom.case.scan.grid
    points = index[:, ::-1] * [grid.pixel_mm, grid.pixel_mm, grid.slice_mm] + np.array(grid.origin)
    if finding.side is not Side.NONE:
        points = points[(points[:, 0] > 0) == (finding.side is Side.LEFT)]
    return points


@pytest.fixture(scope="module")
def normal() -> Phantom:
    return render(
        next(case for case in map(draw_case, range(100)) if not case.findings and len(case.scan.regions) == 2)
    )


def test_the_same_seed_gives_the_same_bytes() -> None:
    first, second = make_phantom(6), make_phantom(6)
    assert first.hu.tobytes() == second.hu.tobytes()
    assert first.labels.findings.tobytes() == second.labels.findings.tobytes()


def test_the_bytes_of_a_seed_are_those_of_every_machine() -> None:
    # The digest was taken on x86-64; only exactly rounded operations reach a voxel, so any processor must agree.
    digest = hashlib.sha256(make_phantom(9).hu.tobytes()).hexdigest()
    assert digest == "a2937c2918fd05c7a1c83193a6c57649affe9e5ebae4343139b26dbafb272527"


def test_the_processors_vector_unit_changes_no_byte() -> None:
    multiarray = np._core._multiarray_umath  # where numpy lists what it dispatches by processor
    faster = [name for name in multiarray.__cpu_dispatch__ if multiarray.__cpu_features__.get(name)]
    if not faster:
        pytest.skip("numpy has only its baseline on this processor")
    code = (
        "import hashlib\n"
        "from training.phantoms.disease import draw_case\n"
        "from training.phantoms.phantom import render\n"
        "print(hashlib.sha256(render(draw_case(12), range(20, 40)).hu.tobytes()).hexdigest())"
    )
    environment = {**os.environ, "NPY_DISABLE_CPU_FEATURES": " ".join(faster)}
    plain = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    here = hashlib.sha256(render(draw_case(12), range(20, 40)).hu.tobytes()).hexdigest()
    assert plain.stdout.strip() == here


def test_some_slices_alone_are_those_of_the_whole() -> None:
    case = draw_case(4)
    whole = render(case)
    part = render(case, range(30, 38))
    assert np.array_equal(part.hu, whole.hu[30:38])
    assert np.array_equal(part.labels.organs, whole.labels.organs[30:38])


def test_a_range_outside_the_scan_is_refused() -> None:
    with pytest.raises(ValueError, match="within 0 to"):
        render(draw_case(4), range(100, 500))


def test_organs_have_the_hounsfield_values_of_their_tissue(normal: Phantom) -> None:
    tissue = normal.case.tissue
    expected = {
        Organ.LIVER: normal.case.liver_hu,
        Organ.SPLEEN: tissue.spleen,
        Organ.SKIN_FAT: -102.0,
        Organ.MUSCLE: tissue.muscle,
    }
    for organ, hu in expected.items():
        assert np.median(normal.hu[normal.labels.organs == organ]) == pytest.approx(hu, abs=8.0)
    assert -920 < np.median(normal.hu[normal.labels.organs == Organ.LUNG_RIGHT]) < -780


def test_organs_have_the_volume_of_an_adults(normal: Phantom) -> None:
    millilitres = abs(np.linalg.det(normal.affine[:3, :3])) / 1000.0
    volume = {organ: np.count_nonzero(normal.labels.organs == organ) * millilitres for organ in Organ}
    assert 900 < volume[Organ.LIVER] < 2300
    assert 80 < volume[Organ.SPLEEN] < 350
    assert 90 < volume[Organ.KIDNEY_LEFT] < 300
    assert 1500 < volume[Organ.LUNG_RIGHT] < 4500
    assert 300 < volume[Organ.HEART] < 900


def test_the_liver_lies_on_the_patients_right_and_the_spleen_on_the_left(normal: Phantom) -> None:
    def middle_x(organ: Organ) -> float:
        index = np.argwhere(normal.labels.organs == organ).mean(axis=0)
        return float((normal.affine[:3, :3] @ index + normal.affine[:3, 3])[0])

    assert middle_x(Organ.LIVER) > 30.0  # RAS: right is positive
    assert middle_x(Organ.SPLEEN) < -50.0
    assert middle_x(Organ.LUNG_RIGHT) > 0.0 > middle_x(Organ.LUNG_LEFT)


def test_a_normal_case_has_no_finding_voxel(normal: Phantom) -> None:
    assert not normal.labels.findings.any()


def around(case: Case, finding: Finding, reach_mm: float) -> range:
    """Slices about a finding's middle: painting a part is as good as the whole and faster."""
    grid = case.scan.grid
    middle = case.habitus.build.place(finding.center)[2]
    first, last = (round((middle + way * reach_mm - grid.origin[2]) / grid.slice_mm) for way in (-1, 1))
    return range(max(first, 0), min(last, grid.slices))


@pytest.mark.parametrize("kind", CORE)
def test_a_core_finding_is_painted_and_on_its_side(kind: FindingType) -> None:
    case, finding = first_with(kind, start=500)
    phantom = render(case, around(case, finding, 45.0))
    voxels = np.argwhere(phantom.labels.findings == FINDING_LABELS[kind])
    assert len(voxels) >= 4
    sides = {other.side for other in case.findings if other.kind is kind}
    if len(sides) == 1 and finding.side is not Side.NONE:
        assert len(voxels_of(phantom, finding)) > 0.9 * len(voxels)


@pytest.mark.parametrize("kind", [FindingType.HEPATIC_CYST, FindingType.HEPATIC_LESION, FindingType.RENAL_CALCULUS])
def test_a_ball_measures_what_the_truth_says(kind: FindingType) -> None:
    for start in (0, 700, 1400):
        case, finding = first_with(kind, start=start)
        points = voxels_of(render(case, around(case, finding, (finding.size_mm or 0) + 12.0)), finding)
        diameter = 2.0 * (len(points) * 4.0**3 * 3.0 / (4.0 * np.pi)) ** (1.0 / 3.0)
        assert diameter == pytest.approx(finding.size_mm, rel=0.2, abs=2.0)


def test_an_enlarged_heart_measures_what_the_truth_says() -> None:
    case, finding = first_with(FindingType.CARDIOMEGALY)
    phantom = render(case, around(case, finding, 24.0))
    columns = np.flatnonzero((phantom.labels.organs == Organ.HEART).any(axis=(0, 1)))
    assert (columns[-1] - columns[0] + 1) * 4.0 == pytest.approx(finding.size_mm, rel=0.06)


@pytest.mark.parametrize("kind", [FindingType.PLEURAL_EFFUSION, FindingType.PNEUMOTHORAX])
def test_pleural_fluid_and_air_are_as_deep_as_the_truth_says(kind: FindingType) -> None:
    case, finding = first_with(kind, start=100)
    phantom = render(case, around(case, finding, 80.0))
    grid = case.scan.grid
    marked = phantom.labels.findings == FINDING_LABELS[kind]
    x = grid.origin[0] + grid.pixel_mm * np.arange(grid.columns)
    deepest = marked[:, :, (x > 0) == (finding.side is Side.LEFT)].sum(axis=1).max() * grid.pixel_mm
    assert deepest == pytest.approx(finding.size_mm, rel=0.25, abs=6.0)


def test_a_cyst_is_darker_than_the_liver_around_it() -> None:
    case, finding = first_with(FindingType.HEPATIC_CYST)
    phantom = render(case, around(case, finding, 20.0))
    inside = phantom.labels.findings == FINDING_LABELS[finding.kind]
    assert np.median(phantom.hu[inside]) < case.liver_hu - 40.0


def test_noise_has_the_deviation_asked_for_and_little_of_it_at_low_frequencies() -> None:
    noise = noise_slice(3, 0, 128, 128, 0.5)
    assert noise.std() == pytest.approx(1.0, abs=0.05)
    spectrum = np.abs(np.fft.fft2(noise)) ** 2
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.fftfreq(128)))
    low = spectrum[(frequency > 0) & (frequency < 0.04)].mean()
    middle = spectrum[(frequency > 0.1) & (frequency < 0.2)].mean()
    assert low < 0.6 * middle


def test_thick_slices_of_full_phantoms_come_out_on_their_grid() -> None:
    case = next(case for case in (draw_case(s, full=True) for s in range(200)) if case.scan.grid.slice_mm == 5.0)
    phantom = render(case, range(10, 12))
    assert phantom.hu.shape == (2, 256, 256)
    assert phantom.hu.dtype == np.int16
