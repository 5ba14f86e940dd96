"""An act decides on the text that its author's page showed, and is refused where another reader has put one in its place."""

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from tests.review.builders import (
    PASSWORD,
    SENTENCES,
    Department,
    Reader,
    accept_all,
    card_ids,
    copy_revision,
    state_of,
    version_of,
)
from tests.review.test_signed_pages import redrafted
from worker.core.records import ReportVersion, Signature
from worker.core.report import ReportState, Section, Sentence
from worker.core.review_records import WorkingCopy

OTHER = tuple(
    Sentence(sentence.section, f"Unseen: {sentence.text}", confidence=-0.1, support=0.9) for sentence in SENTENCES
)


@pytest.fixture
def second(page: str) -> Iterator[Reader]:
    """Another radiologist, at another page."""
    with Reader(base_url=page) as client:
        client.log_in("second")
        yield client


def signed(reader: Reader, study_id: str) -> str:
    """Signs the draft as it is; the page after it."""
    return reader.act(f"/studies/{study_id}/sign", revision=accept_all(reader, study_id), password=PASSWORD).text


def corrected_words(reader: Reader, study_id: str, text: str, changes: int = 1) -> str:
    """Begins a correction and changes its first sentence so many times; the page after it."""
    shown = reader.act(f"/studies/{study_id}/correct").text
    card = card_ids(shown)[0]
    for number in range(1, changes + 1):
        words = f"{text} {number}." if number < changes else text
        shown = reader.act(f"/studies/{study_id}/sentences/{card}", act="edit", revision=number, text=words).text
    return shown


def signatures(here: Department) -> int:
    with here.database.read() as session:
        return session.scalar(sa.select(sa.func.count()).select_from(Signature)) or 0


@pytest.mark.parametrize("left_by", ["start-over", "reject"])
@pytest.mark.parametrize("act", ["sign", "preliminary", "reject"])
def test_page_that_shows_the_first_draft_decides_nothing_on_the_second(
    here: Department, reader: Reader, second: Reader, act: str, left_by: str
) -> None:
    study_id = here.drafted(slices=2)
    revision = accept_all(reader, study_id)
    assert copy_revision(second.get(f"/studies/{study_id}").text) == revision
    if left_by == "reject":
        reader.act(f"/studies/{study_id}/reject", revision=revision, reason="motion")
        revision_left = ""
    else:
        revision_left = revision
    redrafted(here, study_id, sentences=OTHER)
    assert reader.act(f"/studies/{study_id}/start-over", revision=revision_left).status_code == 200
    latest = accept_all(reader, study_id)
    assert latest.partition("/")[2] == revision.partition("/")[2]  # as many changes: a count tells them not apart
    answer = second.act(f"/studies/{study_id}/{act}", revision=revision, password=PASSWORD, reason="motion")
    assert answer.status_code == 409 and "changed since it was shown" in answer.text
    assert "Unseen: " in answer.text
    assert (state_of(here, study_id), signatures(here)) == (ReportState.AI_DRAFT, 0)


@pytest.mark.parametrize("act", ["sign", "sign-correction"])
def test_page_that_shows_the_draft_does_not_sign_a_correction_in_work(
    here: Department, reader: Reader, second: Reader, act: str
) -> None:
    study_id = here.drafted(slices=2)
    revision = accept_all(second, study_id)
    reader.act(f"/studies/{study_id}/sign", revision=revision, password=PASSWORD)
    corrected_words(reader, study_id, "Half a correction", changes=len(SENTENCES))
    answer = second.act(f"/studies/{study_id}/{act}", revision=revision, password=PASSWORD)
    assert answer.status_code == 409
    assert (state_of(here, study_id), signatures(here)) == (ReportState.FINAL, 1)


def test_sign_never_signs_a_correction_nor_the_other_way_round(here: Department, reader: Reader) -> None:
    study_id = here.drafted(slices=2)
    revision = accept_all(reader, study_id)
    path = f"/studies/{study_id}"
    assert reader.act(f"{path}/sign-correction", revision=revision, password=PASSWORD).status_code == 409
    reader.act(f"{path}/sign", revision=revision, password=PASSWORD)
    revision = copy_revision(corrected_words(reader, study_id, "The lungs are clear of disease."))
    assert reader.act(f"{path}/sign", revision=revision, password=PASSWORD).status_code == 409
    assert f'hx-post="{path}/sign-correction"' in reader.get(path).text
    assert reader.act(f"{path}/sign-correction", revision=revision, password=PASSWORD).status_code == 200
    assert state_of(here, study_id) is ReportState.CORRECTED


