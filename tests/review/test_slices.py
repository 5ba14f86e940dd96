"""Slices: the very values of the volume, cut and turned as readers know it; and the PDF."""

import gzip
import io
import unicodedata
from dataclasses import replace
from datetime import UTC, datetime
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
from pypdf import PdfReader

from tests.review.builders import Department, Reader, phantom
from worker.core.errors import InvalidObjectError, NotFoundError, StoreUnavailableError
from worker.core.records import Study
from worker.core.report import DISCLOSURE, Order, Patient, Person, Report, ReportState, Section, Sentence
from worker.imaging import stored
from worker.imaging.volume import Volume
from worker.results import pdf, pdf_fonts
from worker.review.slices import SliceCache, open_volume


def saved(volume: Volume, folder: Path, name: str = "volume-01.npz") -> Path:
    """The volume on disk."""
    stored.save(volume, folder / name)
    return folder / name


def test_slice_on_the_wire_is_the_volumes_hounsfield_values(here: Department, reader: Reader) -> None:
    study_id = here.drafted(slices=6)
    answer = reader.get(f"/studies/{study_id}/volumes/1/axial/4")
    assert answer.headers["content-encoding"] == "gzip"
    assert np.array_equal(np.frombuffer(answer.content, "<i2").reshape(256, 256), phantom(6).hu[4])


