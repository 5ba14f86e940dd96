"""`mu2 study consent` and `mu2 study export-training`: what leaves, under which names, and what never does."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from mu2_model import Mu2ImageProcessor
from mu2_model.nifti import load_nifti
from mu2_model.report_text import split_report
from tests.cli.conftest import Terminal
from tests.cli.signed_studies import Archive, ct, sentence
from training.data import check, read_manifest
from training.preferences import read_pairs
from worker.cli.training_export import IMAGES, PAIRS, RECORD, NotUsable, report_text
from worker.core import studies
from worker.core.consents import Decision
from worker.core.corrections import LeftOut
from worker.core.errors import NotFoundError, SettingsError, StateError
from worker.core.notices import UNLIKE_TRAINING
from worker.core.records import AuditEvent, Study
from worker.core.records import Sentence as SentenceRow
from worker.core.report import Assessment, ReportState, Section, Sentence

PATIENT = {
    "patient_name": "CANARYNAME^ADA",
    "patient_identifier": "MRN-CANARY-77",
    "accession": "ACC-CANARY-9",
    "referring_physician": "CANARYDOCTOR^X",
}
KEY = "k" * 32
DRAFTED, SIGNED = "The lungs are clear.", "There is a nodule of 12 mm in the right lung."
ALL_TRAIN = ("--validation", "0", "--test", "0")


@pytest.fixture
def archive(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> Archive:
    """The terminal's database and store, at a site that opted in."""
    monkeypatch.setenv("MU2_TRAINING__EXPORT", "true")
    monkeypatch.setenv("MU2_TRAINING__PSEUDONYM_KEY", KEY)
    return Archive(terminal.database, terminal.home / "store")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "export"


def exported(terminal: Terminal, out: Path, *options: str) -> dict[str, Any]:
    return dict(terminal.data("study", "export-training", str(out), *(options or ALL_TRAIN)))


def events(terminal: Terminal, action: str) -> list[AuditEvent]:
    with terminal.database.read() as session:
        return list(session.scalars(sa.select(AuditEvent).where(AuditEvent.action == action).order_by(AuditEvent.id)))


def written(out: Path) -> list[Path]:
    return sorted(path for path in out.rglob("*") if path.is_file())


def test_nothing_leaves_a_site_that_did_not_opt_in(terminal: Terminal, out: Path) -> None:
    Archive(terminal.database, terminal.home / "store").signed(1, DRAFTED, SIGNED)
    error = terminal.run("study", "export-training", str(out)).exception
    assert isinstance(error, SettingsError) and "MU2_TRAINING__EXPORT" in str(error)
    assert not out.exists() and events(terminal, "training_export") == []


