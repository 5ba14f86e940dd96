"""Headers of good, foreign and broken objects."""

import random
import traceback
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.errors import BytesLengthException
from pydicom.uid import RLELossless

from tests.imaging import synthetic
from tests.imaging.synthetic import Scan
from worker.core.errors import FinalError, InvalidObjectError, StoreUnavailableError
from worker.imaging import pixels, series
from worker.imaging.headers import read_header, read_headers
from worker.imaging.rules import ImagingRules


@pytest.fixture(scope="module")
def odd(ct_data: Path) -> Path:
    return ct_data / "odd"


def test_a_file_that_is_not_dicom_is_named_as_such(odd: Path) -> None:
    with pytest.raises(InvalidObjectError, match="The file is not DICOM: it has no DICM prefix"):
        read_header(odd / "corrupt" / "not_dicom.dcm")


def test_a_file_cut_inside_its_header_is_refused(odd: Path) -> None:
    with pytest.raises(InvalidObjectError, match=r"ends inside its header\. Send the object again\."):
        read_header(odd / "corrupt" / "ct_header_cut.dcm")


@pytest.mark.parametrize("size", [0, 100, 132, 140, 200, 400, 1500])
def test_any_cut_of_the_header_is_an_invalid_object(size: int, tmp_path: Path) -> None:
    whole = synthetic.write(Scan(), tmp_path)[0]
    header_bytes = whole.stat().st_size - 16 * 20 * 2
    cut = tmp_path / "cut"
    cut.write_bytes(whole.read_bytes()[: min(size, header_bytes - 9)])
    with pytest.raises(InvalidObjectError):
        read_header(cut)


def test_one_broken_file_stops_nothing(odd: Path) -> None:
    headers, unreadable = read_headers(sorted((odd / "corrupt").iterdir()))

    assert len(headers) == 4
    assert sorted(bad.path.name for bad in unreadable) == ["ct_header_cut.dcm", "not_dicom.dcm"]


def test_a_dicomdir_is_no_object_of_a_study() -> None:
    path = pydicom.data.get_testdata_file("DICOMDIR", download=False)
    with pytest.raises(InvalidObjectError, match="a DICOMDIR: it lists other files"):
        read_header(path)


def test_a_missing_file_is_the_stores_trouble(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError, match="No such file"):
        read_header(tmp_path / "gone.dcm")


def test_absent_geometry_is_none_and_not_a_guess(odd: Path) -> None:
    piece = read_header(odd / "corrupt" / "ct_no_geometry.dcm").slices[0]

    assert piece.position is None
    assert piece.orientation is None


@pytest.mark.parametrize("value", ["NaN\\0\\0", "1\\2", "abc\\0\\0", "inf\\0\\0", ""])
def test_an_unusable_position_is_none(value: str, tmp_path: Path) -> None:
    path = synthetic.write(Scan(), tmp_path)[0]
    element = b"\x20\x00\x32\x00DS"
    raw = path.read_bytes()
    at = raw.index(element)
    length = int.from_bytes(raw[at + 6 : at + 8], "little")
    text = value.encode().ljust(length)
    path.write_bytes(raw[: at + 8] + text + raw[at + 8 + length :])

    assert read_header(path).slices[0].position is None


def test_functional_groups_of_each_frame_win_over_shared_ones(odd: Path) -> None:
    header = read_header(odd / "ect_perfusion_2frames_jpeg_ext_no_bot.dcm")

    assert [piece.position for piece in header.slices] == [(99.5, -301.5, -159.0), (99.5, -301.5, -149.0)]
    assert {piece.intercept for piece in header.slices} == {-1024.0}
    assert {piece.spacing for piece in header.slices} == {(0.388672, 0.388672)}
    assert header.body_part == "BRAIN"


def test_a_legacy_converted_object_has_the_geometry_of_its_frames(odd: Path) -> None:
    header = read_header(odd / "legacy_enhanced_ct_3frames_23x38.dcm")

    assert [piece.position and piece.position[2] for piece in header.slices] == [-177.75, -175.25, -172.75]
    assert {piece.thickness_mm for piece in header.slices} == {2.5}


def test_a_multi_frame_object_that_describes_too_few_frames_is_refused(tmp_path: Path) -> None:
    ds = synthetic.multiframe(Scan())
    ds.PerFrameFunctionalGroupsSequence = ds.PerFrameFunctionalGroupsSequence[:-1]
    path = synthetic.save(ds, tmp_path / "short", synthetic.ExplicitVRLittleEndian)
    with pytest.raises(InvalidObjectError, match="another number of frames"):
        read_header(path)


def test_a_plain_object_that_claims_to_hold_frames_without_end_is_refused_at_once(tmp_path: Path) -> None:
    path = synthetic.write(Scan(attributes={"NumberOfFrames": 2147483647}), tmp_path)[0]
    with pytest.raises(InvalidObjectError, match="another number of frames"):
        read_header(path)


