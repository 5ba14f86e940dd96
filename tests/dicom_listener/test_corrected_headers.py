"""An instance sent again with another header: a correction counts, another picture stays a conflict, nothing is lost."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
from pydicom import Dataset, FileDataset, Sequence, dcmread
from pydicom.uid import ComprehensiveSRStorage, ExplicitVRBigEndian, generate_uid

from dicom_listener import arrivals
from dicom_listener.arrivals import Ranking
from dicom_listener.statuses import Status
from tests.dicom_listener.conftest import Running
from tests.dicom_listener.sending import ct, send
from worker.core import studies
from worker.core.records import AuditEvent, Disposition, Instance, StudyStatus

KEPT, VARIANT, CONFLICT = Disposition.KEPT, Disposition.VARIANT, Disposition.CONFLICT


def again(image: FileDataset, **changes: Any) -> FileDataset:
    """The same instance with other words in its header."""
    copy = deepcopy(image)
    for keyword, value in changes.items():
        setattr(copy, keyword, value)
    return copy


def dispositions(running: Running) -> list[Disposition]:
    return [row.disposition for row in running.sent.instances()]


def complete(running: Running) -> None:
    with running.sent.database.write() as session:
        studies.complete(session, studies.get(session, running.sent.studies()[0].id))


def audited(running: Running) -> list[AuditEvent]:
    with running.sent.database.read() as session:
        return list(session.query(AuditEvent).filter(AuditEvent.action == "correction"))


@pytest.mark.parametrize("processes", [1, 2])
def test_corrected_name_and_accession_count_and_open_a_revision(start: Callable[..., Running], processes: int) -> None:
    running = start(processes=processes)
    study = generate_uid()
    images = [ct(study, InstanceNumber=n) for n in range(3)]
    send(running.port, images)
    complete(running)
    corrected = [again(image, PatientName="ROE^MARY", AccessionNumber="A-2", PatientID="MRN-2") for image in images]
    assert send(running.port, corrected) == [Status.SUCCESS] * 3
    (row,) = running.sent.studies()
    assert (row.patient_name, row.accession, row.patient_identifier) == ("ROE^MARY", "A-2", "MRN-2")
    assert (row.status, row.revision) == (StudyStatus.RECEIVING, 2)
    assert sorted(dispositions(running)) == [KEPT] * 3 + [VARIANT] * 3
    (event,) = audited(running)
    assert (event.actor, event.study_id, event.detail) == ("ae:PACS", row.id, {"revision": 2})
    complete(running)
    assert running.sent.studies()[0].status is StudyStatus.COMPLETE


def test_correction_loses_no_byte_and_raises_no_alarm(running: Running) -> None:
    first = ct()
    send(running.port, [first, again(first, PatientName="ROE^MARY")])
    by_disposition = {row.disposition: dcmread(running.sent.root / row.path) for row in running.sent.instances()}
    assert by_disposition[VARIANT].PatientName == "DOE^JANE"
    assert by_disposition[KEPT].PatientName == "ROE^MARY"
    assert running.sent.counted("mu2_dicom_corrections_total") == 1
    assert running.sent.counted("mu2_dicom_conflicts_total") == 0


def test_correction_sent_twice_is_one_correction(running: Running) -> None:
    first = ct()
    corrected = again(first, PatientName="ROE^MARY")
    assert send(running.port, [first, corrected, corrected]) == [Status.SUCCESS] * 3
    assert dispositions(running) == [VARIANT, KEPT]
    assert running.sent.counted("mu2_dicom_duplicates_total") == 1


def test_study_is_not_complete_while_its_instances_name_two_patients(running: Running) -> None:
    study = generate_uid()
    images = [ct(study), ct(study)]
    send(running.port, [*images, again(images[0], PatientID="MRN-2")])
    complete(running)
    assert running.sent.studies()[0].status is StudyStatus.FAILED
    send(running.port, [again(images[1], PatientID="MRN-2")])
    complete(running)
    assert running.sent.studies()[0].status is StudyStatus.COMPLETE


def test_old_copy_from_another_sender_changes_nothing_and_the_corrector_may_take_it_back(running: Running) -> None:
    first = ct()
    corrected = again(first, PatientName="ROE^MARY")
    send(running.port, [first], calling="SCANNER")
    send(running.port, [corrected], calling="PACS")
    assert send(running.port, [first], calling="SCANNER") == [Status.SUCCESS]
    assert running.sent.studies()[0].patient_name == "ROE^MARY"
    assert send(running.port, [first], calling="PACS") == [Status.SUCCESS]
    assert running.sent.studies()[0].patient_name == "DOE^JANE"
    assert dispositions(running) == [KEPT, VARIANT]


def test_correction_that_was_taken_back_may_be_made_once_more(running: Running) -> None:
    first = ct()
    corrected = again(first, PatientName="ROE^MARY")
    send(running.port, [first], calling="SCANNER")
    send(running.port, [corrected, first, corrected], calling="PACS")
    assert running.sent.studies()[0].patient_name == "ROE^MARY"
    assert send(running.port, [first], calling="SCANNER") == [Status.SUCCESS]
    assert running.sent.studies()[0].patient_name == "ROE^MARY"


def test_study_whose_every_instance_loses_its_patient_names_none(running: Running) -> None:
    study = generate_uid()
    images = [ct(study, PatientID="MRN-1") for _ in range(2)]
    nobody = [again(image, PatientID="", PatientName="UNKNOWN") for image in images]
    send(running.port, [*images, nobody[0]])
    assert running.sent.studies()[0].patient_identifier == "MRN-1"  # the other instance says so
    send(running.port, [nobody[1]])
    (row,) = running.sent.studies()
    assert (row.patient_identifier, row.patient_name) == ("", "UNKNOWN")


def test_accession_is_corrected_without_a_patient_id(running: Running) -> None:
    first = ct(PatientID="", AccessionNumber="A-1")
    send(running.port, [first, again(first, AccessionNumber="A-2")])
    assert running.sent.studies()[0].accession == "A-2"


def test_object_whose_earlier_file_is_gone_is_stored_with_an_alarm(running: Running) -> None:
    first = ct()
    send(running.port, [first])
    (running.sent.root / running.sent.instances()[0].path).unlink()
    assert send(running.port, [again(first, PatientName="ROE^MARY")]) == [Status.SUCCESS]
    assert dispositions(running) == [KEPT, CONFLICT]


@pytest.mark.parametrize(
    "changes",
    [
        {"PixelData": bytes(512)},
        {"RescaleSlope": 2},
        {"ImagePositionPatient": [0, 0, 5]},
        {"PatientPosition": "FFS"},
        {"SeriesInstanceUID": "1.2.3.4"},
        {"BitsStored": 16},
        {"ImageType": ["DERIVED", "SECONDARY"]},
        {"StudyInstanceUID": "1.2.3.5"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_the_picture_or_its_place_stays_a_conflict(running: Running, changes: dict[str, Any]) -> None:
    first = ct()
    send(running.port, [first, again(first, PatientName="ROE^MARY", **changes)])
    assert dispositions(running) == [KEPT, CONFLICT]
    assert running.sent.studies()[0].patient_name == "DOE^JANE"
    assert running.sent.counted("mu2_dicom_conflicts_total") == 1


def test_report_object_may_change_its_patient_but_not_its_content(running: Running) -> None:
    def report(text: str, name: str) -> FileDataset:
        item = Dataset()
        item.ValueType, item.TextValue = "TEXT", text
        found = ct(
            "1.2.9", SOPInstanceUID="1.2.9.1", PatientName=name, SOPClassUID=ComprehensiveSRStorage, PixelData=None
        )
        found.ContentSequence = Sequence([item])
        return found

    send(running.port, [report("clear", "DOE^JANE"), report("clear", "ROE^MARY"), report("nodule", "ROE^MARY")])
    assert dispositions(running) == [VARIANT, KEPT, CONFLICT]


def test_correction_in_big_endian_is_told_as_well(running: Running) -> None:
    first = ct(PixelData=bytes(range(256)) * 2)
    first.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    first["PixelData"].VR = "OW"
    send(running.port, [first, again(first, PatientName="ROE^MARY")])
    assert dispositions(running) == [VARIANT, KEPT]


def test_correction_whose_rows_were_lost_is_recovered(running: Running) -> None:
    first = ct()
    send(running.port, [first, again(first, PatientName="ROE^MARY")])
    with running.sent.database.write() as session:
        session.query(Instance).delete()
    store, database = running.listener._reception.store, running.sent.database
    (running.sent.root / "recovered").unlink(missing_ok=True)
    assert arrivals.recover(store, database, Ranking({}), running.listener.metrics) == 2
    assert dispositions(running) == [VARIANT, KEPT]
    assert running.sent.studies()[0].patient_name == "ROE^MARY"
