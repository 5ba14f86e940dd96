"""Lengths and letters of the viewer against known geometry, and the report on paper, in a real Chromium."""

import io
import shutil
import unicodedata
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import sqlalchemy as sa
from pypdf import PdfReader

from tests.review.browser import Browser, Page, log_in, needs_chromium, open_study, picture, until, wait_for_picture
from tests.review.builders import SENTENCES, Department, phantom
from worker.core.records import Study
from worker.core.report import DISCLOSURE, BestSlice, Section, Sentence
from worker.core.review_records import EvidenceRequest
from worker.imaging import stored
from worker.imaging.volume import Volume
from worker.review.slices import Looks

if TYPE_CHECKING:
    from playwright.sync_api import Route

pytestmark = needs_chromium

SPACING_MM = (5.0, 0.6, 0.9)  # between slices, rows and columns: every plane has pixels that are not square
SHAPE = (30, 200, 160)
FIRST = (12, 90, 75)  # slice from the foot, row from the front, column from the right of the block's first voxel
BLOCK = (10, 60, 30)  # voxels
LENGTHS_MM = {"axial": (27.0, 36.0), "coronal": (27.0, 50.0), "sagittal": (36.0, 50.0)}  # across, down
LETTERS = {"axial": "ALPR", "coronal": "HLFR", "sagittal": "HPFA"}


def block() -> Volume:
    """A bright block left, behind and above the middle, yet cut by each plane's middle slice.

    Slices count to the head, rows to the back, columns to the left.
    """
    hu = np.full(SHAPE, -1000, np.float32)
    first = tuple(slice(start, start + size) for start, size in zip(FIRST, BLOCK, strict=True))
    hu[first] = 1000
    z, y, x = SPACING_MM
    affine = np.array([[0, 0, -x, 70], [0, -y, 0, 60], [z, 0, 0, -300], [0, 0, 0, 1]], float)
    return Volume(hu=hu, affine=affine, padding=None, regions=("chest",))


def turned(volume: Volume, order: tuple[int, int, int], flips: tuple[int, ...]) -> Volume:
    """The same patient from another acquisition: axes in another order, some the other way."""
    hu, affine = np.transpose(volume.hu, order), volume.affine[:, [*order, 3]].copy()
    for axis in flips:
        affine[:, 3] += affine[:, axis] * (hu.shape[axis] - 1)
        affine[:, axis] *= -1
        hu = np.flip(hu, axis)
    return Volume(hu=np.ascontiguousarray(hu), affine=affine, padding=None, regions=volume.regions)


ACQUISITIONS = {
    "axial, head first supine": ((0, 1, 2), ()),
    "axial, feet first supine": ((0, 1, 2), (0, 2)),
    "axial, head first prone": ((0, 1, 2), (1, 2)),
    "axial, feet first prone": ((0, 1, 2), (0, 1)),
    "coronal first": ((1, 0, 2), (1,)),
    "sagittal first": ((2, 0, 1), (1,)),
}


def show(
    here: Department,
    page: str,
    window: Page,
    volume: Volume,
    accession: str = "A-1",
    sentences: tuple[Sentence, ...] = SENTENCES,
) -> None:
    """Opens a study of this volume."""
    study_id = here.drafted(slices=2, size=8, accession=accession, sentences=sentences)
    with here.database.read() as session:
        folder = session.get_one(Study, study_id).model_input
    assert folder is not None
    stored.save(volume, here.settings.store_root / folder / "volume-01.npz")
    window.goto(f"{page}/studies/{study_id}")
    wait_for_picture(window)
    window.keyboard.press("3")  # liver: the block is white and the air black, so that the edge is where grey begins


_EDGES = """() => {
  const canvas = document.getElementById('canvas');
  const box = canvas.getBoundingClientRect();
  const context = canvas.getContext('2d');
  const ratio = canvas.width / box.width;
  const bright = (pixels) => {
    const on = [];
    for (let i = 0; i < pixels.length / 4; i++) if (pixels[4 * i] > 128 && pixels[4 * i + 2] > 128) on.push(i);
    return on;
  };
  const whole = context.getImageData(0, 0, canvas.width, canvas.height);
  const all = bright(whole.data);
  const [xs, ys] = [all.map((i) => i % canvas.width), all.map((i) => Math.floor(i / canvas.width))];
  const least = (values) => values.reduce((a, b) => Math.min(a, b));
  const most = (values) => values.reduce((a, b) => Math.max(a, b));
  return { left: box.left + least(xs) / ratio, right: box.left + (most(xs) + 1) / ratio,
           top: box.top + least(ys) / ratio, bottom: box.top + (most(ys) + 1) / ratio,
           middle: [box.left + box.width / 2, box.top + box.height / 2] };
}"""


