"""What goes wrong at a reader's desk, in a real Chromium: the network fails, the server restarts, many tabs are open."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.conftest import free_port
from tests.review.browser import Browser, Page, log_in, needs_chromium, open_study, until
from tests.review.builders import PASSWORD, SENTENCES, Department, served, state_of
from worker.core import reports
from worker.core.records import AuthorKind
from worker.core.report import ReportState, Sentence

if TYPE_CHECKING:
    from playwright.sync_api import Route

pytestmark = needs_chromium


@pytest.fixture
def window(browser: Browser) -> Iterator[Page]:
    """A window of 1280 x 800."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    yield context.new_page()
    context.close()


def open_judged(window: Page, page: str, study_id: str) -> None:
    """Opens a study and accepts every sentence."""
    open_study(window, page, study_id)
    for place in range(len(SENTENCES)):
        window.locator("article.sentence").nth(place).locator('[data-act="accept"]').click()
        until(window, f"document.querySelectorAll('[data-assessment=accepted]').length === {place + 1}")


def sign(window: Page) -> None:
    """By the dialog, with the password."""
    window.click("[data-opens=sign-dialog]")
    window.fill("#sign-password", PASSWORD)
    window.click("#sign-dialog button.primary")


def test_words_that_the_server_never_got_are_not_signed_away(here: Department, page: str, window: Page) -> None:
    study_id = here.drafted(slices=2)
    open_judged(window, page, study_id)
    window.route("**/sentences/*", lambda route: route.abort())  # the network fails while the reader types
    field = window.locator("article.sentence textarea").nth(0)
    field.fill("There is a mass in the left lung.")
    window.keyboard.press("Escape")
    window.wait_for_selector("#toast:not([hidden])")
    sign(window)
    window.wait_for_selector("#sign-dialog", state="hidden")
    assert state_of(here, study_id) is ReportState.AI_DRAFT
    window.unroute("**/sentences/*")
    window.wait_for_selector("ins")  # sent again by itself
    until(window, "!document.querySelector('[data-unsaved]')")
    sign(window)
    window.wait_for_selector(".state.final")
    with here.database.read() as session:
        text = reports.to_value(session, reports.latest(session, study_id).id).text  # type: ignore[union-attr]
    assert "There is a mass in the left lung." in text


def test_report_that_is_drawn_again_keeps_the_words_that_are_on_their_way(
    here: Department, page: str, window: Page
) -> None:
    study_id = here.drafted(slices=2)
    open_study(window, page, study_id)
    held: list[Route] = []
    slow = True
    window.route("**/sentences/*", lambda route: held.append(route) if slow else route.continue_())  # a slow network
    field = window.locator("article.sentence textarea").nth(0)
    field.fill("First words.")
    until_held(window, held)
    field.fill("First words, and more.")
    window.click("#section-impression [data-add]")  # answers with the whole report, as it was before those words
    until(window, "document.querySelectorAll('article.sentence').length === 5")
    assert field.input_value() == "First words, and more."
    slow = False
    for route in held:  # the words are sent again by themselves
        route.abort()
    window.wait_for_selector("ins")
    until(window, "!document.querySelector('[data-unsaved]')")
    window.reload()
    assert field.input_value() == "First words, and more."


def test_words_that_arrive_late_do_not_take_the_place_of_newer_ones(here: Department, page: str, window: Page) -> None:
    study_id = here.drafted(slices=2)
    open_study(window, page, study_id)
    held: list[Route] = []
    window.route("**/sentences/*", lambda route: route.continue_() if held else held.append(route))
    field = window.locator("article.sentence textarea").nth(0)
    field.fill("First words.")
    until_held(window, held)
    field.fill("First words, and more.")
    window.click("#section-impression [data-add]")  # draws the report again, so that the newer words overtake
    window.wait_for_selector("ins")
    until(window, "!document.querySelector('[data-unsaved]')")
    with window.expect_response("**/sentences/*"):
        held[0].continue_()
    window.reload()
    assert field.input_value() == "First words, and more."
    assert window.locator(".conflict").count() == 0


