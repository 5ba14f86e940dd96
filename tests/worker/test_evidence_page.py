"""From the click on "Where the model looked" to the overlay: page, doorbell, worker, a model, and a real Chromium."""

import pytest

from tests.review.browser import chromium, needs_chromium, open_study, picture, until, wait_for_picture
from tests.review.builders import PASSWORD, served
from tests.worker.hospital_site import Site
from worker import queues, tasks
from worker.core import accounts
from worker.core.notices import UNTRAINED
from worker.core.records import Role, Sentence, Stage, Study
from worker.inference.mu2 import untrained_checkpoint
from worker.process import WorkerProcess
from worker.review.app import create_app

pytestmark = needs_chromium
OVERLAY = "Number(document.getElementById('viewer').dataset.overlay || -1)"
LABEL = "document.getElementById('overlay-label')"


@pytest.fixture
def site(site: Site) -> Site:
    """The site's worker runs a tiny model without training: what it says is nonsense, where it looked is real."""
    site.environment |= {
        "MU2_MODEL__REPORTER": "mu2",
        "MU2_MODEL__PATH": str(untrained_checkpoint(site.home)),
        "MU2_MODEL__DEVICE": "cpu",
    }
    return site


def test_reader_asks_where_the_model_looked_and_sees_it_on_the_slice(site: Site, worker_process: WorkerProcess) -> None:
    site.add_study()
    for stage in Stage:
        tasks.answer(worker_process, stage, "task")
    site.database.run(
        lambda session: accounts.add(session, username="reader", role=Role.RADIOLOGIST, password=PASSWORD)
    )
    (study,) = site.rows(Study)

    def ring(queue: str, subject: str) -> None:
        assert (queue, subject) == (queues.DRAFT, study.id)
        tasks.answer_evidence(worker_process)

    app = create_app(worker_process.settings, site.database, ring)
    with served(app) as address, chromium() as browser:
        page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
        open_study(page, address, study.id)
        wait_for_picture(page)
        assert page.is_hidden("#overlay-label")
        card = page.locator("article.sentence", has_not_text=UNTRAINED).first
        card.locator("textarea").click()
        page.keyboard.press("Escape")
        page.click("[data-evidence-toggle]")
        until(page, f"{OVERLAY} >= 0", 60)
        assert "where the model looked" in page.inner_text("#overlay-label")
        picture(page, "evidence")
        shown = page.evaluate(OVERLAY)
        assert page.get_attribute("#viewer", "data-painted") == str(shown)
        page.keyboard.press("c")
        assert page.is_hidden("#overlay-label")
        page.keyboard.press("x")
        page.keyboard.press("o")
        until(page, f"{LABEL}.hidden && {OVERLAY} < 0")
    assert any(row.evidence for row in site.rows(Sentence))
