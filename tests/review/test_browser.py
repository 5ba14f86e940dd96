"""A reader's day in a real Chromium: read, judge, sign, see it acknowledged; by mouse, by keys, by two, and interrupted."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.core.builders import claimed, completed, destination
from tests.review.browser import (
    Browser,
    Page,
    cut_or_overlapping,
    hard_to_read,
    log_in,
    needs_chromium,
    open_study,
    picture,
    until,
    wait_for_picture,
)
from tests.review.builders import PASSWORD, SENTENCES, Department, Reader, accept_all, department, served
from worker.core import accounts, outbox, reports, studies
from worker.core.database import Database
from worker.core.errors import DeliveryRefusedError, NothingToReportError
from worker.core.records import Heartbeat, Role, Stage
from worker.core.report import BestSlice, Section, Sentence
from worker.delivery.mllp import MllpConnection
from worker.delivery.mllp_receiver import MllpReceiver
from worker.review.app import create_app

pytestmark = needs_chromium


@pytest.fixture
def window(browser: Browser) -> Iterator[Page]:
    """A window of 1280 x 800 whose scripts must not fail."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("console", lambda line: failures.append(line.text) if "Content Security Policy" in line.text else None)
    yield page
    context.close()
    assert failures == []


def deliver(database: Database, name: str, port: int) -> None:
    """What the worker's deliver task does, once."""
    with database.write() as session:
        claim = outbox.claim(session, name, 60)
    assert claim is not None
    with MllpConnection(destination(name, port=port)) as connection:
        answer = connection.send(claim.payload, claim.control_id)
    with database.write() as session:
        outbox.acknowledge(session, claim, answer.code)


def test_reader_reads_judges_signs_and_sees_the_final_message_acknowledged(here: Department, window: Page) -> None:
    study_id = here.drafted(slices=24)
    with MllpReceiver() as receiver:
        app = create_app(
            here.settings, here.database, lambda queue, subject: deliver(here.database, subject, receiver.port)
        )
        with served(app) as address:
            log_in(window, address)
            window.click(f'a[href="/studies/{study_id}"]')
            wait_for_picture(window)
            assert window.get_attribute("#viewer", "data-painted") == "12"
            window.mouse.move(300, 400)
            window.mouse.wheel(0, 100)
            window.wait_for_selector('#viewer[data-painted="13"]')
            before = window.text_content("#window-readout")
            window.mouse.down()
            window.mouse.move(340, 420)
            window.mouse.up()
            until(window, f"document.getElementById('window-readout').textContent !== {before!r}")
            window.click("[data-preset='1']")
            until(window, "document.getElementById('window-readout').textContent.startsWith('W 1500  L -600')")
            window.click("[data-tool=measure]")
            window.mouse.move(250, 400)
            window.mouse.down()
            window.mouse.move(350, 400)
            window.mouse.up()
            assert float(window.get_attribute("#viewer", "data-measured") or 0) > 10

            cards = window.locator("article.sentence")
            cards.nth(0).locator('[data-act="accept"]').click()
            window.wait_for_selector('article:nth-of-type(1) [data-assessment="accepted"]')
            cards.nth(1).locator("textarea").fill("There is a 13 mm cyst in the left kidney.")
            window.wait_for_selector("ins")
            cards.nth(2).locator('[data-act="reject"]').click()
            window.wait_for_selector('[data-assessment="rejected"]')
            cards.nth(3).locator('[data-act="accept"]').click()
            window.wait_for_selector(".ready")
            picture(window, "judged")
            window.click("[data-opens=sign-dialog]")
            window.fill("#sign-password", PASSWORD)
            window.click("#sign-dialog button.primary")
            window.wait_for_selector(".state.acknowledged")
            picture(window, "signed")
            assert window.locator("article textarea").count() == 0
        (message,) = receiver.accepted.values()
    obr = next(line for line in message.decode().split("\r") if line.startswith("OBR")).split("|")
    assert (obr[25], obr[32]) == ("F", "reader&Reader&Ada")
    assert "13 mm" in message.decode() and "liver is of normal" not in message.decode()