def picture_of(window: Page, plane: str) -> dict[str, Any]:
    """Where the block is on the screen, once the plane is painted."""
    until(window, f"document.getElementById('readout').textContent.startsWith('{plane}')")
    window.wait_for_timeout(100)
    found: dict[str, Any] = window.evaluate(_EDGES)
    return found


def measured(window: Page, start: tuple[float, float], end: tuple[float, float]) -> float:
    """The length that the page tells of a line drawn with the mouse."""
    window.evaluate("delete document.getElementById('viewer').dataset.measured")
    window.mouse.move(*start)
    window.mouse.down()
    window.mouse.move(*end, steps=3)
    window.mouse.up()
    until(window, "document.getElementById('viewer').dataset.measured !== undefined")
    return float(window.get_attribute("#viewer", "data-measured") or 0)


@pytest.mark.parametrize("ratio", [1, 2])
def test_lengths_are_millimetres_in_every_plane_however_zoomed(
    here: Department, page: str, browser: Browser, ratio: int
) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 800}, device_scale_factor=ratio)
    window = context.new_page()
    log_in(window, page)
    show(here, page, window, block())
    for plane, (across, down) in LENGTHS_MM.items():
        window.click(f"[data-plane={plane}]")
        for enlarged in (False, True):
            if enlarged:
                window.mouse.move(380, 450)
                window.keyboard.press("+")
                window.click("[data-tool=pan]")
                window.mouse.down()
                window.mouse.move(350, 420, steps=3)
                window.mouse.up()
            edges = picture_of(window, plane)
            window.click("[data-tool=measure]")
            x, y = (edges["left"] + edges["right"]) / 2, (edges["top"] + edges["bottom"]) / 2
            pixel_mm = across / (edges["right"] - edges["left"])
            assert measured(window, (edges["left"], y), (edges["right"], y)) == pytest.approx(across, abs=3 * pixel_mm)
            assert measured(window, (x, edges["top"]), (x, edges["bottom"])) == pytest.approx(down, abs=3 * pixel_mm)
            diagonal = measured(window, (edges["left"], edges["top"]), (edges["right"], edges["bottom"]))
            assert diagonal == pytest.approx(np.hypot(across, down), abs=3 * pixel_mm)
            window.click("[data-tool=window]")
    context.close()


def test_letters_and_sides_are_the_patients_whatever_was_acquired(
    here: Department, page: str, browser: Browser
) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    window = context.new_page()
    log_in(window, page)
    for number, (name, acquired) in enumerate(ACQUISITIONS.items()):
        show(here, page, window, turned(block(), *acquired), accession=f"A-{number}")
        for plane, letters in LETTERS.items():
            window.click(f"[data-plane={plane}]")
            edges = picture_of(window, plane)
            shown = "".join(window.text_content(f".edge.{side}") or "" for side in ("top", "right", "bottom", "left"))
            assert shown == letters
            x, y = (edges["left"] + edges["right"]) / 2, (edges["top"] + edges["bottom"]) / 2
            place = letters[1 if x > edges["middle"][0] else 3] + letters[2 if y > edges["middle"][1] else 0]
            assert place == {"axial": "LP", "coronal": "LH", "sagittal": "PH"}[plane], name
    context.close()


