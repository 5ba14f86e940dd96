"""Body regions a series shows, from its codes and words and from how long it is."""

import re
import unicodedata

from worker.imaging.rules import REGIONS

_WORDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"\b(CAP|TAP|NCAP|WHOLE ?BODY|WB|CHESTABDPELVIS)\b", ("chest", "abdomen", "pelvis")),
    (r"\bC A P\b", ("chest", "abdomen", "pelvis")),
    (r"\bA P\b", ("abdomen", "pelvis")),
    (r"CHESTABDOMEN|THORAX ?ABDOMEN|\bTA\b", ("chest", "abdomen")),
    (r"\bNECK|HALS|\bCOU\b|CUELLO|HEADNECK|CAROTI|\bLARYNX|THYROID", ("neck",)),
    (r"\b(HEAD|BRAIN|SKULL|CRANI|SCHAEDEL|SCHADEL|KOPF|CRANE|CEREBR|ORBIT|SINUS|TEMPORAL|FACE|FACIAL)", ("head",)),
    (
        r"CHEST|THORA|TORA[XC]|\bLUNGS?\b|\bLUNGE|PULMON|POUMON|HRCT|MEDIASTIN|\bCTPA\b|\bHEART|CARDIAC|CORONARY",
        ("chest",),
    ),
    (
        r"ABDOM|ADDOM|BAUCH|\bABD\b|ABDPEL|\bLIVER|\bLEBER|HEPAT|KIDNEY|RENAL|PANCREA|UROGRA|\bAAP\b|\bKUB\b",
        ("abdomen",),
    ),
    (r"PELV|\bPEL\b|BECKEN|BASSIN|ABDPEL|BLADDER|\bKUB\b|UROGRA", ("pelvis",)),
    (r"SPINE|\b[CTL]SPINE|WIRBEL|\b[HBL]WS\b|RACHIS|COLUMNA|CERVICAL|LUMBAR", ("spine",)),
    (
        r"\b(EXTREMITY|LEG|ARM|HAND|FOOT|KNEE|HIP|ANKLE|ELBOW|SHOULDER|WRIST|FEMUR|TIBIA|HUMERUS|FOREARM|CALF|THIGH)\b",
        ("limb",),
    ),
)
"""Patterns over upper-case text without accents; every match adds its regions."""

_LONGEST_MM: tuple[tuple[tuple[str, ...], float, tuple[str, ...]], ...] = (
    (("chest",), 600.0, ("chest", "abdomen", "pelvis")),
    (("chest",), 480.0, ("chest", "abdomen")),
    (("abdomen",), 560.0, ("chest", "abdomen", "pelvis")),
    (("abdomen",), 360.0, ("abdomen", "pelvis")),
    (("chest", "abdomen"), 600.0, ("chest", "abdomen", "pelvis")),
    (("abdomen", "pelvis"), 600.0, ("chest", "abdomen", "pelvis")),
    ((), 560.0, ("chest", "abdomen", "pelvis")),
)
"""(named regions, longer than mm, what it shows then): a series longer than what it is named for shows more."""


def in_words(text: str) -> frozenset[str]:
    """Regions named in a text; words may be joined by underscores or other signs, and what lies between two is meant too.

    >>> sorted(in_words("CT_CHEST/ABD with contrast")), sorted(in_words("TÓRAX a PELVIS"))
    (['abdomen', 'chest'], ['abdomen', 'chest', 'pelvis'])
    """
    bare = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    plain = re.sub(r"[^A-Z0-9]+", " ", bare.upper())
    named = {region for pattern, regions in _WORDS if re.search(pattern, plain) for region in regions}
    return frozenset(named | ({"abdomen"} if named >= {"chest", "pelvis"} else set()))


def shown(body_part: str, series_text: str, other_texts: tuple[str, ...], length_mm: float) -> tuple[str, ...]:
    """Regions a volume shows, ordered from head to foot; () when nothing tells.

    Body Part Examined and the series' own description count together; the other texts (protocol, study) only when those
    name nothing, first one first; then a length that does not fit corrects them.
    """
    named = in_words(body_part) | in_words(series_text)
    for text in other_texts:
        named = named or in_words(text)
    trunk = tuple(region for region in REGIONS if region in named)
    for regions, longest_mm, corrected in _LONGEST_MM:
        if trunk == regions and length_mm > longest_mm:
            named = frozenset(corrected)
            break
    return tuple(region for region in REGIONS if region in named)
