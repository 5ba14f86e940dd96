"""The pages by real requests: worklist, judging, signing, live updates, admin pages."""

import html
import re
import threading
from dataclasses import replace
from datetime import timedelta

import httpx
import numpy as np
import pytest
import sqlalchemy as sa

from tests.core.builders import LIMITS, claimed, completed
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
from worker.core import outbox, studies
from worker.core.errors import DeliveryRefusedError, NothingToReportError
from worker.core.records import Message, MessageState, Priority, Stage, Study, User
from worker.core.report import DISCLOSURE, BestSlice, ReportState, Section, Sentence
from worker.core.review_records import Presence
from worker.review import worklist


def test_worklist_shows_stat_first_then_the_longest_waiting(here: Department, reader: Reader) -> None:
    older, newer, urgent = (here.drafted(slices=2, accession=f"A-{n}") for n in range(3))
    with here.database.write() as session:
        session.get_one(Study, urgent).priority = Priority.STAT
        session.get_one(Study, older).received_at = studies.now() - timedelta(hours=2)
    shown = re.findall(r'href="/studies/([0-9a-f-]+)"', reader.get("/").text)
    assert shown == [urgent, older, newer]


def test_study_without_a_draft_says_why(here: Department, reader: Reader) -> None:
    completed(here.database)
    claim = claimed(here.database, Stage.PREPARE)
    with here.database.write() as session:
        studies.skip(session, claim, "no axial CT series of 12 slices or more", {})
    completed(here.database)
    claim = claimed(here.database, Stage.PREPARE)
    with here.database.write() as session:
        studies.postpone(session, claim, NothingToReportError("x"), LIMITS)
    completed(here.database)
    claim = claimed(here.database, Stage.PREPARE)
    with here.database.write() as session:
        studies.fail(session, claim, NothingToReportError("slices lie 2.5 and 5.0 mm apart"))
    text = reader.get("/").text
    assert "no axial CT series of 12 slices or more" in text
    assert ">slices lie 2.5 and 5.0 mm apart<" in text  # not the name of an error's class before it
    assert "draft on its way" in text
    assert "no axial CT series" in reader.get(f"/studies/{_skipped(here)}").text


def _skipped(here: Department) -> str:
    with here.database.read() as session:
        return session.scalars(sa.select(Study.id).where(Study.status == "skipped")).one()


def test_filters_live_in_the_address_and_the_patient_search_does_not(here: Department, reader: Reader) -> None:
    here.drafted(slices=2, patient_name="DOE^JANE")
    here.drafted(slices=2, patient_name="ROE^RICHARD", accession="A-2")
    assert reader.get("/?state=signed&age=24h&modality=CT").text.count('class="patient"') == 0
    assert reader.get("/?state=unread&age=4h&modality=CT").text.count('class="patient"') == 2
    found = reader.act("/worklist/search", patient="Roe, Rich")
    assert "ROE, RICHARD" in found.text and "DOE" not in found.text
    assert "roe" not in str(found.request.url).lower()
    assert reader.get("/worklist/search?patient=Roe").status_code == 405


@pytest.mark.parametrize("wild", ["%", "_", "\\", "'"])
def test_patient_search_takes_wildcards_as_letters(here: Department, reader: Reader, wild: str) -> None:
    here.drafted(slices=2)
    assert "0 found" in reader.act("/worklist/search", patient=wild).text


def test_next_unread_passes_over_what_another_reader_has_open(here: Department, reader: Reader) -> None:
    first, second = here.drafted(slices=2), here.drafted(slices=2, accession="A-2")
    with here.database.write() as session:
        other = session.scalars(sa.select(User.id).where(User.username == "second")).one()
        session.add(Presence(study_id=first, user_id=other, seen_at=studies.now()))
    assert reader.get("/worklist/next").headers["location"] == f"/studies/{second}"
    assert ">second</td>" in reader.get("/").text


def test_next_unread_leaves_the_study_on_the_page_behind(here: Department, reader: Reader) -> None:
    first, second = here.drafted(slices=2), here.drafted(slices=2, accession="A-2")
    assert f'href="/worklist/next?after={first}"' in reader.get(f"/studies/{first}").text
    assert reader.get(f"/worklist/next?after={first}").headers["location"] == f"/studies/{second}"
    assert reader.get(f"/worklist/next?after={second}").headers["location"] == f"/studies/{first}"
    revision = copy_revision(reader.get(f"/studies/{second}").text)
    reader.act(f"/studies/{second}/reject", revision=revision, reason="motion")
    assert reader.get(f"/worklist/next?after={first}").headers["location"] == "/"


