"""TLS: certificates asked for by setting, and silent clients that stop nobody."""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from dicom_listener.statuses import Status
from tests.dicom_listener.conftest import Running
from tests.dicom_listener.sending import ct, echo, eventually, send
from tests.dicom_listener.test_hostile_peers import MOST_GROWTH_BYTES, resident_bytes, silent
from worker.core.errors import SettingsError
from worker.core.settings import Peer, Settings


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


def context(certificates: Certificates, *, client: bool = False) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=certificates.ca)
    if client:
        made.load_cert_chain(certificates.client, certificates.client_key)
    return made


def test_study_arrives_by_tls(start: Callable[..., Running], certificates: Certificates) -> None:
    running = start(**certificates.settings)
    assert send(running.port, [ct(), ct()], tls_args=(context(certificates), "127.0.0.1")) == [Status.SUCCESS] * 2


def test_plain_sender_is_not_understood_by_a_tls_port(
    start: Callable[..., Running], certificates: Certificates
) -> None:
    running = start(**certificates.settings, artim_seconds=1.0)
    assert not echo(running.port)
    assert echo(running.port, tls_args=(context(certificates), "127.0.0.1"))


def test_sender_without_certificate_is_refused_where_one_is_required(
    start: Callable[..., Running], certificates: Certificates
) -> None:
    running = start(**certificates.settings, tls_ca=certificates.ca)
    assert not echo(running.port, tls_args=(context(certificates), "127.0.0.1"))
    assert echo(running.port, tls_args=(context(certificates, client=True), "127.0.0.1"))


def test_fifty_silent_tls_clients_stop_nobody(start: Callable[..., Running], certificates: Certificates) -> None:
    running = start(**certificates.settings)
    options = {"tls_args": (context(certificates), "127.0.0.1")}
    assert echo(running.port, **options)
    before = resident_bytes()
    hello_begins = bytes.fromhex("16030100")
    with silent(running.port, 50), silent(running.port, 50, hello_begins):
        assert send(running.port, [ct() for _ in range(3)], **options) == [Status.SUCCESS] * 3
        assert echo(running.port, **options)
        assert resident_bytes() - before < MOST_GROWTH_BYTES


def test_tls_handshake_has_its_time_out(start: Callable[..., Running], certificates: Certificates) -> None:
    running = start(**certificates.settings, artim_seconds=0.5)
    with silent(running.port, 3, bytes.fromhex("16030100")):
        eventually(lambda: running.sent.counted("mu2_dicom_associations_total", outcome="stalled") == 3)


@pytest.mark.parametrize(
    "changes",
    [{"tls_key": Path("key.pem")}, {"peers": (Peer(ae_title="PACS", tls=True),)}, {"tls_certificate": Path("no.pem")}],
    ids=["key without certificate", "peer that needs TLS without a certificate", "file that is not there"],
)
def test_half_made_tls_settings_are_a_clear_error(
    settings: Callable[..., Settings], changes: dict[str, object]
) -> None:
    from dicom_listener.server import Listener

    with pytest.raises(SettingsError, match="MU2_DICOM__TLS_"):
        Listener(settings(**changes), lambda _: None)