@pytest.mark.parametrize("acquired", ["axial, head first supine", "axial, feet first prone", "coronal first"])
def test_click_on_a_sentence_of_a_fresh_draft_shows_its_best_slice_without_any_evidence(
    here: Department, page: str, browser: Browser, acquired: str
) -> None:
    volume = turned(block(), *ACQUISITIONS[acquired])
    point = BestSlice(1, (0.0, 0.0, -300.0 + SPACING_MM[0] * 21))  # the 22nd slice from the foot, however acquired
    window = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
    log_in(window, page)
    sentences = (SENTENCES[0], replace(SENTENCES[1], best_slice=point))
    show(here, page, window, volume, sentences=sentences)
    window.click("[data-plane=sagittal]")
    window.click("article.sentence >> nth=0 >> .meta")
    assert (window.text_content("#readout") or "").startswith("sagittal")  # no slice is known of this one
    window.click("article.sentence >> nth=1 >> .meta", position={"x": 2, "y": 2})
    until(window, "document.getElementById('readout').textContent === 'axial 22 / 30'")
    window.keyboard.press("Home")
    window.click("[data-slice]")
    until(window, "document.getElementById('readout').textContent === 'axial 22 / 30'")
    window.keyboard.press("Home")
    window.keyboard.press("k")
    window.keyboard.press("j")
    until(window, "document.getElementById('readout').textContent === 'axial 22 / 30'")
    assert window.is_hidden("#overlay-label")
    with here.database.read() as session:
        assert session.scalars(sa.select(EvidenceRequest)).all() == []
    window.context.close()


def test_what_was_mended_in_the_geometry_stands_on_the_picture(here: Department, page: str, browser: Browser) -> None:
    window = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
    repairs = (
        "the gantry was tilted by 12.0 degrees; slices were shifted back",
        "1 missing slice was filled in between",
    )
    log_in(window, page)
    show(here, page, window, replace(phantom(2, 8), repairs=repairs))
    told = window.inner_text("#readout").split("\n")
    assert told == [*(f"repaired: {repair}" for repair in repairs), "axial 2 / 2"]
    picture(window, "repaired")
    window.context.close()


def test_picture_of_another_slice_never_passes_for_the_one_that_is_coming(
    here: Department, page: str, browser: Browser
) -> None:
    window = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
    study_id = here.drafted(slices=24)
    held: list[Route] = []
    window.route("**/axial/13?*", lambda route: held.append(route))
    open_study(window, page, study_id)
    wait_for_picture(window)
    window.keyboard.press("ArrowDown")
    until(window, "document.getElementById('readout').textContent === 'axial 14 / 24 is coming'")
    assert window.get_attribute("#viewer", "data-painted") == "12"
    held[0].continue_()
    until(window, "document.getElementById('readout').textContent === 'axial 14 / 24'")
    assert window.get_attribute("#viewer", "data-painted") == "13"
    window.context.close()


def test_open_page_says_when_its_volume_was_made_anew(
    here: Department, page: str, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Looks, "SECONDS", 0.0)
    window = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
    study_id = here.drafted(slices=4, size=8)
    open_study(window, page, study_id)
    wait_for_picture(window)
    with here.database.write() as session:
        study = session.get_one(Study, study_id)
        assert study.model_input is not None
        shutil.move(here.settings.store_root / study.model_input, here.settings.store_root / "anew")
        study.model_input = "anew"
    window.keyboard.press("c")
    until(window, "document.getElementById('stage-note').textContent.includes('Load the page again')")
    window.reload()
    wait_for_picture(window)
    window.keyboard.press("c")
    until(window, "document.getElementById('readout').textContent === 'coronal 5 / 8'")
    window.context.close()


SCRIPTS = ("王小東", "Иван", "مريم")


def test_every_sheet_of_a_long_report_says_what_it_is_and_whose(here: Department, page: str, browser: Browser) -> None:
    long = tuple(
        Sentence(Section.FINDINGS, f"Sentence {number} about the study of {' and '.join(SCRIPTS)}.")
        for number in range(150)
    )
    study_id = here.drafted(slices=2, size=8, sentences=long, patient_name="ŁUKASZ^АННА", patient_identifier="MRN-77")
    context = browser.new_context()
    window = context.new_page()
    log_in(window, page)
    window.goto(f"{page}/studies/{study_id}/print")
    sheets = PdfReader(io.BytesIO(window.pdf(format="A4", prefer_css_page_size=True))).pages
    context.close()
    assert len(sheets) > 2
    for number, sheet in enumerate(sheets, start=1):
        told = " ".join(unicodedata.normalize("NFKC", sheet.extract_text()).split())
        assert "ŁUKASZ, АННА, MRN-77" in told and DISCLOSURE in told and "DRAFT" in told, number
        assert f"Page {number} of {len(sheets)}" in told
        assert "Иван" in told
