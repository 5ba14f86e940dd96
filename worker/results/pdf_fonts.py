"""Fonts for the PDF: DejaVu Sans, which ships here, then fonts of the machine for scripts that DejaVu does not have.

Debian's packages `fonts-wqy-microhei` and `fonts-noto-cjk` hold Chinese, Japanese and Korean letters; either is enough.
A letter that no font has is never dropped in silence: the PDF says which one it was.
"""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fontTools.ttLib import TTFont

SHIPPED = Path(__file__).parent / "fonts"
REGULAR = SHIPPED / "DejaVuSans.ttf"
BOLD = SHIPPED / "DejaVuSans-Bold.ttf"

_RIGHT_TO_LEFT = frozenset({"R", "AL"})
_UNSEEN = frozenset({"Cc", "Cf", "Zl", "Zp", "Zs"})  # controls, marks of direction and spaces leave no box


@dataclass(frozen=True)
class Face:
    """One font of a file; `number` is its place in a collection."""

    path: Path
    number: int = 0


OF_THE_MACHINE = (
    Face(Path("/usr/share/fonts/truetype/wqy/wqy-microhei.ttc")),  # Debian: fonts-wqy-microhei
    Face(Path("/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc")),  # Debian: fonts-noto-cjk
    Face(Path("/usr/share/fonts/google-noto-sans-cjk-fonts/NotoSansCJK-Regular.ttc")),  # Fedora
)


@dataclass(frozen=True)
class Choice:
    """The faces that a text needs beside DejaVu, and the letters that none of them has."""

    faces: tuple[Face, ...]
    missing: tuple[str, ...]
    shaped: bool  # joined or right-to-left letters, which must be ordered and joined before they are drawn


def choose(texts: Iterable[str], machine: tuple[Face, ...] = OF_THE_MACHINE) -> Choice:
    """Looks for every letter of the texts, in DejaVu first; machine fonts are opened only for what it lacks."""
    letters = {c for text in texts for c in text if unicodedata.category(c) not in _UNSEEN}
    shaped = any(unicodedata.bidirectional(c) in _RIGHT_TO_LEFT for c in letters)
    wanted = {c for c in letters if ord(c) not in _letters(Face(REGULAR))}
    faces: list[Face] = []
    for face in machine:
        if not wanted:
            break
        if face.path.is_file():
            found = {c for c in wanted if ord(c) in _letters(face)}
            if found:
                faces.append(face)
                wanted -= found
    return Choice(tuple(faces), tuple(sorted(wanted)), shaped)


@lru_cache(maxsize=8)
def _letters(face: Face) -> frozenset[int]:
    with TTFont(face.path, fontNumber=face.number, lazy=True) as font:
        return frozenset(font.getBestCmap())
