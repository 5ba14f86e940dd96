"""C-STORE over real associations: what is kept, what is answered."""

import random
import threading
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import MRImageStorage, generate_uid
from pynetdicom import _config

from dicom_listener.statuses import Status
from tests.dicom_listener.conftest import Running
from tests.dicom_listener.sending import connect, ct, data_set_bytes, echo, eventually, send
from worker.core.records import Disposition, Priority
from worker.core.settings import Peer, QueueSettings

LOSSY = ["1.2.4.50", "1.2.4.51", "1.2.4.53", "1.2.4.55", "1.2.4.81", "1.2.4.91"]
LOSSLESS = ["1.2", "1.2.1", "1.2.1.99", "1.2.2", "1.2.4.57", "1.2.4.70", "1.2.4.80", "1.2.4.90", "1.2.4.201", "1.2.5"]
ODD = [
    "sr_basic_text_no_pixel_data",
    "sr_comprehensive3d_for_ct",
    "sr_xray_radiation_dose_minimal",
    "seg_for_ct",
    "dx_not_ct",
    "pr_grayscale_softcopy",
    "ect_perfusion_2frames_jpeg_ext_no_bot",
    "legacy_enhanced_ct_3frames_23x38",
    "ct1_j2k_lossless_signed",
    "ct2_j2k_lossless_hu_intercept0_10mm",
    "corrupt/ct_truncated_pixeldata",
    "corrupt/ct_jpegls_truncated",
    "corrupt/ct_no_geometry",
    "corrupt/ct_empty_patient_id_and_accession",
]


@pytest.fixture(autouse=True)
def files_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """pynetdicom sends a file's bytes without decoding them."""
    monkeypatch.setattr(_config, "STORE_SEND_CHUNKED_DATASET", True)


def test_echo_is_answered(running: Running) -> None:
    assert echo(running.port)


def test_stored_file_is_a_dicom_file_with_the_data_set_that_was_sent(running: Running) -> None:
    image = ct()
    assert send(running.port, [image]) == [Status.SUCCESS]
    (row,) = running.sent.instances()
    stored = dcmread(running.sent.root / row.path)
    assert stored == image
    assert stored.file_meta.MediaStorageSOPInstanceUID == image.SOPInstanceUID
    assert stored.file_meta.TransferSyntaxUID == image.file_meta.TransferSyntaxUID


def test_rows_say_what_the_header_says(running: Running) -> None:
    send(running.port, [ct(IssuerOfPatientID="SITE", SeriesDescription="Thorax")])
    (study,) = running.sent.studies()
    assert (study.patient_identifier, study.patient_authority, study.patient_name) == ("MRN-1", "SITE", "DOE^JANE")
    assert (str(study.patient_birth_date), study.patient_sex) == ("1950-01-02", "F")
    assert (study.accession, study.description, study.calling_ae) == ("A-1", "CT Chest", "PACS")
    assert str(study.study_time) == "2025-03-04 05:06:07"


def test_rows_say_what_was_ordered_and_a_code_too_long_for_its_column_is_none(running: Running) -> None:
    code, request = Dataset(), Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "24627-2", "LN", "CT Chest"
    request.RequestedProcedureCodeSequence, request.ReasonForTheRequestedProcedure = [code], "cough"
    send(running.port, [ct(RequestAttributesSequence=[request], AdmissionID="V-1", RequestingPhysician="ASKS^ANN")])
    code.LongCodeValue = "9" * 65
    del code.CodeValue
    send(running.port, [ct(ProcedureCodeSequence=[code])])
    ordered, uncoded = running.sent.studies()
    if not ordered.visit:
        ordered, uncoded = uncoded, ordered
    assert (ordered.procedure_code, ordered.procedure_text, ordered.procedure_system) == ("24627-2", "CT Chest", "LN")
    assert (ordered.procedure_reason, ordered.visit, ordered.requesting_physician) == ("cough", "V-1", "ASKS^ANN")
    assert (uncoded.procedure_code, uncoded.procedure_text, uncoded.procedure_system) == ("", "", "")


def test_every_transfer_syntax_is_kept_byte_for_byte(running: Running, odd: Path) -> None:
    sources = {
        f"1.2.840.10008.{s}": odd / "transfer_syntax" / f"ctimage_1.2.840.10008.{s}.dcm" for s in LOSSLESS + LOSSY
    }
    assert send(running.port, sources.values()) == [Status.SUCCESS] * 16
    rows = {row.transfer_syntax_uid: row for row in running.sent.instances()}
    assert rows.keys() == sources.keys()
    for syntax, source in sources.items():
        assert data_set_bytes(running.sent.root / rows[syntax].path) == data_set_bytes(source), syntax