def test_an_export_without_a_key_for_pseudonyms_is_a_wrong_setting(
    terminal: Terminal, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MU2_TRAINING__EXPORT", "true")
    error = terminal.run("study", "export-training", str(out)).exception
    assert isinstance(error, SettingsError) and "openssl rand -hex 32" in str(error)


def test_the_signed_text_is_the_answer_and_the_draft_the_rejected_side(
    terminal: Terminal, archive: Archive, out: Path
) -> None:
    archive.signed(1, DRAFTED, SIGNED)
    facts = exported(terminal, out)
    case, pair = read_manifest(out)[0], read_pairs(out / PAIRS)[0]
    assert case.answer == pair.chosen == f"FINDINGS:\n{SIGNED}"
    assert pair.rejected == f"FINDINGS:\n{DRAFTED}"
    assert (pair.image, pair.question, pair.case_id) == (case.image, case.question, case.case_id)
    assert (facts["studies"], facts["cases"], facts["pairs"], facts["left_out"]) == (1, 1, 1, {})
    assert check([case]).ok


def test_the_model_is_asked_in_training_what_it_is_asked_in_service(
    terminal: Terminal, archive: Archive, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MU2_MODEL__QUESTION", "What does this CT show?")
    archive.signed(1, DRAFTED, SIGNED)
    exported(terminal, out)
    assert read_manifest(out)[0].question == "What does this CT show?"


def test_training_sees_the_very_volume_that_the_worker_saw(terminal: Terminal, archive: Archive, out: Path) -> None:
    archive.signed(7, DRAFTED, SIGNED)
    exported(terminal, out)
    processor = Mu2ImageProcessor(target_shape=(16, 32, 32), chunk_slices=8)
    ours = processor.prepare(ct(7).hu, ct(7).affine).pixel_values
    theirs = processor.prepare(*load_nifti(read_manifest(out)[0].image)).pixel_values
    np.testing.assert_array_equal(theirs.numpy(), ours.numpy())


def test_a_draft_that_was_signed_as_it_was_is_an_answer_and_no_pair(
    terminal: Terminal, archive: Archive, out: Path
) -> None:
    archive.signed(1, SIGNED, SIGNED)
    assert (exported(terminal, out)["cases"], read_pairs(out / PAIRS)) == (1, [])


@pytest.mark.parametrize("trained_on", ["nothing", "phantoms"])
def test_what_a_model_wrote_that_saw_no_patient_is_nobodys_rejected_side(
    terminal: Terminal, archive: Archive, out: Path, trained_on: str
) -> None:
    archive.signed(1, DRAFTED, SIGNED, trained_on=trained_on)
    assert (exported(terminal, out)["cases"], read_pairs(out / PAIRS)) == (1, [])


def test_what_the_system_says_about_its_model_is_not_learned(terminal: Terminal, archive: Archive, out: Path) -> None:
    notice = Sentence(Section.FINDINGS, UNLIKE_TRAINING)
    study_id = archive.drafted([notice, Sentence(Section.FINDINGS, DRAFTED)], [ct(1)])
    archive.sign(study_id, [sentence(UNLIKE_TRAINING), sentence(SIGNED)])
    archive.decide(study_id)
    exported(terminal, out)
    assert read_manifest(out)[0].answer == f"FINDINGS:\n{SIGNED}"
    assert [pair.rejected for pair in read_pairs(out / PAIRS)] == [f"FINDINGS:\n{DRAFTED}"]


def test_a_sentence_that_the_reader_rejected_is_not_learned(terminal: Terminal, archive: Archive, out: Path) -> None:
    study_id = archive.drafted([Sentence(Section.FINDINGS, DRAFTED)], [ct(1)])
    archive.sign(study_id, [sentence(DRAFTED, assessment=Assessment.REJECTED), sentence(SIGNED)])
    archive.decide(study_id)
    exported(terminal, out)
    assert read_manifest(out)[0].answer == f"FINDINGS:\n{SIGNED}"


@pytest.mark.parametrize("decision", [None, Decision.REFUSED])
def test_a_study_without_consent_stays(
    terminal: Terminal, archive: Archive, out: Path, decision: Decision | None
) -> None:
    study_id = archive.drafted([Sentence(Section.FINDINGS, DRAFTED)], [ct(1)])
    archive.sign(study_id, [sentence(SIGNED)])
    if decision is not None:
        archive.decide(study_id, Decision.GIVEN)
        archive.decide(study_id, decision)
    reason = LeftOut.NOT_ASKED if decision is None else LeftOut.REFUSED
    assert exported(terminal, out)["left_out"] == {reason: 1}
    assert read_manifest(out) == [] and list((out / IMAGES).iterdir()) == []
    assert events(terminal, "training_export") == []


def test_a_draft_that_nobody_signed_stays_whatever_the_consent(terminal: Terminal, archive: Archive, out: Path) -> None:
    archive.decide(archive.drafted([Sentence(Section.FINDINGS, DRAFTED)], [ct(1)]))
    assert exported(terminal, out)["cases"] == 0


def test_a_report_that_does_not_stand_as_it_was_signed_stays(terminal: Terminal, archive: Archive, out: Path) -> None:
    addended, retracted = archive.signed(1, DRAFTED, SIGNED), archive.signed(2, DRAFTED, SIGNED)
    archive.sign(addended, [sentence(SIGNED), sentence("It is gone.", Section.ADDENDUM)], ReportState.ADDENDED)
    archive.retract(retracted)
    assert exported(terminal, out)["left_out"] == {LeftOut.ADDENDED: 1, LeftOut.RETRACTED: 1}


def test_a_correction_takes_the_place_of_what_was_signed_before(
    terminal: Terminal, archive: Archive, out: Path
) -> None:
    study_id = archive.signed(1, DRAFTED, SIGNED)
    archive.sign(study_id, [sentence("A nodule of 15 mm.")], ReportState.CORRECTED)
    exported(terminal, out)
    assert [case.answer for case in read_manifest(out)] == ["FINDINGS:\nA nodule of 15 mm."]


def test_a_signature_on_another_text_is_no_signature(terminal: Terminal, archive: Archive, out: Path) -> None:
    archive.signed(1, DRAFTED, SIGNED)
    with terminal.database.write() as session:
        session.execute(sa.text("DROP TRIGGER sentences_signed_update"))
        session.execute(sa.update(SentenceRow).where(SentenceRow.text == SIGNED).values(text="The lungs are gone."))
    assert exported(terminal, out)["left_out"] == {LeftOut.UNFIT_SIGNATURE: 1}


def test_a_study_with_later_images_than_the_signed_ones_stays(terminal: Terminal, archive: Archive, out: Path) -> None:
    study_id = archive.signed(1, DRAFTED, SIGNED)
    with terminal.database.write() as session:
        studies.requeue(session, study_id)
    assert exported(terminal, out)["left_out"] == {LeftOut.OTHER_IMAGES: 1}


def test_without_a_patient_id_no_split_by_patient_can_be_made(terminal: Terminal, archive: Archive, out: Path) -> None:
    archive.signed(1, DRAFTED, SIGNED, patient_identifier=" ")
    assert exported(terminal, out)["left_out"] == {LeftOut.NO_PATIENT_ID: 1}


def test_nothing_of_the_patient_or_the_readers_is_in_any_file_or_name(
    terminal: Terminal, archive: Archive, out: Path
) -> None:
    text = (
        "Ms. Canaryname, MRN-CANARY-77, compared with ACC-CANARY-9 of 12.03.2024 and of March 3rd, asked by Canarydoctor "
        "and read by Canaryreader: a nodule of 12 mm."
    )
    study_id = archive.signed(1, f"Ada Canaryname: {DRAFTED}", text, **PATIENT)
    facts = exported(terminal, out)
    with terminal.database.read() as session:
        uid = session.get_one(Study, study_id).study_instance_uid
    telling = [b"canary", study_id.encode(), study_id[:8].encode(), uid.encode()]
    for path in written(out):
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        else:
            assert [word for word in (b"2024", b"march", b"ada") if word in content.lower()] == [], path.name
        assert [word for word in telling if word in str(path).lower().encode() + content.lower()] == [], path.name
    assert facts["texts_changed"] == 2
    assert "a nodule of 12 mm" in read_manifest(out)[0].answer


def test_ids_are_the_same_with_the_same_key_and_others_with_another(
    terminal: Terminal, archive: Archive, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive.signed(1, DRAFTED, SIGNED)
    exported(terminal, out)
    exported(terminal, out.with_name("again"))
    monkeypatch.setenv("MU2_TRAINING__PSEUDONYM_KEY", "other" * 8)
    exported(terminal, out.with_name("other"))
    first, again, other = (read_manifest(out.with_name(name))[0] for name in (out.name, "again", "other"))
    assert (first.case_id, first.patient_id, first.study_id) == (again.case_id, again.patient_id, again.study_id)
    assert first.patient_id != other.patient_id and Path(first.image).name != Path(other.image).name


def test_all_studies_of_a_patient_are_in_one_split(terminal: Terminal, archive: Archive, out: Path) -> None:
    for seed in range(8):
        archive.signed(seed, DRAFTED, SIGNED, patient_identifier=f"P-{seed // 2}")
    facts = exported(terminal, out, "--validation", "0.3", "--test", "0.3")
    cases = read_manifest(out)
    assert len(cases) == 8 and len({case.split for case in cases}) > 1
    assert check(cases).ok
    assert facts["patients"] == 4 == len({(case.patient_id, case.split) for case in cases})


def test_pairs_come_from_patients_of_the_training_split_alone(terminal: Terminal, archive: Archive, out: Path) -> None:
    for seed in range(8):
        archive.signed(seed, DRAFTED, SIGNED, patient_identifier=f"P-{seed}")
    exported(terminal, out, "--validation", "0.3", "--test", "0.3")
    trained = {case.case_id for case in read_manifest(out, "train")}
    assert {pair.case_id for pair in read_pairs(out / PAIRS)} == trained
    assert 0 < len(trained) < 8


def test_each_region_is_a_case_with_the_sentences_about_it(terminal: Terminal, archive: Archive, out: Path) -> None:
    regions = ("chest", "abdomen")
    draft = [Sentence(Section.FINDINGS, f"The {region} is normal.", region=region) for region in regions]
    study_id = archive.drafted(draft, [ct(1, regions=regions)])
    archive.sign(study_id, [sentence("The chest is normal.", region="chest"), sentence("Ascites.", region="abdomen")])
    archive.decide(study_id)
    exported(terminal, out)
    chest, abdomen = read_manifest(out)
    assert (chest.answer, abdomen.answer) == ("FINDINGS:\nThe chest is normal.", "FINDINGS:\nAscites.")
    assert chest.image == abdomen.image and "abdomen only" in abdomen.question
    assert [pair.case_id for pair in read_pairs(out / PAIRS)] == [abdomen.case_id]
    assert check([chest, abdomen]).ok


def test_a_sentence_of_no_region_keeps_a_study_of_several_regions_out(
    terminal: Terminal, archive: Archive, out: Path
) -> None:
    study_id = archive.drafted([], [ct(1, regions=("chest", "abdomen"))])
    archive.sign(study_id, [sentence("The chest is normal.", region="chest"), sentence("No change.")])
    archive.decide(study_id)
    assert exported(terminal, out)["left_out"] == {NotUsable.REGIONLESS: 1}


def test_what_retention_took_stays_in_an_export_that_had_it(terminal: Terminal, archive: Archive, out: Path) -> None:
    study_id = archive.signed(1, DRAFTED, SIGNED)
    exported(terminal, out)
    with terminal.database.write() as session:
        session.get_one(Study, study_id).model_input = None
    assert exported(terminal, out)["cases"] == 1
    assert exported(terminal, out.with_name("new"))["left_out"] == {NotUsable.PIXELS_GONE: 1}


def test_a_consent_that_is_taken_back_takes_the_study_out_of_the_folder(
    terminal: Terminal, archive: Archive, out: Path
) -> None:
    kept, gone = archive.signed(1, DRAFTED, SIGNED), archive.signed(2, DRAFTED, SIGNED)
    exported(terminal, out)
    terminal.run("study", "consent", "refused", gone)
    assert exported(terminal, out)["images_removed"] == 1
    assert len(read_manifest(out)) == len(list((out / IMAGES).iterdir())) == len(read_pairs(out / PAIRS)) == 1
    assert [event.study_id for event in events(terminal, "training_export")] == [kept, gone, kept]


def test_a_damaged_volume_is_counted_and_stops_nobody_else(terminal: Terminal, archive: Archive, out: Path) -> None:
    damaged = archive.signed(1, DRAFTED, SIGNED)
    archive.signed(2, DRAFTED, SIGNED)
    next((archive.store / "inputs" / damaged[:2] / damaged).glob("*.npz")).write_bytes(b"no volume")
    facts = exported(terminal, out)
    assert (facts["cases"], facts["left_out"]) == (1, {NotUsable.DAMAGED: 1})


def test_a_dry_run_counts_and_writes_nothing(terminal: Terminal, archive: Archive, out: Path) -> None:
    archive.signed(1, DRAFTED, SIGNED)
    facts = exported(terminal, out, "--dry-run", *ALL_TRAIN)
    assert (facts["cases"], facts["pairs"]) == (1, 1)
    assert not out.exists() and events(terminal, "training_export") == []


def test_a_folder_of_something_else_is_left_alone(terminal: Terminal, archive: Archive, out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    error = terminal.run("study", "export-training", str(out)).exception
    assert isinstance(error, StateError) and written(out) == [out / "thesis.txt"]


@pytest.mark.parametrize("content", ["", '{"key": "4f', "[]", '{"shares": {}}'])
def test_a_damaged_record_of_an_earlier_export_is_refused_in_words(
    terminal: Terminal, archive: Archive, out: Path, content: str
) -> None:
    exported(terminal, out)
    (out / RECORD).write_text(content)
    error = terminal.run("study", "export-training", str(out), *ALL_TRAIN).exception
    assert isinstance(error, StateError) and "export.json" in str(error) and "name a new folder" in str(error)


@pytest.mark.parametrize("killed", ["write_text", "replace"])
def test_a_run_that_is_killed_while_it_makes_its_folder_leaves_one_that_the_next_can_use(
    terminal: Terminal, archive: Archive, out: Path, monkeypatch: pytest.MonkeyPatch, killed: str
) -> None:
    archive.signed(1, DRAFTED, SIGNED)
    act = getattr(Path, killed)

    def kill(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.parent == out:
            raise KeyboardInterrupt
        return act(path, *arguments, **options)

    with monkeypatch.context() as killing:
        killing.setattr(Path, killed, kill)
        assert terminal.run("study", "export-training", str(out), *ALL_TRAIN).exit_code != 0
    assert exported(terminal, out)["cases"] == 1


def test_other_shares_or_another_key_are_refused_in_the_folder_of_an_earlier_export(
    terminal: Terminal, archive: Archive, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(terminal, out)
    error = terminal.run("study", "export-training", str(out), "--test", "0.2").exception
    assert isinstance(error, StateError) and "shares" in str(error)
    monkeypatch.setenv("MU2_TRAINING__PSEUDONYM_KEY", "other" * 8)
    error = terminal.run("study", "export-training", str(out), *ALL_TRAIN).exception
    assert isinstance(error, StateError) and "another pseudonym key" in str(error)


def test_only_its_owner_may_look_into_the_export(terminal: Terminal, archive: Archive, out: Path) -> None:
    archive.signed(1, DRAFTED, SIGNED)
    exported(terminal, out)
    assert out.stat().st_mode & 0o777 == 0o700


def test_a_consent_is_recorded_for_several_studies_and_audited(terminal: Terminal, archive: Archive) -> None:
    ids = [archive.drafted([Sentence(Section.FINDINGS, DRAFTED)], [ct(n)]) for n in range(2)]
    terminal.data("study", "consent", "given", *ids)
    assert {terminal.data("study", "show", study_id)["training_consent"] for study_id in ids} == {"given"}
    terminal.data("study", "consent", "refused", ids[0])
    told = [(event.study_id, event.detail["decision"]) for event in events(terminal, "training_consent")]
    assert told == [(ids[0], "given"), (ids[1], "given"), (ids[0], "refused")]
    assert terminal.data("study", "show", ids[0])["training_consent"] == "refused"


def test_a_wrong_id_records_no_consent_at_all(terminal: Terminal, archive: Archive) -> None:
    study_id = archive.drafted([Sentence(Section.FINDINGS, DRAFTED)], [ct(1)])
    assert isinstance(terminal.run("study", "consent", "given", study_id, "f" * 8).exception, NotFoundError)
    assert events(terminal, "training_consent") == []
    assert terminal.run("study", "consent", "perhaps", study_id).exit_code == 2


def test_the_model_would_read_back_the_sentences_that_were_signed() -> None:
    told = [
        sentence("The lungs are clear."),
        sentence("No effusion"),
        sentence("Normal heart."),
        sentence("Normal chest.", Section.IMPRESSION),
        sentence("Is a control needed?", Section.RECOMMENDATIONS),
    ]
    spans = split_report(report_text(told))
    assert [(span.section, span.text) for span in spans] == [(s.section.value, s.text) for s in told]


def test_the_settings_hide_the_key(archive: Archive) -> None:
    from worker.core import settings

    loaded = settings.load()
    assert loaded.training.pseudonym_key.get_secret_value() == KEY
    assert KEY not in json.dumps(loaded.model_dump(mode="json"))
