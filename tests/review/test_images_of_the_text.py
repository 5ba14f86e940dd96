"""A text stands beside the images that it was drafted from, whatever the machine drafts later; nothing else is pointed at."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from tests.review.browser import Browser, Page, needs_chromium, open_study, picture, until, wait_for_picture
from tests.review.builders import SENTENCES, Department, Reader, card_ids, phantom
from worker.core import model_inputs, studies
from worker.core.records import Report, ReportVersion
from worker.core.records import Sentence as SentenceRow
from worker.core.report import BestSlice, Sentence
from worker.core.review_records import EvidenceRequest
from worker.imaging.volume import Volume

if TYPE_CHECKING:
    from playwright.sync_api import Route

READOUT = "document.getElementById('readout').textContent"
CURRENT = "document.querySelector('article.current')"


def placed(volume: int, z: float, text: str = "") -> tuple[Sentence, ...]:
    """A draft whose every sentence has its best slice at this height."""
    return tuple(replace(s, text=text + s.text, best_slice=BestSlice(volume, (0.0, 0.0, z))) for s in SENTENCES)


def elsewhere() -> Volume:
    """Another volume of the same patient: six slices, 270 mm below the first volume."""
    volume = phantom(6, 32)
    affine = volume.affine.copy()
    affine[2, 3] = -900.0
    return replace(volume, affine=affine)


OLD, NEW = placed(1, -600.0 + 3 * 19), placed(1, -900.0 + 3 * 2, "Newer: ")  # the 20th slice of 24, the third of six


def shown_images(text: str) -> str:
    """The model input that a page asks for."""
    found = re.search(r'data-images="([^"]*)"', text)
    assert found is not None
    return found[1]


def begun(here: Department, reader: Reader, **drafted: object) -> tuple[str, str]:
    """A study whose draft a reader has begun to judge, and the images beside it."""
    study_id = here.drafted(slices=24, size=32, **{"sentences": OLD, **drafted})  # type: ignore[arg-type]
    text = reader.get(f"/studies/{study_id}").text
    reader.act(f"/studies/{study_id}/sentences/{card_ids(text)[0]}", act="accept", revision=1)
    return study_id, shown_images(text)


class TestTextOfAnEarlierRevision:
    def test_stands_beside_the_volume_that_it_was_drafted_from(self, here: Department, reader: Reader) -> None:
        study_id, own = begun(here, reader)
        here.drafted_again(study_id, elsewhere(), NEW)
        text = reader.get(f"/studies/{study_id}").text
        assert shown_images(text) == own and "data-other-images" not in text
        (volume,) = reader.get(f"/studies/{study_id}/volumes", params={"input": own}).json()
        assert (volume["planes"]["axial"]["count"], volume["input"]) == (24, own)
        assert reader.get(f"/studies/{study_id}/volumes/1/axial/23", params={"input": own}).status_code == 200
        assert 'data-best-slice="1 0.0 0.0 -543.0"' in text

    def test_keeps_its_images_while_the_machine_drafts_again(self, here: Department, reader: Reader) -> None:
        study_id, own = begun(here, reader)
        with here.database.write() as session:
            studies.requeue(session, study_id)
        assert shown_images(reader.get(f"/studies/{study_id}").text) == own
        assert len(reader.get(f"/studies/{study_id}/volumes", params={"input": own}).json()) == 1

    def test_keeps_its_evidence_on_its_own_volume(self, here: Department, reader: Reader) -> None:
        study_id, own = begun(here, reader, evidence=True)
        here.drafted_again(study_id, elsewhere(), NEW)
        (sentence,) = re.findall(r'data-evidence="([^"]*)"', reader.get(f"/studies/{study_id}").text)
        found = reader.get(f"/studies/{study_id}/evidence/{sentence}").json()
        assert (found["input"], found["slice"]) == (own, 12)

    def test_points_at_nothing_on_other_images_when_its_own_are_gone(self, here: Department, reader: Reader) -> None:
        study_id, own = begun(here, reader, evidence=True)
        here.drafted_again(study_id, elsewhere(), NEW)
        shutil.rmtree(here.settings.store_root / model_inputs.folder(study_id) / "1")
        text = reader.get(f"/studies/{study_id}").text
        assert "data-other-images" in text and shown_images(text) not in {"", own}
        assert "data-best-slice" not in text and "data-evidence=" not in text and ">best slice<" not in text
        assert reader.get(f"/studies/{study_id}/volumes", params={"input": own}).status_code == 404
        assert reader.get(f"/studies/{study_id}/volumes/1/axial/0", params={"input": own}).status_code == 404


@pytest.mark.parametrize("name", ["..", "../..", "x" * 36, "00000000-0000-0000-0000-000000000000", "another study's"])
def test_images_are_asked_for_by_names_of_this_study_alone(here: Department, reader: Reader, name: str) -> None:
    study_id, _ = begun(here, reader)
    if name == "another study's":
        other = here.drafted(slices=2, size=8, accession="A-2")
        name = shown_images(reader.get(f"/studies/{other}").text)
    for path in ("volumes", "volumes/1/axial/0"):
        assert reader.get(f"/studies/{study_id}/{path}", params={"input": name}).status_code == 404


def take_evidence(session: Session, study_id: str) -> tuple[str, str]:
    """Hides the evidence of a study's draft, as before anybody asked: its sentence, and where it lies."""
    drafts = sa.select(ReportVersion.id).join(Report).where(Report.study_id == study_id)
    found = sa.select(SentenceRow).where(SentenceRow.version_id.in_(drafts), SentenceRow.evidence.is_not(None))
    row = session.scalars(found).one()
    kept, row.evidence = str(row.evidence), None
    return row.id, kept


