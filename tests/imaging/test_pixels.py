"""Stored values of every transfer syntax against the hashes given with the data and against independent decoders."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest

from tests.imaging import synthetic
from tests.imaging.synthetic import Scan
from worker.core.errors import PixelDataError, StoreUnavailableError
from worker.imaging import headers, pixels
from worker.imaging.slices import Slice

LOSSLESS = ("", ".1", ".1.99", ".2", ".5", ".4.57", ".4.70", ".4.80", ".4.90", ".4.201")
LOSSY = (".4.50", ".4.51", ".4.53", ".4.55", ".4.81", ".4.91")


def decode(path: Path) -> np.ndarray:
    piece = headers.read_header(path).slices[0]
    with pixels.PixelFile(path, piece.pixels) as file:
        return pixels.stored_values(piece, file)


@pytest.fixture(scope="module")
def syntaxes(ct_data: Path) -> Path:
    return ct_data / "odd" / "transfer_syntax"


def path_of(syntaxes: Path, syntax: str) -> Path:
    return syntaxes / f"ctimage_1.2.840.10008.1.2{syntax}.dcm"


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_every_lossless_syntax_gives_the_values_of_the_reference_hash(syntax: str, syntaxes: Path) -> None:
    array = decode(path_of(syntaxes, syntax))

    assert array.dtype == np.int16
    assert hashlib.sha256(array.tobytes()).hexdigest()[:16] == "1bee432808f49770"


@pytest.mark.parametrize("syntax", [".4.50", ".4.51", ".4.81", ".4.91"])
def test_lossy_syntaxes_agree_with_pydicoms_plugins(syntax: str, syntaxes: Path) -> None:
    array = decode(path_of(syntaxes, syntax))
    other = pydicom.dcmread(path_of(syntaxes, syntax)).pixel_array

    assert array.shape == other.shape
    assert np.abs(array.astype(int) - other.astype(int)).max() <= 1


@pytest.mark.parametrize("syntax", [".4.51", ".4.53", ".4.55"])
def test_twelve_bit_jpeg_processes_agree_with_gdcm(syntax: str, syntaxes: Path) -> None:
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
    piece = headers.read_header(path_of(syntaxes, syntax)).slices[0]
    hu = decode(path_of(syntaxes, syntax)) * piece.slope + piece.intercept
    other = sitk.GetArrayFromImage(sitk.ReadImage(str(path_of(syntaxes, syntax))))[0]

    assert np.abs(hu - other).max() <= 1.01 * piece.slope


@pytest.mark.parametrize("name", ["ct1_j2k_lossless_signed", "ct2_j2k_lossless_hu_intercept0_10mm"])
def test_real_jpeg_2000_slices_give_the_values_of_the_reference_hash(name: str, ct_data: Path) -> None:
    entries = json.loads((ct_data / "index.json").read_text())["entries"]
    known = next(entry for entry in entries if entry["path"] == f"odd/{name}.dcm")["pixels"]

    assert (
        hashlib.sha256(decode(ct_data / "odd" / f"{name}.dcm").tobytes()).hexdigest()[:16]
        == known["sha256_of_array_bytes"]
    )


def test_fragments_of_frames_are_told_apart_without_an_offset_table(ct_data: Path) -> None:
    path = ct_data / "odd" / "ect_perfusion_2frames_jpeg_ext_no_bot.dcm"
    frames = headers.read_header(path).slices
    other = pydicom.dcmread(path).pixel_array

    with pixels.PixelFile(path, frames[0].pixels) as file:
        for index, piece in enumerate(frames):
            assert np.abs(pixels.stored_values(piece, file).astype(int) - other[index]).max() <= 1


def fragmented(tmp_path: Path, table: bool) -> tuple[Path, tuple[Slice, ...], Scan]:
    """An RLE multi-frame object whose frames are cut into two fragments each; RLE streams have no start marker."""
    scan = Scan()
    ds = synthetic.multiframe(scan)
    synthetic.save(ds, tmp_path / "whole", synthetic.pydicom.uid.RLELossless)
    encoded = list(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=len(scan.depths)))
    half = [[frame[: len(frame) // 4 * 2], frame[len(frame) // 4 * 2 :]] for frame in encoded]
    offsets, at = [], 0
    for pieces in half:
        offsets.append(at)
        at += sum(8 + len(piece) for piece in pieces)
    items = b"".join(
        b"\xfe\xff\x00\xe0" + len(piece).to_bytes(4, "little") + piece for pieces in half for piece in pieces
    )
    basic = b"".join(offset.to_bytes(4, "little") for offset in offsets) if table else b""
    ds.PixelData = b"\xfe\xff\x00\xe0" + len(basic).to_bytes(4, "little") + basic + items
    ds["PixelData"].is_undefined_length = True
    pydicom.dcmwrite(tmp_path / "cut", ds, enforce_file_format=True)
    return tmp_path / "cut", headers.read_header(tmp_path / "cut").slices, scan


def test_fragments_of_frames_are_told_apart_by_the_offset_table(tmp_path: Path) -> None:
    path, frames, scan = fragmented(tmp_path, table=True)

    with pixels.PixelFile(path, frames[0].pixels) as file:
        for piece, depth in zip(frames, scan.depths, strict=True):
            assert np.array_equal(pixels.stored_values(piece, file), scan.stored(depth))


def test_fragments_that_nothing_tells_apart_are_refused(tmp_path: Path) -> None:
    path, frames, _ = fragmented(tmp_path, table=False)
    with pytest.raises(PixelDataError, match="28 fragments cannot be told apart into 14 frames"):
        pixels.PixelFile(path, frames[0].pixels)


def test_native_pixels_that_end_early_are_refused_with_the_bytes_that_lack(ct_data: Path) -> None:
    with pytest.raises(PixelDataError, match=r"The pixel data ends \d+ bytes too early\. Send the object again\."):
        decode(ct_data / "odd" / "corrupt" / "ct_truncated_pixeldata.dcm")


def test_a_compressed_slice_that_was_cut_is_refused(ct_data: Path) -> None:
    with pytest.raises(PixelDataError, match=r"The pixel data ends \d+ bytes too early\. Send the object again\."):
        decode(ct_data / "odd" / "corrupt" / "ct_jpegls_truncated.dcm")


@pytest.mark.parametrize("syntax", [".4.57", ".4.70", ".4.80", ".4.90", ".4.201", ".4.51"])
def test_a_stream_cut_inside_whole_fragments_is_refused_and_not_filled_with_grey(
    syntax: str, syntaxes: Path, tmp_path: Path
) -> None:
    ds = pydicom.dcmread(path_of(syntaxes, syntax))
    frame = pydicom.encaps.get_frame(ds.PixelData, 0, number_of_frames=1)
    ds.PixelData = pydicom.encaps.encapsulate([frame[: len(frame) // 4 * 2]])
    ds["PixelData"].is_undefined_length = True
    ds.save_as(tmp_path / "cut")
    with pytest.raises(PixelDataError, match="no end marker"):
        decode(tmp_path / "cut")


@pytest.mark.parametrize("syntax", [".4.80", ".4.90", ".5"])
def test_a_stream_of_noise_is_refused(syntax: str, syntaxes: Path, tmp_path: Path) -> None:
    ds = pydicom.dcmread(path_of(syntaxes, syntax))
    noise = np.random.default_rng(1).integers(0, 256, 5000, np.uint8).tobytes()
    ds.PixelData = pydicom.encaps.encapsulate([noise + b"\xff\xd9"])
    ds["PixelData"].is_undefined_length = True
    ds.save_as(tmp_path / "noise")
    with pytest.raises(PixelDataError, match="does not decode"):
        decode(tmp_path / "noise")


@pytest.mark.parametrize("syntax", [".4.51", ".4.70", ".4.80", ".4.90", ".4.201", ".5"])
def test_a_stream_of_another_size_than_the_header_says_is_refused(syntax: str, syntaxes: Path) -> None:
    path = path_of(syntaxes, syntax)
    piece = headers.read_header(path).slices[0]
    wrong = replace(piece, pixels=replace(piece.pixels, rows=256))
    with pixels.PixelFile(path, wrong.pixels) as file, pytest.raises(PixelDataError):
        pixels.stored_values(wrong, file)


def test_a_stream_that_declares_a_huge_picture_is_refused_before_it_is_decoded(syntaxes: Path, tmp_path: Path) -> None:
    ds = pydicom.dcmread(path_of(syntaxes, ".4.90"))
    frame = bytearray(pydicom.encaps.get_frame(ds.PixelData, 0, number_of_frames=1))
    frame[8:16] = (60000).to_bytes(4, "big") * 2
    ds.PixelData = pydicom.encaps.encapsulate([bytes(frame)])
    ds["PixelData"].is_undefined_length = True
    ds.save_as(tmp_path / "huge")
    with pytest.raises(PixelDataError, match="60000 x 60000 values where its header says 512 x 512"):
        decode(tmp_path / "huge")


def test_a_private_transfer_syntax_is_refused_and_not_guessed(syntaxes: Path) -> None:
    path = path_of(syntaxes, ".1")
    piece = headers.read_header(path).slices[0]
    private = replace(piece, pixels=replace(piece.pixels, transfer_syntax="1.2.840.113619.5.2"))
    with pixels.PixelFile(path, private.pixels) as file, pytest.raises(PixelDataError, match="not a standard one"):
        pixels.stored_values(private, file)


def test_an_object_that_left_the_store_may_come_back(tmp_path: Path) -> None:
    path = synthetic.write(Scan(), tmp_path)[0]
    piece = headers.read_header(path).slices[0]
    path.unlink()
    with pytest.raises(StoreUnavailableError, match="cannot be read"):
        pixels.PixelFile(path, piece.pixels)