def test_everything_is_done_with_keys_alone(here: Department, page: str, window: Page) -> None:
    study_id = here.drafted(slices=24)
    window.goto(f"{page}/login")
    window.keyboard.type("reader")
    window.keyboard.press("Tab")
    window.keyboard.type(PASSWORD)
    window.keyboard.press("Enter")
    window.wait_for_selector("nav")
    window.wait_for_load_state("domcontentloaded")
    window.keyboard.press("g")
    window.wait_for_url(f"**/studies/{study_id}")
    wait_for_picture(window)
    window.keyboard.press("ArrowDown")
    window.wait_for_selector('#viewer[data-painted="13"]')
    window.keyboard.press("3")
    until(window, "document.getElementById('window-readout').textContent.includes('liver')")
    window.keyboard.press("c")
    until(window, "document.getElementById('readout').textContent.startsWith('coronal')")
    for place in range(len(SENTENCES)):
        window.keyboard.press("j")
        window.keyboard.press("a")
        until(window, f"document.querySelectorAll('[data-assessment=accepted]').length === {place + 1}")
    until(window, "!document.querySelector('.htmx-request, .htmx-swapping, .htmx-settling')")
    window.keyboard.press("e")
    until(window, "document.activeElement.tagName === 'TEXTAREA'")
    window.keyboard.type(" It is simple.")
    window.keyboard.press("Escape")
    window.wait_for_selector('[data-assessment="edited"]')
    window.keyboard.press("n")
    until(window, "document.activeElement.tagName === 'TEXTAREA'")
    window.keyboard.type("Follow-up in one year.")
    window.keyboard.press("Escape")
    window.wait_for_selector(".ready")
    until(window, "!document.querySelector('[data-unsaved]')")
    window.keyboard.press("s")
    window.keyboard.type(PASSWORD)
    window.keyboard.press("Enter")
    window.wait_for_selector(".state.final")
    with here.database.read() as session:
        text = reports.to_value(session, reports.latest(session, study_id).id).text  # type: ignore[union-attr]
    assert "It is simple." in text and "Follow-up in one year." in text


def test_two_browsers_on_one_report_lose_nobodys_text(
    here: Department, page: str, window: Page, browser: Browser
) -> None:
    study_id = here.drafted(slices=2)
    other = browser.new_context().new_page()
    log_in(window, page)
    log_in(other, page, "second")
    for each in (window, other):
        each.goto(f"{page}/studies/{study_id}")
    first, second = (each.locator("article.sentence textarea").nth(0) for each in (window, other))
    second.focus()  # who is about to type is not interrupted by what others do
    first.fill("Words of the first reader.")
    window.wait_for_selector("ins")
    second.fill("Words of the second reader.")
    assert second.input_value() == "Words of the second reader."
    other.wait_for_selector(".conflict")
    picture(other, "conflict")
    assert "Words of the first reader." in (other.text_content(".conflict") or "")
    other.click("text=Take mine")
    other.wait_for_selector(".conflict", state="detached")
    window.locator("h2").first.click()
    until(window, "document.querySelector('article textarea').value === 'Words of the second reader.'")
    other.context.close()


def test_idle_desk_is_covered_and_unsaved_text_is_kept(sqlite_database: Database, tmp_path: Path, window: Page) -> None:
    here = department(sqlite_database, tmp_path, idle_minutes=0.05)
    here.user("reader", Role.RADIOLOGIST)
    study_id = here.drafted(slices=2)
    with served(here.app()) as address:
        open_study(window, address, study_id)
        field = window.locator("article.sentence textarea").nth(0)
        window.route("**/sentences/*", lambda route: route.abort())  # the network fails while the reader types
        field.fill("Typed and not saved.")
        window.wait_for_selector("#cover[open]", timeout=10_000)
        picture(window, "locked")
        window.unroute("**/sentences/*")
        window.fill("#cover [name=password]", "wrong")
        window.keyboard.press("Enter")
        window.wait_for_selector("#cover .problem:not([hidden])")
        window.fill("#cover [name=password]", PASSWORD)
        window.keyboard.press("Enter")
        window.wait_for_selector("ins")
        assert field.input_value() == "Typed and not saved."
        window.reload()
        assert field.input_value() == "Typed and not saved."


