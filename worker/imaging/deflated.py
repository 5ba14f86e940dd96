"""Datasets that were deflated as a whole (PS3.5 A.5): inflated as far as they are needed, whatever size they claim."""

import zlib
from pathlib import Path

MIB = 1 << 20


def inflate(path: Path, start: int, skip: int, length: int) -> bytearray:
    """`length` bytes of the dataset that is deflated from byte `start` of a file, after its first `skip` ones.

    Fewer bytes when the dataset ends earlier. Never holds more than those and 2 MiB.

    Raises OSError when the file cannot be read, zlib.error for bytes that are not deflated.
    """
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    found = bytearray()
    with path.open("rb") as file:
        file.seek(start)
        waiting = b""
        while len(found) < length and not inflater.eof:
            waiting = waiting or file.read(MIB)
            if not waiting:
                break
            piece = inflater.decompress(waiting, MIB)
            waiting = inflater.unconsumed_tail
            found += piece[skip : skip + length - len(found)]
            skip = max(0, skip - len(piece))
    return found
