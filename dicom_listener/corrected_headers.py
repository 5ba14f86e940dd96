"""The same instance with another header: a correction of patient or order, or another picture under a UID that is taken?

A PACS that merges a patient or mends an accession number sends the study again under its old UIDs. What such a correction
may touch is named here; everything else, the pixels foremost, must be equal byte for byte. Then the newer header counts
and the earlier object stays aside. Whatever differs more remains a conflict for a person.

A header that was superseded counts again only from the sender of the present one, or from who corrected the study last: he
took his correction back, or made it once more. From another it is an old copy that a scanner sends again.

Not covered: a header corrected and encoded anew at once (kept aside as a variant), objects with more than 16 MiB before
their pixels, and what retention has removed.
"""

import hashlib
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from dicom_listener import elements, part10
from dicom_listener.elements import HeadTooShortError
from dicom_listener.storage import Store
from worker.core import corrected_headers
from worker.core.arrivals import Arrival, Recorded
from worker.core.database import Database
from worker.core.errors import InvalidObjectError, StoreUnavailableError
from worker.core.records import Disposition

# Identification, patient, visit, order, modification history (PS3.6); odd groups are private.
_GROUPS_OF_WORDS = frozenset({0x0008, 0x0010, 0x0032, 0x0038, 0x0400})
_PROCEDURE_STEP_GROUP, _FIRST_CONTENT_ELEMENT = 0x0040, 0x3000  # above it stand measured values and an SR's content
_WORDS = frozenset({0x00180015, 0x00181030, 0x00200010, 0x00204000, 0x0040A370})
_ABOUT_THE_PICTURE = frozenset(
    {0x00080008, 0x00080016, 0x00080018, 0x00080060}
)  # image type, class, instance, modality
_BEFORE_PIXELS = 0x7FE00007
_BLOCK_BYTES = 1 << 20

T = TypeVar("T")


class Corrections:
    """Decides about instances whose UID is taken. Safe for threads."""

    def __init__(self, store: Store, database: Database) -> None:
        self._store = store
        self._database = database

    def settle(self, arrival: Arrival, recorded: Recorded) -> Recorded:
        """What a recorded arrival is once a correction has taken effect; raises a `RetryableError` when it cannot.

        Run again after a crash in between, it finishes what was begun.
        """
        if recorded.disposition is Disposition.KEPT or recorded.duplicate:
            return recorded
        seen_before = recorded.disposition is Disposition.VARIANT
        while True:
            with self._database.read() as session:
                kept = corrected_headers.rival(session, arrival)
                corrector = corrected_headers.corrector(session, arrival) if kept and seen_before else ""
            if kept is None or (seen_before and not self._may_take_back(arrival, kept, corrector)):
                return recorded
            if not self._same_picture(arrival, kept):
                return recorded
            settled = self._database.run(partial(corrected_headers.apply, arrival=arrival, kept_path=kept))
            if settled is not None:
                return settled  # otherwise another correction came first: this one is held against that

    def _may_take_back(self, arrival: Arrival, kept: str, corrector: str) -> bool:
        """Whether the sender brought the header that counts now, for the first time or once more."""
        if arrival.calling_ae == corrector:
            return True
        held = self._read(lambda: part10.read_file(self._store.path(kept)))
        return held is not None and held.source_ae_title == arrival.calling_ae.strip()

    def _same_picture(self, arrival: Arrival, kept: str) -> bool:
        earlier = self._read(lambda: picture(self._store.path(kept)))
        return earlier is not None and earlier == self._read(lambda: picture(self._store.path(arrival.path)))

    @staticmethod
    def _read(read: Callable[[], T]) -> T | None:
        """None for an object that cannot be taken apart, or is gone: with what is not there nothing can be compared."""
        try:
            return read()
        except (InvalidObjectError, FileNotFoundError):
            return None
        except OSError as error:
            raise StoreUnavailableError("a stored object cannot be read; look at the store's disk") from error


def picture(path: Path) -> str:
    """A hash of all of a stored object that a correction may not touch.

    Raises `InvalidObjectError` when the object cannot be taken apart, `OSError` when it cannot be read.
    """
    held = part10.read_file(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(held.offset)
        raw = file.read(elements.MORE_BYTES)
        whole = len(raw) == held.size_bytes - held.offset
        data, ends_here = elements.inflated(raw, held.transfer_syntax, whole=whole)
        if not ends_here and data is not raw:
            raise InvalidObjectError("a deflated object is too long to be compared")
        digest.update(data[_hash_elements(data, held.transfer_syntax, digest, whole=ends_here) :])
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _hash_elements(data: bytes, transfer_syntax: str, digest: "hashlib._Hash", *, whole: bool) -> int:
    """Hashes the elements before the pixels that describe the picture; returns where the pixels begin."""
    position = 0
    try:
        for tag, vr, start, position in elements.walk(data, elements.encoding_of(transfer_syntax), last=_BEFORE_PIXELS):
            if position <= len(data) and not _may_change(tag):
                digest.update(struct.pack(">I2sQ", tag, vr, position - start))
                digest.update(data[start:position])
    except HeadTooShortError:
        raise InvalidObjectError("an object breaks off before its pixels") from None
    if position >= len(data) and not whole:
        raise InvalidObjectError("an object's header is too long to be compared")
    return position


def _may_change(tag: int) -> bool:
    """Whether a correction may touch this element; so may the retired group lengths, which say nothing."""
    group, element = tag >> 16, tag & 0xFFFF
    if tag in _ABOUT_THE_PICTURE:
        return False
    if tag in _WORDS or group in _GROUPS_OF_WORDS or group % 2 or element == 0:
        return True
    return group == _PROCEDURE_STEP_GROUP and element < _FIRST_CONTENT_ELEMENT
