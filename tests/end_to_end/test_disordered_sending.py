"""A study as a bad day sends it: twice at once, shuffled, with slices that do not belong, again, and late."""

import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import _config

from dicom_listener import part10
from tests.dicom_listener.sending import connect
from tests.end_to_end import chaos_ledger
from tests.end_to_end.chaos_load import SentStudy
from tests.end_to_end.running_services import Services, save, settings
from tests.worker.hospital_site import slice_dataset, wait_for
from worker.core.records import (
    Attempt,
    AttemptOutcome,
    Disposition,
    Instance,
    Message,
    MessageState,
    ReportVersion,
    Stage,
    Study,
    StudyStatus,
)
from worker.delivery.mllp_receiver import MllpReceiver
from worker.imaging import stored
from worker.services import services as services_of
from worker.services import with_chosen_ports

SLICES = 24
LATE = 3  # of them come after the draft
HU_OF_FIRST_SLICE = 40  # in its middle; each next slice is one unit denser


@pytest.fixture
def services(tmp_path: Path, receiver: MllpReceiver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Services]:
    monkeypatch.setattr(_config, "STORE_SEND_CHUNKED_DATASET", True)  # the very bytes of the files
    destination = {"name": "ris", "host": "127.0.0.1", "port": receiver.port, "drafts": "R"}
    config = with_chosen_ports(settings(tmp_path / "home", hl7={"destinations": [destination]}))
    started = Services.start(config, services_of(config, review=False))
    yield started
    started.stop()


@dataclass
class Scanner:
    """One study, the slices that stray among its own, and what was acknowledged of all of them."""

    folder: Path
    uid: str = field(default_factory=lambda: str(generate_uid()))
    series: str = field(default_factory=lambda: str(generate_uid()))
    other_study: str = field(default_factory=lambda: str(generate_uid()))
    promised: list[SentStudy] = field(default_factory=list)  # one for each file that was sent

    def slices(self) -> list[Path]:
        """Its own slices from foot to head."""
        return [self._write(slice_dataset(self.uid, self.series, index)) for index in range(SLICES)]

    def strays(self, number: int) -> list[Path]:
        """A slice of another study, one of another series and one of another matrix, at places of slices of its own."""
        place = {"ImagePositionPatient": [0.0, 0.0, 3.0 * (5 + number)]}
        return [
            self._write(slice_dataset(self.other_study, str(generate_uid()), 500 + number, PatientID="OTHER", **place)),
            self._write(slice_dataset(self.uid, f"{self.series[:60]}.9", 510 + number, **place)),
            self._write(slice_dataset(self.uid, self.series, 520 + number, side=24, **place)),
        ]

    def impostor(self) -> Path:
        """Another picture under the SOP Instance UID of one of its slices."""
        dataset = slice_dataset(self.uid, self.series, 7)
        dataset.PixelData = bytes(len(dataset.PixelData))
        return self._write(dataset, "impostor")

    def send_by_two_at_once(self, port: int, paths: Sequence[Path]) -> None:
        """Both send all of them, each in an order of its own; both associations are open before the first slice goes."""
        associations = [connect(port, paths, calling=f"CT{number}") for number in range(2)]
        assert all(association.is_established for association in associations)
        statuses: list[tuple[Path, int]] = []

        def send(seed: int) -> None:
            for path in random.Random(seed).sample(list(paths), len(paths)):
                statuses.append((path, associations[seed].send_c_store(path).get("Status", -1)))
            associations[seed].release()

        threads = [threading.Thread(target=send, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(statuses) == sorted([(path, 0x0000) for path in paths] * 2)
        for path in paths:
            self.promised.append(SentStudy(self.uid, SLICES, {instance_uid(path): part10.read_file(path).sha256}))

    def _write(self, dataset: Dataset, name: str = "") -> Path:
        self.folder.mkdir(exist_ok=True)
        path = self.folder / (name or str(dataset.SOPInstanceUID))
        save(dataset, path)
        return path


def instance_uid(path: Path) -> str:
    return str(dcmread(path, stop_before_pixels=True).SOPInstanceUID)


def drafted(services: Services, uid: str, revision: int) -> Study:
    """The study's row once that revision is drafted and its message acknowledged."""

    def look() -> Study | None:
        study = services.study(uid)
        done = study is not None and study.status is StudyStatus.DRAFTED and study.revision == revision
        acknowledged = services.rows(Message, Message.state == MessageState.ACKNOWLEDGED)
        return study if done and len(acknowledged) == revision else None

    found = wait_for(look, 40, f"draft and message of revision {revision}")
    assert found is not None
    return found


def assert_volume_is_of(services: Services, study: Study, slices: int) -> None:
    """The model saw one volume of the study's own slices, each in its place, and no other."""
    assert study.model_input is not None
    (path,) = (services.settings.store_root / study.model_input).glob("volume-*.npz")
    hu = stored.load(path).hu
    assert hu.shape == (slices, 16, 16)
    assert np.array_equal(hu[:, 8, 8], HU_OF_FIRST_SLICE + np.arange(slices))


def test_a_study_is_drafted_once_a_revision_however_it_is_sent_and_no_slice_is_lost_or_misplaced(
    services: Services, receiver: MllpReceiver, tmp_path: Path
) -> None:
    port = services.settings.dicom.port
    scanner = Scanner(tmp_path / "scanner")
    own, strays = scanner.slices(), scanner.strays(0)

    scanner.send_by_two_at_once(port, [*own[:-LATE], *strays])
    assert_volume_is_of(services, drafted(services, scanner.uid, 1), SLICES - LATE)

    scanner.send_by_two_at_once(port, [*own[:-LATE], *strays, scanner.impostor()])
    assert drafted(services, scanner.uid, 1).model_input is not None

    late_strays = scanner.strays(1)
    scanner.send_by_two_at_once(port, [*own[-LATE:], *late_strays])
    study = drafted(services, scanner.uid, 2)
    assert_volume_is_of(services, study, SLICES)

    versions = services.rows(ReportVersion)
    assert sorted(version.study_revision for version in versions) == [1, 2]
    drafts = services.rows(Attempt, Attempt.study_id == study.id, Attempt.stage == Stage.DRAFT)
    assert [attempt.outcome for attempt in drafts] == [AttemptOutcome.DONE] * 2
    assert services.wait_for_status(scanner.other_study, StudyStatus.SKIPPED).id != study.id

    rows = services.rows(Instance)
    aside = [row.sop_instance_uid for row in rows if row.disposition is Disposition.CONFLICT]
    assert aside == [instance_uid(own[7])]
    assert len(rows) == len([*own, *strays, *late_strays]) + len(aside)

    verdict = chaos_ledger.Verdict()
    scanner.promised[-1].whole = True
    accepted = [message.control_id for message in receiver.received]
    with services.database.read() as session:
        chaos_ledger.examine(session, services.settings.store_root, scanner.promised, accepted, verdict)
    assert verdict.is_clean, verdict.notes
    assert verdict.counts["instances acknowledged"] == len(scanner.promised)
    assert len(accepted) == len(set(accepted)) == 2
