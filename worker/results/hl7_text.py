"""Text in HL7 v2: the one `escape()` through which every value goes, its inverse, and what ISO 8859-1 cannot carry.

Source: HL7 2.5.1 §2.7 (escape sequences), §2.A.29 (FT), §2.A.78 (TX), §2.15.9.18 (MSH-18).
"""

import re
import unicodedata

CODECS = {"UNICODE UTF-8": "utf-8", "8859/1": "latin-1"}
"""MSH-18 (HL7 table 0211) to the codec of Python, for the two sets that a destination may ask for."""

TX_BREAK = "~"  # TX repeats the field where a line ends
FT_BREAK = "\\.br\\"  # FT stays one value and names the break

_SURROGATE = re.compile("[\ud800-\udfff]")
_LINE_END = re.compile("\r\n|\r|\n")
_SEQUENCE = re.compile(r"\\([^\\\r]*)\\")
_DELIMITERS = {"|": "F", "^": "S", "&": "T", "~": "R", "\\": "E"}
_CONTROLS = (*range(0x20), 0x7F)
_ESCAPES = str.maketrans(
    {character: f"\\{letter}\\" for character, letter in _DELIMITERS.items()}
    | {chr(code): f"\\X{code:02X}\\" for code in _CONTROLS}
)
_LETTERS = {letter: character for character, letter in _DELIMITERS.items()}


def escape(text: str, line_break: str | None = None) -> str:
    """Makes any text safe inside one field, so that an HL7 parser gives back the same text.

    With `line_break` (`TX_BREAK`, `FT_BREAK`) the line ends CR LF, CR and LF become that break; without it they are
    written as hexadecimal like every other control character, for fields of one line such as names. The result holds
    no delimiter that is not meant, no CR and no MLLP block character.
    """
    if line_break is None:
        return text.translate(_ESCAPES)
    return line_break.join(line.translate(_ESCAPES) for line in _LINE_END.split(text))


def unescape(text: str, codec: str = "utf-8") -> str:
    r"""The text that `escape` was given; `\.br\` gives a line feed, sequences it never writes stay as they are."""
    return _SEQUENCE.sub(lambda found: _unescaped(found, codec), text)


def _unescaped(found: re.Match[str], codec: str) -> str:
    sequence = found[1]
    if sequence in _LETTERS:
        return _LETTERS[sequence]
    if sequence == ".br":
        return "\n"
    if re.fullmatch(r"X(?:[0-9A-Fa-f]{2})+", sequence):
        return bytes.fromhex(sequence[1:]).decode(codec, errors="replace")
    return found[0]


def carried(text: str, character_set: str) -> str:
    """The text as the character set of a destination (MSH-18) can carry it.

    UTF-8 carries everything but a lone surrogate, which becomes U+FFFD. For 8859/1 see `transliterate`.
    """
    if character_set == "8859/1":
        return transliterate(text)
    return _SURROGATE.sub("\ufffd", text)


def transliterate(text: str) -> str:
    """Text that ISO 8859-1 can carry: composed first, then letters and signs replaced by the nearest it has.

    Cyrillic and Greek letters by the tables below, accents that 8859-1 lacks dropped, signs of comparison spelt out
    (`≤` is `<=`), raised figures marked (`10⁴` is `10^4`) and fractions kept apart (`2⅓` is `2 1/3`), so that no number
    changes. What has no equivalent becomes `?`: a reader sees that something is missing.
    """
    composed = unicodedata.normalize("NFC", text)
    if composed.isascii():
        return composed
    raised = _RAISED_RUN.sub(_raised, composed)
    return "".join(character if ord(character) < 0x100 else _nearest(character) for character in raised)


_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-", strict=True))
_RAISED_RUN = re.compile(f"[{''.join(_RAISED)}]+")


def _raised(run: re.Match[str]) -> str:
    """`²` and `³` alone are part of 8859-1 and stay; any other run of raised figures is marked by a caret."""
    if all(ord(character) < 0x100 for character in run[0]):
        return run[0]
    return "^" + "".join(_RAISED[character] for character in run[0])


def _nearest(character: str) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    lower = _ALPHABETS.get(character.lower())
    if lower is not None:
        return lower if character.islower() else lower.capitalize()
    if unicodedata.category(character) in {"Mn", "Cf"}:
        return ""  # an accent that found no letter, a variation selector, a joiner
    parts = unicodedata.normalize("NFKD", character)
    if "\u2044" in parts:
        return " " + parts.replace("\u2044", "/")
    return _without_accents(parts) if parts != character else "?"


def _without_accents(parts: str) -> str:
    """Drops an accent only from a letter: `≠` without its stroke is `=`, which would say the opposite."""
    kept: list[str] = []
    for part in parts:
        if unicodedata.category(part) != "Mn":
            kept.append(part if ord(part) < 0x100 else _nearest(part))
        elif not kept or not kept[-1].isalpha():
            return "?"
    return "".join(kept)


def _alphabet(letters: str, latin: str) -> dict[str, str]:
    return dict(zip(letters, latin.split(), strict=True))


_ALPHABETS = {
    # Russian, Bulgarian, Serbian, Ukrainian and Belarusian letters; one Latin spelling each.
    **_alphabet(
        "абвгдеёжзийклмнопрстуфхцчшщыэюяіїєґўјљњћђџ",
        "a b v g d e yo zh z i y k l m n o p r s t u f kh ts ch sh shch y e yu ya i yi ye g w j lj nj c dj dz",
    ),
    "ъ": "",
    "ь": "'",
    # Greek after ELOT 743, one letter at a time.
    **_alphabet("αβγδεζηθικλμνξοπρσςτυφχψω", "a v g d e z i th i k l m n x o p r s s t y f ch ps o"),
    # Latin letters that do not come apart into a base and an accent.
    **_alphabet("œłđħıŋŧĸəƒ", "oe l d h i n t k e f"),
}

_SIGNS = {
    "μ": "\u00b5",  # the Greek letter is meant as micro, which 8859-1 has
    **dict.fromkeys("‐‑‒–—―−", "-"),
    **dict.fromkeys("‘’‚‛′", "'"),
    **dict.fromkeys("“”„‟″", '"'),
    **dict.fromkeys("•‣◦∙●▪", "*"),
    **dict.fromkeys("≈∼≃", "~"),
    **dict.fromkeys("\u2028\u2029", " "),
    "≤": "<=",
    "≥": ">=",
    "≠": "!=",
    "→": "->",
    "←": "<-",
    "↔": "<->",
    "↑": "(up)",
    "↓": "(down)",
    "∞": "infinity",
    "∅": "\u00d8",  # the sign of diameter and of "none" alike, drawn as the letter
    "⌀": "\u00d8",
    "€": "EUR",
    "ẞ": "SS",
}
