"""Volumes rebuilt from synthetic slices equal the field they were cut from."""

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLSLossless,
    RLELossless,
)

from tests.imaging import synthetic
from tests.imaging.synthetic import Field, Scan
from worker.core.errors import GeometryError, PixelDataError
from worker.imaging import headers, volume
from worker.imaging.rules import ImagingRules
from worker.imaging.slices import Slice

RULES = ImagingRules(decode_threads=2)
EXACT = 0.51
"""Stored values are rounded to whole slopes, so half a unit is the stated tolerance at slope 1."""


def slices_of(paths: list[Path]) -> list[Slice]:
    return [piece for path in paths for piece in headers.read_header(path).slices]


def build(scan: Scan, folder: Path, order: list[int] | None = None, rules: ImagingRules = RULES) -> volume.Volume:
    return volume.build(slices_of(synthetic.write(scan, folder, order=order)), rules)


def build_from_one_object(scan: Scan, folder: Path, order: list[int], rules: ImagingRules) -> volume.Volume:
    path = synthetic.save(synthetic.multiframe(scan, order), folder / "enhanced", scan.syntax)
    return volume.build(slices_of([path]), rules)


def rotation(first: float, second: float, third: float) -> np.ndarray:
    """Rotation by three small angles in degrees about x, y and z."""
    matrix = np.eye(3)
    for axis, degrees in enumerate((first, second, third)):
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        turn = np.eye(3)
        i, j = [k for k in range(3) if k != axis]
        turn[i, i], turn[i, j], turn[j, i], turn[j, j] = c, -s, s, c
        matrix = matrix @ turn
    return matrix


PATIENT_POSITIONS = {
    "HFS": ((1, 0, 0), (0, 1, 0)),
    "HFP": ((-1, 0, 0), (0, -1, 0)),
    "FFS": ((-1, 0, 0), (0, 1, 0)),
    "FFP": ((1, 0, 0), (0, -1, 0)),
    "HFDR": ((0, -1, 0), (1, 0, 0)),
    "FFDL": ((0, 1, 0), (1, 0, 0)),
}


@st.composite
def scans(draw: st.DrawFn) -> Scan:
    """Any slice geometry and storage a CT may have."""
    columns, rows = PATIENT_POSITIONS[draw(st.sampled_from(sorted(PATIENT_POSITIONS)))]
    turn = rotation(*(draw(st.floats(-12, 12)) for _ in range(3)))
    step = draw(st.floats(0.5, 5.0))
    count = draw(st.integers(12, 16))
    kind = draw(st.sampled_from(["even", "gap", "uneven"]))
    depths = [step * index for index in range(count)]
    if kind == "gap":
        del depths[draw(st.integers(1, count - 2))]
    elif kind == "uneven":
        half = count // 2
        depths = [*depths[:half], *(depths[half - 1] + 1.6 * step * (index + 1) for index in range(count - half))]
    signed = draw(st.booleans())
    slope = draw(st.sampled_from([1.0, 0.5, 2.0]))
    intercept = float(draw(st.sampled_from([0, -1000] if signed else [-4096, -8192])))
    padding = draw(st.sampled_from([None, -20000 if signed else 0]))
    return Scan(
        known=Field(
            offset=-100.0,
            gradient=(draw(st.floats(-4, 4)), draw(st.floats(-4, 4)), draw(st.sampled_from([-6.0, 6.0]))),
        ),
        rows=draw(st.integers(32, 36)),
        columns=draw(st.integers(32, 40)),
        spacing=(draw(st.floats(0.4, 3)), draw(st.floats(0.4, 3))),
        column_axis=tuple(turn @ np.array(columns)),
        row_axis=tuple(turn @ np.array(rows)),
        corner=(draw(st.floats(-100, 100)), draw(st.floats(-100, 100)), draw(st.floats(-20, 20))),
        depths=tuple(depths),
        shear=(
            math.tan(math.radians(draw(st.sampled_from([0.0, -18.5, 27.0])))),
            draw(st.sampled_from([0.0, 0.0, 0.1])),
        ),
        slope=slope,
        intercept=intercept,
        signed=signed,
        padding=padding,
        syntax=draw(
            st.sampled_from(
                [
                    ImplicitVRLittleEndian,
                    ExplicitVRLittleEndian,
                    ExplicitVRBigEndian,
                    DeflatedExplicitVRLittleEndian,
                    RLELossless,
                    JPEGLossless,
                    JPEGLSLossless,
                    JPEG2000Lossless,
                    HTJ2KLossless,
                ]
            )
        ),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scan=scans(), seed=st.integers(0, 2**32 - 1), in_one_object=st.booleans())
