"""Text in HL7: whatever a report says comes back identical through a parser that is not ours."""

import hl7 as python_hl7
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.results.examples import destination, parsed, report, section_text
from worker.core.report import Patient, Section, Sentence
from worker.results.hl7_text import FT_BREAK, TX_BREAK, carried, escape, transliterate, unescape

HOSTILE = "a|b^c&d~e\\f \\.br\\ \\X0D\\ \\F\\ MSH|^~\\& \x0b\x1c\x00\t\x7f\x85 Привет 漢字 😀 "
# Half of the texts are drawn from the characters that mean something to HL7.
TEXTS = st.one_of(st.text(), st.text(alphabet="|^~&\\.brXFSTRE0AD\r\n \x0b\x1c", max_size=40))


def lines_joined(text: str) -> str:
    """Line ends of every kind as one, which is all that TX and FT can say."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def message_with(value: str) -> python_hl7.Message:
    return python_hl7.parse(f"MSH|^~\\&|A\rOBX|1|TX|c||{value}|x".encode())


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_any_text_comes_back_identical_from_one_field(text):
    message = message_with(escape(text))
    assert message.unescape(str(message.segment("OBX")[5])) == text
    assert str(message.segment("OBX")[6]) == "x"


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_any_text_comes_back_identical_as_repetitions_of_tx(text):
    message = message_with(escape(text, TX_BREAK))
    lines = [message.unescape(str(repetition)) for repetition in message.segment("OBX")[5]]
    assert "\n".join(lines) == lines_joined(text)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_any_text_comes_back_identical_with_the_breaks_of_ft(text):
    message = message_with(escape(text, FT_BREAK))
    back = message.unescape(str(message.segment("OBX")[5]))  # the package gives CR for \.br\
    assert back.replace("\r", "\n") == lines_joined(text)


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_unescape_is_the_inverse_of_escape(text):
    assert unescape(escape(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_escaped_text_holds_no_delimiter_and_no_control_character(text):
    assert not set(escape(text)) & {"|", "^", "&", "~", *map(chr, range(32))}


@settings(max_examples=25, deadline=None)
@example(text="a\n \nb", name=" ", datatype="TX")
@given(text=TEXTS.filter(str.strip), name=TEXTS, datatype=st.sampled_from(["TX", "FT"]))
def test_any_text_comes_back_identical_from_a_whole_message(text, name, datatype):
    written = report(sentences=(Sentence(Section.FINDINGS, text),), patient=Patient("1", family_name=name))
    message = parsed(written, destination(text_type=datatype))
    assert lines_joined(section_text(message, "59776-5")) == lines_joined(text)
    assert message.unescape(str(message.segment("PID")[5])) == (name if name.strip() else "^^^^^^U")
    assert [str(segment[0]) for segment in message] == ["MSH", "PID", "PV1", "ORC", "OBR", "NTE", "OBX", "OBX"]


@pytest.mark.parametrize("datatype", ["TX", "FT"])
def test_hostile_text_stays_text(datatype):
    written = report(sentences=(Sentence(Section.FINDINGS, HOSTILE),))
    assert section_text(parsed(written, destination(text_type=datatype)), "59776-5") == HOSTILE


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_transliterated_text_can_always_be_written_in_8859_1(text):
    assert carried(text, "8859/1").encode("latin-1").decode("latin-1") == transliterate(text)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(max_codepoint=0x7F)))
def test_ascii_text_is_not_touched(text):
    assert transliterate(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Größe 3 µm ±1°, naïve", "Größe 3 µm ±1°, naïve"),
        ("e\u0301", "é"),
        ("5 μm", "5 µm"),
        ("≤ 5, ≥ 6, ≠ 7, ≈ 8", "<= 5, >= 6, != 7, ~ 8"),
        ("10⁴ and 10⁻³ and cm³", "10^4 and 10^-3 and cm³"),
        ("2⅓", "2 1/3"),
        ("“left” – ‘right’…", "\"left\" - 'right'..."),
        ("Łukasz Dvořák", "Lukasz Dvorák"),
        ("Щербаков Юрий", "Shcherbakov Yuriy"),
        ("α-fetoprotein", "a-fetoprotein"),
        ("山田 😀", "?? ?"),
        ("≯ 5", "? 5"),
        ("a\u200db\ufe0f", "ab"),
    ],
)
def test_text_outside_8859_1_is_replaced_by_the_stated_transliteration(text, expected):
    assert transliterate(text) == expected


def test_transliteration_comes_before_escaping():
    message = parsed(
        report(sentences=(Sentence(Section.FINDINGS, "≈ 5 mm"),)),
        destination(character_set="8859/1"),
    )
    assert section_text(message, "59776-5") == "~ 5 mm"


def test_changed_text_is_announced_in_a_note():
    cyrillic = report(patient=Patient("1", family_name="Ёжиков"))
    notes = parsed(cyrillic, destination(character_set="8859/1")).segments("NTE")
    assert len(notes) == 2 and "transliterated" in str(notes[1])
    assert len(parsed(report(), destination(character_set="8859/1")).segments("NTE")) == 1


def test_lone_surrogate_becomes_the_replacement_character():
    assert carried("a\ud800b", "UNICODE UTF-8") == "a\ufffdb"
