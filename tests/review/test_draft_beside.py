"""A draft that the machine wrote beside a person's text: it is neither lost nor shown in that text's place."""

from dataclasses import replace

from tests.core.builders import claimed
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
from worker.core import editing, studies
from worker.core.errors import ModelError
from worker.core.records import Stage, Study, StudyStatus
from worker.core.report import BestSlice, ReportState, Section, Sentence

LATER = (
    Sentence(Section.FINDINGS, "The machine saw the late slices.", confidence=-0.1, support=0.9),
    Sentence(Section.IMPRESSION, "Nothing new.", confidence=-0.1, support=0.9),
)


def begun_and_drafted_again(here: Department, reader: Reader) -> str:
    """A study whose first draft is in work while a second one arrives."""
    study_id = here.drafted(slices=2)
    card = card_ids(reader.get(f"/studies/{study_id}").text)[0]
    reader.act(f"/studies/{study_id}/sentences/{card}", act="accept", revision=1)
    redrafted(here, study_id, sentences=LATER)
    return study_id


def rejected(reader: Reader, study_id: str) -> str:
    """Rejects what the page shows; the page as it is then."""
    revision = copy_revision(reader.get(f"/studies/{study_id}").text)
    answer = reader.act(f"/studies/{study_id}/reject", revision=revision, reason="wrong")
    assert answer.status_code == 200
    return reader.get(f"/studies/{study_id}").text


def test_draft_that_lay_beside_a_rejected_text_is_still_there_to_be_read(here: Department, reader: Reader) -> None:
    study_id = begun_and_drafted_again(here, reader)
    text = rejected(reader, study_id)
    assert "A newer machine draft is there" in text and "The rejected text stays on record" in text
    assert "rejected, drafted again" in reader.get("/").text
    text = reader.act(f"/studies/{study_id}/start-over", revision="").text
    assert LATER[0].text in text and SENTENCES[0].text not in text
    revision = accept_all(reader, study_id)
    assert reader.act(f"/studies/{study_id}/sign", revision=revision, password=PASSWORD).status_code == 200
    assert LATER[0].text in reader.get(f"/studies/{study_id}").text


def test_draft_beside_a_text_in_work_is_read_once_and_its_rejection_ends_it(here: Department, reader: Reader) -> None:
    study_id = begun_and_drafted_again(here, reader)
    rejected(reader, study_id)
    reader.act(f"/studies/{study_id}/start-over", revision="")
    assert "newer machine draft" not in rejected(reader, study_id)
    assert study_id not in reader.get("/").text
    assert reader.act(f"/studies/{study_id}/start-over", revision="").status_code == 409


def test_rejected_study_is_in_the_open_worklist_while_its_next_draft_is_made_and_when_that_fails(
    here: Department, reader: Reader
) -> None:
    study_id = here.drafted(slices=2)
    rejected(reader, study_id)
    assert study_id not in reader.get("/").text
    reader.act(f"/studies/{study_id}/regenerate")
    assert study_id in reader.get("/?state=waiting").text and study_id not in reader.get("/?state=closed").text
    assert "draft on its way" in reader.get("/").text
    prepare = claimed(here.database, Stage.PREPARE)
    with here.database.write() as session:
        studies.fail(session, prepare, ModelError("the weights are not there"))
    text = reader.get("/?state=no_draft").text
    assert study_id in text and "the weights are not there" in text and study_id in reader.get("/").text


def test_retracted_study_is_not_drafted_again_on_a_readers_request(here: Department, reader: Reader) -> None:
    study_id = here.drafted(slices=2)
    reader.act(f"/studies/{study_id}/sign", revision=accept_all(reader, study_id), password=PASSWORD)
    shown = version_of(reader.get(f"/studies/{study_id}").text)
    reader.act(f"/studies/{study_id}/retract", version=shown, reason="wrong patient", password=PASSWORD)
    assert reader.act(f"/studies/{study_id}/regenerate").status_code == 409
    with here.database.read() as session:
        assert session.get_one(Study, study_id).status is StudyStatus.DRAFTED


def test_signed_text_says_that_a_draft_came_while_it_was_in_work(here: Department, reader: Reader) -> None:
    study_id = begun_and_drafted_again(here, reader)
    revision = accept_all(reader, study_id)
    reader.act(f"/studies/{study_id}/sign", revision=revision, password=PASSWORD)
    text = reader.get(f"/studies/{study_id}").text
    assert "A newer machine draft is there" in text and "The signed text stands" in text


def test_preliminary_text_is_what_a_viewer_and_a_print_show_after_another_draft(
    here: Department, reader: Reader, page: str
) -> None:
    study_id = here.drafted(slices=2)
    revision = accept_all(reader, study_id)
    assert reader.act(f"/studies/{study_id}/preliminary", revision=revision).status_code == 200
    redrafted(here, study_id, sentences=LATER)
    with Reader(base_url=page) as viewer:
        viewer.log_in("viewer")
        for text in (viewer.get(f"/studies/{study_id}").text, viewer.get(f"/studies/{study_id}/print").text):
            assert SENTENCES[0].text in text and LATER[0].text not in text


def test_reader_of_a_preliminary_report_begins_again_from_the_newest_draft_and_goes_on_to_follow_it(
    here: Department, reader: Reader
) -> None:
    study_id = here.drafted(slices=2)
    revision = accept_all(reader, study_id)
    reader.act(f"/studies/{study_id}/preliminary", revision=revision)
    redrafted(here, study_id, sentences=LATER)
    assert LATER[0].text in reader.act(f"/studies/{study_id}/start-over", revision=revision).text
    redrafted(here, study_id, sentences=(LATER[1],))
    text = reader.get(f"/studies/{study_id}").text
    assert LATER[1].text in text and LATER[0].text not in text and SENTENCES[0].text not in text
    assert state_of(here, study_id) is ReportState.PRELIMINARY
    with here.database.read() as session:
        report = session.get_one(Study, study_id).report
        assert report is not None
        assert editing.of_record(session, report.id).state is ReportState.PRELIMINARY


def test_best_slice_of_a_sentence_that_was_edited_is_said_to_be_that_of_the_models_own_words(
    here: Department, reader: Reader
) -> None:
    study_id = here.drafted(slices=2, sentences=(replace(LATER[0], best_slice=BestSlice(1, (0.0, 0.0, -600.0))),))
    text = reader.get(f"/studies/{study_id}").text
    assert "these words of the model depend most" in text
    (card,) = card_ids(text)
    reader.act(f"/studies/{study_id}/sentences/{card}", act="edit", revision=1, text="No late slices.")
    text = reader.get(f"/studies/{study_id}").text
    assert "the model&#39;s words, since edited, depended most" in text.replace("model's", "model&#39;s")
    assert "these words of the model" not in text