def test_any_series_rebuilt_from_shuffled_slices_equals_what_it_was_cut_from(
    scan: Scan, seed: int, in_one_object: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    order = list(range(len(scan.depths)))
    random.Random(seed).shuffle(order)
    rules = replace(RULES, lowest_hu_at_most=math.inf)

    built = (build_from_one_object if in_one_object else build)(scan, tmp_path_factory.mktemp("scan"), order, rules)

    kept = np.ones(built.hu.shape, bool) if built.padding is None else ~built.padding
    assert kept.mean() > 0.1
    if scan.shear == (0.0, 0.0):  # nothing but what was padding, or may be by its value, is marked as such
        measured = scan.known.at(synthetic.points_of(built)) > -1400
        measured[:, :2, :3] &= scan.padding is None
        assert kept[measured].all()
    assert synthetic.largest_error(built, scan.known) <= 0.5 * scan.slope + 0.02


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scan=scans(), seed=st.integers(0, 2**32 - 1))
def test_a_permutation_of_the_files_changes_not_one_bit(
    scan: Scan, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    slices = slices_of(synthetic.write(scan, tmp_path_factory.mktemp("scan")))
    rules = replace(RULES, lowest_hu_at_most=math.inf)
    first = volume.build(slices, rules)
    random.Random(seed).shuffle(slices)

    second = volume.build(slices, rules)

    assert np.array_equal(first.hu, second.hu)
    assert np.array_equal(first.affine, second.affine)
    assert first.repairs == second.repairs
    assert first.instance_uids == second.instance_uids


def test_slice_and_intercept_may_differ_from_slice_to_slice(tmp_path: Path) -> None:
    scan, uids = Scan(), synthetic.new_uids()
    paths = []
    for number, depth in enumerate(scan.depths):
        own = replace(scan, slope=(1.0, 2.0)[number % 2], intercept=(-1024.0, -2000.0)[number % 2])
        paths.append(synthetic.save(synthetic.dataset(own, depth, uids, number), tmp_path / str(number), own.syntax))

    built = volume.build(slices_of(paths), RULES)

    assert synthetic.largest_error(built, scan.known) <= 1.01


def test_slices_grow_towards_the_head_and_the_affine_says_where_each_voxel_is(tmp_path: Path) -> None:
    built = build(Scan(), tmp_path)

    assert built.hu.shape == (14, 16, 20)
    assert built.spacing_mm == pytest.approx((2.5, 2.0, 1.5))
    np.testing.assert_allclose(built.affine[:3, 3], [15, 16, -15], atol=1e-9)
    np.testing.assert_allclose(built.affine[:3, 0], [0, 0, 2.5], atol=1e-9)
    assert built.repairs == ()
    assert built.padding is None


def test_a_regular_series_keeps_every_stored_value(tmp_path: Path) -> None:
    scan = Scan()
    built = build(scan, tmp_path, order=[3, 1, 0, 2, *range(4, 14)])

    for index, depth in enumerate(scan.depths):
        assert np.array_equal(built.hu[index], scan.stored(depth) + scan.intercept)


def test_one_missing_slice_is_interpolated_and_said(tmp_path: Path) -> None:
    scan = Scan(depths=tuple(2.5 * index for index in range(20) if index != 7))
    built = build(scan, tmp_path)

    assert built.hu.shape[0] == 20
    assert built.repairs == ("1 missing of 20 slices were interpolated, up to 1 in a row",)
    assert synthetic.largest_error(built, scan.known) <= EXACT


def test_too_many_missing_slices_in_a_row_are_refused(tmp_path: Path) -> None:
    scan = Scan(depths=tuple(1.0 * index for index in range(60) if not 20 <= index < 24))
    with pytest.raises(GeometryError, match=r"4 of 60 slices are missing, up to 4 in a row \(5\.0 mm\)"):
        build(scan, tmp_path)


def test_too_large_a_share_of_missing_slices_is_refused(tmp_path: Path) -> None:
    scan = Scan(depths=tuple(1.0 * index for index in range(24) if index not in (3, 9, 15)))
    with pytest.raises(GeometryError, match="3 of 24 slices are missing"):
        build(scan, tmp_path)


def test_a_gap_too_wide_to_interpolate_is_refused(tmp_path: Path) -> None:
    scan = Scan(depths=(*(5.0 * index for index in range(10)), *(62.3 + 5.0 * index for index in range(5))))
    with pytest.raises(GeometryError, match=r"gap of 17\.3 mm"):
        build(scan, tmp_path)


def test_slices_regular_but_too_far_apart_are_refused(tmp_path: Path) -> None:
    scan = Scan(depths=tuple(20.0 * index for index in range(14)), known=Field(gradient=(3, 5, -2)))
    with pytest.raises(GeometryError, match=r"slices are 20\.0 mm apart"):
        build(scan, tmp_path)


def test_uneven_slices_are_resampled_to_the_closer_spacing(tmp_path: Path) -> None:
    scan = Scan(depths=(*(2.0 * index for index in range(9)), *(16 + 3.5 * index for index in range(1, 8))))
    built = build(scan, tmp_path)

    assert built.spacing_mm[0] == pytest.approx(2.0, abs=0.1)
    assert "slices 2.00 to 3.50 mm apart were resampled" in built.repairs[0]
    assert synthetic.largest_error(built, scan.known) <= EXACT


@pytest.mark.parametrize("offset_mm", [0.03, 0.3, 0.6])
@pytest.mark.parametrize("shared", [3, 14])
def test_two_scans_that_nothing_but_their_positions_tells_apart_are_refused(
    offset_mm: float, shared: int, tmp_path: Path
) -> None:
    first = tuple(2.5 * index for index in range(14))
    second = tuple(2.5 * (14 - shared + index) + offset_mm for index in range(14))
    with pytest.raises(GeometryError, match=r"as when two scans are mixed|slices are missing"):
        build(Scan(depths=(*first, *second)), tmp_path)


def test_a_tilt_is_found_from_positions_and_sheared_straight(tmp_path: Path) -> None:
    scan = Scan(shear=(math.tan(math.radians(18.5)), 0.0), attributes={"GantryDetectorTilt": "0"})
    built = build(scan, tmp_path)

    axes = built.affine[:3, :3] / np.linalg.norm(built.affine[:3, :3], axis=0)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)
    assert built.repairs == ("gantry tilt of 18.5 degrees was sheared straight",)
    assert built.hu.shape[1] > scan.rows
    assert synthetic.largest_error(built, scan.known) <= EXACT


