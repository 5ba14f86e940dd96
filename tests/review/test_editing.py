"""The working copy: what readers do with sentences, and that nobody's text is lost."""

from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.review.builders import SENTENCES, department
from tests.review.ward import redraft
from worker.core import editing, redrafts, seen
from worker.core.database import Database
from worker.core.editing import Reader
from worker.core.errors import AccessError, ReportError
from worker.core.records import Report, Role
from worker.core.report import Assessment, Origin, ReportState, Section
from worker.core.review_records import SentenceEdit, WorkingCopy, WorkingSentence


class Desk:
    """A report and two readers."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        self.there = department(database, folder)
        self.study_id = self.there.drafted(slices=2)
        self.one = Reader(self.there.user("one", Role.RADIOLOGIST).id)
        self.two = Reader(self.there.user("two", Role.RADIOLOGIST).id)
        self.viewer = Reader(self.there.user("viewer", Role.VIEWER).id)
        with database.read() as session:
            self.report_id = session.scalars(sa.select(Report.id)).one()
        with database.write() as session:
            copy = editing.open_copy(session, self.report_id, self.one)
            self.copy_id = copy.id
            self.ids = [row.id for row in editing.in_order(copy.sentences)]

    def change(self, reader: Reader, place: int, revision: int, **given: object) -> editing.Changed:
        with self.database.write() as session:
            return editing.change(session, self.ids[place], reader, revision=revision, **given)  # type: ignore[arg-type]

    def row(self, place: int) -> WorkingSentence:
        with self.database.read() as session:
            return session.get_one(WorkingSentence, self.ids[place])

    def state(self) -> ReportState:
        with self.database.read() as session:
            return session.get_one(Report, self.report_id).state


@pytest.fixture
def desk(sqlite_database: Database, tmp_path: Path) -> Desk:
    """Two readers at one report."""
    return Desk(sqlite_database, tmp_path)


def test_edit_is_kept_beside_the_machines_words(desk: Desk) -> None:
    desk.change(desk.one, 0, 1, text="The lungs are  clear\nof disease.")
    row = desk.row(0)
    assert (row.text, row.origin, row.assessment) == (
        "The lungs are clear of disease.",
        Origin.EDITED,
        Assessment.EDITED,
    )
    with desk.database.read() as session:
        source = session.get_one(WorkingSentence, row.id).source
    assert source is not None and source.text == SENTENCES[0].text


def test_the_machines_own_words_again_are_untouched_again(desk: Desk) -> None:
    desk.change(desk.one, 0, 1, text="Something else.")
    desk.change(desk.one, 0, 2, text=SENTENCES[0].text)
    assert desk.row(0).assessment is Assessment.UNTOUCHED


def test_emptied_machine_sentence_is_rejected_and_keeps_its_words(desk: Desk) -> None:
    desk.change(desk.one, 0, 1, text=" ")
    row = desk.row(0)
    assert (row.text, row.assessment) == (SENTENCES[0].text, Assessment.REJECTED)


def test_second_reader_on_an_old_revision_loses_no_text(desk: Desk) -> None:
    desk.change(desk.one, 0, 1, text="From one.")
    late = desk.change(desk.two, 0, 1, text="From two.")
    assert not late.applied
    assert desk.row(0).text == "From one."
    with desk.database.read() as session:
        (lost,) = editing.conflicts(session, desk.copy_id, desk.two.user_id)
        assert lost.text == "From two."
        assert editing.conflicts(session, desk.copy_id, desk.one.user_id) == []


@pytest.mark.parametrize(("take", "stands"), [(True, "From two."), (False, "From one.")])
def test_conflict_is_settled_by_its_author(desk: Desk, take: bool, stands: str) -> None:
    desk.change(desk.one, 0, 1, text="From one.")
    desk.change(desk.two, 0, 1, text="From two.")
    with desk.database.write() as session:
        (lost,) = editing.conflicts(session, desk.copy_id, desk.two.user_id)
        editing.settle(session, lost.id, desk.two, take=take)
    assert desk.row(0).text == stands
    with desk.database.read() as session:
        assert editing.conflicts(session, desk.copy_id, desk.two.user_id) == []


def on_page(reader: Reader, page: str, sequence: int) -> Reader:
    """The reader at one page, sending its request of this number."""
    return replace(reader, page=page, sequence=sequence)


@pytest.mark.parametrize("arriving", [(1, 2), (2, 1)], ids=["the answer was lost", "the network turned them around"])
def test_page_that_overtakes_itself_is_no_conflict_and_the_last_written_stands(
    desk: Desk, arriving: tuple[int, int]
) -> None:
    for sequence in arriving:
        desk.change(on_page(desk.one, "a", sequence), 0, 1, text=f"Written {sequence}.")
    assert desk.row(0).text == "Written 2."
    with desk.database.read() as session:
        assert editing.conflicts(session, desk.copy_id, desk.one.user_id) == []
        assert {e.text for e in session.scalars(sa.select(SentenceEdit))} == {"Written 1.", "Written 2."}


def test_words_that_were_taken_back_do_not_come_back_late(desk: Desk) -> None:
    desk.change(on_page(desk.one, "a", 2), 0, 1, text=SENTENCES[0].text)
    desk.change(on_page(desk.one, "a", 1), 0, 1, text="Thought better of.")
    assert desk.row(0).text == SENTENCES[0].text


@pytest.mark.parametrize("who", ["one", "two"])
def test_page_that_did_not_see_what_another_page_wrote_is_in_conflict(desk: Desk, who: str) -> None:
    desk.change(on_page(desk.one, "a", 1), 0, 1, text="At the first page.")
    desk.change(on_page(getattr(desk, who), "b", 1), 0, 2, text="At the second page.")
    late = desk.change(on_page(desk.one, "a", 2), 0, 1, text="At the first page, later.")
    assert not late.applied
    assert desk.row(0).text == "At the second page."
    with desk.database.read() as session:
        (lost,) = editing.conflicts(session, desk.copy_id, desk.one.user_id)
        assert lost.text == "At the first page, later."


def test_every_change_is_on_record(desk: Desk) -> None:
    desk.change(desk.one, 0, 1, text="First.")
    desk.change(desk.one, 0, 2, text="Second.")
    with desk.database.read() as session:
        assert session.scalars(sa.select(SentenceEdit.text).order_by(SentenceEdit.id)).all() == ["First.", "Second."]


def test_same_change_again_is_no_conflict(desk: Desk) -> None:
    desk.change(desk.one, 0, 1, assessment=Assessment.ACCEPTED)
    assert desk.change(desk.two, 0, 1, assessment=Assessment.ACCEPTED).applied


def test_added_sentence_stands_behind_the_one_it_was_added_to(desk: Desk) -> None:
    with desk.database.write() as session:
        editing.add(session, desk.copy_id, desk.one, section=Section.FINDINGS, text="Added.", after=desk.ids[0])
    with desk.database.read() as session:
        copy = session.get_one(WorkingCopy, desk.copy_id)
        texts = [row.text for row in editing.in_order(copy.sentences)]
    assert texts[:3] == [SENTENCES[0].text, "Added.", SENTENCES[1].text]


def test_viewer_changes_nothing(desk: Desk) -> None:
    with pytest.raises(AccessError):
        desk.change(desk.viewer, 0, 1, text="Mine.")


def test_endless_sentence_is_refused(desk: Desk) -> None:
    with pytest.raises(ReportError, match="2000"):
        desk.change(desk.one, 0, 1, text="x" * 2001)


def test_no_edit_makes_a_report_preliminary(desk: Desk) -> None:
    for place in range(len(SENTENCES)):
        desk.change(desk.one, place, 1, assessment=Assessment.ACCEPTED)
    assert desk.state() is ReportState.AI_DRAFT


def test_untouched_copy_follows_a_newer_draft(desk: Desk) -> None:
    redraft(desk)  # type: ignore[arg-type]
    with desk.database.write() as session:
        copy = editing.open_copy(session, desk.report_id, desk.one)
        assert [row.text for row in copy.sentences] == ["The machine wrote this later."]


def test_worked_on_copy_survives_a_newer_draft_until_its_reader_starts_over(desk: Desk) -> None:
    desk.change(desk.one, 0, 1, text="My words.")
    redraft(desk)  # type: ignore[arg-type]
    with desk.database.write() as session:
        copy = editing.open_copy(session, desk.report_id, desk.one)
        assert copy.id == desk.copy_id
        assert editing.newer_draft(session, copy) is not None
        redrafts.start_over(session, desk.report_id, desk.one, revision=seen.full_revision(copy))
    with desk.database.read() as session:
        kept = session.get_one(WorkingSentence, desk.ids[0])
        assert kept.text == "My words."
