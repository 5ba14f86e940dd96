"""Typed access to the undecoded elements of a DICOM dataset, without a warning that could name a patient."""

import math
import struct
from functools import cache

from pydicom.charset import python_encoding
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag, Tag


class Values:
    """Typed access to a dataset's undecoded elements.

    pydicom's own conversion warns with the offending value in the text, which may be a patient's; this reads the bytes and
    answers None for what does not parse.
    """

    def __init__(self, dataset: Dataset, outer: "Values | None" = None) -> None:
        self.dataset = dataset
        self.elements = dict(dataset.items())
        self.codec: str = outer.codec if outer else "latin-1"
        declared = self.texts("SpecificCharacterSet")
        if declared:
            names = python_encoding.get(declared[-1]) or python_encoding.get(declared[0])
            self.codec = names or self.codec

    def _bytes(self, keyword: str) -> tuple[bytes, bool]:
        """Undecoded value and whether it is little endian; empty when absent or a sequence."""
        element = self.elements.get(_tag(keyword))
        if isinstance(element, RawDataElement):
            return element.value or b"", element.is_little_endian
        if element is None or element.VR == "SQ":
            return b"", True
        values = element.value if isinstance(element.value, MultiValue) else [element.value]
        return "\\".join("" if value is None else str(value) for value in values).encode("latin-1", "replace"), True

    def texts(self, keyword: str) -> tuple[str, ...]:
        """Backslash-separated values of a string element, stripped; () when absent or empty."""
        raw, _ = self._bytes(keyword)
        text = raw.decode("latin-1").strip(" \0")
        return tuple(part.strip(" \0") for part in text.split("\\")) if text else ()

    def text(self, keyword: str) -> str:
        """First value of a string element; empty when absent."""
        values = self.texts(keyword)
        return values[0] if values else ""

    def words(self, keyword: str) -> str:
        """A text of people's words, decoded by the Specific Character Set as far as it goes."""
        raw, _ = self._bytes(keyword)
        return raw.decode(self.codec, errors="replace").strip(" \0")

    def floats(self, keyword: str, count: int) -> tuple[float, ...] | None:
        """Exactly `count` finite decimal strings, or None."""
        parts = self.texts(keyword)
        if len(parts) != count:
            return None
        try:
            numbers = tuple(float(part) for part in parts)
        except ValueError:
            return None
        return numbers if all(math.isfinite(number) for number in numbers) else None

    def decimal(self, keyword: str) -> float | None:
        """One decimal string (VR DS)."""
        numbers = self.floats(keyword, 1)
        return numbers[0] if numbers else None

    def integer(self, keyword: str) -> int | None:
        """An integer string (VR IS)."""
        number = self.decimal(keyword)
        return int(number) if number is not None else None

    def short(self, keyword: str, signed: bool = False) -> int | None:
        """A 16-bit binary value (VR US or SS)."""
        raw, little = self._bytes(keyword)
        if len(raw) < 2:
            return None
        code = ("<" if little else ">") + ("h" if signed else "H")
        return int(struct.unpack_from(code, raw)[0])

    def binary(self, keyword: str) -> str:
        """A binary number (VR US, UL, FL, FD) as text, for telling frames apart; empty when absent."""
        tag = _tag(keyword)
        return str(self.dataset[tag].value) if tag in self.elements else ""

    def binaries(self, keyword: str) -> tuple[str, ...]:
        """The values of a binary element, each as text; () when absent or empty."""
        tag = _tag(keyword)
        if tag not in self.elements:
            return ()
        value = self.dataset[tag].value
        if value is None:
            return ()
        return tuple(map(str, value)) if isinstance(value, (list, MultiValue)) else (str(value),)

    def has(self, keyword: str) -> bool:
        """Whether an element is there, empty or not."""
        return _tag(keyword) in self.elements

    def items(self, keyword: str) -> list[Dataset]:
        """Items of a sequence; [] when absent."""
        tag = _tag(keyword)
        return list(self.dataset[tag].value or []) if tag in self.elements else []

    def first_item(self, keyword: str) -> "Values | None":
        """First item of a sequence; None when absent or empty."""
        items = self.items(keyword)
        return Values(items[0], self) if items else None


@cache
def _tag(keyword: str) -> BaseTag:
    """Looking a keyword up takes longer than reading its value, and there are a few dozen of them."""
    return Tag(keyword)
