"""What the page shows of a report that was signed, corrected, rejected or drafted again."""

import re
from datetime import timedelta

import pytest

from tests.core.builders import claimed
from tests.review.builders import (
    PASSWORD,
    SENTENCES,
    Department,
    Reader,
    accept_all,
    card_ids,
    copy_revision,
    revision_of,
    state_of,
    version_of,
)
from worker.core import editing, reports, studies
from worker.core.records import Stage, Study, StudyStatus
from worker.core.report import Provenance, ReportState, Sentence
from worker.review import origins


def judged_and_signed(reader: Reader, study_id: str) -> None:
    """One sentence as it was, one edited, one struck out, one added; then signed."""
    cards = card_ids(reader.get(f"/studies/{study_id}").text)
    at = f"/studies/{study_id}/sentences"
    reader.act(f"{at}/{cards[0]}", act="edit", revision=1, text="The lungs are clear of disease.")
    reader.act(f"{at}/{cards[1]}", act="accept", revision=1)
    reader.act(f"{at}/{cards[2]}", act="reject", revision=1)
    reader.act(f"{at}/{cards[3]}", act="accept", revision=1)
    text = reader.act(at, section="findings", text="No effusion.", after=cards[0]).text
    answer = reader.act(f"/studies/{study_id}/sign", revision=copy_revision(text), password=PASSWORD)
    assert answer.status_code == 200


def redrafted(here: Department, study_id: str, sentences: tuple[Sentence, ...] = SENTENCES[:1]) -> None:
    """The machine drafts the study again, in a new revision."""
    with here.database.write() as session:
        if session.get_one(Study, study_id).status is StudyStatus.DRAFTED:
            studies.requeue(session, study_id)
        folder = session.get_one(Study, study_id).model_input or "inputs/x"
    prepare = claimed(here.database, Stage.PREPARE)
    with here.database.write() as session:
        studies.store_prepared(session, prepare, {}, folder)
    claim = claimed(here.database, Stage.DRAFT)
    with here.database.write() as session:
        study = studies.held(session, claim)
        assert study is not None
        draft = reports.Draft(sentences, Provenance("mu2LLM", "0.2", "0" * 64, "prompt"))
        reports.add_draft(session, study, draft)
        studies.mark_drafted(session, study, claim)


def differences(text: str) -> list[str]:
    """The differences on a page, added words as {+ +}, removed ones as [- -]."""
    marked = (
        re.sub(r"<ins>(.*?)</ins>", r"{+\1+}", re.sub(r"<del>(.*?)</del>", r"[-\1-]", found)).strip()
        for found in re.findall(r'class="difference"[^>]*>(.*?)</(?:p|li)>', text, re.S)
    )
    return list(marked)


@pytest.mark.parametrize("username", ["reader", "viewer"])
def test_reader_of_a_signed_report_sees_what_was_changed_against_the_draft(
    here: Department, reader: Reader, page: str, username: str
) -> None:
    study_id = here.drafted(slices=2)
    judged_and_signed(reader, study_id)
    with Reader(base_url=page) as other:
        other.log_in(username)
        text = other.get(f"/studies/{study_id}").text
    assert differences(text) == ["The lungs are [-clear.-]{+clear of disease.+}"]
    assert text.count('class="text rejected"') == 1 and text.count('class="mark person"') == 1


def test_addendum_and_later_draft_leave_the_difference_to_the_first_draft(here: Department, reader: Reader) -> None:
    study_id = here.drafted(slices=2)
    judged_and_signed(reader, study_id)
    redrafted(here, study_id)
    seen = version_of(reader.get(f"/studies/{study_id}").text)
    reader.act(f"/studies/{study_id}/addend", version=seen, text="Compared with 2024.", password=PASSWORD)
    assert state_of(here, study_id) is ReportState.ADDENDED
    text = reader.get(f"/studies/{study_id}").text
    assert differences(text) == ["The lungs are [-clear.-]{+clear of disease.+}"]
    with here.database.read() as session:
        report = session.get_one(Study, study_id).report
        version = editing.of_record(session, report.id)
        machine = origins.machine_version(session, version)
        assert machine is not None and machine.number < version.number
        assert (machine.number, len(machine.sentences)) == (1, len(SENTENCES))  # not the later draft, of one sentence