def test_long_worklist_is_read_page_by_page_with_its_filters(
    here: Department, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worklist, "MOST_LINES", 2)
    studies_in_order = [here.drafted(slices=2, accession=f"A-{n}") for n in range(5)]
    address, shown = "/?state=unread&age=7d&modality=CT", []
    for _ in range(3):
        text = reader.get(address).text
        shown += re.findall(r'href="/studies/([0-9a-f-]+)"', text)
        further = re.search(r'href="([^"]+)" rel="next"', text)
        address = html.unescape(further[1]) if further else ""
        assert not address or "state=unread&age=7d&modality=CT&page=" in address
    assert (shown, address) == (studies_in_order, "")
    assert "No further study" in reader.get("/?page=4").text
    assert "Only the first 2 are shown" in reader.act("/worklist/search", patient="DOE").text


def test_every_page_says_what_a_draft_is(here: Department, reader: Reader) -> None:
    study_id = here.drafted(slices=2)
    for path in ("/", f"/studies/{study_id}", f"/studies/{study_id}/print"):
        assert DISCLOSURE in reader.get(path).text
    for path, status in (("/login", 200), ("/nowhere", 404), ("/admin/users", 403)):
        answer = httpx.get(reader.base_url.join(path)) if path == "/login" else reader.get(path)
        assert (answer.status_code, DISCLOSURE in answer.text) == (status, True), path


def test_doubtful_and_weak_sentences_are_marked(here: Department, reader: Reader) -> None:
    text = reader.get(f"/studies/{here.drafted(slices=2)}").text
    assert (text.count("low confidence<"), text.count("weak support<")) == (1, 1)


def test_accepting_a_section_leaves_marked_sentences_to_the_reader(here: Department, reader: Reader) -> None:
    study_id = here.drafted(slices=2)
    reader.get(f"/studies/{study_id}")
    seen = copy_revision(reader.get(f"/studies/{study_id}").text)
    text = reader.act(f"/studies/{study_id}/accept-all", section="findings", revision=seen).text
    assert text.count('data-assessment="accepted"') == 2
    assert text.count('data-assessment="untouched"') == 2  # the doubtful one, and the impression


def test_edit_is_saved_and_survives_a_reload_with_its_difference(here: Department, reader: Reader) -> None:
    study_id = here.drafted(slices=2)
    card = card_ids(reader.get(f"/studies/{study_id}").text)[0]
    answer = reader.act(f"/studies/{study_id}/sentences/{card}", act="edit", revision=1, text="The left lung is clear.")
    assert "<textarea" not in answer.text  # what the reader types in is left alone
    text = reader.get(f"/studies/{study_id}").text
    assert "The left lung is clear.</textarea>" in text
    shown = re.sub(r"</(ins|del)><\1>|</(ins|del)> <\2>", " ", text)
    assert "<ins>left" in shown and "<del>lungs" in shown


def test_two_readers_at_one_sentence_lose_no_text(here: Department, reader: Reader, page: str) -> None:
    study_id = here.drafted(slices=2)
    with Reader(base_url=page) as other:
        other.log_in("second")
        card = card_ids(reader.get(f"/studies/{study_id}").text)[0]
        other.get(f"/studies/{study_id}")
        reader.act(f"/studies/{study_id}/sentences/{card}", act="edit", revision=1, text="Words of the first.")
        late = other.act(f"/studies/{study_id}/sentences/{card}", act="edit", revision=1, text="Words of the second.")
        assert "Words of the first." in late.text and "Words of the second." in late.text
        edit = re.search(r"/conflicts/(\d+)", late.text)
        assert edit is not None
        assert reader.act(f"/studies/{study_id}/conflicts/{edit[1]}", take="true").status_code == 404
        taken = other.act(f"/studies/{study_id}/conflicts/{edit[1]}", take="true").text
        assert "Words of the second.</textarea>" in taken and "conflict" not in taken