def test_same_instance_in_ten_encodings_keeps_the_first_and_notes_the_rest(running: Running, odd: Path) -> None:
    files = [odd / "transfer_syntax" / f"ctimage_1.2.840.10008.{syntax}.dcm" for syntax in LOSSLESS]
    assert send(running.port, files) == [Status.SUCCESS] * 10
    rows = running.sent.instances()
    assert [row.disposition for row in rows] == [Disposition.KEPT] + [Disposition.VARIANT] * 9
    assert rows[0].transfer_syntax_uid == "1.2.840.10008.1.2"
    assert len(running.sent.files()) == 10


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ct_cyrillic_ir144", "Люкceмбypг"),
        ("ct_utf8_ir192", "Müller-Łukaszewicz^Jürgen=王^小明"),
        ("ct_gb18030", "Wang^XiaoDong=王^小东"),
        ("ct_latin1_ir100", "Buc^Jérôme"),
        ("ct_japanese_ir87", "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("ct_undeclared_utf8", "Müller^Jürgen"),
    ],
)
def test_names_are_read_in_their_character_set(running: Running, odd: Path, name: str, expected: str) -> None:
    assert send(running.port, [odd / "charset" / f"{name}.dcm"]) == [Status.SUCCESS]
    assert running.sent.studies()[0].patient_name == expected


def test_odd_objects_whose_headers_are_whole_are_kept_as_they_came(running: Running, odd: Path) -> None:
    sources = [odd / f"{name}.dcm" for name in ODD]
    assert send(running.port, sources) == [Status.SUCCESS] * len(ODD)
    stored = [data_set_bytes(running.sent.root / row.path) for row in running.sent.instances()]
    for source in sources:
        assert data_set_bytes(source) in stored, source.name


def test_header_that_breaks_off_is_refused_and_the_association_goes_on(running: Running, odd: Path) -> None:
    cut = odd / "corrupt" / "ct_header_cut.dcm"
    assert send(running.port, [cut, ct()]) == [Status.CANNOT_UNDERSTAND, Status.SUCCESS]
    assert len(running.sent.files()) == len(running.sent.instances()) == 1


def test_other_objects_are_refused_where_a_site_wants_ct_only(start: Any, odd: Path) -> None:
    running = start(keep_other_objects=False)
    association = connect(running.port, [odd / "dx_not_ct.dcm"])
    accepted = [str(c.abstract_syntax) for c in association.accepted_contexts]
    association.release()
    assert accepted == ["1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.1"]


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"StudyInstanceUID": "../../etc/passwd"}, Status.INVALID_STUDY_OR_SERIES_UID),
        ({"SeriesInstanceUID": "1.2..3"}, Status.INVALID_STUDY_OR_SERIES_UID),
        ({"StudyInstanceUID": ""}, Status.MISSING_STUDY_OR_SERIES_UID),
        ({"SeriesInstanceUID": None}, Status.MISSING_STUDY_OR_SERIES_UID),
    ],
)
def test_uid_that_is_none_has_its_own_status_and_writes_nothing(
    running: Running, tmp_path: Path, changes: dict[str, Any], status: Status
) -> None:
    before = {p for p in tmp_path.rglob("*") if "home/mu2.sqlite" not in str(p)}
    assert send(running.port, [ct(**changes), ct()]) == [status, Status.SUCCESS]
    (kept,) = running.sent.files()
    after = {p for p in tmp_path.rglob("*") if "home/mu2.sqlite" not in str(p)}
    assert after - before <= {kept, kept.parent, kept.parent.parent, running.sent.root / "recovered"}


def test_request_whose_instance_uid_is_a_path_is_refused(running: Running) -> None:
    association = connect(running.port)
    image = ct()
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = "../../../etc/passwd"
    assert association.send_c_store(image).Status == Status.INVALID_SOP_INSTANCE
    assert association.send_c_store(ct()).Status == Status.SUCCESS
    association.release()
    assert len(running.sent.files()) == 1