def test_correction_shows_its_difference_to_the_signed_text(here: Department, reader: Reader) -> None:
    study_id = here.drafted(slices=2)
    judged_and_signed(reader, study_id)
    text = reader.act(f"/studies/{study_id}/correct").text
    assert differences(text) == []
    card = card_ids(text)[2]
    reader.act(
        f"/studies/{study_id}/sentences/{card}",
        act="edit",
        revision=revision_of(text, card),
        text="There is a 13 mm cyst in the left kidney.",
    )
    text = reader.get(f"/studies/{study_id}").text
    assert differences(text) == ["There is a [-12-]{+13+} mm cyst in the left kidney."]
    reader.act(f"/studies/{study_id}/sign-correction", revision=copy_revision(text), password=PASSWORD)
    assert state_of(here, study_id) is ReportState.CORRECTED
    assert differences(reader.get(f"/studies/{study_id}").text) == [
        "The lungs are [-clear.-]{+clear of disease.+}",
        "There is a [-12-]{+13+} mm cyst in the left kidney.",
    ]


def test_correction_that_was_begun_can_be_left(here: Department, reader: Reader) -> None:
    study_id = here.drafted(slices=2)
    judged_and_signed(reader, study_id)
    text = reader.act(f"/studies/{study_id}/correct").text
    assert "Leave the correction" in text
    revision = copy_revision(text)
    text = reader.act(f"/studies/{study_id}/leave-correction", revision=revision).text
    assert "<textarea id=" not in text and "correction in work" not in text and "The signed text stands" in text
    assert state_of(here, study_id) is ReportState.FINAL
    assert reader.act(f"/studies/{study_id}/leave-correction", revision=revision).status_code == 409