def test_a_tilt_attribute_without_a_tilt_of_positions_changes_nothing(tmp_path: Path) -> None:
    built = build(Scan(attributes={"GantryDetectorTilt": "+25.0"}), tmp_path)

    assert built.repairs == ()
    assert built.hu.shape == (14, 16, 20)


def test_a_lean_that_no_gantry_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GeometryError, match="50 degrees away from their normal"):
        build(Scan(shear=(math.tan(math.radians(50)), 0.0)), tmp_path)


def test_a_jump_of_the_image_centre_is_refused(tmp_path: Path) -> None:
    scan, uids = Scan(), synthetic.new_uids()
    paths = []
    for number, depth in enumerate(scan.depths):
        own = replace(scan, corner=(-15.0 + 30 * (number >= 7), -16.0, -15.0))
        paths.append(synthetic.save(synthetic.dataset(own, depth, uids, number), tmp_path / str(number), own.syntax))
    with pytest.raises(GeometryError, match="jumps sideways"):
        volume.build(slices_of(paths), RULES)


def test_a_small_shift_of_the_image_centre_is_aligned_and_said(tmp_path: Path) -> None:
    scan, uids = Scan(), synthetic.new_uids()
    paths = []
    for number, depth in enumerate(scan.depths):
        own = replace(scan, corner=(-15.0 + 1.2 * (number >= 7), -16.0, -15.0))
        paths.append(synthetic.save(synthetic.dataset(own, depth, uids, number), tmp_path / str(number), own.syntax))
    built = volume.build(slices_of(paths), RULES)

    assert "were aligned by their positions" in built.repairs[0]
    assert synthetic.largest_error(built, scan.known) <= EXACT


