"""Stored values of one slice: fetch its bytes, undo the compression, put the sign right.

Everything heavy runs without Python's interpreter lock, so that slices decode side by side in threads.
"""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from worker.core.errors import PixelDataError, StoreUnavailableError
from worker.imaging import deflated
from worker.imaging.slices import Pixels, Slice

_ITEM = (0xFFFE, 0xE000)
_SEQUENCE_DELIMITER = (0xFFFE, 0xE0DD)
_END_OF_IMAGE = b"\xff\xd9"
"""Last bytes of all these streams; decoders fill up a cut one with grey or the last row instead of complaining."""
_STARTS_OF_IMAGE = (b"\xff\xd8", b"\xff\x4f\xff\x51")
"""First bytes of a JPEG or JPEG-LS stream, and of a JPEG 2000 one."""

_DECODERS: dict[str, Callable[[bytes], NDArray[np.generic]]] = {
    "1.2.840.10008.1.2.4.50": imagecodecs.jpeg_decode,
    "1.2.840.10008.1.2.4.51": imagecodecs.jpeg_decode,
    "1.2.840.10008.1.2.4.53": imagecodecs.jpeg_decode,
    "1.2.840.10008.1.2.4.55": imagecodecs.jpeg_decode,
    "1.2.840.10008.1.2.4.57": imagecodecs.ljpeg_decode,
    "1.2.840.10008.1.2.4.70": imagecodecs.ljpeg_decode,
    "1.2.840.10008.1.2.4.80": imagecodecs.jpegls_decode,
    "1.2.840.10008.1.2.4.81": imagecodecs.jpegls_decode,
    "1.2.840.10008.1.2.4.90": imagecodecs.jpeg2k_decode,
    "1.2.840.10008.1.2.4.91": imagecodecs.jpeg2k_decode,
    "1.2.840.10008.1.2.4.201": imagecodecs.jpeg2k_decode,
    "1.2.840.10008.1.2.4.202": imagecodecs.jpeg2k_decode,
    "1.2.840.10008.1.2.4.203": imagecodecs.jpeg2k_decode,
}
"""Transfer syntax to the function that undoes it (PS3.5 section 10 and A.4)."""
_RLE = "1.2.840.10008.1.2.5"
_NATIVE = frozenset({"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"})


def stored_values(piece: Slice, source: "PixelFile") -> NDArray[np.generic]:
    """Stored values of one slice, sign and unused high bits put right.

    Returns an integer array (rows, columns) in native byte order.

    Raises PixelDataError when the bytes are missing, do not decode, or decode to another size; StoreUnavailableError when
    the file cannot be read.
    """
    pixels = piece.pixels
    raw = source.frame(piece.frame)
    if not pixels.encapsulated:
        return _in_range(_native(raw, pixels), pixels)
    if pixels.transfer_syntax != _RLE and _END_OF_IMAGE not in raw[-64:].rstrip(b"\0")[-3:]:
        raise PixelDataError(
            "The compressed pixel data of a slice has no end marker: it was cut. Send the object again."
        )
    size = _stream_size(raw)
    if size is not None and size != (pixels.rows, pixels.columns):  # before anything of that size is allocated
        raise _other_size(size, pixels)
    try:
        array = _decode(raw, pixels)
    except (RuntimeError, ValueError, TypeError, IndexError, OSError) as error:
        raise PixelDataError("The pixel data of a slice does not decode. Send the object again.") from error
    if array.shape != (pixels.rows, pixels.columns):
        raise _other_size(array.shape, pixels)
    return _in_range(array, pixels)


def _other_size(size: tuple[int, ...], pixels: Pixels) -> PixelDataError:
    return PixelDataError(
        f"A slice decodes to {' x '.join(map(str, size))} values where its header says "
        f"{pixels.rows} x {pixels.columns}. Send the object again."
    )


def _stream_size(raw: bytes) -> tuple[int, int] | None:
    """Rows and columns that a compressed stream declares; None for RLE, which declares none.

    JPEG 2000: the SIZ marker (ISO 15444-1 A.5.1). JPEG and JPEG-LS: the frame header (ISO 10918-1 B.2.2).
    """
    if raw.startswith(b"\xff\x4f\xff\x51") and len(raw) >= 24:
        right, bottom, left, top = struct.unpack_from(">4I", raw, 8)
        return bottom - top, right - left
    if not raw.startswith(b"\xff\xd8"):
        return None
    at = 2
    while at + 9 <= len(raw) and raw[at] == 0xFF:
        marker, length = raw[at + 1], int.from_bytes(raw[at + 2 : at + 4], "big")
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return struct.unpack_from(">HH", raw, at + 5)
        at += 2 + length
    return None


