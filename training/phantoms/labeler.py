"""Reads a report back into structured findings: kind, side, place, size, density, degree, and what is denied.

Rules, no model: mentions of findings are matched in each sentence, negation is resolved by clause, and every side, place and size
is given to the mention that shares its clause. It knows the wordings of `phrases.py` exactly and common paraphrases of them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from training.phantoms.vocabulary import Finding, FindingType, Side

K = FindingType
SIDED = {
    K.LUNG_NODULE: "lung", K.LUNG_MASS: "lung", K.CONSOLIDATION: "lung", K.ATELECTASIS: "lung", K.PLEURAL_EFFUSION: "pleura",
    K.PNEUMOTHORAX: "pleura", K.RENAL_CYST: "kidney", K.RENAL_CALCULUS: "kidney", K.HYDRONEPHROSIS: "kidney",
}  # fmt: skip

STONE = r"(?:stones?|calcul(?:us|i)|concrements?)"
PATTERNS: tuple[tuple[FindingType | str, str], ...] = (
    (K.GALLSTONES, rf"gall ?stones?|cholelithiasis|{STONE} in the gall ?bladder|gall ?bladder[^.;,]*{STONE}"),
    (K.BLADDER_STONE, rf"cystolithiasis|vesical {STONE}|{STONE} in the (?:urinary )?bladder|bladder[^.;,]*{STONE}"),
    (K.RENAL_CALCULUS, rf"nephrolithiasis|(?:renal|kidney) {STONE}|renal pelvic {STONE}"),
    (K.LYTIC_LESION, r"(?:lytic|osteolytic)(?: \w+){0,3}? (?:lesions?|focus|metastas[ie]s)|osteolys[ie]s"),
    (K.CORONARY_CALCIFICATION, r"coronary(?: artery)? calcifications?|calcifi\w+ (?:of|in) the coronary|calcified coronary"),
    (K.PERICARDIAL_EFFUSION, r"pericardial (?:effusion|fluid)|fluid in the pericardi\w+"),
    (K.PLEURAL_EFFUSION, r"(?:pleural )?effusions?|pleural fluid|fluid in the pleural \w+|hydrothorax"),
    (K.PNEUMOTHORAX, r"(?:hydro)?pneumothora(?:x|ces)|free pleural air"),
    (K.CARDIOMEGALY, r"cardiomegaly|enlarged (?:heart|cardiac \w+)|enlargement of the heart|cardiac enlargement"
                     r"|(?:heart|cardiac silhouette)(?: size)?(?: \w+){0,3}? (?:enlarged|dilated)"),
    (K.AORTIC_ANEURYSM, r"aneurysm(?:al)?(?: dilatation)?|aort\w+(?: \w+){0,3}? (?:dilated|ectatic)"
                        r"|dilat\w+(?: \w+){0,3}? aorta"),
    (K.STEATOSIS, r"steatosis|fatty (?:infiltrat(?:e|ion)|liver|change)|steatotic"),
    (K.SPLENOMEGALY, r"splenomegaly|enlarged spleen|enlargement of the spleen|spleen(?: \w+){0,3}? enlarged"),
    (K.HYDRONEPHROSIS, r"(?:uretero)?hydronephrosis|dilated (?:renal )?(?:collecting system|pelvicalyceal system|renal pelvis)"
                       r"|dilat\w+ of the (?:\w+ ){0,2}(?:collecting system|renal pelvis)"
                       r"|collecting systems?(?: \w+){0,3}? dilated"),
    (K.ASCITES, r"ascit(?:es|ic fluid)|free (?:peritoneal |intraperitoneal |abdominal |pelvic )?fluid"
                r"|fluid (?:around|surrounding) the (?:liver|spleen)|peri(?:hepatic|splenic) fluid"),
    (K.VERTEBRAL_FRACTURE, r"(?:compression |wedge |burst )?fractures?|(?:compression|wedge) deformit(?:y|ies)"
                           r"|loss of (?:vertebral )?height|height loss"),
    (K.LYMPHADENOPATHY, r"(?:lymph)?adenopathy|enlarged (?:\w+ ){0,4}?nodes?|nodes?(?: \w+){0,3}? enlarged"),
    (K.EMPHYSEMA, r"emphysema(?:tous)?(?: changes?)?"),
    (K.ATELECTASIS, r"atelecta(?:sis|tic)(?: bands?)?"),
    (K.CONSOLIDATION, r"consolidat(?:ion|ions|ed)|airspace (?:opacity|disease)|(?<!fatty )infiltrates?"),
    ("cyst", r"cysts?"),
    ("stone", STONE),
    ("nodule", r"nodules?"),
    ("mass", r"mass(?:es)?|tumou?rs?"),
    ("lesion", r"lesions?|foc(?:us|i)"),
)  # fmt: skip
"""Mentions, most specific first; a word of the plain kinds gets its organ from the words around it."""

MENTION = tuple((kind, re.compile(rf"\b(?:{pattern})\b")) for kind, pattern in PATTERNS)
BY_ORGAN: dict[tuple[str, str], FindingType] = {
    ("cyst", "liver"): K.HEPATIC_CYST,
    ("cyst", "kidney"): K.RENAL_CYST,
    ("stone", "kidney"): K.RENAL_CALCULUS,
    ("stone", "bladder"): K.BLADDER_STONE,
    ("stone", "gallbladder"): K.GALLSTONES,
    ("nodule", "lung"): K.LUNG_NODULE,
    ("nodule", ""): K.LUNG_NODULE,
    ("nodule", "liver"): K.HEPATIC_LESION,
    ("mass", "lung"): K.LUNG_MASS,
    ("mass", "liver"): K.HEPATIC_LESION,
    ("mass", "pancreas"): K.PANCREATIC_MASS,
    ("lesion", "liver"): K.HEPATIC_LESION,
    ("lesion", "pancreas"): K.PANCREATIC_MASS,
    ("stone", ""): K.RENAL_CALCULUS,
}
ORGANS = tuple(
    (organ, re.compile(rf"\b(?:{words})\b"))
    for organ, words in (
        ("gallbladder", r"gall ?bladder|cholelithiasis"),
        ("bladder", r"(?:urinary )?bladder|vesical"),
        ("pancreas", r"pancrea\w+"),
        ("kidney", r"kidneys?|renal|upper pole|lower pole|interpolar"),
        ("liver", r"liver|hepatic|segments? [ivx]+"),
        ("lung", r"lungs?|pulmonary|(?:upper|middle|lower) lobes?|lingula\w*"),
    )
)
LOBES = {
    "rul": "right upper lobe", "rml": "right middle lobe", "rll": "right lower lobe", "lul": "left upper lobe",
    "lll": "left lower lobe",
}  # fmt: skip
LOBE = re.compile(rf"\b({'|'.join(LOBES)})\b")
ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth",
)  # fmt: skip
LEVEL = re.compile(rf"\b({'|'.join(ORDINALS)}) (thoracic|lumbar)(?= vertebra)")
ONE = re.compile(r"(?:, |\bbut )(?:but |and )?(an? (?:[\w.]+ ){0,3})one\b")
"""A second mention without its name, as in "no effusion on the right, a small one on the left"."""
SIZE = re.compile(r"(\d+(?:\.\d+)?)((?:\s*[x×]\s*\d+(?:\.\d+)?)*)\s*(mm|cm|millimet(?:er|re)s?|centimet(?:er|re)s?)\b")
SIZE_PAIR = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?) and (?=\d+(?:\.\d+)?\s*(mm|cm)\b)")
SIDE_WORD = re.compile(r"\b(right|left|bilateral|both|bibasilar|bibasal)\b")
BETWEEN_SIDES = r"(?:(?!no\b|none\b|not\b|without\b|clear\b|normal\b|right\b|left\b)[\w.]+ ){0,4}"
BOTH_SIDES = re.compile(
    rf"\b(?:bilateral(?:ly)?|both|bibasilar|bibasal|right and {BETWEEN_SIDES}left|left and {BETWEEN_SIDES}right)\b"
)
PLACES = {
    "lung": re.compile(r"\b(upper|middle|lower) lobes?\b|\b(lingula)\w*"),
    "kidney": re.compile(r"\b(upper|lower) pole\b|\b(interpolar)\b"),
    "liver": re.compile(r"\bsegment ([ivx]+)\b"),
    "pancreas": re.compile(r"\b(head|body|tail)\b"),
    "bone": re.compile(r"\b([tl])h?(\d{1,2})\b|\b(left|right) (?:ilium|iliac)"),
    "aorta": re.compile(r"\b(ascending|infrarenal|abdominal)\b"),
    "nodes": re.compile(r"\b(mediastinal|retroperitoneal|para-?aortic|pelvic|iliac)\b"),
}
PLACED_IN = {
    K.LUNG_NODULE: "lung", K.LUNG_MASS: "lung", K.CONSOLIDATION: "lung", K.ATELECTASIS: "lung",
    K.RENAL_CYST: "kidney", K.RENAL_CALCULUS: "kidney", K.HEPATIC_CYST: "liver", K.HEPATIC_LESION: "liver",
    K.PANCREATIC_MASS: "pancreas", K.VERTEBRAL_FRACTURE: "bone", K.LYTIC_LESION: "bone", K.AORTIC_ANEURYSM: "aorta",
    K.LYMPHADENOPATHY: "nodes",
}  # fmt: skip
GRADED = (K.EMPHYSEMA, K.CORONARY_CALCIFICATION, K.STEATOSIS, K.VERTEBRAL_FRACTURE)
UNSIZED = (*GRADED,)
DEGREE = re.compile(r"\b(mild|moderate|severe)(?:ly)?\b")
DENSITY = re.compile(r"\b(hypo|hyper)(?:dense|attenuating|vascular|enhancing)\b")

DENIAL = re.compile(
    r"\b(?:no|not|without|absence of|absent|negative for|free of|rather than|nor|neither|never)\b|\b(?:is|are|was|were)n't\b"
)
DENIED_AFTER = re.compile(
    r"\b(?:(?:is|are) (?:not(?! resolved)|absent)|not (?:seen|identified|present|demonstrated)|(?:ruled out|excluded)"
    r"|no longer|(?:has|have) (?:completely |since )?resolved)\b"
)
GONE_BEFORE = re.compile(
    r"(?<!not )(?<!partially )(?<!incompletely )\b(?:resolved|resolution of)(?: (?!and\b|with\b)[\w-]+){0,4} $"
)
OPEN_BEFORE = re.compile(r"\b(?:can ?not|can't|could not) (?:exclude|rule out)(?: (?!and\b|with\b)[\w-]+){0,4} $")
OPEN_AFTER = re.compile(r"[^,]{0,40}?\b(?:(?:can ?not|can't|could not) be|(?:is|are) not) (?:excluded|ruled out)\b")
"""What is neither stated nor denied."""
CLAUSE_END = re.compile(
    r";|\bbut\b|\bhowever\b|\bexcept\b|\bwhile\b|\bwhereas\b|\bthere (?:is|are)\b|\bapart from\b|\bother than\b"
)
HEADING = re.compile(
    r"^\s*(?:findings|impression|conclusion|chest|abdomen|pelvis|thorax)\s*:\s*", re.MULTILINE | re.IGNORECASE
)
SENTENCE_END = re.compile(r"(?<!\d)\.(?!\d)|(?<=\d)\.(?=\s|$)|(?<=\D)\.(?=\d)|\n")
BOUNDARY = re.compile(r", and |, with |, | and | with |; |: ")


@dataclass(frozen=True)
class Reading:
    """What a report says."""

    findings: tuple[Finding, ...]
    """Present, one for each (kind, side), in the order of `FindingType`, right before left."""
    denied: frozenset[FindingType]
    """Kinds that are said to be absent and never said to be present."""


@dataclass(frozen=True)
class _Mention:
    kind: FindingType
    start: int
    end: int
    denied: bool


def read(report: str) -> Reading:
    """The findings of a report, of its Findings and Impression together: what one leaves out the other fills in."""
    present: dict[tuple[FindingType, Side], Finding] = {}
    denied: set[FindingType] = set()
    text = HEADING.sub("\n", report)
    for sentence in SENTENCE_END.split(text):
        for finding, absent in _read_sentence(_spelled_out(sentence)):
            if absent:
                denied.add(finding.kind)
            else:
                _merge(present, finding)
    order = list(FindingType)
    kept = sorted(present.values(), key=lambda finding: (order.index(finding.kind), finding.side is Side.LEFT))
    return Reading(tuple(kept), frozenset(denied - {finding.kind for finding in kept}))


def _spelled_out(sentence: str) -> str:
    """A sentence in lower case, with lobes and vertebrae by their usual names and "one" by the word that it stands for."""
    text = LOBE.sub(lambda lobe: LOBES[lobe[1]], " ".join(sentence.lower().split()))
    text = LEVEL.sub(lambda level: f"{level[2][0]}{ORDINALS.index(level[1]) + 1}", text)
    one = ONE.search(text)
    if one is None:
        return text
    named = [match for _, pattern in MENTION for match in pattern.finditer(text, 0, one.start())]
    if not named:
        return text
    meant = max(named, key=lambda match: (match.end(), len(match[0])))
    return f"{text[: one.start()]}; {one[1]}{meant[0]}{text[one.end() :]}"


def _merge(present: dict[tuple[FindingType, Side], Finding], new: Finding) -> None:
    """Add a finding, or fill the gaps of the one that is meant."""
    same = [key for key in present if key[0] is new.kind]
    key = (new.kind, new.side)
    if (
        key not in present
        and new.kind in SIDED
        and same
        and (new.side is Side.NONE or present[same[0]].side is Side.NONE)
    ):
        key = same[0]
    if key not in present:
        present[key] = new
        return
    old = present.pop(key)
    merged = replace(
        old,
        side=old.side or new.side,
        place=old.place or new.place,
        size_mm=old.size_mm if old.size_mm is not None else new.size_mm,
        density=old.density or new.density,
        degree=old.degree or new.degree,
    )
    present[(merged.kind, merged.side)] = merged


def _read_sentence(sentence: str) -> Iterator[tuple[Finding, bool]]:
    mentions = _mentions(sentence)
    for number, mention in enumerate(mentions):
        if mention.denied:
            yield Finding(mention.kind), True
            continue
        start, end = _reach(sentence, mentions, number)
        at = mention.start - start
        yield from ((finding, False) for finding in _describe(mention.kind, sentence[start:end], at, sentence))


def _mentions(sentence: str) -> list[_Mention]:
    """Mentions in order, each stretch of text used once by its most specific pattern."""
    taken: list[tuple[int, int, FindingType | str]] = []
    for kind, pattern in MENTION:
        for match in pattern.finditer(sentence):
            if all(match.end() <= start or match.start() >= end for start, end, _ in taken):
                taken.append((match.start(), match.end(), kind))
    taken.sort()
    spans = [(start, end) for start, end, _ in taken]
    mentions = []
    for number, (start, end, kind) in enumerate(taken):
        if OPEN_BEFORE.search(sentence[:start]) or OPEN_AFTER.match(sentence, end):
            continue
        low, high = _between(sentence, spans, number)
        for resolved in _resolve(kind, sentence[low:high], sentence):
            mentions.append(_Mention(resolved, start, end, _is_denied(sentence, start, end)))
    return mentions


def _resolve(kind: FindingType | str, clause: str, sentence: str) -> tuple[FindingType, ...]:
    """The kind of a mention; a plain word takes the organ named in its clause, else in its sentence."""
    if isinstance(kind, FindingType):
        return (kind,)
    for text in (clause, sentence):
        for organ, words in ORGANS:
            if words.search(text) and (kind, organ) in BY_ORGAN:
                return (BY_ORGAN[kind, organ],)
    plain = BY_ORGAN.get((kind, ""))
    return (plain,) if plain is not None else ()


def _is_denied(sentence: str, start: int, end: int) -> bool:
    """Whether a mention stands in the scope of a denial: after one in its clause, or before 'is not seen'."""
    ends = [match.end() for match in CLAUSE_END.finditer(sentence, 0, start)]
    before = sentence[max(ends, default=0) : start]
    denial = None
    for match in DENIAL.finditer(before):
        denial = match
    if denial is not None and not re.search(r",? (?:with|and there is) ", before[denial.end() :]):
        return True
    if DENIAL.search(sentence, start, end) or GONE_BEFORE.search(sentence[:start]):
        return True
    stop = CLAUSE_END.search(sentence, end)
    after = sentence[end : stop.start() if stop else len(sentence)]
    return bool(re.match(r"[^,]{0,40}?" + DENIED_AFTER.pattern, after))


def _between(sentence: str, spans: list[tuple[int, int]], number: int) -> tuple[int, int]:
    """The stretch of a sentence that belongs to one mention: up to the last boundary before the next one."""
    start, end = spans[number]
    low, high = 0, len(sentence)
    if number > 0:
        low = _last_boundary(sentence, spans[number - 1][1], start)
    if number + 1 < len(spans):
        high = _last_boundary(sentence, end, spans[number + 1][0])
    return low, high


def _last_boundary(sentence: str, start: int, end: int) -> int:
    cut = start
    for match in BOUNDARY.finditer(sentence, start, end):
        cut = match.start()
    return cut


def _reach(sentence: str, mentions: list[_Mention], number: int) -> tuple[int, int]:
    """The stretch that describes a mention, where mentions of the same kind in a row share one ("cardiomegaly; the heart")."""
    return _between(sentence, [(mention.start, mention.end) for mention in mentions], number)


def _sizes(text: str) -> list[tuple[int, int]]:
    """(position, millimetres) of every size, the largest where dimensions are multiplied."""
    sizes = [
        (pair.start(), round(float(pair[1]) * (10.0 if pair[2] == "cm" else 1.0))) for pair in SIZE_PAIR.finditer(text)
    ]
    for match in SIZE.finditer(text):
        values = [float(value) for value in re.findall(r"\d+(?:\.\d+)?", match[1] + match[2])]
        millimetres = max(values) * (10.0 if match[3].startswith("c") else 1.0)
        sizes.append((match.start(), round(millimetres)))
    return sorted(sizes)


def _place(kind: FindingType, text: str) -> str:
    group = PLACED_IN.get(kind)
    match = PLACES[group].search(text) if group is not None else None
    if match is None:
        return ""
    if group == "bone":
        return f"{match[3]} ilium" if match[3] else f"{match[1].upper()}{match[2]}"
    word = next(part for part in match.groups() if part)
    words = {
        "lung": {"lingula": "upper lobe"}.get(word, f"{word} lobe"),
        "kidney": "interpolar region" if word == "interpolar" else f"{word} pole",
        "liver": f"segment {word.upper()}",
        "pancreas": word,
        "aorta": "ascending aorta" if word == "ascending" else "infrarenal aorta",
        "nodes": {"iliac": "pelvic"}.get(word, "retroperitoneal" if word.startswith("para") else word),
    }
    return words[group or ""]


def _describe(kind: FindingType, text: str, at: int, sentence: str) -> list[Finding]:
    """Findings that a stretch of text describes, with its mention at a position: one, or one a side."""
    sizes = [] if kind in UNSIZED else _sizes(text)
    degree = DEGREE.search(text) if kind in GRADED else None
    density = DENSITY.search(text) if kind is K.HEPATIC_LESION else None
    base = Finding(
        kind,
        place=_place(kind, text),
        size_mm=max((size for _, size in sizes), default=None),
        density=f"{density[1]}dense" if density else "",
        degree=degree[1] if degree else "",
    )
    if kind not in SIDED:
        return [base]
    words = list(SIDE_WORD.finditer(text)) or list(SIDE_WORD.finditer(sentence))
    if BOTH_SIDES.search(text):
        return [_on_side(base, side, sizes, words) for side in (Side.RIGHT, Side.LEFT)]
    sides = [word for word in words if word[1] in ("right", "left")]
    # "Right lung clear, left lower lobe consolidation": the nearest side is meant.
    nearest = min(sides, key=lambda word: abs(word.start() - at), default=None)
    return [replace(base, side=Side(nearest[1]))] if nearest is not None else [base]


def _on_side(base: Finding, side: Side, sizes: list[tuple[int, int]], words: list[re.Match[str]]) -> Finding:
    """One of two sides, with the size that stands before its word, or the only size for both.

    Where both sizes follow both sides they go in the same order.
    """
    positions = [word.start() for word in words if word[1] == side.value]
    if not positions or len(sizes) < 2:
        return replace(base, side=side)
    order = [word for word in words if word[1] in ("right", "left")]
    if len(order) == 2 and len(sizes) == 2 and sizes[0][0] > order[1].start():
        return replace(base, side=side, size_mm=sizes[0 if order[0][1] == side.value else 1][1])
    before = [size for position, size in sizes if position < positions[0]]
    return replace(base, side=side, size_mm=before[-1] if before else sizes[0][1])