def test_words_typed_while_a_judgement_is_on_its_way_are_kept(here: Department, page: str, window: Page) -> None:
    study_id = here.drafted(slices=2)
    open_study(window, page, study_id)
    held: list[Route] = []
    window.route("**/sentences/*", lambda route: route.continue_() if held else held.append(route))
    window.keyboard.press("j")
    window.keyboard.press("a")
    until_held(window, held)
    window.keyboard.press("e")
    window.keyboard.type(" No effusion.")
    held[0].continue_()
    window.wait_for_selector('[data-assessment="accepted"], [data-assessment="edited"]')
    window.keyboard.type(" No nodule.")  # the caret is where it was
    window.wait_for_selector('[data-assessment="edited"]')
    until(window, "!document.querySelector('[data-unsaved]')")
    window.reload()
    written = window.locator("article.sentence textarea").nth(0).input_value()
    assert written == f"{SENTENCES[0].text} No effusion. No nodule."


def test_words_typed_a_moment_before_the_page_goes_are_saved(here: Department, page: str, window: Page) -> None:
    study_id = here.drafted(slices=2)
    open_study(window, page, study_id)
    window.locator("article.sentence textarea").nth(0).fill("Typed at the last moment.")
    window.goto(f"{page}/")
    window.goto(f"{page}/studies/{study_id}")
    until(window, "document.querySelector('article textarea').value === 'Typed at the last moment.'")


def until_held(window: Page, held: "list[Route]") -> None:
    """Waits until a request was caught."""
    deadline = time.monotonic() + 30
    while not held:
        assert time.monotonic() < deadline
        window.wait_for_timeout(20)


def test_reader_with_nine_studies_open_in_tabs_gets_the_next_one(here: Department, page: str, browser: Browser) -> None:
    context = browser.new_context()
    log_in(context.new_page(), page)
    for number in range(9):  # a browser opens six connections to a host
        study_id = here.drafted(slices=2, size=8, accession=f"A-{number}")
        tab = context.new_page()
        tab.goto(f"{page}/studies/{study_id}")
        tab.wait_for_selector("#viewer[data-painted]", timeout=15_000)
        tab.evaluate("Object.defineProperty(document, 'visibilityState', { value: 'hidden', configurable: true })")
        tab.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # headless, every tab counts as seen
    first = context.pages[1]
    with here.database.write() as session:
        draft = reports.latest(session, here_study(first))
        assert draft is not None
        reports.add_version(
            session,
            draft.report,
            state=ReportState.PRELIMINARY,
            sentences=[Sentence(s.section, s.text) for s in draft.sentences],
            study_revision=draft.study_revision,
            author_kind=AuthorKind.PERSON,
        )
        draft.report.state = ReportState.PRELIMINARY
    first.evaluate("delete document.visibilityState")
    first.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    first.wait_for_selector(".state.preliminary")  # what changed behind its back is there
    context.close()


def here_study(window: Page) -> str:
    """The id of the study that a page shows."""
    return window.url.rsplit("/", 1)[1]


def test_worklist_shows_after_a_restart_what_came_meanwhile_and_keeps_the_readers_line(
    here: Department, window: Page
) -> None:
    here.drafted(slices=2, size=8, accession="A-before")
    port = free_port()
    with served(here.app(), port) as page:
        log_in(window, page)
        window.keyboard.press("j")
        line = window.evaluate("document.activeElement.id")
        assert line.startswith("open-")
    here.drafted(slices=2, size=8, accession="A-meanwhile")
    with served(here.app(), port):
        until(window, "document.getElementById('rows').innerText.includes('A-meanwhile')")
        here.drafted(slices=2, size=8, accession="A-after")
        until(window, "document.getElementById('rows').innerText.includes('A-after')")
        assert window.evaluate("document.activeElement.id") == line