def test_data_set_of_another_class_than_its_request_is_refused(running: Running, tmp_path: Path) -> None:
    image = ct(SOPClassUID=MRImageStorage)
    image.file_meta.MediaStorageSOPClassUID = ct().SOPClassUID
    image.save_as(tmp_path / "mr.dcm", enforce_file_format=False)
    assert send(running.port, [tmp_path / "mr.dcm", ct()]) == [Status.DATA_SET_DOES_NOT_MATCH, Status.SUCCESS]
    assert len(running.sent.files()) == 1


def test_instance_sent_twice_is_acknowledged_and_kept_once(running: Running) -> None:
    image = ct()
    assert send(running.port, [image, image]) + send(running.port, [image]) == [Status.SUCCESS] * 3
    assert len(running.sent.instances()) == len(running.sent.files()) == 1
    assert running.sent.counted("mu2_dicom_duplicates_total") == 2


def test_other_pixels_under_the_same_uid_are_kept_aside_and_raise_an_alarm(running: Running) -> None:
    first = ct()
    second = ct(first.StudyInstanceUID, SOPInstanceUID=first.SOPInstanceUID)
    assert send(running.port, [first, second]) == [Status.SUCCESS] * 2
    rows = running.sent.instances()
    assert [row.disposition for row in rows] == [Disposition.KEPT, Disposition.CONFLICT]
    assert dcmread(running.sent.root / rows[0].path).PixelData == first.PixelData
    assert dcmread(running.sent.root / rows[1].path).PixelData == second.PixelData
    assert running.sent.counted("mu2_dicom_conflicts_total") == 1


def test_one_study_from_two_associations_at_once_in_any_order_is_one_study(running: Running) -> None:
    study = generate_uid()
    images = [ct(study, InstanceNumber=n) for n in range(30)]
    statuses: list[int] = []

    def deliver(seed: int) -> None:
        mine = random.Random(seed).sample(images, len(images))
        statuses.extend(send(running.port, mine))

    threads = [threading.Thread(target=deliver, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [Status.SUCCESS] * 60
    assert len(running.sent.studies()) == 1
    assert len(running.sent.instances()) == len(running.sent.files()) == 30


def test_real_series_arrives_whole(running: Running, real_series: list[Path]) -> None:
    assert send(running.port, real_series) == [Status.SUCCESS] * 28
    stored = {data_set_bytes(file) for file in running.sent.files()}
    assert stored == {data_set_bytes(file) for file in real_series}


def test_instance_larger_than_the_buffer_arrives_whole(running: Running) -> None:
    image = ct(PixelData=random.Random(0).randbytes(3_000_000))
    assert send(running.port, [image]) == [Status.SUCCESS]
    assert dcmread(running.sent.files()[0]).PixelData == image.PixelData


def test_header_longer_than_what_is_read_first_is_read_on(running: Running) -> None:
    image = ct(StudyInstanceUID=generate_uid())
    image.add_new(0x00090010, "LO", "MU2 TEST")
    image.add_new(0x00091001, "OB", bytes(200_000))
    assert send(running.port, [image]) == [Status.SUCCESS]
    assert running.sent.studies()[0].study_instance_uid == image.StudyInstanceUID


@pytest.mark.parametrize(
    ("changes", "calling", "rank"),
    [
        ({}, "PACS", Priority.ROUTINE),
        ({"RequestedProcedurePriority": "STAT"}, "PACS", Priority.STAT),
        ({"add": (0x0032000C, "CS", "HIGH")}, "PACS", Priority.URGENT),
        ({"StudyDescription": "CT head trauma room"}, "PACS", Priority.URGENT),
        ({}, "EMERGENCY", Priority.STAT),
    ],
)
def test_priority_comes_from_the_peer_the_request_or_a_rule(
    start: Any, changes: dict[str, Any], calling: str, rank: Priority
) -> None:
    peers = (Peer(ae_title="EMERGENCY", priority="stat"), Peer(ae_title="PACS"))
    running = start(peers=peers, queue=QueueSettings(priority_rules={"trauma": "urgent"}))
    add = changes.pop("add", None)
    image = ct(**changes)
    if add:
        image.add_new(*add)
    send(running.port, [image], calling=calling)
    assert running.sent.studies()[0].priority == rank


def test_statuses_are_counted_by_name(running: Running) -> None:
    send(running.port, [ct(), ct(StudyInstanceUID="x")])
    eventually(lambda: running.sent.counted("mu2_dicom_instances_total", status="success") == 1)
    assert running.sent.counted("mu2_dicom_instances_total", status="invalid_study_or_series_uid") == 1
