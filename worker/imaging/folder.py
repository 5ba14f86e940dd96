"""A plain folder of DICOM files, as research and discs have them: links, nested folders and files of other kinds among them."""

import os
from collections.abc import Iterator
from pathlib import Path

from worker.core.errors import InvalidObjectError, StoreUnavailableError
from worker.imaging.headers import Header, Unreadable, read_header


def read(folder: Path) -> tuple[list[Header], list[Unreadable]]:
    """The headers of every DICOM object below a folder, and every other file with its reason.

    Unlike in the instance store, a file that cannot be opened is no trouble that passes: it is one of the others.
    """
    headers: list[Header] = []
    unreadable: list[Unreadable] = []
    for path in files_below(folder):
        try:
            headers.append(read_header(path))
        except InvalidObjectError as error:
            unreadable.append(Unreadable(path, str(error)))
        except StoreUnavailableError as error:
            reason = "The file is a link to nothing. Fetch what it points to." if _dangles(path) else str(error)
            unreadable.append(Unreadable(path, reason))
    return headers, unreadable


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, once, in one order; links to folders are followed, links to nothing are files."""
    seen: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        place = Path(parent).stat()
        if (place.st_dev, place.st_ino) in seen:  # two links to one folder, or a link to a folder above
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            if path.is_file() or _dangles(path):
                yield path


def _dangles(path: Path) -> bool:
    return path.is_symlink() and not path.exists()