def test_copies_of_a_slice_are_used_once(tmp_path: Path) -> None:
    scan, uids = Scan(), synthetic.new_uids()
    paths = synthetic.write(scan, tmp_path / "a", uids) + synthetic.write(
        replace(scan, depths=scan.depths[2:4], syntax=JPEGLSLossless), tmp_path / "b", uids
    )
    built = volume.build(slices_of(paths), RULES)

    assert built.hu.shape == (14, 16, 20)
    assert built.repairs == ("2 slices sent more than once were used once",)


def test_two_different_images_at_one_position_are_refused(tmp_path: Path) -> None:
    scan, uids = Scan(), synthetic.new_uids()
    other = replace(scan, depths=scan.depths[2:3], known=Field(offset=-250.0))
    paths = synthetic.write(scan, tmp_path / "a", uids) + synthetic.write(other, tmp_path / "b", uids)
    with pytest.raises(GeometryError, match="Two different images stand at one position"):
        volume.build(slices_of(paths), RULES)


def test_padding_stays_raw_and_is_marked(tmp_path: Path) -> None:
    built = build(Scan(signed=True, intercept=0.0, padding=-2000), tmp_path)

    assert built.padding is not None
    assert (built.hu[:, :2, :3] == -2000).all()
    assert built.padding.sum() == 14 * 6
    assert built.padding[:, :2, :3].all()


def test_padding_range_is_marked_whole(tmp_path: Path) -> None:
    scan = Scan(padding=3, attributes={"PixelPaddingRangeLimit": 0})
    built = build(scan, tmp_path)

    assert built.padding is not None
    assert built.padding.sum() == 14 * 6


def test_values_too_low_for_air_are_marked_without_a_padding_attribute(tmp_path: Path) -> None:
    scan = Scan(signed=True, intercept=0.0, padding=-2048, attributes={"PixelPaddingValue": None})
    built = build(scan, tmp_path)

    assert built.padding is not None
    assert built.padding.sum() == 14 * 6


def test_a_volume_without_any_air_is_not_in_hounsfield_units(tmp_path: Path) -> None:
    scan = Scan(known=Field(offset=1500, gradient=(0.1, 0.1, 0.1)))
    with pytest.raises(PixelDataError, match="no air and no fat anywhere"):
        build(scan, tmp_path)


def test_padding_is_no_air(tmp_path: Path) -> None:
    scan = Scan(signed=True, intercept=0.0, padding=-2000, known=Field(offset=700, gradient=(1.0, 1.0, 1.0)))
    with pytest.raises(PixelDataError, match="no air and no fat anywhere"):
        build(scan, tmp_path)