def give_evidence(session: Session, sentence_id: str, path: str) -> None:
    """A worker's answer to the one request."""
    session.get_one(SentenceRow, sentence_id).evidence = path
    session.scalars(sa.select(EvidenceRequest)).one().done_at = studies.now()


@pytest.fixture
def window(browser: Browser) -> Iterator[Page]:
    """A window whose scripts must not fail; every question of the page is answered with yes."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("dialog", lambda dialog: dialog.accept())
    yield page
    context.close()
    assert failures == []


@needs_chromium
class TestOnTheScreen:
    def test_images_follow_the_text_when_a_reader_begins_again_from_a_newer_draft(
        self, here: Department, page: str, window: Page
    ) -> None:
        study_id = here.drafted(slices=24, size=32, sentences=OLD)
        open_study(window, page, study_id)
        wait_for_picture(window)
        window.click("article.sentence [data-act=accept] >> nth=0")
        window.wait_for_selector('[data-assessment="accepted"]')
        here.drafted_again(study_id, elsewhere(), NEW)
        window.wait_for_selector("text=A newer machine draft is there", timeout=30_000)
        window.click("article.sentence .meta >> nth=1", position={"x": 2, "y": 2})
        until(window, f"{READOUT} === 'axial 20 / 24'")
        window.click("text=Begin again from it")
        until(window, f"{READOUT} === 'axial 4 / 6'")
        assert "belong to the text" in window.inner_text("#stage-note")
        picture(window, "images-followed")
        window.click("article.sentence .meta >> nth=1", position={"x": 2, "y": 2})
        until(window, f"{READOUT} === 'axial 3 / 6'")
        assert window.inner_text("#stage-note") == ""
        assert window.locator("#series option").count() == 1

    def test_images_come_with_a_draft_that_the_open_page_waited_for(
        self, here: Department, page: str, window: Page
    ) -> None:
        study_id = here.drafted(slices=24, size=32, sentences=OLD)
        open_study(window, page, study_id)
        wait_for_picture(window)
        here.drafted_again(study_id, elsewhere(), NEW)  # nobody had touched the first: the page goes on with the newer
        until(window, f"{READOUT} === 'axial 4 / 6'")
        assert window.locator("article.sentence textarea").first.input_value().startswith("Newer: ")

    def test_other_images_say_on_the_picture_that_they_are_not_the_texts(
        self, here: Department, page: str, window: Page, reader: Reader
    ) -> None:
        study_id, _ = begun(here, reader)
        here.drafted_again(study_id, elsewhere(), NEW)
        shutil.rmtree(here.settings.store_root / model_inputs.folder(study_id) / "1")
        open_study(window, page, study_id)
        wait_for_picture(window)
        assert window.inner_text("#readout").split("\n")[0] == "not the images that this text was drafted from"
        picture(window, "other-images")

    @pytest.mark.parametrize(
        ("sentences", "told"),
        [(placed(1, -450.0), "outside this volume"), (placed(3, -600.0), "volume that is not here")],
    )
    def test_place_that_the_images_do_not_hold_is_named_and_not_clamped(
        self, here: Department, page: str, window: Page, sentences: tuple[Sentence, ...], told: str
    ) -> None:
        open_study(window, page, here.drafted(slices=24, size=32, sentences=sentences))
        wait_for_picture(window)
        window.click("article.sentence .meta >> nth=1", position={"x": 2, "y": 2})
        until(window, f"document.getElementById('stage-note').textContent.includes('{told}')")
        window.wait_for_timeout(100)  # frames that are painted meanwhile leave it there
        assert told in window.inner_text("#stage-note") and window.inner_text("#readout") == "axial 13 / 24"
        picture(window, "outside")
        window.keyboard.press("ArrowDown")
        until(window, "document.getElementById('stage-note').textContent === ''")


@needs_chromium
class TestOverlay:
    def explained(self, here: Department, page: str, window: Page) -> str:
        """A study, open, with evidence for its second sentence."""
        study_id = here.drafted(slices=24, size=32, sentences=(SENTENCES[0], OLD[1], OLD[2]), evidence=True)
        open_study(window, page, study_id)
        wait_for_picture(window)
        window.click("article.sentence .meta >> nth=1", position={"x": 2, "y": 2})
        until(window, f"{READOUT} === 'axial 20 / 24'")
        return study_id

    def test_evidence_that_comes_late_never_stands_beside_another_sentence(
        self, here: Department, page: str, window: Page
    ) -> None:
        self.explained(here, page, window)
        held: list[Route] = []
        window.route(re.compile(r"/evidence/[^/]+$"), lambda route: held.append(route))
        window.keyboard.press("o")
        until(window, f"{CURRENT}.dataset.evidence !== undefined")
        while not held:
            window.wait_for_timeout(20)
        window.keyboard.press("j")
        until(window, f"{CURRENT}.dataset.evidence === undefined")
        with window.expect_response(re.compile(r"/evidence/[^/]+$")):
            held[0].continue_()
        window.wait_for_timeout(200)
        assert window.is_hidden("#overlay-label") and not window.get_attribute("#viewer", "data-overlay")
        assert window.inner_text("#readout") == "axial 20 / 24"

    def test_overlay_goes_with_its_sentence_also_to_one_of_which_nothing_is_known(
        self, here: Department, page: str, window: Page
    ) -> None:
        self.explained(here, page, window)
        window.keyboard.press("o")
        until(window, "document.getElementById('viewer').dataset.overlay === '12'")
        assert window.is_visible("#overlay-label")
        window.keyboard.press("k")  # the first sentence has neither a best slice nor evidence
        until(window, "!document.getElementById('viewer').dataset.overlay")
        assert window.is_hidden("#overlay-label")

    def test_evidence_asked_for_does_not_pull_a_reader_back_who_reads_on(
        self, here: Department, page: str, window: Page
    ) -> None:
        study_id = here.drafted(slices=24, size=32, evidence=True)
        with here.database.write() as session:
            kept = take_evidence(session, study_id)
        open_study(window, page, study_id)
        wait_for_picture(window)
        window.keyboard.press("j")
        window.keyboard.press("j")
        window.keyboard.press("o")  # nobody has asked before: a worker is asked
        window.wait_for_selector("[data-evidence-toggle]:disabled")
        window.keyboard.press("j")
        with here.database.write() as session:
            give_evidence(session, *kept)
        until(
            window,
            "document.getElementById('toast').textContent.startsWith('The evidence that you asked for is there')",
        )
        window.wait_for_timeout(100)
        assert window.is_hidden("#overlay-label") and window.inner_text("#readout") == "axial 13 / 24"
