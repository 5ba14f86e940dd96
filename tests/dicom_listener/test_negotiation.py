"""Who may connect, and what for."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RJ

from dicom_listener.negotiation import TRANSFER_SYNTAXES, Accepted, Refusal, Refused, negotiate
from dicom_listener.pdus import ProtocolError
from tests.dicom_listener.sending import connect, echo, request_pdu
from worker.core import settings
from worker.core.errors import SettingsError
from worker.core.records import AuditEvent
from worker.core.settings import DicomSettings, Peer

CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT, IMPLICIT, HTJ2K = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.4.201"


def answer(request: bytes, address: str = "127.0.0.1", *, tls: bool = False, **dicom: Any) -> Accepted | Refused:
    return negotiate(
        request, DicomSettings(**dicom), address, tls=tls, tls_only="tls_certificate" in dicom, refuse=None
    )


@pytest.mark.parametrize(
    ("dicom", "address", "tls", "request_options", "reason"),
    [
        ({}, "127.0.0.1", False, {}, None),
        ({}, "::1", False, {}, None),
        ({}, "::ffff:127.0.0.1", False, {}, None),
        ({}, "10.0.0.5", False, {}, Refusal.ADDRESS),
        ({"any_peer": True}, "10.0.0.5", False, {}, None),
        ({}, "127.0.0.1", False, {"called": "OTHER"}, Refusal.CALLED_AE_TITLE),
        ({"peers": (Peer(ae_title="PACS"),)}, "10.0.0.5", False, {}, None),
        ({"peers": (Peer(ae_title="PACS"),)}, "127.0.0.1", False, {"calling": "X"}, Refusal.CALLING_AE_TITLE),
        ({"peers": (Peer(ae_title="PACS", address="10.0.0.0/24"),)}, "10.0.0.5", False, {}, None),
        ({"peers": (Peer(ae_title="PACS", address="10.0.0.0/24"),)}, "10.0.1.5", False, {}, Refusal.ADDRESS),
        ({"peers": (Peer(ae_title="PACS", address="fe80::/10"),)}, "fe80::1%eth0", False, {}, None),
        ({"tls_certificate": Path("server.pem")}, "127.0.0.1", False, {}, Refusal.TLS_REQUIRED),
        ({"tls_certificate": Path("server.pem")}, "127.0.0.1", True, {}, None),
        ({"peers": (Peer(ae_title="PACS", tls=True),)}, "127.0.0.1", True, {}, None),
        ({"peers": (Peer(ae_title="PACS", tls=True),)}, "127.0.0.1", False, {}, Refusal.PEER_WITHOUT_TLS),
        ({"peers": (Peer(ae_title="PACS", tls=True), Peer(ae_title="PACS"))}, "127.0.0.1", False, {}, None),
    ],
)
def test_peers_are_admitted_by_title_address_and_tls(
    dicom: dict[str, Any], address: str, tls: bool, request_options: dict[str, str], reason: Refusal | None
) -> None:
    outcome = answer(request_pdu(**request_options), address, tls=tls, **dicom)  # type: ignore[arg-type]
    assert (outcome.reason if isinstance(outcome, Refused) else None) is reason


@pytest.mark.parametrize("address", ["pacs.hospital", "10.0.0.0/33", "10.0.0"])
def test_peer_by_host_name_is_refused_when_settings_load(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("MU2_CONFIG", os.devnull)
    monkeypatch.setenv("MU2_DICOM__PEERS", json.dumps([{"ae_title": "PACS", "address": address}]))
    with pytest.raises(SettingsError, match=r"dicom.peers.0.address: .*IP address") as refused:
        settings.load()
    assert address not in str(refused.value).replace("10.0.0.0/24", "")


def with_titles(called: bytes, calling: bytes) -> bytes:
    request = request_pdu()
    return request[:10] + called + calling + request[42:]


def test_titles_padded_with_nul_are_those_without() -> None:
    outcome = answer(
        with_titles(b"MU2".ljust(16, b"\0"), b"PACS \0\0".ljust(16, b"\0")), peers=(Peer(ae_title="PACS"),)
    )
    assert isinstance(outcome, Accepted)
    assert outcome.calling_ae_title == "PACS"


@pytest.mark.parametrize(
    ("called", "calling", "reason"),
    [
        (bytes(16), b"PACS".ljust(16), Refusal.CALLED_AE_TITLE),
        (b"M\xffU2".ljust(16), b"PACS".ljust(16), Refusal.CALLED_AE_TITLE),
        (b"MU2".ljust(16), bytes(16), Refusal.CALLING_AE_TITLE),
        (b"MU2".ljust(16), b"PA\\CS\0\x1b".ljust(16), Refusal.CALLING_AE_TITLE),
    ],
    ids=["no called", "not ASCII", "no calling", "forbidden characters"],
)
def test_titles_that_are_none_are_rejected_rather_than_aborted(called: bytes, calling: bytes, reason: Refusal) -> None:
    outcome = answer(with_titles(called, calling), peers=(Peer(ae_title="PACS"),))
    assert isinstance(outcome, Refused)
    assert outcome.reason is reason


@pytest.mark.parametrize("reason", list(Refusal))
def test_every_refusal_is_an_association_reject(reason: Refusal) -> None:
    outcome = negotiate(request_pdu(), DicomSettings(), "127.0.0.1", tls=False, tls_only=False, refuse=reason)
    assert isinstance(outcome, Refused)
    pdu = A_ASSOCIATE_RJ()
    pdu.decode(outcome.reply)
    assert (pdu.result in (1, 2), bool(pdu.reason_str)) == (True, True)


def test_senders_first_choice_of_transfer_syntax_is_taken() -> None:
    contexts = [(CT, [HTJ2K, EXPLICIT]), (CT, [IMPLICIT, EXPLICIT]), (CT, ["1.2.3.4", EXPLICIT]), (CT, ["1.2.3.4"])]
    outcome = answer(request_pdu(contexts=contexts))
    assert isinstance(outcome, Accepted)
    assert {number: c.transfer_syntax for number, c in outcome.contexts.items()} == {1: HTJ2K, 3: IMPLICIT, 5: EXPLICIT}
    pdu = A_ASSOCIATE_AC()
    pdu.decode(outcome.reply)
    assert [item.result for item in pdu.presentation_context] == [0, 0, 0, 4]


def test_storage_commitment_is_offered_only_where_it_is_on() -> None:
    request = request_pdu(contexts=[("1.2.840.10008.1.20.1", [IMPLICIT])])
    off, on = answer(request), answer(request, storage_commitment=True)
    assert isinstance(off, Accepted)
    assert isinstance(on, Accepted)
    assert (len(off.contexts), len(on.contexts)) == (0, 1)


@pytest.mark.parametrize(
    "sop_class",
    ["1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.3.1.2.3.3", "1.2.840.10008.1.3.10"],
    ids=["query", "performed procedure step", "media directory"],
)
def test_what_is_no_storage_is_not_accepted(sop_class: str) -> None:
    outcome = answer(request_pdu(contexts=[(sop_class, [IMPLICIT])]))
    assert isinstance(outcome, Accepted)
    assert not outcome.contexts


def test_all_known_transfer_syntaxes_are_accepted() -> None:
    contexts = [(CT, [syntax]) for syntax in sorted(TRANSFER_SYNTAXES)]
    outcome = answer(request_pdu(contexts=contexts))
    assert isinstance(outcome, Accepted)
    assert len(outcome.contexts) == len(TRANSFER_SYNTAXES)


def test_mutilated_requests_are_protocol_errors_and_nothing_else() -> None:
    rng = random.Random(7)
    whole = request_pdu(contexts=[(CT, [EXPLICIT, IMPLICIT]), ("1.2.840.10008.1.1", [IMPLICIT])])
    errors = 0
    for _ in range(1500):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            damaged[rng.randrange(6, len(damaged))] = rng.randrange(256)
        cut = rng.randrange(len(damaged)) if rng.random() < 0.2 else len(damaged)
        try:
            answer(bytes(damaged[:cut]))
        except ProtocolError:
            errors += 1
    assert errors > 500


def test_refused_association_is_audited_with_its_reason_once_a_minute(start: Any) -> None:
    running = start(peers=(Peer(ae_title="PACS"),))
    assert not echo(running.port, calling="STRANGER")
    assert not echo(running.port, calling="STRANGER")
    assert not echo(running.port, called="NOBODY")
    with running.sent.database.read() as session:
        events = session.scalars(sa.select(AuditEvent).order_by(AuditEvent.id)).all()
    assert [(e.action, e.actor, e.origin, e.outcome) for e in events] == [
        ("association_refused", "ae:STRANGER", "127.0.0.1", "refused"),
        ("association_refused", "ae:PACS", "127.0.0.1", "refused"),
    ]
    assert [e.detail["reason"] for e in events] == [Refusal.CALLING_AE_TITLE.value, Refusal.CALLED_AE_TITLE.value]


def test_more_associations_than_allowed_are_refused_until_one_ends(start: Any) -> None:
    running = start(max_associations=2)
    first, second = connect(running.port), connect(running.port)
    third = connect(running.port)
    assert (first.is_established, second.is_established, third.is_rejected) == (True, True, True)
    first.release()
    assert echo(running.port)
    second.release()
