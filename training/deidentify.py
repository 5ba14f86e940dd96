"""Takes what points to a person out of a report before it leaves the machine: names, dates, numbers, contacts, high ages.

Rules for English and German, not a promise. What stays: names that nobody listed and that stand without a title, a degree or
"signed by"; Mr and Ms written MR and MS without a dot, since MR is a modality; addresses; years alone; numbers shorter than
six digits that no word such as MRN, ID or Tel. announces; what is spelled out or misspelled. A number beside HU, mm, cm or ml
is a measurement and stays. Texts for an endpoint outside the hospital need the list of names and a person's eye on a sample.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

MARKS = "\u0300-\u036f"
"""Combining accents, as canonical decomposition (NFD) leaves them behind their letters."""
DASHES = r"\u2010-\u2015-"
SPELLINGS = {
    "a\u0308": "(?:a\u0308?|ae|æ)",
    "o\u0308": "(?:o\u0308?|oe|ø)",
    "u\u0308": "(?:u\u0308?|ue)",
    "a\u030a": "(?:a\u030a?|aa)",
    "ae": "(?:ae|a\u0308|æ)",
    "oe": "(?:oe|o\u0308|ø|œ)",
    "ue": "(?:ue|u\u0308)",
    "aa": "(?:aa|a\u030a)",
    "ss": "(?:ss|ß)",
    "æ": "(?:æ|ae|a\u0308)",
    "œ": "(?:œ|oe)",
    "ø": "(?:ø|oe?|o\u0308)",
    "o": "[oø]",
    "ł": "[łl]",
    "l": "[łl]",
    "đ": "[đd]",
    "d": "[đd]",
    "ı": "[ıi]",
    "i": "[ıi]",
    "'": "['’]?",
    "’": "['’]?",
}
"""Letters of a listed name in decomposed lower case: the ways a text may write them."""

UNIT = r"(?:HU|H\.U\.|Hounsfield|mm|cm|ml|cc(?!\s*:|\s+(?-i:[A-Z]))|kVp?|mAs?|mGy|mg|kg|%)(?![a-z])"
MEASURED_AFTER = re.compile(rf"\s?(?:(?:x|×|by|to)\s*\d[\d.,]*\s*)*{UNIT}", re.IGNORECASE)
MEASURED_BEFORE = re.compile(
    r"(?:(?:(?<!\d)(?<!\d\s)(?:HU|Hounsfield units?|mm|cm|ml)|SUV\w*|DLP|CTDI\w*|density|attenuation|ratio|index|score|diameter"
    r"|size|volume|length|width|thickness)\b(?:\s*(?:values?|range|of|is|was|about|approximately|[.:=(~]))*"
    r"|(?:images?|slices?|series|segments?|levels?|frames?|window)\b(?:\s*(?:numbers?|nos?|[.:=(#]))*)\s*\Z",
    re.IGNORECASE,
)
SMALL_RANGE = re.compile(rf"\d{{2,3}}[ {DASHES}]\d{{2,3}}")
SPAN_BEFORE = re.compile(r"(?:\d\s*[x×]|\bbetween|\bfrom)\s*\Z", re.IGNORECASE)
SPAN_AFTER = re.compile(r"\s*[x×]", re.IGNORECASE)
YEARS = re.compile(rf"(?:19|20)\d\d\s?[{DASHES}]\s?(?:19|20)\d\d")
CONTEXT_CHARACTERS = 48
NO_SIZE = rf"(?!\s?(?:{UNIT}|[x×])|[.,]?\d|\w)"
"""Behind a number that is the end of a date or of an identifier: no further digit and no unit."""

YEAR = r"(?:19|20)\d{2}"
DAY, MONTH_NUMBER = r"(?:0?[1-9]|[12]\d|3[01])", r"(?:0?[1-9]|1[0-2])"
CLOCK = r"(?:[01]?\d|2[0-3]):[0-5]\d(?::[0-5]\d(?:\.\d+)?)?"
MAY = "may|mai"
NOT_MAY = (
    "jan(?:uary?)?|feb(?:ruary?)?|mar(?:ch)?|m(?:ä|ae)rz|apr(?:il)?|jun[ei]?|jul[yi]?|aug(?:ust)?|sep(?:t(?:ember)?)?"
    "|o[ck]t(?:ober)?|nov(?:ember)?|de[cz](?:ember)?"
)
MONTH = f"(?:{NOT_MAY}|{MAY})"
MONTH_ALONE = f"(?:(?i:{NOT_MAY})|Ma[yi])"
"""The word "may" is a month only with a capital letter: "segment 7 may hold a cyst" is no date."""
FULL_MONTH = (
    "(?:January?|February?|March|März|April|Ma[yi]|Jun[ei]|Jul[yi]|August|September|O[ck]tober|November|De[cz]ember)"
)
ORDINAL = r"(?:st|nd|rd|th)?"
GAP = rf"[\s.,/{DASHES}]{{0,3}}"
SEPARATOR = rf"\s?[./{DASHES}]\s?"

NUMBER_WORD = r"(?:no|nr|num|number|nummer|id)\b|[#№]"
ANNOUNCED = rf"(?:\s*(?:is\b|{NUMBER_WORD}|[.:=#{DASHES}]))*\s*"
TOKEN = rf"(?:\d{{1,4}}(?:[ ]\d{{2,4}}){{1,4}}|(?=[\w./-]*\d)\w(?:[\w./-]*\w)?){NO_SIZE}"
PHONE_SEPARATOR = rf"(?:[ ./{DASHES}]|\)[ ]?|[ ]?\()"

UPPER = "".join(chr(code) for code in range(0x530) if chr(code).isupper())
NO_NAME = (
    r"(?!(?i:no|not|none|the|there|this|that|an?|is|was|has|had|have|are|were|in|on|at|of|for|from|with|without|by|and|or"
    r"|to|as|if|who|said|saw|read|reads|reports?|reported|reviewed|confirm(?:s|ed)|discussed|informed|notified|called"
    r"|agrees|stated|signed|dictated|findings?|impression|ct|mri?|us|pet|chest|abdom\w*|pelvi\w*|liver|lungs?|heart"
    r"|kidneys?|spleen|brain|spine|aorta|imaging|scans?|exam\w*|study|angiogra\w*|follow\w*|further|compar\w*|recommend\w*"
    r"|small|large|left|right|both|mild|new|old|multiple|normal|unchanged|stable|hepatic|renal|pleural|it|its|we|(?:fe)?male)\b)"
)
"""Words that follow an abbreviation such as MR or a name, and are none."""
PARTICLES = (
    r"(?:(?i:van|von|vom|und|zum?|zur|de[nrlsm]?|della|di|da|dos?|du|la|le|el|al|bin|ibn|ben|ter|ten|st\.?)\s+"
    r"|(?i:al|el)-|(?i:[dl])['’]){0,3}"
)
WORD = rf"{NO_NAME}[{UPPER}][\w'’{DASHES}]*\w"
INITIALS = rf"(?:[{UPPER}]\.[ -]?){{0,4}}"
FULL_NAME = rf"(?:{PARTICLES}{INITIALS}{WORD}(?:[ ]{PARTICLES}{INITIALS}{WORD}){{0,2}}|{INITIALS}[{UPPER}]\b\.?)"
DEGREES = r"(?:(?i:med|dent|vet|phil|rer|nat|sc|h\.?\s?c|habil|univ|dipl|ing|mult|dr|prof|pd)\b\.?[\s-]*){0,5}"
AFTER_NAME = r"(?:M\.?D\b\.?|Ph\.?D\b\.?|MB\s?BS|MBChB|FRCR|FRCPC|FRANZCR|FACR|RN)(?!\w)"


@dataclass(frozen=True)
class Rule:
    """What to look for and what to write in its place; with `measures`, a match that is a measurement stays."""

    pattern: re.Pattern[str]
    replacement: str
    measures: bool = False

    def apply(self, text: str) -> str:
        """The text with every match replaced."""
        return self.pattern.sub(self._replace, text)

    def _replace(self, match: re.Match[str]) -> str:
        return match.group() if self.measures and _is_measured(match) else match.expand(self.replacement)


def _rule(pattern: str, replacement: str, flags: int = re.IGNORECASE, measures: bool = False) -> Rule:
    return Rule(re.compile(pattern, flags), replacement, measures)


IDENTIFIERS = (
    _rule(r"\b[\w.+-]+@[\w-]+\.[\w.-]*\w", "[email]"),
    _rule(r"\b(?:https?://|www\.)[^\s)\]>]*\w/?", "[link]"),
    _rule(
        r"\b(?:MRN|SSN|NHS|DOB|UID|accession|date of birth|(?:patient|pat|study|series|SOP instance)\b\.?[\s-]*(?:UID|"
        rf"{NUMBER_WORD})|(?:fall|patienten|auftrags|akten|versicherten)-?(?:nr|nummer|id)){ANNOUNCED}{TOKEN}",
        "[identifier]",
    ),
    _rule(
        r"\b(?:acc|case|order|visit|encounter|account|admission|episode|chart|file|record|insurance|policy|member|ref"
        r"|reference|exam|examination|report|request|hospital|health|passport|claim)\b"
        rf"[\s.{DASHES}]*(?:{NUMBER_WORD}){ANNOUNCED}{TOKEN}",
        "[identifier]",
    ),
    _rule(rf"\b(?:ID\b|Acc\b\.?|ACC\b\.?){ANNOUNCED}(?=[\w./-]{{3}}){TOKEN}", "[identifier]", flags=0),
    _rule(r"(?<![\w.+])[0-2](?:\.\d+){3,}(?!\w)", "[identifier]"),
)

DATES = (
    _rule(rf"\b{YEAR}\s?([./{DASHES}])\s?\d{{1,2}}\s?\1\s?\d{{1,2}}(?:[T ]{CLOCK}Z?)?(?!\w)", "[date]"),
    _rule(rf"(?<![\w.,])\d{{1,2}}{SEPARATOR}\d{{1,2}}{SEPARATOR}(?:{YEAR})(?:[T ]{CLOCK}Z?)?(?!\w)", "[date]"),
    _rule(
        rf"(?<![\w.,])(?:{DAY}([./{DASHES}]){MONTH_NUMBER}|{MONTH_NUMBER}([/{DASHES}]){DAY})(?:\1|\2)\d{{2}}(?![\w]|[.,/-]\d)",
        "[date]",
        measures=True,
    ),
    _rule(rf"\b\d{{1,2}}{ORDINAL}{GAP}(?:of\s+)?{MONTH}{GAP}['’]?(?:{YEAR}|\d{{2}}){NO_SIZE}", "[date]"),
    _rule(rf"\b{MONTH}{GAP}\d{{1,2}}{ORDINAL}(?:{GAP}{YEAR}|{GAP}['’]\d{{2}}|[/{DASHES}]\d{{2}}){NO_SIZE}", "[date]"),
    _rule(rf"\b{MONTH}{GAP}(?:of\s+)?(?:{YEAR}|['’]\d{{2}}){NO_SIZE}", "[date]"),
    _rule(rf"\b{MONTH_ALONE}(?:\.?\s+|[/{DASHES}])\d{{1,2}}{ORDINAL}{NO_SIZE}", "[date]", flags=0),
    _rule(
        rf"\b\d{{1,2}}{ORDINAL}(?:\.?\s*|[/{DASHES}])(?:of\s+)?(?:{NOT_MAY})\b|\b\d{{1,2}}\.\s+Mai\b"
        rf"|\b\d{{1,2}}{ORDINAL}(?:\s+|[/{DASHES}])(?:of\s+)?(?-i:Ma[yi])\b|\b\d{{1,2}}(?-i:MA[YI])\b",
        "[date]",
    ),
    _rule(rf"\b((?i:in|since|from|until|till|early|mid|late|last|im|seit)[\s-]+){FULL_MONTH}\b", r"\1[date]", flags=0),
    _rule(
        rf"(?<![\w.,/])(?:{MONTH_NUMBER}{SEPARATOR}{YEAR}|{YEAR}[./-]{MONTH_NUMBER})(?!\w|[.,/-]\d)",
        "[date]",
        measures=True,
    ),
    # German dates end in a dot; "a ratio of 12.3." does as well, and stays for the word before it.
    _rule(rf"(?<![\w.,/x×-]){DAY}\.\s?{MONTH_NUMBER}\.(?!\s?\d)", "[date]", measures=True),
    _rule(
        rf"\b((?:on|dated|since|vom|seit|(?:ct|study|scan|exam) of|compar\w+(?: (?:with|to))?)\s+)(?:{DAY}/{DAY}){NO_SIZE}",
        r"\1[date]",
    ),
    _rule(rf"(?<![\w:.,]){CLOCK}(?:\s?[ap]\.?m\b\.?|\s?(?:h|hrs?|hours|Uhr)\b)?(?![\w:])", "[time]", measures=True),
    _rule(r"\b(?:0?[1-9]|1[0-2])\s?(?:[ap]m\b|[ap]\.m\.)", "[time]"),
    _rule(r"\b(?:[01]\d|2[0-3])[.]?[0-5]\d\s?(?:h|hrs|hours|Uhr)\b", "[time]"),
)

HIGH_AGE = r"(?:9\d|1[0-2]\d)"
AGES = (
    _rule(rf"(?<![\w.,]){HIGH_AGE}(?=[\s{DASHES}]*(?:years?|yrs?|y\b|y\.?\s?/?\s?o\b|Jahre|jährig))", "[age]"),
    _rule(rf"\b((?:aged?|alter)\s*(?:of|is|[:=])?\s*){HIGH_AGE}{NO_SIZE}", r"\1[age]"),
    _rule(rf"(?<![\w.,]){HIGH_AGE}(?=[\s/{DASHES}]?(?:[MF]|(?i:(?:fe)?male|(?:wo)?man))\b)", "[age]", flags=0),
    _rule(rf"\bninety(?:[\s{DASHES}]\w+)?(?=[\s{DASHES}]years?)|\b(?:nona|cente)narian\b", "[age]"),
)

PHONES = (
    _rule(
        r"\b((?:tel|telephone|telefon|phone|fax|pager|bleep|beeper|ext|extension|mobile|cell|call|handy|dect|durchwahl)\b"
        r"(?:\s*(?:is\b|no\b|nr\b|number\b|at\b|on\b|under\b|phone\b|[.:#]))*\s*)"
        rf"[+(]?(?=(?:\D{{0,2}}\d){{3}})\d(?:{PHONE_SEPARATOR}?\d)*(?!\s?{UNIT}|[.,{DASHES}]?\d|\w)",
        r"\1[phone]",
    ),
    _rule(rf"(?<!\w)\+\d(?:{PHONE_SEPARATOR}?\d){{6,14}}(?!\w)", "[phone]", measures=True),
    _rule(rf"\(\+?\d{{2,5}}\)[ ]?\d(?:[ ./{DASHES}]?\d){{4,}}(?!\w)", "[phone]", measures=True),
    _rule(rf"(?<![\w.,])(?=(?:\D?\d){{7}})0\d{{1,4}}(?:[ ./{DASHES}]\d{{2,}}){{1,5}}(?!\w)", "[phone]", measures=True),
    _rule(rf"(?<![\w.,])\d{{3}}[ .{DASHES}]\d{{3}}[ .{DASHES}]\d{{4}}(?!\w)", "[phone]", measures=True),
    _rule(
        rf"(?<![\w.,])(?:\d{{3,4}}[ {DASHES}]\d{{3,4}}(?:[ {DASHES}]\d{{2,4}})?|\d{{3}}[ ]\d{{2}}[ ]\d{{2}})(?!\w|[.,]\d)",
        "[phone]",
        measures=True,
    ),
    _rule(r"\b[a-z]{0,4}[-/]?\d{6,}\w*", "[identifier]"),
    _rule(
        r"(?<![\w.,])(?:[a-z]{1,4}[-/])?(?=(?:[-/]?\d){7})\d+(?:[-/]\d+)+(?!\w)",
        "[identifier]",
        measures=True,
    ),
)

NAMES = (
    _rule(rf"\b(?i:drs|dres)\b\.?\s+{DEGREES}{FULL_NAME}(?:(?:,|[ ]and|[ ]&)[ ]{FULL_NAME}){{1,4}}", "[name]", flags=0),
    _rule(
        r"\b(?:(?i:Drs?|Dres|Prof|PD|Professor|Doctor|Doktor|Nurse|Mrs|Herrn?|Frau)|M(?:r|s|x|iss)|MISS)\b(?:\.[\s-]*|[\s-]+)"
        rf"{DEGREES}{FULL_NAME}",
        "[name]",
        flags=0,
    ),
    _rule(r"\b(?:MR|MS)\.[ ]" + rf"(?:[{UPPER}]\.[ ])*{NO_NAME}[{UPPER}’'-]{{3,}}\b", "[name]", flags=0),
    # Lower case after a dot is no new sentence, so that what follows is a name there too.
    _rule(
        rf"\b(?:(?:dr|prof|mrs)\b\.?|(?:mr|ms)\.)\s+{DEGREES}{PARTICLES}"
        rf"{NO_NAME}[^\W\d_][\w'’-]+(?:[ ]{NO_NAME}[^\W\d_][\w'’-]+)?",
        "[name]",
    ),
    _rule(
        rf"(?<![\w'’-])(?:(?:[{UPPER}]\.|{WORD})[ ]{PARTICLES}){{0,3}}{WORD},?[ ]{AFTER_NAME}(?:,?[ ]{AFTER_NAME})*",
        "[name]",
        flags=0,
    ),
    _rule(
        r"\b((?i:(?:signed|reported|dictated|read|reviewed|verified|approved|interpreted|transcribed|requested|referred)\s+by"
        rf"|patient(?:(?:['’]s)? name|(?=\s*:))|referring physician|radiologist)\s*(?:is\b|:)?\s+){FULL_NAME}",
        r"\1[name]",
        flags=0,
    ),
)
"""Case counts in a name, where a capital letter tells it from a word."""
RULES = (*IDENTIFIERS, *DATES, *AGES, *PHONES, *NAMES)


def deidentify(text: str, names: Sequence[str] = ()) -> str:
    """The text, composed (NFC), with listed names and everything the rules know replaced by what it was.

    A listed name is also found in other case, without its accents and transliterated (Müller, Muller, Mueller).

    >>> deidentify("Mr. John Smith, MRN 123456, 12.03.2024: a 35 mm cyst in segment IV.")
    '[name], [identifier], [date]: a 35 mm cyst in segment IV.'
    """
    text = unicodedata.normalize("NFD", text)
    for name in sorted(names, key=len, reverse=True):
        if name.strip():
            text = _spelled(name.strip()).sub("[name]", text)
    text = unicodedata.normalize("NFC", text)
    for rule in RULES:
        text = rule.apply(text)
    return text


@lru_cache(maxsize=4096)
def _spelled(name: str) -> re.Pattern[str]:
    """The ways in which a decomposed text may write a name."""
    letters = unicodedata.normalize("NFD", name.casefold())
    parts = []
    for unit in re.findall(rf"{'|'.join(sorted(SPELLINGS, key=len, reverse=True))}|\s+|.", letters, re.DOTALL):
        if unit.isspace():
            parts.append(rf"[\s{DASHES}]+")
        elif re.fullmatch(f"[{DASHES}]", unit):
            parts.append(rf"[\s{DASHES}]*")
        elif not unicodedata.combining(unit[0]):
            parts.append(SPELLINGS.get(unit, re.escape(unit)) + f"[{MARKS}]*")
    return re.compile(rf"(?<![\w{MARKS}]){''.join(parts)}(?![\w{MARKS}])", re.IGNORECASE)


def _is_measured(match: re.Match[str]) -> bool:
    """Whether a match is a measurement or the number of an image by what stands beside it, or a span of years."""
    before = match.string[max(0, match.start() - CONTEXT_CHARACTERS) : match.start()]
    after = match.string[match.end() : match.end() + CONTEXT_CHARACTERS]
    if MEASURED_AFTER.match(after) or MEASURED_BEFORE.search(before) or YEARS.fullmatch(match.group()):
        return True
    # "555-1234 x12" is a telephone with its extension, "120-130 x 80" is a size.
    return bool(SMALL_RANGE.fullmatch(match.group()) and (SPAN_BEFORE.search(before) or SPAN_AFTER.match(after)))
