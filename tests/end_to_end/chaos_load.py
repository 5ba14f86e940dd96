"""What the hospital does meanwhile: PACS that send studies and send again what was not acknowledged, for the ledger."""

import hashlib
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE, _config
from pynetdicom.association import Association
from pynetdicom.dsutils import split_dataset

from tests.end_to_end.running_services import save
from tests.worker.hospital_site import slice_dataset

SLICES = 12
SIDE = 48
ANSWER_SECONDS = 8.0
RETRY_SECONDS = 0.3
LATE_SECONDS = 2.0
PAUSE_SECONDS = (0.2, 1.2)  # between two studies of one PACS
LATE_SHARE = 0.2  # of the studies have a slice that comes after the study was complete
AGAIN_SHARE = 0.2  # of the studies are sent twice


@dataclass
class SentStudy:
    """One study as its PACS knows it."""

    uid: str
    slices: int
    acknowledged: dict[str, str] = field(default_factory=dict)  # SOP Instance UID → SHA-256 of the data set sent
    whole: bool = False  # every instance was acknowledged


class Pacs(threading.Thread):
    """Sends one study after another until `finish`, then ends the one in hand."""

    def __init__(self, number: int, seed: int, port: int, folder: Path) -> None:
        super().__init__(name=f"pacs-{number}", daemon=True)
        self.studies: list[SentStudy] = []
        self.is_sending = threading.Event()  # an association is in the middle of a study
        self.broken_associations = 0
        self._random = random.Random(f"{seed}-{number}")
        self._port = port
        self._folder = folder / self.name
        self._finish = threading.Event()

    def run(self) -> None:
        """Sends until told to finish."""
        _config.STORE_SEND_CHUNKED_DATASET = True
        while not self._finish.is_set():
            self._one_study()
            self._finish.wait(self._random.uniform(*PAUSE_SECONDS))

    def finish(self, seconds: float) -> None:
        """Lets the study in hand be sent to its end."""
        self._finish.set()
        self.join(seconds)

    def _one_study(self) -> None:
        study = SentStudy(str(generate_uid()), SLICES)
        self.studies.append(study)
        files = self._write(study)
        self._random.shuffle(files)
        late = files[:1] if self._random.random() < LATE_SHARE else []
        self._send(study, files[len(late) :])
        if late:
            time.sleep(LATE_SECONDS)
            self._send(study, late)
        study.whole = len(study.acknowledged) == SLICES
        if self._random.random() < AGAIN_SHARE:
            self._send(study, files)
        for path in files:
            path.unlink()

    def _write(self, study: SentStudy) -> list[Path]:
        series = str(generate_uid())
        self._folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for index in range(SLICES):
            dataset = slice_dataset(study.uid, series, index, side=SIDE, AccessionNumber=study.uid[-16:])
            path = self._folder / f"{dataset.SOPInstanceUID}"
            save(dataset, path)
            paths.append(path)
        return paths

    def _send(self, study: SentStudy, files: list[Path]) -> None:
        """Sends these files, and again those that were not acknowledged, until all are."""
        waiting = list(files)
        while waiting:
            association = self._associate()
            if not association.is_established:
                time.sleep(RETRY_SECONDS)
                continue
            self.is_sending.set()
            waiting = [path for path in waiting if not self._send_one(association, study, path)]
            self.is_sending.clear()
            if association.is_established:
                association.release()
            if waiting:
                self.broken_associations += 1
                time.sleep(RETRY_SECONDS)

    def _associate(self) -> Association:
        entity = AE(ae_title=self.name.upper())
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = ANSWER_SECONDS
        entity.connection_timeout = ANSWER_SECONDS
        entity.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
        return entity.associate("127.0.0.1", self._port, ae_title="MU2")

    def _send_one(self, association: Association, study: SentStudy, path: Path) -> bool:
        """Whether the listener said that it has this instance."""
        if not association.is_established:
            return False
        try:
            answer = association.send_c_store(path)
        except (RuntimeError, ValueError):
            return False
        if answer.get("Status") != 0x0000:
            return False
        meta, offset = split_dataset(path)
        study.acknowledged[str(meta.MediaStorageSOPInstanceUID)] = hashlib.sha256(
            path.read_bytes()[offset:]
        ).hexdigest()
        return True
