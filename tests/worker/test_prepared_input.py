"""What the stage `prepare` leaves in the store: each volume, and its picture to look at."""

import uuid
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.uid import generate_uid

from tests.worker.hospital_site import Site, slice_dataset
from worker import queues, tasks
from worker.core.errors import SettingsError
from worker.core.records import Stage, StudyStatus
from worker.imaging import preview, stored
from worker.process import WorkerProcess


def prepared(site: Site, worker: WorkerProcess, study_id: str) -> Path:
    """The folder of the study's model input, after the stage ran."""
    tasks.answer(worker, Stage.PREPARE, str(uuid.uuid4()))
    study = site.study(study_id)
    assert study.status is StudyStatus.PREPARED
    assert study.model_input is not None
    return site.store / study.model_input


def test_every_prepared_study_has_a_picture_of_its_volume(site: Site, worker_process: WorkerProcess) -> None:
    folder = prepared(site, worker_process, site.add_study(side=32))

    assert sorted(path.name for path in folder.iterdir()) == ["preview-01.png", "volume-01.npz"]
    drawn = preview.draw(stored.load(folder / "volume-01.npz"))
    with Image.open(folder / "preview-01.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(drawn))


def test_each_of_two_volumes_has_its_own_picture(site: Site, worker_process: WorkerProcess) -> None:
    uid, chest, abdomen = (str(generate_uid()) for _ in range(3))
    datasets = [slice_dataset(uid, chest, index, BodyPartExamined="CHEST") for index in range(12)]
    datasets += [slice_dataset(uid, abdomen, index, BodyPartExamined="ABDOMEN") for index in range(12)]
    for dataset in datasets[12:]:
        dataset.ImagePositionPatient[2] = float(dataset.ImagePositionPatient[2]) - 200
    study_id = site.receive(uid, datasets)
    site.complete(study_id)
    folder = prepared(site, worker_process, study_id)

    assert sorted(path.name for path in folder.glob("*.png")) == ["preview-01.png", "preview-02.png"]
    regions = [stored.load(path).regions for path in sorted(folder.glob("*.npz"))]
    assert sorted(regions) == [("abdomen",), ("chest",)]


def test_a_worker_with_impossible_rules_refuses_to_start_and_fails_no_study(site: Site) -> None:
    site.environment["MU2_IMAGING__NEVER_DESCRIPTIONS"] = '["("]'
    worker = WorkerProcess(site.settings(), queues.QUEUES, 8, site.doorbell())
    with pytest.raises(SettingsError, match="never_descriptions"):
        worker.start()