@pytest.mark.parametrize(
    "name", ["cyrillic_ir144", "gb18030", "japanese_ir87", "latin1_ir100", "undeclared_utf8", "utf8_ir192"]
)
def test_any_character_set_is_read_without_a_warning(name: str, odd: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        header = read_header(odd / "charset" / f"ct_{name}.dcm")

    assert header.series_description == "HELICAL CHEST"


def test_a_description_is_decoded_by_its_character_set(tmp_path: Path) -> None:
    scan = Scan(attributes={"SpecificCharacterSet": "ISO_IR 144", "SeriesDescription": "ГРУДЬ"})
    assert read_header(synthetic.write(scan, tmp_path)[0]).series_description == "ГРУДЬ"


def test_nothing_of_a_patient_shows_in_the_representation_of_a_header(tmp_path: Path) -> None:
    scan = Scan(attributes={"PatientID": "CANARY-1", "SeriesDescription": "CANARY-2"})
    header = read_header(synthetic.write(scan, tmp_path / "CANARY-3")[0])

    assert "CANARY" not in repr(header)


@pytest.mark.filterwarnings("ignore:Expected (ex|im)plicit VR, but found")
@pytest.mark.parametrize(
    ("named", "written"), [("1.2.840.10008.1.2.1", "1.2.840.10008.1.2"), ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1")]
)
def test_pixels_are_found_where_they_are_although_the_file_names_the_other_encoding(
    named: str, written: str, tmp_path: Path
) -> None:
    scan = Scan(syntax=written)
    ds = synthetic.dataset(scan, 0.0, synthetic.new_uids(), 1)
    ds.DataSetTrailingPadding = bytes(16)  # so that reading too late would find enough bytes
    path = synthetic.save(ds, tmp_path / "slice", written)
    data = path.read_bytes()
    at = data.index(b"\x02\x00\x10\x00UI") + 6
    end = at + 2 + int.from_bytes(data[at : at + 2], "little")
    value = named.encode() + b"\0" * (len(named) % 2)
    path.write_bytes(data[:at] + len(value).to_bytes(2, "little") + value + data[end:])
    (piece,) = read_header(path).slices

    with pixels.PixelFile(path, piece.pixels) as file:
        assert np.array_equal(pixels.stored_values(piece, file), scan.stored(0.0))


def test_reading_a_header_does_not_read_the_pixels(tmp_path: Path) -> None:
    path = synthetic.write(Scan(), tmp_path)[0]
    raw = path.read_bytes()
    path.write_bytes(raw[: -16 * 20 * 2])

    piece = read_header(path).slices[0]

    assert piece.pixels.offset == len(raw) - 16 * 20 * 2
    assert piece.pixels.length == 16 * 20 * 2


@pytest.mark.parametrize(
    ("name", "modality"), [("CT_small.dcm", "CT"), ("MR_small_bigendian.dcm", "MR"), ("JPEG2000.dcm", "NM")]
)
def test_a_pydicom_test_file_of_each_encoding_is_read(name: str, modality: str) -> None:
    path = pydicom.data.get_testdata_file(name, download=False)
    assert path is not None
    assert read_header(path).modality == modality


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_are_read_or_refused_and_never_break_the_worker(tmp_path: Path) -> None:
    whole = synthetic.write(Scan(), tmp_path)[0].read_bytes()
    enhanced = synthetic.save(synthetic.multiframe(Scan()), tmp_path / "enhanced", RLELossless).read_bytes()
    chance = random.Random(4)
    damaged, outcomes = tmp_path / "damaged", set()
    for _ in range(250):
        data = bytearray(chance.choice((whole, enhanced)))
        for _ in range(chance.choice((1, 3, 12))):
            data[chance.randrange(128, len(data) * 2 // 3)] = chance.randrange(256)
        damaged.write_bytes(data)
        try:
            header = read_header(damaged)
            series.choose([header], ImagingRules())
            if header.slices:
                with pixels.PixelFile(damaged, header.slices[0].pixels) as file:
                    pixels.stored_values(header.slices[0], file)
            outcomes.add("read")
        except FinalError as error:
            outcomes.add(type(error).__name__)
            assert not isinstance(error.__cause__, BytesLengthException)

    assert outcomes == {"read", "InvalidObjectError", "PixelDataError"}


def test_an_error_about_a_damaged_header_does_not_quote_it(tmp_path: Path) -> None:
    path = synthetic.write(Scan(attributes={"PatientID": "CANARY"}), tmp_path)[0]
    data = bytearray(path.read_bytes())
    data[138:140] = b"\xff\x03"  # the group length element of the file meta swallows the patient's id
    path.write_bytes(data)
    with pytest.raises(InvalidObjectError) as caught:
        read_header(path)

    assert "CANARY" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"])
def test_a_syntax_that_always_loses_is_lossy_whatever_the_header_says(syntax: str, odd: Path, tmp_path: Path) -> None:
    ds = pydicom.dcmread(odd / "transfer_syntax" / f"ctimage_{syntax}.dcm")
    ds.LossyImageCompression = "00"
    ds.save_as(tmp_path / "slice")

    assert read_header(tmp_path / "slice").lossy