def test_signing_with_the_password_sends_and_makes_the_page_read_only(here: Department, reader: Reader) -> None:
    study_id = here.drafted(slices=2)
    revision = accept_all(reader, study_id)
    wrong = reader.act(f"/studies/{study_id}/sign", revision=revision, password="wrong")
    assert wrong.status_code == 409 and "password is wrong" in wrong.text
    assert reader.act(f"/studies/{study_id}/sign", revision=revision).status_code == 409
    done = reader.act(f"/studies/{study_id}/sign", revision=revision, password=PASSWORD)
    assert "Signed by Ada Reader" in done.text and "<textarea id=" not in done.text
    assert here.rang("deliver", "ris")
    with here.database.read() as session:
        payload = session.scalars(sa.select(Message.payload)).one().decode()
    obr = next(line for line in payload.split("\r") if line.startswith("OBR"))
    assert obr.split("|")[25] == "F" and obr.split("|")[32] == "reader&Reader&Ada"


def test_critical_finding_waits_for_a_record_of_who_was_told(here: Department, reader: Reader) -> None:
    sentences = (*SENTENCES, Sentence(Section.IMPRESSION, "Tension pneumothorax on the right."))
    study_id = here.drafted(slices=2, sentences=sentences)
    revision = accept_all(reader, study_id)
    blocked = reader.act(f"/studies/{study_id}/sign", revision=revision, password=PASSWORD)
    assert blocked.status_code == 409 and "who was told" in blocked.text
    reader.act(f"/studies/{study_id}/communications", told="Dr Bell, emergency", means="telephone", minutes_ago=3)
    assert reader.act(f"/studies/{study_id}/sign", revision=revision, password=PASSWORD).status_code == 200


def test_preliminary_rejection_correction_addendum_and_retraction_by_the_page(here: Department, reader: Reader) -> None:
    study_id = here.drafted(slices=2)
    revision = accept_all(reader, study_id)
    reader.act(f"/studies/{study_id}/preliminary", revision=revision)
    assert state_of(here, study_id) is ReportState.PRELIMINARY
    reader.act(f"/studies/{study_id}/sign", revision=revision, password=PASSWORD)
    text = reader.act(f"/studies/{study_id}/correct").text
    card = card_ids(text)[0]
    reader.act(
        f"/studies/{study_id}/sentences/{card}", act="edit", revision=revision_of(text, card), text="Clear lungs."
    )
    text = reader.get(f"/studies/{study_id}").text
    text = reader.act(f"/studies/{study_id}/sign-correction", revision=copy_revision(text), password=PASSWORD).text
    assert state_of(here, study_id) is ReportState.CORRECTED
    lines = "First line.\nSecond line."
    text = reader.act(f"/studies/{study_id}/addend", version=version_of(text), text=lines, password=PASSWORD).text
    assert state_of(here, study_id) is ReportState.ADDENDED
    reader.act(f"/studies/{study_id}/retract", version=version_of(text), reason="wrong patient", password=PASSWORD)
    assert state_of(here, study_id) is ReportState.RETRACTED
    assert "RETRACTED" in reader.get(f"/studies/{study_id}/print").text
    other = here.drafted(slices=2, accession="A-9")
    revision = copy_revision(reader.get(f"/studies/{other}").text)
    assert reader.act(f"/studies/{other}/reject", revision=revision, reason="motion").status_code == 200
    assert state_of(here, other) is ReportState.REJECTED


def test_draft_again_rings_and_takes_nothing_away(here: Department, reader: Reader) -> None:
    study_id = here.drafted(slices=2)
    revision = accept_all(reader, study_id)
    reader.act(f"/studies/{study_id}/sign", revision=revision, password=PASSWORD)
    assert reader.act(f"/studies/{study_id}/regenerate").status_code == 200
    assert here.rang("prepare", study_id)
    assert state_of(here, study_id) is ReportState.FINAL


def test_viewer_reads_and_finds_nothing_to_press(here: Department, page: str) -> None:
    study_id = here.drafted(slices=2)
    with Reader(base_url=page) as viewer:
        viewer.log_in("viewer")
        text = viewer.get(f"/studies/{study_id}").text
    assert SENTENCES[0].text in text
    assert "/sign" not in text and "data-act" not in text


