"""Objects whose dataset was deflated as a whole: read like any other, and never inflated beyond what is needed."""

import tracemalloc
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian

from tests.imaging import synthetic
from tests.imaging.synthetic import Scan
from worker.core.errors import InvalidObjectError, PixelDataError
from worker.imaging import deflated, pixels, volume
from worker.imaging.headers import read_header
from worker.imaging.rules import ImagingRules

SCAN = Scan(rows=96, columns=96, spacing=(0.7, 0.7), syntax=DeflatedExplicitVRLittleEndian)
MIB = deflated.MIB


def dataset_start(path: Path) -> int:
    return read_header(path).slices[0].pixels.deflated_from or 0


def with_dataset(path: Path, dataset: bytes) -> Path:
    """The file with another dataset, deflated, behind its file meta."""
    start = dataset_start(path)
    squeeze = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
    path.write_bytes(path.read_bytes()[:start] + squeeze.compress(dataset) + squeeze.flush())
    return path


def inflated(path: Path) -> bytes:
    return zlib.decompress(path.read_bytes()[dataset_start(path) :], -zlib.MAX_WBITS)


def stored(path: Path) -> np.ndarray:
    piece = read_header(path).slices[0]
    with pixels.PixelFile(path, piece.pixels) as file:
        return pixels.stored_values(piece, file)


def test_any_part_of_a_deflated_dataset_can_be_had(tmp_path: Path) -> None:
    plain = np.random.default_rng(2).integers(0, 9, 3 * MIB, np.uint8).tobytes()
    squeeze = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    path = tmp_path / "some"
    path.write_bytes(b"meta" + squeeze.compress(plain) + squeeze.flush())

    assert deflated.inflate(path, 4, 0, 10 * MIB) == plain
    assert deflated.inflate(path, 4, MIB + 5, MIB) == plain[MIB + 5 : 2 * MIB + 5]
    assert deflated.inflate(path, 4, 3 * MIB, 8) == b""


def test_pixels_behind_a_private_element_are_found(tmp_path: Path) -> None:
    path = synthetic.write(SCAN, tmp_path)[0]
    before, data = stored(path), inflated(path)
    at = data.index(b"\xe0\x7f\x10\x00OW")
    with_dataset(path, data[:at] + b"\xd1\x7f\x10\x10UN\0\0" + (4000).to_bytes(4, "little") + bytes(4000) + data[at:])

    assert np.array_equal(stored(path), before)


def test_a_header_that_inflates_without_end_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    path = synthetic.write(SCAN, tmp_path)[0]
    size = 200 * MIB
    with_dataset(path, b"\x09\x00\x10\x10OB\0\0" + size.to_bytes(4, "little") + bytes(size) + inflated(path))
    assert path.stat().st_size < 2 * MIB
    tracemalloc.start()
    try:
        with pytest.raises(InvalidObjectError, match="more than 32 MiB before its pixels"):
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 80 * MIB


def test_pixels_that_inflate_to_more_than_the_header_says_are_left_alone(tmp_path: Path) -> None:
    path = synthetic.write(SCAN, tmp_path)[0]
    before, data = stored(path), inflated(path)
    at = data.index(b"\xe0\x7f\x10\x00OW") + 8
    size = before.nbytes + 200 * MIB
    with_dataset(path, data[:at] + size.to_bytes(4, "little") + before.tobytes() + bytes(200 * MIB))
    tracemalloc.start()
    try:
        after = stored(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert np.array_equal(after, before)
    assert peak < 80 * MIB


def test_a_deflated_slice_that_was_cut_is_refused_with_the_bytes_that_lack(tmp_path: Path) -> None:
    path = synthetic.write(SCAN, tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PixelDataError, match=r"The pixel data ends \d+ bytes too early\. Send the object again\."):
        stored(path)


@pytest.mark.parametrize("padding", [None, 7])
@pytest.mark.parametrize("upwards", [True, False])
def test_a_deflated_multi_frame_object_costs_no_more_memory_than_any_other(
    upwards: bool, padding: int | None, tmp_path: Path
) -> None:
    scan = replace(
        SCAN,
        depths=tuple(1.0 * index for index in range(60)),
        known=synthetic.Field(gradient=(2, 2, -7)),
        padding=padding,
    )
    order = range(60) if upwards else range(59, -1, -1)
    path = synthetic.save(synthetic.multiframe(scan, order), tmp_path / "enhanced", DeflatedExplicitVRLittleEndian)
    pieces = list(read_header(path).slices)
    volume.build(pieces, ImagingRules(decode_threads=2))  # imports what a first build imports
    tracemalloc.start()
    try:
        built = volume.build(pieces, ImagingRules(decode_threads=2))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert synthetic.largest_error(built, scan.known) <= 0.51
    assert peak <= 1.5 * built.hu.nbytes + 2 * built.hu[0].nbytes


def frames_of(tmp_path: Path, count: int) -> tuple[deflated.Frames, list[bytes]]:
    """Frames behind 1,000 bytes of something else, and what they hold."""
    plain = [bytes([index]) * 70_000 for index in range(count)]
    squeeze = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    path = tmp_path / "frames"
    path.write_bytes(b"meta" + squeeze.compress(bytes(1000) + b"".join(plain)) + squeeze.flush())
    return deflated.Frames(path, 4, 1000, 70_000), plain


@pytest.mark.parametrize(
    "order",
    [range(12), range(11, -1, -1), (1, 0, 3, 2, 5, 4), (0, 6, 1, 7, 2, 8), (3, 3, 3), (11, 0)],
    ids=str,
)
def test_frames_come_out_right_in_any_order_and_again(order: Sequence[int], tmp_path: Path) -> None:
    frames, plain = frames_of(tmp_path, 12)

    assert [frames.frame(index) == plain[index] for index in order] == [True] * len(order)


def test_frames_in_nearly_their_order_are_inflated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openings: list[Path] = []
    original = Path.open

    def counted(path: Path, *arguments: str) -> object:
        openings.append(path)
        return original(path, *arguments)

    frames, _ = frames_of(tmp_path, 12)
    monkeypatch.setattr(Path, "open", counted)
    for index in (1, 0, 3, 2, 4, 7, 5, 6, 9, 8, 10, 11):
        frames.frame(index)

    assert len(openings) == 1


def test_a_frame_behind_the_end_is_empty(tmp_path: Path) -> None:
    frames, plain = frames_of(tmp_path, 3)

    assert frames.frame(3) == b""
    assert frames.frame(0) == plain[0]
