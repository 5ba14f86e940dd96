"""A real listener on a loopback port, and senders to talk to it."""

import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme

from dicom_listener.server import Listener, quieten_libraries
from tests.dicom_listener.sending import Sent
from worker.core.settings import DicomSettings, QueueSettings, Settings, StoreSettings


@pytest.fixture(scope="session", autouse=True)
def quiet_libraries() -> None:
    quieten_libraries()


@pytest.fixture
def settings(sqlite_template: Path, tmp_path: Path) -> Callable[..., Settings]:
    """Settings of a listener in the test's own folder, its database made; keywords change the DICOM part."""

    def make(*, store: StoreSettings | None = None, queue: QueueSettings | None = None, **dicom: Any) -> Settings:
        home = tmp_path / "home"
        if not home.exists():
            home.mkdir()
            shutil.copy(sqlite_template, home / "mu2.sqlite")
        values = {"port": 0, "metrics_port": 0, "quiet_seconds": 60.0, "idle_seconds": 10.0, **dicom}
        return Settings(
            home=home,
            dicom=DicomSettings(**values),
            store=store or StoreSettings(floor_bytes=0),
            queue=queue or QueueSettings(),
        )

    return make


class Running:
    """A started listener and what it submitted."""

    def __init__(self, settings: Settings) -> None:
        self.submitted: list[str] = []
        self.listener = Listener(settings, self.submitted.append)
        self.listener.start()
        self.port = self.listener.port
        self.sent = Sent(self.listener, settings)

    def stop(self) -> None:
        self.listener.close()


@pytest.fixture
def start(settings: Callable[..., Settings]) -> Iterator[Callable[..., Running]]:
    """Starts listeners with the settings given and stops them at the end."""
    running: list[Running] = []

    def begin(**changes: Any) -> Running:
        running.append(Running(settings(**changes)))
        return running[-1]

    yield begin
    for one in running:
        one.stop()


@pytest.fixture
def running(start: Callable[..., Running]) -> Running:
    """A listener with plain settings."""
    return start()


@pytest.fixture(scope="session")
def odd(shared_data: Path) -> Path:
    """The folder of odd DICOM objects."""
    return shared_data / "ct" / "odd"


@pytest.fixture(scope="session")
def real_series(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The 28 files of a real head CT."""
    folder = tmp_path_factory.mktemp("series")
    with tarfile.open(shared_data / "ct" / "series" / "ge_head_tilt_gap_28.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return sorted(p for p in folder.rglob("*") if p.is_file())


@dataclass(frozen=True)
class Certificates:
    """Files of a CA, of the listener and of a client."""

    ca: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path

    @property
    def settings(self) -> dict[str, Path]:
        return {"tls_certificate": self.server, "tls_key": self.server_key}


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    made = Certificates(*(folder / name for name in ("ca.pem", "server.pem", "server.key", "client.pem", "client.key")))
    authority.cert_pem.write_to_path(made.ca)
    for certificate, chain, key in (
        (authority.issue_cert("127.0.0.1", "localhost"), made.server, made.server_key),
        (authority.issue_cert("pacs.hospital"), made.client, made.client_key),
    ):
        certificate.private_key_pem.write_to_path(key)
        for number, blob in enumerate(certificate.cert_chain_pems):
            blob.write_to_path(chain, append=number > 0)
    return made
