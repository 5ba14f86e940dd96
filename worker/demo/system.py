"""The whole system on embedded parts: the real services, and a receiver in the place of the hospital's."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from worker.core.database import Database
from worker.core.settings import (
    DatabaseSettings,
    Destination,
    DicomSettings,
    Hl7Settings,
    QueueSettings,
    ReviewSettings,
    Settings,
    StoreSettings,
)
from worker.delivery.mllp_receiver import MllpReceiver
from worker.services import services, with_chosen_ports
from worker.supervisor import Supervisor

QUIET_SECONDS = 1.0  # a demo need not wait for a scanner's pause
SWEEP_SECONDS = 0.5
STORE_FLOOR_BYTES = 50_000_000
READY_SECONDS = 120.0
DEFAULT_HOME = Settings.model_fields["home"].default


@dataclass(frozen=True)
class System:
    """The running parts."""

    settings: Settings
    database: Database
    receiver: MllpReceiver
    supervisor: Supervisor


@contextmanager
def running(base: Settings, *, review: bool) -> Iterator[System]:
    """The services of `base` on loopback ports, with broker, database and receiver of their own.

    Of `base` the model, imaging, worker and log settings count, and MU2_HOME when it is set; otherwise everything lies
    in a temporary folder, which goes with the system and stays only when something went wrong. Raises `ServiceError`.
    """
    temporary = Path(tempfile.mkdtemp(prefix="mu2-demo-")) if base.home == DEFAULT_HOME else None
    with MllpReceiver() as receiver:
        settings = with_chosen_ports(_settings(base, temporary or base.home, receiver.port))
        supervisor = Supervisor(settings, services(settings, review=review), log_folder=settings.home / "logs")
        with supervisor:
            supervisor.wait_ready(READY_SECONDS)
            database = Database.from_settings(settings)
            try:
                yield System(settings, database, receiver, supervisor)
            finally:
                database.close()
    if temporary is not None:
        shutil.rmtree(temporary)


def _settings(base: Settings, home: Path, receiver_port: int) -> Settings:
    receiver = Destination(
        name="demo",
        host="127.0.0.1",
        port=receiver_port,
        drafts="R",
        sending_facility="DEMO",
        receiving_application="RIS",
        receiving_facility="DEMO",
    )
    return base.model_copy(
        update={
            "home": home,
            "dicom": DicomSettings(port=0, metrics_port=0, quiet_seconds=QUIET_SECONDS),
            "store": StoreSettings(floor_bytes=STORE_FLOOR_BYTES),
            "queue": QueueSettings(sweep_seconds=SWEEP_SECONDS),
            "database": DatabaseSettings(),
            "model": base.model.model_copy(update={"allow_not_clinical": True}),  # its receiver is the demo's own
            "hl7": Hl7Settings(destinations=(receiver,), assigning_authority="DEMO"),
            "review": ReviewSettings(port=0, metrics_port=0),
            "worker": base.worker.model_copy(update={"metrics_port": 0, "metrics_host": "127.0.0.1"}),
        }
    )
