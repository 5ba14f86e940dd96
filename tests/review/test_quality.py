"""The quality page over a department's half year: several weeks, two model versions, sentences judged in every way."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from tests.review.browser import Browser, Page, cut_or_overlapping, hard_to_read, log_in, needs_chromium, picture
from tests.review.builders import PASSWORD, SENTENCES, Department, Reader, accept_all, copy_revision
from tests.review.test_signed_pages import redrafted
from worker.core import accounts, editing, seen, signing, studies
from worker.core.records import Study
from worker.core.report import Assessment, Section
from worker.results import hl7
from worker.review import quality

WEEKS = (9, 8, 6, 3, 2, 1)  # ago; some are missing, as on holidays
A_MONDAY = timedelta(hours=9)


class Calendar:
    """A clock that tests move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        self.monday = today - timedelta(days=today.weekday())
        self.at = datetime.now(UTC)
        monkeypatch.setattr(studies, "now", lambda: self.at)

    def week(self, ago: int) -> None:
        """Goes to that week's Monday, nine o'clock."""
        self.at = self.monday - timedelta(weeks=ago) + A_MONDAY


@pytest.fixture
def half_year(here: Department, monkeypatch: pytest.MonkeyPatch) -> Calendar:
    """One or two signed reports a week; the later model needs fewer changes."""
    calendar = Calendar(monkeypatch)
    with here.database.read() as session:
        reader = editing.Reader(accounts.by_name(session, "reader").id)
    for number, ago in enumerate(WEEKS):
        for place in range(1 + number % 2):
            calendar.week(ago)
            new = number >= 3
            sign(here, reader, calendar, f"A-{ago}-{place}", "0.2" if new else "0.1", changed=place == 1 or not new)
    calendar.at = datetime.now(UTC)
    return calendar


def sign(
    here: Department, reader: editing.Reader, calendar: Calendar, accession: str, model: str, *, changed: bool
) -> None:
    """One study read and signed: some sentences as they were, one edited, one struck out."""
    study_id = here.drafted(slices=2, size=8, accession=accession, model_version=model)
    calendar.at += timedelta(minutes=20 if changed else 6)
    with here.database.write() as session:
        copy = editing.open_copy(session, session.get_one(Study, study_id).report.id, reader)
        for place, row in enumerate(editing.in_order(copy.sentences)):
            if changed and place == 0:
                editing.change(session, row.id, reader, revision=1, text="The lungs are clear of disease.")
            elif changed and place == 2:
                editing.change(session, row.id, reader, revision=1, assessment=Assessment.REJECTED)
            else:
                editing.change(session, row.id, reader, revision=1, assessment=Assessment.ACCEPTED)
        report_id, revision = copy.report_id, seen.full_revision(copy)
    proof = accounts.prove_by_password(here.database, reader.user_id, PASSWORD, accounts.Lockout(5, 15), study_id)
    with here.database.write() as session:
        desk = signing.Desk.from_settings(here.settings, hl7.write)
        signing.sign(session, report_id, reader, desk, revision=revision, authentication_id=proof)


def test_figures_are_what_the_readers_did(here: Department, half_year: Calendar) -> None:
    with here.database.read() as session:
        by_model, by_section, weeks = quality.shares(session)
        words = quality.changed_words(session)
        by_part = quality.changed_words_by_section(session)
        (minutes,) = quality.minutes_to_sign(session)
    old, new = by_model
    assert (old.label, old.accepted, old.edited, old.rejected) == ("mu2LLM 0.1", 8, 4, 4)
    assert (new.label, new.accepted, new.edited, new.rejected) == ("mu2LLM 0.2", 16, 2, 2)
    assert {shares.label: shares.total for shares in by_section} == {"Findings": 27, "Impression": 9}
    assert len(weeks) == len(WEEKS)
    assert [line.label for line in words] == ["mu2LLM 0.1", "mu2LLM 0.2"]
    assert [len(line.points) for line in words] == [3, 3]
    drafted = sum(len(sentence.text.split()) for sentence in SENTENCES)
    assert words[0].points[0].value == pytest.approx(
        100 * 9 / drafted
    )  # "clear." to "clear of disease.", six words struck out
    findings, impression = by_part
    in_findings = sum(len(s.text.split()) for s in SENTENCES if s.section is Section.FINDINGS)
    assert (findings.label, impression.label) == ("Findings", "Impression")
    assert findings.points[0].value == pytest.approx(100 * 9 / in_findings)
    assert [point.value for point in impression.points] == [0] * len(WEEKS)
    shown = quality.plot("Time", "min", [minutes])
    assert shown is not None
    steps = [b - a for a, b in pairwise(shown.axis.x(point.week) for point in minutes.points)]
    assert steps[1:3] == pytest.approx([2 * steps[0], 3 * steps[0]])  # a week without reports leaves its place empty
    assert (minutes.points[0].value, minutes.points[-1].value) == (20, 13)


