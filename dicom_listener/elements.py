"""Data elements as they lie in encoded bytes: where each begins and ends, without a value decoded.

A walk goes over the elements of one level in their ascending order; a sequence of undefined length is passed item by item.

Source: PS3.5 sections 7.1 (elements), 7.5 (sequences), 6.2.2 (unknown VR), A.5 (deflated).
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from worker.core.errors import InvalidObjectError

MORE_BYTES = 16_777_216
LAST_TAG = 0xFFFFFFFF
_MAX_NESTING = 16
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_LONG_VRS = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_SHORT_VR_NAMES = "AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US"
_SHORT_VRS = frozenset(name.encode() for name in _SHORT_VR_NAMES.split())
_INFLATED_SYNTAXES = frozenset({str(DeflatedExplicitVRLittleEndian)})


class HeadTooShortError(Exception):
    """The bytes end before the walk does."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How elements are written: byte order, and whether they name their VR."""

    implicit: bool
    short: Callable[[bytes, int], tuple[int, int, bytes, int]]  # group, element, VR, 16-bit length
    long: Callable[[bytes, int], tuple[int, int, int]]  # group, element, 32-bit length
    number: Callable[[bytes, int], tuple[int]]  # 32 bits

    def element(self, data: bytes, position: int) -> tuple[int, bytes, int, int]:
        """Tag, VR (empty when implicit), length and start of the value of the element at `position`."""
        try:
            if self.implicit:
                group, element, length = self.long(data, position)
                return group << 16 | element, b"", length, position + 8
            group, element, vr, length = self.short(data, position)
            if vr in _SHORT_VRS:
                return group << 16 | element, vr, length, position + 8
            if vr in _LONG_VRS:
                return group << 16 | element, vr, self.number(data, position + 8)[0], position + 12
        except struct.error:
            raise HeadTooShortError from None
        raise InvalidObjectError("an element has no VR: no data set in the agreed transfer syntax")

    def within(self, vr: bytes) -> "Encoding":
        """The encoding inside a sequence: one whose VR is UN holds implicit little endian (PS3.5 section 6.2.2)."""
        return _IMPLICIT if vr == b"UN" else self


def _encoding(order: str, implicit: bool) -> Encoding:
    short, long, number = (struct.Struct(order + form).unpack_from for form in ("HH2sH", "HHI", "I"))
    return Encoding(implicit, short, long, number)


_IMPLICIT = _encoding("<", implicit=True)
_EXPLICIT = _encoding("<", implicit=False)
_BIG_ENDIAN = _encoding(">", implicit=False)
# Papyrus 3 (retired) is implicit as well; every syntax not named here is explicit little endian (PS3.5 annex A).
_ENCODINGS = {
    str(ImplicitVRLittleEndian): _IMPLICIT,
    "1.2.840.10008.1.20": _IMPLICIT,
    str(ExplicitVRBigEndian): _BIG_ENDIAN,
}


def encoding_of(transfer_syntax: str) -> Encoding:
    """How a transfer syntax writes elements."""
    return _ENCODINGS.get(transfer_syntax, _EXPLICIT)


def inflated(head: bytes, transfer_syntax: str, *, whole: bool) -> tuple[bytes, bool]:
    """The first `MORE_BYTES` of the elements at most, and whether they are all; raises `InvalidObjectError`.

    `whole` says that `head` is the whole data set. Only a deflated one is changed.
    """
    if transfer_syntax not in _INFLATED_SYNTAXES:
        return head, whole
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = inflater.decompress(head, MORE_BYTES)
    except zlib.error as error:
        raise InvalidObjectError("deflated data set cannot be inflated") from error
    return data, inflater.eof or (whole and len(data) < MORE_BYTES)


def walk(
    data: bytes, encoding: Encoding, position: int = 0, end: int = -1, *, last: int = LAST_TAG
) -> Iterator[tuple[int, bytes, int, int]]:
    """Tag, VR, start and end of the value of each element from `position` to `end` (that of `data` when negative).

    Stops at the first tag above `last`, whatever its value is. A value's end may lie beyond `data`; the walk then raises
    `HeadTooShortError` when it is asked for the next element, as it does for an element that breaks off. Raises
    `InvalidObjectError` for bytes that are no elements.
    """
    end = len(data) if end < 0 else end
    previous = -1
    while position < end:
        tag, vr, length, position = encoding.element(data, position)
        if tag <= previous:
            raise InvalidObjectError("elements do not ascend: no data set in the agreed transfer syntax")
        if tag > last:
            return
        previous = tag
        start = position
        if length == _UNDEFINED:
            position = _skip_items(data, position, encoding.within(vr), 0)
        else:
            position += length
        yield tag, vr, start, position
    if position > end:
        raise HeadTooShortError


def items(data: bytes, encoding: Encoding, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Start and end of the elements of each item of the sequence whose value is `data[start:end]`."""
    position = start
    while position < end:
        tag, length, position = _item(data, position, encoding)
        if tag == _SEQUENCE_END:
            return
        if tag != _ITEM:
            raise InvalidObjectError("a sequence holds something that is no item")
        after = _skip_item(data, position, encoding, 0) if length == _UNDEFINED else position + length
        yield position, (after - 8 if length == _UNDEFINED else after)
        position = after


def _skip_items(data: bytes, position: int, encoding: Encoding, depth: int) -> int:
    """The position behind a sequence of undefined length whose first item starts at `position`."""
    if depth > _MAX_NESTING:
        raise InvalidObjectError("sequences are nested too deep")
    while True:
        tag, length, position = _item(data, position, encoding)
        if tag == _SEQUENCE_END:
            return position
        if tag != _ITEM:
            raise InvalidObjectError("a sequence holds something that is no item")
        position = _skip_item(data, position, encoding, depth) if length == _UNDEFINED else position + length


def _skip_item(data: bytes, position: int, encoding: Encoding, depth: int) -> int:
    """The position behind an item of undefined length whose first element starts at `position`."""
    while True:
        if _item(data, position, encoding)[0] == _ITEM_END:
            return position + 8
        _, vr, length, position = encoding.element(data, position)
        if length == _UNDEFINED:
            position = _skip_items(data, position, encoding.within(vr), depth + 1)
        else:
            position += length


def _item(data: bytes, position: int, encoding: Encoding) -> tuple[int, int, int]:
    """Tag, length and start of what stands at `position` if it is an item or a delimiter, which name no VR."""
    try:
        group, element, length = encoding.long(data, position)
    except struct.error:
        raise HeadTooShortError from None
    return group << 16 | element, length, position + 8