def test_slice_that_the_browser_has_is_not_sent_again(here: Department, reader: Reader) -> None:
    path = f"/studies/{here.drafted(slices=2)}/volumes/1/axial/0"
    tag = reader.get(path).headers["etag"]
    again = reader.get(path, headers={"If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")


def test_slices_of_two_model_inputs_are_never_mixed(here: Department, reader: Reader) -> None:
    study_id = here.drafted(slices=2, size=8)
    address = f"/studies/{study_id}/volumes/1/axial/0"
    (first,) = reader.get(f"/studies/{study_id}/volumes").json()
    assert reader.get(address, params={"input": first["input"]}).status_code == 200
    with here.database.write() as session:  # slices came late, and the volume was made anew
        study = session.get_one(Study, study_id)
        assert study.model_input is not None
        old = here.settings.store_root / study.model_input
        study.model_input = f"{study.model_input}-anew"
    old.rename(f"{old}-anew")
    (second,) = reader.get(f"/studies/{study_id}/volumes").json()
    assert reader.get(address, params={"input": second["input"]}).status_code == 200
    assert reader.get(address, params={"input": first["input"]}).status_code == 404


@pytest.mark.parametrize(("order", "flips"), list(product(permutations(range(3)), product((1, -1), repeat=3)))[::5])
def test_any_orientation_is_shown_as_readers_know_it(tmp_path: Path, order: tuple, flips: tuple) -> None:
    base = phantom(8, size=16)
    turned, affine = np.transpose(base.hu, order), base.affine[:, [*order, 3]]
    for axis, flip in enumerate(flips):
        if flip < 0:
            affine = affine.copy()
            affine[:, 3] += affine[:, axis] * (turned.shape[axis] - 1)
            affine[:, axis] *= -1
            turned = np.flip(turned, axis)
    opened = open_volume(saved(replace(base, hu=np.ascontiguousarray(turned), affine=affine), tmp_path))
    assert np.array_equal(opened.hu, base.hu)
    assert np.allclose(opened.affine, base.affine)
    assert np.array_equal(opened.plane("coronal", 3), base.hu[::-1, 3, :])
    assert np.array_equal(opened.plane("sagittal", 5), base.hu[::-1, :, 5])


def test_volume_with_fractions_is_rounded_to_whole_hounsfield_units(tmp_path: Path) -> None:
    opened = open_volume(saved(replace(phantom(2, 8), hu=phantom(2, 8).hu + 0.4), tmp_path))
    assert np.array_equal(opened.plane("axial", 1), phantom(2, 8).hu[1])


def test_oblique_volume_says_so(tmp_path: Path) -> None:
    base = phantom(4, 8)
    angle = np.radians(20)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    assert open_volume(saved(replace(base, affine=turn @ base.affine), tmp_path)).oblique
    assert not open_volume(saved(base, tmp_path, "straight.npz")).oblique


def test_slice_beyond_the_volume_and_a_damaged_or_missing_file_are_named(tmp_path: Path) -> None:
    path = saved(phantom(2, 8), tmp_path)
    with pytest.raises(NotFoundError):
        open_volume(path).plane("axial", 2)
    (tmp_path / "broken.npz").write_bytes(path.read_bytes()[:200])
    with pytest.raises(InvalidObjectError):
        open_volume(tmp_path / "broken.npz")
    with pytest.raises(StoreUnavailableError):
        open_volume(tmp_path / "gone.npz")


def test_cache_drops_what_was_read_longest_ago(tmp_path: Path) -> None:
    cache = SliceCache(1)
    rng = np.random.default_rng(0)
    noise = replace(phantom(5, 512), hu=rng.integers(-1000, 1000, (5, 512, 512)).astype(np.float32))
    path = saved(noise, tmp_path)
    for index in range(5):
        assert gzip.decompress(cache.get(path, "axial", index)) == noise.hu[index].astype("<i2").tobytes()
    assert sum(map(len, cache._planes.values())) <= 1024 * 1024
    assert (str(path), "axial", 4) in cache._planes


def report(**changes: object) -> Report:
    """A report to print."""
    base = Report(
        study_instance_uid="2.25.1",
        version=1,
        state=ReportState.AI_DRAFT,
        sentences=(Sentence(Section.FINDINGS, "The lungs are clear."),),
        patient=Patient("MRN-1", family_name="ŁUKASZ", given_name="Иван 王"),
        order=Order(accession="A-1"),
        study_time=datetime(2026, 3, 31, 8, 0),
        status_time=datetime(2026, 3, 31, 9, 0, tzinfo=UTC),
        disclosure=DISCLOSURE,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def words(body: bytes) -> str:
    """The text of a PDF."""
    return "\n".join(page.extract_text() for page in PdfReader(io.BytesIO(body)).pages)


def test_pdf_of_a_draft_says_on_every_page_what_it_is_and_whose() -> None:
    long = tuple(Sentence(Section.FINDINGS, f"Sentence number {n} of a long report.") for n in range(120))
    pages = PdfReader(io.BytesIO(pdf.write(report(sentences=long)))).pages
    assert len(pages) > 2
    for number, page in enumerate(pages, start=1):
        told = page.extract_text()
        assert "DRAFT" in told and DISCLOSURE in told and f"MRN-1  Page {number} of {len(pages)}" in told


def test_pdf_of_a_signed_report_names_its_signer_and_bears_no_watermark() -> None:
    told = words(pdf.write(report(state=ReportState.FINAL, signer=Person("reader", "Reader", "Ada"))))
    assert "Signed by Ada Reader" in told and "DRAFT" not in told


def test_pdf_of_a_retracted_report_says_so_over_the_page() -> None:
    told = words(pdf.write(report(state=ReportState.RETRACTED, signer=Person("r", "R", "A"), reason="wrong study")))
    assert "RETRACTED" in told and "wrong study" in told


@pytest.mark.parametrize(
    "name", ["ŁUKASZ", "Иван", "Ἀλέξανδρος", "مريم", "王小東", "山田", "やまだ", "김희중"], ids=lambda name: ascii(name)
)
def test_pdf_writes_a_name_in_any_of_these_scripts(name: str) -> None:
    if ord(name[0]) > 0x3000 and pdf_fonts.choose([name]).missing:
        pytest.skip("no font of this machine has the letters: install Debian's package `fonts-wqy-microhei`")
    told = words(pdf.write(report(patient=Patient("MRN-1", family_name=name))))
    assert (
        unicodedata.normalize("NFKC", told).count(name) == 2
    )  # head and foot; Arabic letters come back in their joined forms
    assert "stands for letters" not in told


def test_pdf_shows_a_letter_without_a_font_as_a_box_and_says_which_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf_fonts.choose, "__defaults__", ((),))
    told = " ".join(words(pdf.write(report(patient=Patient("MRN-1", family_name="Li 王")))).split())
    assert "Li \u25a1" in told
    assert "stands for letters that no font of this system has (U+738B): do not identify by them" in told


def test_pdf_tells_no_patient_in_its_own_properties_and_is_the_same_every_time() -> None:
    assert "ŁUKASZ" not in str(PdfReader(io.BytesIO(pdf.write(report()))).metadata)
    assert pdf.write(report()) == pdf.write(report())
