"""TLS: certificates asked for by setting, and silent clients that stop nobody."""

import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from dicom_listener.negotiation import Refusal
from dicom_listener.statuses import Status
from tests.dicom_listener.conftest import Certificates, Running
from tests.dicom_listener.sending import connect, ct, echo, eventually, send, silent
from tests.dicom_listener.test_hostile_peers import MOST_GROWTH_BYTES, resident_bytes
from worker.core.errors import SettingsError
from worker.core.records import AuditEvent
from worker.core.settings import Peer, Settings
from worker.doctor import peers


def context(certificates: Certificates, *, client: bool = False) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=certificates.ca)
    if client:
        made.load_cert_chain(certificates.client, certificates.client_key)
    return made


def test_study_arrives_by_tls(start: Callable[..., Running], certificates: Certificates) -> None:
    running = start(**certificates.settings)
    assert send(running.port, [ct(), ct()], tls_args=(context(certificates), "127.0.0.1")) == [Status.SUCCESS] * 2


def test_plain_sender_is_refused_in_words_that_it_reads_and_audited(
    start: Callable[..., Running], certificates: Certificates
) -> None:
    running = start(**certificates.settings)
    assert connect(running.port).is_rejected
    with running.sent.database.read() as session:
        (event,) = session.scalars(sa.select(AuditEvent)).all()
    assert (event.action, event.detail["reason"]) == ("association_refused", Refusal.TLS_REQUIRED.value)
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


def test_two_ports_take_who_speaks_plainly_and_who_speaks_tls(
    start: Callable[..., Running], certificates: Certificates
) -> None:
    running = start(**certificates.settings, tls_port=0)
    tls_port = running.listener.tls_port
    assert tls_port not in (None, running.port)
    options = {"tls_args": (context(certificates), "127.0.0.1")}
    assert send(running.port, [ct()]) + send(tls_port, [ct()], **options) == [Status.SUCCESS] * 2
    assert not echo(running.port, **options)
    assert connect(tls_port).is_rejected


def test_peer_who_must_speak_tls_is_refused_at_the_plain_port(
    start: Callable[..., Running], certificates: Certificates
) -> None:
    peers = (Peer(ae_title="PACS", tls=True), Peer(ae_title="SCANNER"))
    running = start(**certificates.settings, tls_port=0, peers=peers)
    assert connect(running.port).is_rejected
    assert echo(running.port, calling="SCANNER")
    assert echo(running.listener.tls_port, tls_args=(context(certificates), "127.0.0.1"))
    with running.sent.database.read() as session:
        (event,) = session.scalars(sa.select(AuditEvent)).all()
    assert event.detail["reason"] == Refusal.PEER_WITHOUT_TLS.value


@pytest.mark.parametrize("asks_for_certificates", [False, True])
def test_doctor_tries_both_ports(
    start: Callable[..., Running],
    settings: Callable[..., Settings],
    certificates: Certificates,
    asks_for_certificates: bool,
) -> None:
    running = start(**certificates.settings, tls_port=0, tls_ca=certificates.ca if asks_for_certificates else None)
    ports = {"port": running.port, "tls_port": running.listener.tls_port}
    found = {
        c.finding: c.outcome for c in peers.listener(settings(**certificates.settings, **ports)) if c.name == "listener"
    }
    assert found == {
        f"MU2 on 127.0.0.1:{running.port} answers C-ECHO": "ok",
        f"MU2 on 127.0.0.1:{running.listener.tls_port} by TLS answers C-ECHO": "ok",
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"tls_key": Path("key.pem")},
        {"peers": (Peer(ae_title="PACS", tls=True),)},
        {"tls_certificate": Path("no.pem")},
        {"tls_port": 0},
    ],
    ids=[
        "key without certificate",
        "peer that needs TLS without a certificate",
        "file that is not there",
        "port without certificate",
    ],
)
def test_half_made_tls_settings_are_a_clear_error(
    settings: Callable[..., Settings], changes: dict[str, object]
) -> None:
    from dicom_listener.server import Listener

    with pytest.raises(SettingsError, match="MU2_DICOM__TLS_"):
        Listener(settings(**changes), lambda _: None)