class PixelFile:
    """The pixel data of one stored object, opened once; frames may be read from several threads.

    Raises StoreUnavailableError when the file cannot be read, PixelDataError when it is shorter than it says.
    """

    def __init__(self, path: Path, pixels: Pixels) -> None:
        self.path = path
        self.pixels = pixels
        self._deflated: deflated.Frames | None = None
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise _unavailable(error) from error
        try:
            self._ranges = self._frame_ranges()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
        if self._deflated is not None:
            self._deflated.close()

    def __enter__(self) -> "PixelFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def frame(self, index: int) -> bytes:
        """Bytes of one frame: raw values, or one compressed stream."""
        if self._deflated is not None:
            return self._inflated(self._deflated, index)
        return b"".join(self._read(offset, length) for offset, length in self._ranges[index])

    def _inflated(self, frames: deflated.Frames, index: int) -> bytes:
        try:
            data = frames.frame(index)
        except OSError as error:
            raise _unavailable(error) from error
        except zlib.error as error:
            raise PixelDataError(
                "The pixel data of a deflated object does not inflate. Send the object again."
            ) from error
        if len(data) < self.frame_bytes:
            raise _ended(self.frame_bytes - len(data))
        return data

    def _read(self, offset: int, length: int) -> bytes:
        try:
            data = os.pread(self._descriptor, length, offset)
            while len(data) < length and (more := os.pread(self._descriptor, length - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise _unavailable(error) from error
        if len(data) < length:
            raise _ended(length - len(data))
        return data

    def _frame_ranges(self) -> list[list[tuple[int, int]]]:
        """For every frame the (offset, length) pieces its bytes are in."""
        pixels = self.pixels
        if pixels.encapsulated and pixels.deflated_from is None:
            return _assign_fragments(*self._fragments(), frames=pixels.frames, read=self._read)
        size, available = self.frame_bytes, pixels.length or 0
        if size * pixels.frames > available:
            raise _ended(size * pixels.frames - available)
        if pixels.deflated_from is not None:
            self._deflated = deflated.Frames(self.path, pixels.deflated_from, pixels.offset, size)
        return [[(pixels.offset + index * size, size)] for index in range(pixels.frames)]

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame that is not compressed."""
        return self.pixels.rows * self.pixels.columns * (self.pixels.bits_allocated // 8)

    def _fragments(self) -> tuple[list[int], list[tuple[int, int]]]:
        """The basic offset table and the (offset, length) of every fragment (PS3.5 A.4)."""
        fragments: list[tuple[int, int]] = []
        table: list[int] | None = None
        at = self.pixels.offset
        while True:
            head = self._read(at, 8)
            group, element, length = struct.unpack("<HHI", head)
            if (group, element) == _SEQUENCE_DELIMITER:
                return table or [], fragments
            if (group, element) != _ITEM:
                raise PixelDataError("The fragments of the pixel data are out of step. Send the object again.")
            if table is None:
                table = list(struct.unpack(f"<{length // 4}I", self._read(at + 8, length // 4 * 4)))
            else:
                fragments.append((at + 8, length))
            at += 8 + length


def _assign_fragments(
    table: list[int],
    fragments: list[tuple[int, int]],
    frames: int,
    read: Callable[[int, int], bytes],
) -> list[list[tuple[int, int]]]:
    """Which fragments belong to which frame: all to one, one each, by the offset table, or by where streams start."""
    if not fragments:
        raise PixelDataError("The pixel data holds no fragment. Send the object again.")
    if frames == 1:
        return [fragments]
    if len(fragments) == frames:
        return [[fragment] for fragment in fragments]
    if len(table) == frames:
        base = fragments[0][0] - 8
        starts = [base + offset + 8 for offset in table]
    else:
        starts = [at for at, length in fragments if read(at, min(4, length)).startswith(_STARTS_OF_IMAGE)]
    ranges: list[list[tuple[int, int]]] = []
    for fragment in fragments:
        if fragment[0] in starts:
            ranges.append([])
        if ranges:
            ranges[-1].append(fragment)
    if len(ranges) != frames:
        raise PixelDataError(
            f"{len(fragments)} fragments cannot be told apart into {frames} frames. Send the object again."
        )
    return ranges


def _ended(lacking: int) -> PixelDataError:
    return PixelDataError(f"The pixel data ends {lacking} bytes too early. Send the object again.")


def _unavailable(error: OSError) -> StoreUnavailableError:
    return StoreUnavailableError(f"A stored object cannot be read: {error.strerror or 'input/output error'}.")


def _native(raw: bytes, pixels: Pixels) -> NDArray[np.generic]:
    if pixels.bits_allocated not in (8, 16, 32):
        raise PixelDataError(f"{pixels.bits_allocated} bits a value are not supported. Send the series in 16.")
    if pixels.transfer_syntax not in _NATIVE:
        raise PixelDataError("The transfer syntax of a slice is not a standard one. Send the series in a standard one.")
    kind = f"{'>' if pixels.big_endian else '<'}{'i' if pixels.signed else 'u'}{pixels.bits_allocated // 8}"
    array = np.frombuffer(raw, dtype=kind).reshape(pixels.rows, pixels.columns)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _decode(raw: bytes, pixels: Pixels) -> NDArray[np.generic]:
    if pixels.transfer_syntax == _RLE:
        kind = f"<{'i' if pixels.signed else 'u'}{pixels.bits_allocated // 8}"
        return np.frombuffer(imagecodecs.dicomrle_decode(raw, kind), dtype=kind).reshape(pixels.rows, pixels.columns)
    decoder = _DECODERS.get(pixels.transfer_syntax)
    if decoder is None:
        raise PixelDataError("The transfer syntax of a slice is not one that holds CT images. Send it in another.")
    return np.asarray(decoder(raw))


def _in_range(array: NDArray[np.generic], pixels: Pixels) -> NDArray[np.generic]:
    """Keep Bits Stored of each value and give it its sign (PS3.5 8.1.1).

    A code stream may declare its values unsigned where the header says signed, and unused high bits may hold overlays.
    """
    width = array.dtype.itemsize * 8
    unsigned = np.dtype(f"u{array.dtype.itemsize}")
    kind = np.dtype(f"i{array.dtype.itemsize}") if pixels.signed else unsigned
    spare = width - pixels.bits_stored
    if spare < 0 or pixels.high_bit >= width:
        raise PixelDataError("A slice holds fewer bits than its header says. Send the object again.")
    if spare == 0 or (pixels.encapsulated and pixels.signed and array.dtype.kind == "i"):
        return array.view(kind)
    above = spare if pixels.encapsulated else width - 1 - pixels.high_bit
    lifted = np.left_shift(array.view(unsigned), unsigned.type(above))
    values: NDArray[np.generic] = np.right_shift(lifted.view(kind), kind.type(spare))
    return values
