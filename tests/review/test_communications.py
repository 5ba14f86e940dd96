"""Who was told of one text was not told of the next: a record unblocks the critical findings that it can be about."""

import pytest

from tests.review.builders import (
    PASSWORD,
    SENTENCES,
    Department,
    Reader,
    accept_all,
    card_ids,
    copy_revision,
    version_of,
)
from tests.review.test_signed_pages import redrafted
from worker.core.report import Section, Sentence

PNEUMOTHORAX = (SENTENCES[0], Sentence(Section.IMPRESSION, "Pneumothorax.", confidence=-0.1, support=0.9))
DISSECTION = (SENTENCES[0], Sentence(Section.IMPRESSION, "Aortic dissection.", confidence=-0.1, support=0.9))


def told(reader: Reader, study_id: str) -> None:
    """Records that somebody was told."""
    answer = reader.act(f"/studies/{study_id}/communications", told="Dr X", means="telephone", minutes_ago=0)
    assert answer.status_code == 200


def signs(reader: Reader, study_id: str, revision: str, act: str = "sign") -> int:
    """The answer's status to a signature."""
    return reader.act(f"/studies/{study_id}/{act}", revision=revision, password=PASSWORD).status_code


@pytest.fixture
def signed(here: Department, reader: Reader) -> str:
    """A signed report of a critical finding that somebody was told of."""
    study_id = here.drafted(slices=2, sentences=PNEUMOTHORAX)
    revision = accept_all(reader, study_id)
    assert signs(reader, study_id, revision) == 409
    told(reader, study_id)
    assert signs(reader, study_id, revision) == 200
    return study_id


def test_record_about_a_rejected_draft_does_not_unblock_the_next_one(here: Department, reader: Reader) -> None:
    study_id = here.drafted(slices=2, sentences=PNEUMOTHORAX)
    revision = copy_revision(reader.get(f"/studies/{study_id}").text)
    told(reader, study_id)
    reader.act(f"/studies/{study_id}/reject", revision=revision, reason="no pneumothorax")
    redrafted(here, study_id, sentences=DISSECTION)
    reader.act(f"/studies/{study_id}/start-over", revision="")
    revision = accept_all(reader, study_id)
    assert signs(reader, study_id, revision) == 409
    told(reader, study_id)
    assert signs(reader, study_id, revision) == 200


@pytest.mark.parametrize(("text", "status"), [("Small pneumothorax.", 200), ("Pneumothorax. Aortic dissection.", 409)])
def test_correction_needs_a_new_record_only_for_a_finding_that_it_adds(
    reader: Reader, signed: str, text: str, status: int
) -> None:
    card = card_ids(reader.act(f"/studies/{signed}/correct").text)[1]
    reader.act(f"/studies/{signed}/sentences/{card}", act="edit", revision=1, text=text)
    revision = copy_revision(reader.get(f"/studies/{signed}").text)
    assert signs(reader, signed, revision, "sign-correction") == status


def test_critical_addendum_needs_a_record_made_since_the_signature(reader: Reader, signed: str) -> None:
    seen = {
        "version": version_of(reader.get(f"/studies/{signed}").text),
        "text": "Aortic dissection.",
        "password": PASSWORD,
    }
    assert reader.act(f"/studies/{signed}/addend", **seen).status_code == 409
    told(reader, signed)
    assert reader.act(f"/studies/{signed}/addend", **seen).status_code == 200