def test_words_that_a_reader_adds_count_in_their_section(here: Department, reader: Reader) -> None:
    study_id = here.drafted(slices=2)
    revision = accept_all(reader, study_id)
    for section, text in (("impression", "No acute finding."), ("recommendations", "Follow up in one year.")):
        answer = reader.act(f"/studies/{study_id}/sentences", section=section, text=text).text
        revision = copy_revision(answer)
    reader.act(f"/studies/{study_id}/sign", revision=revision, password=PASSWORD)
    with here.database.read() as session:
        lines = {line.label: line.points[0].value for line in quality.changed_words_by_section(session)}
    drafted = len(SENTENCES[3].text.split())
    assert lines == {"Findings": 0, "Impression": pytest.approx(100 * 3 / drafted)}  # no draft had recommendations


def test_one_model_version_is_looked_at_alone(here: Department, half_year: Calendar) -> None:
    with here.database.read() as session:
        by_model, by_section, weeks = quality.shares(session, "mu2LLM 0.1")
        lines = quality.changed_words_by_section(session, "mu2LLM 0.1")
        (minutes,) = quality.minutes_to_sign(session, "mu2LLM 0.1")
    assert [row.label for row in by_model] == ["mu2LLM 0.1"]
    assert {row.label: row.total for row in by_section} == {"Findings": 12, "Impression": 4}
    assert len(weeks) == len(lines[0].points) == len(minutes.points) == 3


def test_draft_that_was_rejected_whole_is_counted_for_its_model_and_starts_no_clock(
    here: Department, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    calendar = Calendar(monkeypatch)
    study_id = here.drafted(slices=2, model_version="0.1")
    revision = copy_revision(reader.get(f"/studies/{study_id}").text)
    reader.act(f"/studies/{study_id}/reject", revision=revision, reason="motion")
    redrafted(here, study_id, SENTENCES)  # by 0.2
    with here.database.write() as session:
        report = session.get_one(Study, study_id).report
        assert report is not None
        report.created_at -= timedelta(days=3)
        report.versions[0].created_at -= timedelta(days=3)
    reader.act(f"/studies/{study_id}/start-over", revision="")
    calendar.at += timedelta(minutes=5)
    reader.act(f"/studies/{study_id}/sign", revision=accept_all(reader, study_id), password=PASSWORD)
    with here.database.read() as session:
        assert quality.rejected_drafts(session) == [("mu2LLM 0.1", 1)]
        assert quality.rejected_drafts(session, "mu2LLM 0.2") == []
        (minutes,) = quality.minutes_to_sign(session)
        assert minutes.points[0].value == pytest.approx(5)
    with Reader(base_url=reader.base_url) as auditor:
        auditor.log_in("auditor")
        text = auditor.get("/admin/quality").text
    assert "<tr><td>mu2LLM 0.1</td><td>1</td></tr>" in text and "<option>mu2LLM 0.1</option>" in text


@needs_chromium
def test_plots_of_many_weeks_are_whole_and_readable(
    here: Department, half_year: Calendar, page: str, browser: Browser
) -> None:
    window = browser.new_page()
    log_in(window, page, "auditor")
    for width, height in ((3840, 2160), (1280, 800)):
        window.set_viewport_size({"width": width, "height": height})
        look(window, f"{page}/admin/quality", width)
    window.close()


_BEYOND = """[...document.querySelectorAll('svg.line-plot')].flatMap((plot) =>
  [...plot.querySelectorAll('text, circle, rect')].map((e) => [plot.getBoundingClientRect(), e.getBoundingClientRect()])
).filter(([box, inner]) => inner.left < box.left - 1 || inner.right > box.right + 1).length"""


def look(window: Page, address: str, width: int) -> None:
    """Everything of each plot lies within it, and nothing else is cut."""
    window.goto(address)
    assert window.locator("svg.line-plot").count() == 4
    assert window.locator("svg.line-plot circle").count() == 24
    assert window.evaluate(_BEYOND) == 0
    picture(window, f"quality-full-{width}")
    window.evaluate("document.getElementById('main').scrollTo(0, 99999)")
    picture(window, f"quality-end-{width}")
    assert cut_or_overlapping(window) == []
    assert hard_to_read(window) == []