def test_correction_past_its_window_gives_way_to_the_addendum_and_loses_no_word(
    here: Department, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    study_id = here.drafted(slices=2)
    judged_and_signed(reader, study_id)
    text = reader.act(f"/studies/{study_id}/correct").text
    card = card_ids(text)[0]
    reader.act(
        f"/studies/{study_id}/sentences/{card}", act="edit", revision=revision_of(text, card), text="Clear lungs."
    )
    late, text = card_ids(text)[2], reader.get(f"/studies/{study_id}").text
    reader.act(f"/studies/{study_id}/sentences/{late}", act="reject", revision=revision_of(text, late))
    revision = copy_revision(reader.get(f"/studies/{study_id}").text)
    at = studies.now()
    window = timedelta(minutes=here.settings.review.correction_minutes)
    monkeypatch.setattr(studies, "now", lambda: at + window)
    reader.act("/active")
    answer = reader.act(f"/studies/{study_id}/sign-correction", revision=revision, password=PASSWORD)
    if answer.status_code == 401:  # the hour also locked the desk
        reader.act("/unlock", password=PASSWORD)
        answer = reader.act(f"/studies/{study_id}/sign-correction", revision=revision, password=PASSWORD)
    assert answer.status_code == 409 and "addendum" in answer.text
    text = reader.get(f"/studies/{study_id}").text
    assert 'data-opens="addend-dialog"' in text and "Sign correction" not in text and "was not signed in time" in text
    unsigned = text[text.index('class="unsigned"') : text.index('id="section-findings"')]
    assert differences(unsigned)[1] == "[-There is a 12 mm cyst in the left kidney.-]"
    assert "{+Clear+}" in differences(unsigned)[0]
    seen = version_of(text)
    unseen = reader.act(f"/studies/{study_id}/addend", version=seen, text="Clear lungs.", password=PASSWORD)
    assert unseen.status_code == 409  # by a page that did not show what the correction had changed
    reader.act(f"/studies/{study_id}/addend", version=seen, revision=revision, text="Clear lungs.", password=PASSWORD)
    assert state_of(here, study_id) is ReportState.ADDENDED
    assert "was not signed in time" not in reader.get(f"/studies/{study_id}").text


def test_rejected_text_stays_when_the_machine_drafts_again(here: Department, reader: Reader) -> None:
    study_id = here.drafted(slices=2)
    revision = copy_revision(reader.get(f"/studies/{study_id}").text)
    reader.act(f"/studies/{study_id}/reject", revision=revision, reason="motion")
    redrafted(here, study_id)
    text = reader.get(f"/studies/{study_id}").text
    assert SENTENCES[1].text in text and "Reason: motion" in text and "The rejected text stays on record" in text
    assert "REJECTED" in reader.get(f"/studies/{study_id}/print").text


def test_draft_made_after_a_rejection_is_read_and_signed_once_a_radiologist_takes_it_up(
    here: Department, reader: Reader, page: str
) -> None:
    study_id = here.drafted(slices=2)
    revision = copy_revision(reader.get(f"/studies/{study_id}").text)
    assert reader.act(f"/studies/{study_id}/reject", revision=revision, reason="motion").status_code == 200
    assert reader.act(f"/studies/{study_id}/start-over").status_code == 409  # nothing newer is there
    assert study_id not in reader.get("/").text
    assert reader.act(f"/studies/{study_id}/regenerate").status_code == 200
    redrafted(here, study_id, sentences=(SENTENCES[0], SENTENCES[3]))
    assert "rejected, drafted again" in reader.get("/").text
    assert reader.get("/worklist/next").headers["location"].endswith(study_id)
    with Reader(base_url=page) as viewer:
        viewer.log_in("viewer")
        assert "start-over" not in viewer.get(f"/studies/{study_id}").text
        assert viewer.act(f"/studies/{study_id}/start-over").status_code == 403
    text = reader.act(f"/studies/{study_id}/start-over").text
    assert state_of(here, study_id) is ReportState.AI_DRAFT
    assert SENTENCES[0].text in text and SENTENCES[1].text not in text
    revision = accept_all(reader, study_id)
    assert reader.act(f"/studies/{study_id}/sign", revision=revision, password=PASSWORD).status_code == 200
    assert state_of(here, study_id) is ReportState.FINAL
    with here.database.read() as session:
        versions = session.get_one(Study, study_id).report.versions  # type: ignore[union-attr]
        assert [version.state.value for version in versions] == ["ai_draft", "rejected", "ai_draft", "final"]


def test_retracted_report_is_not_taken_up_again_by_a_newer_draft(here: Department, reader: Reader) -> None:
    study_id = here.drafted(slices=2)
    judged_and_signed(reader, study_id)
    seen = version_of(reader.get(f"/studies/{study_id}").text)
    reader.act(f"/studies/{study_id}/retract", version=seen, reason="wrong patient", password=PASSWORD)
    redrafted(here, study_id)
    assert "What was decided stands" in reader.get(f"/studies/{study_id}").text
    assert reader.act(f"/studies/{study_id}/start-over").status_code == 409
    assert state_of(here, study_id) is ReportState.RETRACTED


def test_nobody_signs_over_words_of_their_own_that_lost_to_another_reader(
    here: Department, reader: Reader, page: str
) -> None:
    study_id = here.drafted(slices=2)
    revision = accept_all(reader, study_id)
    with Reader(base_url=page) as second:
        second.log_in("second")
        card = card_ids(second.get(f"/studies/{study_id}").text)[0]
        seen = revision_of(second.get(f"/studies/{study_id}").text, card)
        at = f"/studies/{study_id}/sentences/{card}"
        revision = copy_revision(reader.act(at, act="edit", revision=seen, text="From the first.").text)
        second.act(at, act="edit", revision=seen, text="From the second.")
        for act in ("sign", "preliminary"):
            answer = second.act(f"/studies/{study_id}/{act}", revision=revision, password=PASSWORD)
            assert answer.status_code == 409 and "take your words or leave the others" in answer.text
    assert state_of(here, study_id) is ReportState.AI_DRAFT
    assert reader.act(f"/studies/{study_id}/sign", revision=revision, password=PASSWORD).status_code == 200


def test_reader_in_two_windows_is_not_told_that_it_was_somebody_else(here: Department, reader: Reader) -> None:
    study_id = here.drafted(slices=2)
    card = card_ids(reader.get(f"/studies/{study_id}").text)[0]
    at = f"/studies/{study_id}/sentences/{card}"
    for page in ("a" * 32, "b" * 32):
        reader.headers["X-Page"] = page
        text = reader.act(at, act="edit", revision=1, text=f"In window {page[0]}.").text
    assert "another window" in text and "Somebody else" not in text
    assert "In window a." in text and "In window b." in text