@pytest.mark.parametrize("act", ["addend", "retract"])
def test_signed_text_that_was_corrected_meanwhile_is_neither_addended_nor_retracted_unseen(
    here: Department, reader: Reader, second: Reader, act: str
) -> None:
    study_id = here.drafted(slices=2)
    signed(reader, study_id)
    seen = version_of(second.get(f"/studies/{study_id}").text)
    revision = copy_revision(corrected_words(reader, study_id, "Unseen words."))
    reader.act(f"/studies/{study_id}/sign-correction", revision=revision, password=PASSWORD)
    given = {"text": "An addendum.", "reason": "wrong", "password": PASSWORD}
    answer = second.act(f"/studies/{study_id}/{act}", version=seen, **given)
    assert answer.status_code == 409 and "Unseen words." in answer.text
    assert (state_of(here, study_id), signatures(here)) == (ReportState.CORRECTED, 2)
    seen = version_of(answer.text)
    assert second.act(f"/studies/{study_id}/{act}", version=seen, **given).status_code == 200


@pytest.mark.parametrize("act", ["addend", "retract"])
def test_correction_in_work_is_put_aside_by_nobody_elses_addendum_or_retraction(
    here: Department, reader: Reader, second: Reader, act: str
) -> None:
    study_id = here.drafted(slices=2)
    signed(reader, study_id)
    seen = version_of(second.get(f"/studies/{study_id}").text)
    shown = corrected_words(reader, study_id, "Words in work.")
    for revision in ("", copy_revision(shown)):
        given = {"text": "An addendum.", "reason": "wrong", "password": PASSWORD}
        answer = second.act(f"/studies/{study_id}/{act}", version=seen, revision=revision, **given)
        assert answer.status_code == 409 and "correction of this report is in work" in answer.text
    assert "Words in work." in reader.get(f"/studies/{study_id}").text
    assert state_of(here, study_id) is ReportState.FINAL


def test_correction_is_left_only_as_its_reader_saw_it(here: Department, reader: Reader, second: Reader) -> None:
    study_id = here.drafted(slices=2)
    signed(reader, study_id)
    reader.act(f"/studies/{study_id}/correct")
    seen = copy_revision(second.get(f"/studies/{study_id}").text)
    corrected_words(reader, study_id, "Words in work.")
    answer = second.act(f"/studies/{study_id}/leave-correction", revision=seen)
    assert answer.status_code == 409
    text = second.get(f"/studies/{study_id}").text
    assert "Words in work." in text
    assert second.act(f"/studies/{study_id}/leave-correction", revision=copy_revision(text)).status_code == 200


def test_judged_work_is_not_put_aside_by_a_page_that_never_showed_it(
    here: Department, reader: Reader, second: Reader
) -> None:
    study_id = here.drafted(slices=2)
    seen = accept_all(reader, study_id)
    redrafted(here, study_id, sentences=OTHER)
    assert "Begin again from it" in second.get(f"/studies/{study_id}").text
    reader.act(f"/studies/{study_id}/start-over", revision=seen)
    latest = accept_all(reader, study_id)
    for revision in (seen, latest, ""):  # the latest is what is there, and no newer draft is
        assert second.act(f"/studies/{study_id}/start-over", revision=revision).status_code == 409
    redrafted(here, study_id)
    assert second.act(f"/studies/{study_id}/start-over", revision=seen).status_code == 409
    assert copy_revision(reader.get(f"/studies/{study_id}").text) == latest
    with here.database.read() as session:
        assert len(session.scalars(sa.select(WorkingCopy.closed_at).where(WorkingCopy.closed_at.is_(None))).all()) == 1
        assert session.scalar(sa.select(sa.func.count()).select_from(ReportVersion)) == 3


def test_stale_read_it_leaves_the_draft_that_was_taken_up(here: Department, reader: Reader, second: Reader) -> None:
    study_id = here.drafted(slices=2)
    revision = copy_revision(reader.get(f"/studies/{study_id}").text)
    reader.act(f"/studies/{study_id}/reject", revision=revision, reason="motion")
    redrafted(here, study_id, sentences=(*OTHER, Sentence(Section.IMPRESSION, "More.")))
    assert "Read it" in second.get(f"/studies/{study_id}").text
    reader.act(f"/studies/{study_id}/start-over")
    latest = accept_all(reader, study_id)
    assert second.act(f"/studies/{study_id}/start-over").status_code == 409
    assert copy_revision(reader.get(f"/studies/{study_id}").text) == latest


def test_section_of_a_draft_that_was_never_shown_is_not_accepted(
    here: Department, reader: Reader, second: Reader
) -> None:
    study_id = here.drafted(slices=2)
    seen = copy_revision(second.get(f"/studies/{study_id}").text)
    redrafted(
        here, study_id, sentences=OTHER
    )  # nobody touched the first: the page follows, but was not drawn again yet
    answer = second.act(f"/studies/{study_id}/accept-all", section="findings", revision=seen)
    assert answer.status_code == 409
    text = reader.get(f"/studies/{study_id}").text
    assert "Unseen: " in text and 'data-assessment="accepted"' not in text
