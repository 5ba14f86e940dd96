"""What a reader wrote into a text that another had signed, rejected or put aside is kept and shown to them."""

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from tests.review.builders import PASSWORD, Department, Reader, accept_all, card_ids, copy_revision, state_of
from tests.review.test_signed_pages import redrafted
from worker.core.report import ReportState
from worker.core.review_records import SentenceEdit

LATE = "A 5 mm nodule in the left upper lobe."
IN_NO_REPORT = "is in no report"


@pytest.fixture
def second(page: str) -> Iterator[Reader]:
    """Another radiologist, at another page."""
    with Reader(base_url=page, headers={"X-Page": "b" * 32}) as client:
        client.log_in("second")
        yield client


def close(here: Department, reader: Reader, study_id: str, act: str) -> None:
    """The other reader ends the text under work."""
    revision = accept_all(reader, study_id)
    if act == "start-over":
        redrafted(here, study_id)
    answer = reader.act(f"/studies/{study_id}/{act}", revision=revision, password=PASSWORD, reason="motion")
    assert answer.status_code == 200


def late_edit(second: Reader, study_id: str, card: str, text: str = LATE) -> str:
    """Sends an edit to a text that is closed; what the page says to it."""
    answer = second.act(f"/studies/{study_id}/sentences/{card}", act="edit", revision=1, text=text)
    assert answer.status_code == 409
    return answer.text


def kept(here: Department) -> list[str]:
    with here.database.read() as session:
        return list(session.scalars(sa.select(SentenceEdit.text).where(SentenceEdit.text != "").distinct()))


@pytest.mark.parametrize("act", ["sign", "reject", "start-over"])
def test_words_that_came_after_the_text_was_closed_are_shown_to_their_author_alone(
    here: Department, reader: Reader, second: Reader, act: str
) -> None:
    study_id = here.drafted(slices=2)
    card = card_ids(second.get(f"/studies/{study_id}").text)[0]
    close(here, reader, study_id, act)
    assert "the words that you wrote are kept" in late_edit(second, study_id, card)
    text = second.get(f"/studies/{study_id}").text
    assert LATE in text and IN_NO_REPORT in text
    assert LATE not in reader.get(f"/studies/{study_id}").text
    assert LATE not in second.get(f"/studies/{study_id}/print").text


def test_words_are_shown_until_their_author_lets_them_go(here: Department, reader: Reader, second: Reader) -> None:
    study_id = here.drafted(slices=2)
    card = card_ids(second.get(f"/studies/{study_id}").text)[0]
    close(here, reader, study_id, "sign")
    late_edit(second, study_id, card)
    text = second.get(f"/studies/{study_id}").text
    path = f"/studies/{study_id}/conflicts/" + text.split("/conflicts/")[1].split('"')[0]
    assert reader.act(path, take="false").status_code == 404
    assert second.act(path, take="true").status_code == 409
    assert LATE not in second.act(path, take="false").text
    late_edit(second, study_id, card)  # the old page tries again by itself
    assert LATE not in second.get(f"/studies/{study_id}").text
    assert LATE in kept(here) and state_of(here, study_id) is ReportState.FINAL


def test_page_that_sends_its_late_words_again_and_writes_on_leaves_the_last_alone(
    here: Department, reader: Reader, second: Reader
) -> None:
    study_id = here.drafted(slices=2)
    card = card_ids(second.get(f"/studies/{study_id}").text)[0]
    close(here, reader, study_id, "sign")
    for sequence, text in ((3, "A 5 mm"), (4, "A 5 mm"), (6, LATE), (5, "A 5 mm nodule")):
        second.headers["X-Sequence"] = str(sequence)
        late_edit(second, study_id, card, text)
    text = second.get(f"/studies/{study_id}").text
    assert text.count("/conflicts/") == 1 and LATE in text
    with here.database.read() as session:
        sent = session.scalars(sa.select(SentenceEdit.text).where(SentenceEdit.text.startswith("A 5 mm"))).all()
    assert sorted(sent) == ["A 5 mm", "A 5 mm nodule", LATE]


def test_words_that_the_signed_text_has_are_not_late(here: Department, reader: Reader, second: Reader) -> None:
    study_id = here.drafted(slices=2)
    text = second.get(f"/studies/{study_id}").text
    card = card_ids(text)[0]
    second.act(f"/studies/{study_id}/sentences/{card}", act="edit", revision=1, text=LATE)
    close(here, reader, study_id, "sign")
    assert "are kept" not in late_edit(second, study_id, card)  # the answer to the first was lost
    assert IN_NO_REPORT not in second.get(f"/studies/{study_id}").text


def test_conflict_that_was_open_when_the_text_was_signed_is_shown_afterwards(
    here: Department, reader: Reader, second: Reader
) -> None:
    study_id = here.drafted(slices=2)
    card = card_ids(second.get(f"/studies/{study_id}").text)[0]
    at = f"/studies/{study_id}/sentences/{card}"
    reader.act(at, act="edit", revision=1, text="From the first.")
    second.act(at, act="edit", revision=1, text=LATE)
    accept_all(reader, study_id)
    revision = copy_revision(reader.get(f"/studies/{study_id}").text)
    assert reader.act(f"/studies/{study_id}/sign", revision=revision, password=PASSWORD).status_code == 200
    text = second.get(f"/studies/{study_id}").text
    assert LATE in text and IN_NO_REPORT in text
