"""A second encoding of an instance: the same pixels are a variant, other pixels a conflict that raises an alarm."""

from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import ImplicitVRLittleEndian, RLELossless, generate_uid

from tests.worker.hospital_site import Site, slice_dataset
from worker import tasks
from worker.core.records import AuditEvent, Disposition, Instance, Stage, StudyStatus
from worker.process import WorkerProcess


def encoded(dataset: Dataset, syntax: str, change: int = 0) -> Dataset:
    """The same object in another transfer syntax, one voxel changed by `change`."""
    if change:
        pixels = np.frombuffer(dataset.PixelData, "<u2").copy()
        pixels[7] += change
        dataset.PixelData = pixels.tobytes()
    if syntax == RLELossless:
        dataset.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
    else:
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    return dataset


def study_with_second_copy(site: Site, **how: Any) -> str:
    """A complete study whose slice 3 arrived again in another encoding."""
    uid, series = str(generate_uid()), str(generate_uid())
    study_id = site.receive(uid, [slice_dataset(uid, series, i) for i in range(12)])
    site.receive(uid, [encoded(slice_dataset(uid, series, 3), **how)])
    site.complete(study_id)
    return study_id


def dispositions(site: Site) -> set[Disposition]:
    return {i.disposition for i in site.rows(Instance)} - {Disposition.KEPT}


def test_same_pixels_in_another_syntax_stay_a_variant(site: Site, worker_process: WorkerProcess) -> None:
    for syntax in (RLELossless, ImplicitVRLittleEndian):
        study_with_second_copy(site, syntax=syntax)
    tasks.answer(worker_process, Stage.PREPARE, "task")
    assert dispositions(site) == {Disposition.VARIANT}
    assert not site.rows(AuditEvent, AuditEvent.action == "conflict")


def test_other_pixels_under_the_same_uid_raise_an_alarm_and_the_first_is_reported(
    site: Site, worker_process: WorkerProcess
) -> None:
    study_id = study_with_second_copy(site, syntax=RLELossless, change=1)
    tasks.answer(worker_process, Stage.PREPARE, "task")
    assert site.status(study_id) is StudyStatus.PREPARED
    assert dispositions(site) == {Disposition.CONFLICT}
    (event,) = site.rows(AuditEvent, AuditEvent.action == "conflict")
    assert (event.study_id, event.outcome, event.detail) == (study_id, "alarm", {"instances": 1})
    assert worker_process.metrics.registry.get_sample_value("mu2_instance_conflicts_total") == 1


def test_copy_that_does_not_decode_counts_as_other_content(site: Site, worker_process: WorkerProcess) -> None:
    study_with_second_copy(site, syntax=RLELossless)
    path = next(i.path for i in site.rows(Instance, Instance.disposition == Disposition.VARIANT))
    file = site.store / path
    file.write_bytes(file.read_bytes()[:-200])
    tasks.answer(worker_process, Stage.PREPARE, "task")
    assert dispositions(site) == {Disposition.CONFLICT}
