"""Datasets that were deflated as a whole (PS3.5 A.5): inflated as far as they are needed, whatever size they claim."""

import threading
import zlib
from collections.abc import Generator
from pathlib import Path

MIB = 1 << 20
_PIECE = 1 << 16
_PASSED_FRAMES = 4
"""Frames kept that were passed on the way to another; threads ask for their frames nearly in order."""


def inflate(path: Path, start: int, skip: int, length: int) -> bytearray:
    """`length` bytes of the dataset that is deflated from byte `start` of a file, after its first `skip` ones.

    Fewer bytes when the dataset ends earlier. Never holds more than those and 128 KiB.

    Raises OSError when the file cannot be read, zlib.error for bytes that are not deflated.
    """
    found = bytearray()
    for piece in _pieces(path, start):
        found += piece[skip : skip + length - len(found)]
        skip = max(0, skip - len(piece))
        if len(found) >= length:
            break
    return found


def _pieces(path: Path, start: int) -> Generator[bytes, None, None]:
    """The inflated dataset, a little at a time."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    with path.open("rb") as file:
        file.seek(start)
        waiting = b""
        while not inflater.eof:
            waiting = waiting or file.read(_PIECE)
            if not waiting:
                return
            yield inflater.decompress(waiting, _PIECE)
            waiting = inflater.unconsumed_tail


class Frames:
    """Frames of one size in a deflated dataset, from its byte `skip` on; any thread may ask for one.

    Frames asked for nearly in order are inflated once, handed out and let go. One that is asked for again, or after many that
    follow it, makes this inflate anew and keep them all.
    """

    def __init__(self, path: Path, start: int, skip: int, size: int) -> None:
        self._path = path
        self._start = start
        self._skip = skip
        self._size = size
        self._lock = threading.Lock()
        self._keeps_all = False
        self._begin()

    def _begin(self) -> None:
        self._inflated = _pieces(self._path, self._start)
        self._rest = bytearray()
        self._passed: dict[int, bytes] = {}
        self._coming = 0
        self._to_skip = self._skip

    def close(self) -> None:
        """Close the file."""
        self._inflated.close()

    def frame(self, index: int) -> bytes:
        """The bytes of one frame; fewer when the dataset ends early.

        Raises OSError when the file cannot be read, zlib.error for bytes that are not deflated.
        """
        with self._lock:
            if index < self._coming and index not in self._passed:
                self.close()
                self._keeps_all = True
                self._begin()
            while self._coming <= index:
                self._passed[self._coming] = self._next_frame()
                self._coming += 1
                if len(self._passed) > _PASSED_FRAMES and not self._keeps_all:
                    del self._passed[min(self._passed)]
            return self._passed[index] if self._keeps_all else self._passed.pop(index)

    def _next_frame(self) -> bytes:
        while self._to_skip:
            skipped = len(self._take(min(self._to_skip, _PIECE)))
            self._to_skip = self._to_skip - skipped if skipped else 0
        return self._take(self._size)

    def _take(self, length: int) -> bytes:
        while len(self._rest) < length and (piece := next(self._inflated, None)) is not None:
            self._rest += piece
        taken = bytes(self._rest[:length])
        del self._rest[:length]
        return taken