def test_open_page_hears_of_a_change_without_any_patient_data(here: Department, reader: Reader, page: str) -> None:
    study_id = here.drafted(slices=2, patient_name="ZEBRASTRIPE^A")
    reader.get(f"/studies/{study_id}")
    heard: list[str] = []
    ready, done = threading.Event(), threading.Event()

    def listen() -> None:
        with httpx.stream("GET", f"{page}/events?study={study_id}", cookies=dict(reader.cookies), timeout=20) as stream:
            for line in stream.iter_lines():
                heard.append(line)
                ready.set()
                if heard.count("event: study") == 2:  # the first comes at once, for what was missed before
                    done.set()
                    return

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    assert ready.wait(10)
    card = card_ids(reader.get(f"/studies/{study_id}").text)[0]
    reader.act(f"/studies/{study_id}/sentences/{card}", act="accept", revision=1)
    assert done.wait(10)
    thread.join(5)
    assert "event: worklist" in heard and "ZEBRASTRIPE" not in str(heard)


def sign_and_refuse(here: Department, reader: Reader, study_id: str) -> outbox.Claimed:
    """Signs a report whose message its receiver refuses."""
    reader.act(f"/studies/{study_id}/sign", revision=accept_all(reader, study_id), password=PASSWORD)
    with here.database.write() as session:
        claim = outbox.claim(session, "ris", 60)
        assert claim is not None
        outbox.refuse(session, claim, DeliveryRefusedError("no such order"), "AR", "unknown order")
    here.rung.clear()
    return claim


def test_admin_reads_a_message_and_sends_a_refused_one_again(here: Department, reader: Reader, page: str) -> None:
    study_id = here.drafted(slices=2)
    claim = sign_and_refuse(here, reader, study_id)
    with Reader(base_url=page) as boss:
        boss.log_in("boss")
        assert "refused" in boss.get("/admin/messages?state=refused").text
        text = boss.get(f"/admin/messages/{claim.message_id}").text
        assert "MSH|" in text and "Patient name" in text and "unknown order" in text
        assert boss.act(f"/admin/messages/{claim.message_id}/resend").status_code == 303
    assert here.rang("deliver", "ris")
    with here.database.read() as session:
        assert session.get_one(Message, claim.message_id).state is MessageState.PENDING


def test_admin_writes_a_refused_message_again(here: Department, reader: Reader, page: str) -> None:
    study_id = here.drafted(slices=2)
    claim = sign_and_refuse(here, reader, study_id)
    with Reader(base_url=page) as boss:
        boss.log_in("boss")
        renew = f"/admin/messages/{claim.message_id}/renew"
        assert f'action="{renew}"' in boss.get(f"/admin/messages/{claim.message_id}").text
        answer = boss.act(renew)
        assert answer.status_code == 303
        assert "pending" in boss.get(answer.headers["location"]).text
        assert boss.act(renew).status_code == 409
    assert here.rang("deliver", "ris")
    with here.database.read() as session:
        assert session.get_one(Message, claim.message_id).state is MessageState.SUPERSEDED


def test_admin_requeues_a_failed_study_and_keeps_the_accounts(here: Department, page: str) -> None:
    completed(here.database)
    claim = claimed(here.database, Stage.PREPARE)
    with here.database.write() as session:
        studies.fail(session, claim, NothingToReportError("no series"))
    with Reader(base_url=page) as boss:
        boss.log_in("boss")
        assert "NothingToReportError: no series" in boss.get("/admin/queue").text
        boss.act(f"/admin/queue/{claim.study_id}/requeue")
        assert here.rang("prepare", claim.study_id)
        weak = boss.act("/admin/users", username="new", role="radiologist", password="short")
        assert weak.status_code == 409 and "12 to 200" in weak.text
        boss.act("/admin/users", username="new", role="radiologist", password=PASSWORD, family_name="New")
        text = boss.get("/admin/users").text
        assert ">new<" in text
        with here.database.read() as session:
            found = session.scalars(sa.select(User.id).where(User.username == "new")).one()
        boss.act(f"/admin/users/{found}/disable")
        with Reader(base_url=page) as new:
            assert new.log_in("new").status_code == 401
        boss.act(f"/admin/users/{found}/enable")
        with Reader(base_url=page) as new:
            assert new.log_in("new").status_code == 200


def test_auditor_finds_who_did_what_and_walks_the_chain(here: Department, reader: Reader, page: str) -> None:
    study_id = here.drafted(slices=2)
    reader.get(f"/studies/{study_id}")
    with Reader(base_url=page) as auditor:
        auditor.log_in("auditor")
        text = auditor.get(f"/admin/audit?action=view&actor=reader&study={study_id}").text
        assert text.count("<td>view</td>") == 1
        assert "holds" in auditor.act("/admin/audit/verify").text


