"""Takes what points to a person out of a report before it leaves the machine: names given, dates, numbers, contacts.

Rules, not a promise: names that nobody listed and that stand without a title stay. Texts for an endpoint outside the hospital
need the list of names and a person's eye on a sample.
"""

import re
from collections.abc import Sequence

MONTHS = (
    "jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sep(?:t(?:ember)?)?|oct(?:ober)?"
    "|nov(?:ember)?|dec(?:ember)?"
)
MONTHS_ALONE = f"(?:(?i:{MONTHS.replace('may|', '')})|May)"
"""The word "may" is a month only with a capital letter: "segment 7 may hold a cyst" is no date."""
RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b[\w.+-]+@[\w-]+\.[\w.-]+\b"), "[email]"),
    (re.compile(r"\bhttps?://\S+"), "[link]"),
    (re.compile(r"\b\d{4}-\d{2}-\d{2}(?:[T ]\d{2}:\d{2}(?::\d{2})?)?\b"), "[date]"),
    (re.compile(r"\b\d{1,2}[./]\d{1,2}[./](?:\d{4}|\d{2})\b"), "[date]"),
    (re.compile(rf"\b\d{{1,2}}(?:st|nd|rd|th)?\.?\s+(?:{MONTHS})\.?,?\s+\d{{4}}\b", re.IGNORECASE), "[date]"),
    (re.compile(rf"\b(?:{MONTHS})\.?\s+\d{{1,2}}(?:st|nd|rd|th)?,?\s+\d{{4}}\b", re.IGNORECASE), "[date]"),
    (re.compile(rf"\b{MONTHS_ALONE}\.?\s+\d{{1,2}}(?:st|nd|rd|th)?\b(?!\s*(?:mm|cm|HU|x|%)|[.,]\d)"), "[date]"),
    (re.compile(rf"\b\d{{1,2}}(?:st|nd|rd|th)?\.?\s+(?:of\s+)?{MONTHS_ALONE}\b"), "[date]"),
    (re.compile(r"\b(?:9\d|1[0-2]\d)(?=[- ](?:years?|yrs?|y/?o)\b)", re.IGNORECASE), "[age]"),
    (
        re.compile(
            r"\b(?:MRN|patient id|accession(?: (?:no|number))?|case (?:no|number)|SSN|NHS(?: number)?|DOB|date of birth)"
            r"\s*[.:#]*\s*[\w/-]*\d[\w/-]*",
            re.IGNORECASE,
        ),
        "[identifier]",
    ),
    (re.compile(r"(?<!\w)(?:\+\d{1,3}[ -]?)?(?:\(\d{2,5}\)[ -]?)?\d{3,4}[ -]\d{3,4}(?:[ -]\d{2,4})?(?!\w)"), "[phone]"),
    (re.compile(r"\b[1-2]\.\d+(?:\.\d+){4,}\b"), "[identifier]"),
    (re.compile(r"\b\d{6,}\b"), "[identifier]"),
    (
        re.compile(
            r"\b(?:Drs?|Prof|Mr|Mrs|Ms|Miss|Mx|Professor|Doctor)\.?\s+"
            r"(?:[A-Z]\.\s*)*[A-Z][\w'’-]+(?:\s+[A-Z][\w'’-]+)?"
        ),
        "[name]",
    ),
)


def deidentify(text: str, names: Sequence[str] = ()) -> str:
    """The text with listed names and everything the rules know replaced by what it was.

    >>> deidentify("Mr. John Smith, MRN 123456, 12.03.2024: a 35 mm cyst in segment IV.")
    '[name], [identifier], [date]: a 35 mm cyst in segment IV.'
    """
    for name in sorted(names, key=len, reverse=True):
        if name.strip():
            text = re.sub(rf"(?<!\w){re.escape(name.strip())}(?!\w)", "[name]", text, flags=re.IGNORECASE)
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text)
    return text