def test_markup_from_a_scanner_or_a_model_runs_nowhere(here: Department, page: str, window: Page) -> None:
    evil = '<img src=x onerror="window.hurt=1"><script>window.hurt=1</script>'
    study_id = here.drafted(
        slices=2,
        patient_name="<script>window.hurt</script>^A",
        accession="<b>A",
        sentences=(Sentence(Section.FINDINGS, evil),),
    )
    log_in(window, page)
    for path in ("/", f"/studies/{study_id}", f"/studies/{study_id}/print"):
        window.goto(f"{page}{path}")
        window.wait_for_timeout(100)
        assert window.evaluate("window.hurt") is None
        assert "<b>A" in window.inner_text("body")


def filled_for_administrators(here: Department, page: str) -> None:
    """Failures with long reasons, a refused message, a worker, an account that is closed."""
    for reason in ("no axial CT series of 12 slices or more", "slices lie 2.5 and 5.0 mm apart; " * 6):
        completed(here.database)
        claim = claimed(here.database, Stage.PREPARE)
        with here.database.write() as session:
            studies.fail(session, claim, NothingToReportError(reason))
    done = here.drafted(slices=2, accession="A-3")
    with Reader(base_url=page) as reader:
        reader.log_in("reader")
        reader.act(f"/studies/{done}/sign", revision=accept_all(reader, done), password=PASSWORD)
    at = studies.now()
    with here.database.write() as session:
        sent = outbox.claim(session, "ris", 60)
        assert sent is not None
        outbox.refuse(session, sent, DeliveryRefusedError("the receiver refused: no such order"), "AR", "unknown order")
        session.add(Heartbeat(owner="worker-1", service="worker", queues="draft", started_at=at, beat_at=at))
        accounts.set_disabled(session, accounts.add(session, username="gone", role=Role.VIEWER, password=None), True)


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (3840, 2160)])
def test_nothing_is_cut_or_overlaps_and_everybody_can_read_it(
    here: Department, page: str, browser: Browser, width: int, height: int
) -> None:
    long_name = "WOLFESCHLEGELSTEINHAUSENBERGERDORFF^HUBERT BLAINE^^DR"
    placed = tuple(replace(sentence, best_slice=BestSlice(1, (0.0, 0.0, -540.0))) for sentence in SENTENCES)
    study_id = here.drafted(
        sentences=placed, slices=24, evidence=True, patient_name=long_name, accession="ACC-0123456789-0123"
    )
    signed = here.drafted(slices=2, accession="A-2")
    filled_for_administrators(here, page)
    context = browser.new_context(viewport={"width": width, "height": height})
    window = context.new_page()
    problems: list[str] = []
    window.on("console", lambda line: problems.append(line.text) if "Security Policy" in line.text else None)

    def look(name: str) -> None:
        picture(window, f"{name}-{width}")
        problems.extend(f"{name}: {told}" for told in cut_or_overlapping(window))
        problems.extend(f"{name}: {told}" for told in hard_to_read(window))

    window.goto(f"{page}/login")
    look("login")
    log_in(window, page)
    look("worklist")
    window.goto(f"{page}/studies/{study_id}")
    wait_for_picture(window)
    window.keyboard.press("j")
    window.keyboard.press("j")
    window.locator("article.sentence textarea").nth(0).fill("The lungs are clear of disease.")
    window.wait_for_selector("ins")
    window.keyboard.press("Escape")
    assert window.locator("[data-slice]").count() == len(SENTENCES)
    look("study")
    window.keyboard.press("?")
    look("keys")
    window.keyboard.press("Escape")
    window.goto(f"{page}/studies/{signed}")
    window.click("[data-opens=reject-dialog]")
    look("reject")
    window.click("#reject-dialog [data-closes]")
    context.clear_cookies()
    log_in(window, page, "boss")
    for name in ("queue", "messages", "messages/1", "users", "audit"):
        window.goto(f"{page}/admin/{name}")
        assert window.locator("tbody tr, pre").count() > 0, name  # a page of nothing proves nothing
        look(name.replace("/", "-"))
    window.click("text=Verify the chain")
    window.wait_for_selector(".ready")
    look("verified")
    context.clear_cookies()
    window.goto(f"{page}/studies/{signed}")
    look("nobody")
    context.close()
    assert problems == []