def test_quality_counts_what_readers_made_of_the_drafts(here: Department, reader: Reader, page: str) -> None:
    study_id = here.drafted(slices=2)
    text = reader.get(f"/studies/{study_id}").text
    cards = card_ids(text)
    reader.act(f"/studies/{study_id}/sentences/{cards[0]}", act="edit", revision=1, text="Clear lungs.")
    reader.act(f"/studies/{study_id}/sentences/{cards[1]}", act="accept", revision=1)
    reader.act(f"/studies/{study_id}/sentences/{cards[2]}", act="reject", revision=1)
    text = reader.act(f"/studies/{study_id}/sentences/{cards[3]}", act="accept", revision=1).text
    reader.act(f"/studies/{study_id}/sign", revision=copy_revision(text), password=PASSWORD)
    with Reader(base_url=page) as auditor:
        auditor.log_in("auditor")
        shown = auditor.get("/admin/quality").text
    assert "mu2LLM 0.1" in shown and "<polyline" in shown
    assert "accepted 2, edited 1, rejected 1" in shown


def test_evidence_is_off_until_asked_for_and_shows_the_best_slice(here: Department, reader: Reader) -> None:
    with_heat, without = here.drafted(slices=24, evidence=True), here.drafted(slices=4, accession="A-2")
    text = reader.get(f"/studies/{with_heat}").text
    sentence = re.search(r'data-evidence="([0-9a-f-]+)"', text)
    assert sentence is not None
    found = reader.get(f"/studies/{with_heat}/evidence/{sentence[1]}").json()
    (volume,) = reader.get(f"/studies/{with_heat}/volumes").json()
    assert found == {"input": volume["input"], "volume": 1, "slice": 12, "faithfulness": 0.42}
    heat = reader.get(f"/studies/{with_heat}/evidence/{sentence[1]}/axial/12").content
    assert len(heat) == 128 * 128 and max(heat) > 230
    assert reader.get(f"/studies/{without}/evidence/{sentence[1]}").status_code == 404
    reader.get(f"/studies/{without}")
    assert "on its way" in reader.act(f"/studies/{without}/evidence").text


def test_sentence_of_a_fresh_draft_knows_its_best_slice_and_keeps_it_when_it_is_edited_and_signed(
    here: Department, reader: Reader
) -> None:
    placed = replace(SENTENCES[1], best_slice=BestSlice(1, (90.0, -54.0, -549.0)))
    study_id = here.drafted(sentences=(SENTENCES[0], placed, SENTENCES[3]), slices=24)
    text = reader.get(f"/studies/{study_id}").text
    assert re.findall(r'data-best-slice="([^"]*)"', text) == ["1 90.0 -54.0 -549.0"]
    assert text.count(">best slice<") == 1 and "data-evidence=" not in text
    (volume,) = reader.get(f"/studies/{study_id}/volumes").json()
    assert np.dot(volume["axial_of_ras"], [90.0, -54.0, -549.0, 1.0]) == pytest.approx(17)  # 3 mm each, from -600
    card = card_ids(text)[1]
    reader.act(
        f"/studies/{study_id}/sentences/{card}",
        act="edit",
        revision=1,
        text="There is a 13 mm cyst of the left kidney.",
    )
    revision = accept_all(reader, study_id)
    assert reader.act(f"/studies/{study_id}/sign", revision=revision, password=PASSWORD).status_code == 200
    assert re.findall(r'data-best-slice="([^"]*)"', reader.get(f"/studies/{study_id}").text) == ["1 90.0 -54.0 -549.0"]


def test_log_holds_no_patient(here: Department, reader: Reader, capfd: pytest.CaptureFixture[str]) -> None:
    from worker.core import logs

    logs.configure("review")
    study_id = here.drafted(slices=2, patient_name="ZEBRASTRIPE^A", patient_identifier="ZEBRASTRIPE-1")
    reader.act(f"/studies/{study_id}/sign", revision=accept_all(reader, study_id), password=PASSWORD)
    reader.get(f"/studies/{study_id}/report.pdf")
    reader.get("/studies/ZEBRASTRIPE")
    told = "".join(capfd.readouterr())
    assert "uvicorn.access" in told
    assert "ZEBRASTRIPE" not in told