def test_a_volume_of_padding_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PixelDataError, match="Every value is padding"):
        build(Scan(attributes={"RescaleSlope": -1, "RescaleIntercept": -2000}), tmp_path)


def test_signed_values_that_the_header_calls_unsigned_are_refused(tmp_path: Path) -> None:
    crossing_zero = Field(offset=0, gradient=(20.0, 20.0, 20.0))
    wrong = {"PixelRepresentation": 0, "RescaleIntercept": -1024}
    scan = Scan(known=crossing_zero, signed=True, intercept=0.0, attributes=wrong)
    with pytest.raises(PixelDataError, match=r"above 32767, so they are not Hounsfield units.*Pixel Representation"):
        build(scan, tmp_path)


def test_slices_without_rescale_have_no_known_unit(tmp_path: Path) -> None:
    with pytest.raises(PixelDataError, match="no Rescale Slope or Intercept"):
        build(Scan(attributes={"RescaleIntercept": None}), tmp_path)


def test_overlays_in_unused_high_bits_do_not_reach_the_values(tmp_path: Path) -> None:
    scan, uids, paths = Scan(bits_stored=12), synthetic.new_uids(), []
    for number, depth in enumerate(scan.depths):
        ds = synthetic.dataset(scan, depth, uids, number)
        ds.PixelData = (np.frombuffer(ds.PixelData, np.uint16) | 0xB000).tobytes()
        paths.append(synthetic.save(ds, tmp_path / str(number), scan.syntax))
    built = volume.build(slices_of(paths), RULES)

    assert synthetic.largest_error(built, scan.known) <= EXACT


def test_twelve_signed_bits_get_their_sign(tmp_path: Path) -> None:
    scan = Scan(signed=True, bits_stored=12, intercept=0.0, known=Field(offset=-200.0))
    paths = synthetic.write(scan, tmp_path)
    for path in paths:
        ds = synthetic.pydicom.dcmread(path)
        ds.PixelData = (np.frombuffer(ds.PixelData, np.uint16) & 0x0FFF).tobytes()
        ds.save_as(path)
    built = volume.build(slices_of(paths), RULES)

    assert built.hu.min() < 0
    assert synthetic.largest_error(built, scan.known) <= EXACT


def test_monochrome1_tells_how_to_display_and_not_what_the_values_are(tmp_path: Path) -> None:
    scan = Scan(attributes={"PhotometricInterpretation": "MONOCHROME1"})
    assert synthetic.largest_error(build(scan, tmp_path), scan.known) <= EXACT


@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEG2000Lossless]
)
def test_an_enhanced_multi_frame_object_gives_the_volume_of_its_frames(syntax: str, tmp_path: Path) -> None:
    scan = Scan(rows=32, columns=34)
    ds = synthetic.multiframe(scan, order=[5, 0, 13, *range(1, 5), *range(6, 13)])
    path = synthetic.save(ds, tmp_path / "enhanced", syntax)

    built = volume.build(slices_of([path]), RULES)

    assert built.hu.shape == (14, 32, 34)
    assert built.hu.min() < -300
    assert synthetic.largest_error(built, scan.known) <= EXACT


def test_slices_thinner_than_their_distance_are_said(tmp_path: Path) -> None:
    built = build(
        Scan(
            depths=tuple(10.0 * index for index in range(12)),
            known=Field(gradient=(3, 5, -4)),
            attributes={"SliceThickness": 1.0},
        ),
        tmp_path,
    )

    assert built.repairs == ("slices 1 mm thick every 10.0 mm: the tissue between was not imaged",)


def test_a_scan_that_lost_every_second_slice_says_that_tissue_was_not_imaged(tmp_path: Path) -> None:
    built = build(Scan(depths=tuple(5.0 * index for index in range(14)), known=Field(gradient=(3, 5, -5))), tmp_path)

    assert built.repairs == ("slices 2.5 mm thick every 5.0 mm: the tissue between was not imaged",)
