"""What a reconstruction kernel is made for, from the vendors' names."""

import re

_BY_NAME: tuple[tuple[str, str], ...] = (
    (r"LUNG", "lung"),
    (r"BONE|EDGE|ULTRA", "bone"),
    (r"STANDARD|STD|STND|SOFT|DETAIL|CHST|BODY|BRAIN", "soft"),
    (r"(YA|YB|YC|YD|L|LA|LB)$", "lung"),
    (r"(D|E|EB|EC|YE)$", "bone"),
    (r"(A|B|C|AA|EA|UA|UB|UC|SA|SB|SC|SMOOTH)$", "soft"),
)
"""GE by word, Philips by letter; first match at the start of the name wins."""

_DESCRIPTION: tuple[tuple[str, str], ...] = (
    (r"\b(LUNGS?|LUNGE|POUMON|PULMON\w*|PULMAO|PARENCH\w*|HRCT)\b", "lung"),
    (r"\b(BONES?|KNOCHEN|OS|OSSEUX|HUESO|OSEO|OSSO)\b", "bone"),
    (r"\b(SOFT|STANDARD|STD|MEDIASTIN\w*|WEICHTEIL\w*)\b", "soft"),
)


def kernel_class(kernel: str, description: str = "") -> str:
    """Class of a kernel: "soft", "lung", "bone" or "unknown", by the kernel's name, else by words of the description.

    >>> kernel_class("B31f"), kernel_class("Bl57d"), kernel_class("BONEPLUS"), kernel_class("FC51")
    ('soft', 'lung', 'bone', 'lung')
    """
    name = kernel.strip().upper()
    if name and name != "NONE":
        found = _numbered(name)
        if found:
            return found
        for pattern, kind in _BY_NAME:
            if re.match(pattern, name):
                return kind
    for pattern, kind in _DESCRIPTION:
        if re.search(pattern, description.upper()):
            return kind
    return "unknown"


def _numbered(name: str) -> str:
    """Toshiba and Canon FCnn, Siemens letter(s) and sharpness nn."""
    toshiba = re.match(r"FC(\d\d)", name)
    if toshiba:
        number = int(toshiba[1])
        if 30 <= number < 40 or 80 <= number < 90:
            return "bone"
        return "lung" if 50 <= number < 60 else "soft"
    siemens = re.match(r"([BDHIJQSTU])([A-Z]{0,2})(\d\d)", name)
    if not siemens:
        return ""
    family, kind, sharpness = siemens[1], siemens[2], int(siemens[3])
    if kind.startswith("L") and family == "B":
        return "lung"
    if sharpness < 50:
        return "soft"
    return "bone" if family in "HUT" else "lung"
