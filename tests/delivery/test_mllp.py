"""The MLLP client against real sockets: our receiver with bad habits, and the servers and clients of another package."""

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hl7.client
import hl7.mllp
import pytest
import trustme

from worker.core.errors import (
    DeliveryRefusedError,
    DeliveryUnavailableError,
    DeliveryUnreachableError,
    SettingsError,
)
from worker.core.settings import Destination
from worker.delivery import acknowledgement
from worker.delivery.mllp import END_BLOCK, START_BLOCK, MllpConnection
from worker.delivery.mllp_receiver import Behaviour, MllpReceiver

SHORT = 0.3  # seconds; an answer on the loopback takes a millisecond


def message(control_id: str, text: str = "x") -> bytes:
    return f"MSH|^~\\&|MU2||RIS||20260302||ORU^R01^ORU_R01|{control_id}|T|2.5.1\rOBX|1|TX|c||{text}\r".encode()


def connection(port: int, **changes: Any) -> MllpConnection:
    fields = {"name": "ris", "host": "127.0.0.1", "port": port, "drafts": "R", "answer_seconds": 5.0, **changes}
    return MllpConnection(Destination(**fields))


@pytest.fixture
def receiver() -> Iterator[MllpReceiver]:
    with MllpReceiver() as running:
        yield running


def test_message_is_acknowledged(receiver):
    with connection(receiver.port) as client:
        answer = client.send(message("C1"), "C1")
    assert (answer.code, answer.control_id) == ("AA", "C1")
    assert receiver.accepted == {"C1": message("C1")}


def test_connection_is_kept_between_messages(receiver):
    with connection(receiver.port) as client:
        for n in range(5):
            client.send(message(f"C{n}"), f"C{n}")
    assert (receiver.connections, len(receiver.accepted)) == (1, 5)


def test_large_message_arrives_whole(receiver):
    payload = message("C1", "y" * 2_000_000)
    with connection(receiver.port) as client:
        client.send(payload, "C1")
    assert receiver.accepted["C1"] == payload


def test_receiver_that_closes_after_each_message_gets_each_once():
    with MllpReceiver(behaviour=Behaviour.AA_THEN_CLOSE) as receiver, connection(receiver.port) as client:
        for n in range(3):
            client.send(message(f"C{n}"), f"C{n}")
            wait_until(lambda: receiver.open_connections == 0)
    assert [m.control_id for m in receiver.received] == ["C0", "C1", "C2"]


def wait_until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("code", ["AR", "CR"])
def test_rejection_is_final_and_carries_the_answer(code):
    with (
        MllpReceiver(behaviour=Behaviour(code), text="unknown patient Rossi") as receiver,
        connection(receiver.port) as client,
        pytest.raises(DeliveryRefusedError) as caught,
    ):
        client.send(message("C1"), "C1")
    assert (caught.value.code, caught.value.answer_text) == (code, "unknown patient Rossi")
    assert "Rossi" not in str(caught.value)


@pytest.mark.parametrize("code", ["AE", "CE"])
def test_error_is_retryable_and_carries_the_answer(code):
    with (
        MllpReceiver(behaviour=Behaviour(code), text="Rossi is locked") as receiver,
        connection(receiver.port) as client,
        pytest.raises(DeliveryUnavailableError) as caught,
    ):
        client.send(message("C1"), "C1")
    assert (caught.value.code, caught.value.answer_text) == (code, "Rossi is locked")
    assert "Rossi" not in str(caught.value)


def test_connection_survives_an_error_that_was_answered():
    with MllpReceiver(script=[Behaviour.AE, Behaviour.AR]) as receiver, connection(receiver.port) as client:
        with pytest.raises(DeliveryUnavailableError):
            client.send(message("C1"), "C1")
        with pytest.raises(DeliveryRefusedError):
            client.send(message("C2"), "C2")
        assert client.send(message("C1"), "C1").code == "AA"
    assert receiver.connections == 1


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (Behaviour.HANG, "no answer within"),
        (Behaviour.DRIBBLE, "only part of an answer within"),
        (Behaviour.CLOSE, "closed the connection"),
        (Behaviour.HALF, "without a whole answer"),
        (Behaviour.GARBAGE, "not an MLLP block"),
        (Behaviour.NOT_HL7, "not an HL7 message"),
        (Behaviour.OTHER_CONTROL_ID, "another control id"),
        (Behaviour.ENDLESS, "longer than 65536 bytes"),
    ],
)
def test_bad_answer_is_retryable_and_the_next_try_succeeds(behaviour, reason):
    with MllpReceiver(script=[behaviour]) as receiver:
        seconds = SHORT if behaviour in {Behaviour.HANG, Behaviour.DRIBBLE} else 5.0
        with connection(receiver.port, answer_seconds=seconds) as client:
            started = time.monotonic()
            with pytest.raises(DeliveryUnavailableError, match=reason):
                client.send(message("C1"), "C1")
            assert time.monotonic() - started < SHORT + 2
            assert client.send(message("C1"), "C1").code == "AA"
    assert [m.control_id for m in receiver.received] == ["C1", "C1"]
    assert list(receiver.accepted) == ["C1"]


def test_client_never_sends_a_message_twice_by_itself():
    with MllpReceiver(behaviour=Behaviour.CLOSE) as receiver, connection(receiver.port) as client:
        with pytest.raises(DeliveryUnavailableError):
            client.send(message("C1"), "C1")
        wait_until(lambda: receiver.open_connections == 0)
    assert len(receiver.received) == 1


def test_refused_connection_is_retryable_and_recovers():
    with MllpReceiver() as receiver:
        port = receiver.port
    with connection(port) as client:
        with pytest.raises(DeliveryUnavailableError, match="no connection to"):
            client.send(message("C1"), "C1")
        with MllpReceiver(port):
            assert client.send(message("C1"), "C1").code == "AA"


def test_a_host_that_cannot_be_looked_up_is_a_receiver_that_cannot_be_reached():
    with connection(2575) as client:
        client.destination = client.destination.model_copy(update={"host": "ris..hospital"})
        with pytest.raises(DeliveryUnreachableError, match=r"no connection to ris\.\.hospital"):
            client.send(message("C1"), "C1")


def test_receiver_that_was_restarted_is_reached_again():
    with MllpReceiver() as receiver:
        port = receiver.port
        client = connection(port)
        client.send(message("C1"), "C1")
    with MllpReceiver(port) as restarted:
        client.send(message("C2"), "C2")
        client.close()
    assert list(restarted.accepted) == ["C2"]


def test_receiver_that_stops_reading_is_given_up_in_time():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        with (
            connection(listener.getsockname()[1], answer_seconds=SHORT) as client,
            pytest.raises(DeliveryUnavailableError, match="stopped reading"),
        ):
            client.send(message("C1", "y" * 20_000_000), "C1")


def test_commit_accept_is_enough_by_default(receiver):
    receiver.behaviour = Behaviour.CA
    with connection(receiver.port) as client:
        assert client.send(message("C1"), "C1").code == "CA"


def test_application_answer_is_awaited_where_the_destination_asks_for_it(receiver):
    receiver.behaviour = Behaviour.CA_THEN_AA
    with connection(receiver.port, wait_for_application_answer=True) as client:
        assert [client.send(message(c), c).code for c in ("C1", "C2")] == ["AA", "AA"]
    assert receiver.connections == 1


def test_application_error_after_a_commit_accept_is_retryable(receiver):
    receiver.behaviour = Behaviour.CA_THEN_AE
    with (
        connection(receiver.port, wait_for_application_answer=True) as client,
        pytest.raises(DeliveryUnavailableError) as caught,
    ):
        client.send(message("C1"), "C1")
    assert caught.value.code == "AE"


def test_stored_message_is_not_failed_by_a_missing_application_answer(receiver):
    receiver.behaviour = Behaviour.CA
    with connection(receiver.port, wait_for_application_answer=True, answer_seconds=SHORT) as client:
        assert client.send(message("C1"), "C1").code == "CA"


def test_late_answer_is_never_taken_for_the_next_message(receiver):
    receiver.behaviour = Behaviour.CA_THEN_AA
    with connection(receiver.port) as client:  # does not wait for the AA, which arrives behind the CA
        for n in range(5):
            assert client.send(message(f"C{n}"), f"C{n}") == acknowledgement.Acknowledgement("CA", f"C{n}")
    assert [m.control_id for m in receiver.received] == [f"C{n}" for n in range(5)]


def test_message_that_would_break_the_framing_is_not_sent(receiver):
    with connection(receiver.port) as client, pytest.raises(DeliveryRefusedError, match="block character"):
        client.send(message("C1", "a\x1c\rb"), "C1")
    assert receiver.connections == 0


def test_messages_of_several_threads_keep_their_answers(receiver):
    client = connection(receiver.port)
    answers: dict[str, str] = {}

    def send(prefix: str) -> None:
        for n in range(20):
            control_id = f"{prefix}{n}"
            answers[control_id] = client.send(message(control_id), control_id).control_id

    threads = [threading.Thread(target=send, args=(prefix,)) for prefix in "ABCD"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.close()
    assert len(answers) == 80 and all(asked == answered for asked, answered in answers.items())


def test_server_of_another_package_takes_our_message():
    async def converse() -> tuple[str, str]:
        got: list[str] = []

        async def serve(reader: hl7.mllp.HL7StreamReader, writer: hl7.mllp.HL7StreamWriter) -> None:
            received = await reader.readmessage()
            got.append(str(received.segment("OBX")[5]))
            writer.writemessage(received.create_ack())
            await writer.drain()
            writer.close()

        async with await hl7.mllp.start_hl7_server(serve, "127.0.0.1", 0, encoding="utf-8") as server:
            client = connection(server.sockets[0].getsockname()[1])
            answer = await asyncio.to_thread(client.send, message("C1", "Größe"), "C1")
            client.close()
        return answer.code, got[0]

    assert asyncio.run(converse()) == ("AA", "Größe")


def test_client_of_another_package_is_acknowledged_by_our_receiver(receiver):
    with hl7.client.MLLPClient("127.0.0.1", receiver.port) as client:
        answer = client.send_message(message("C1"))
    assert acknowledgement.parse(answer.removeprefix(START_BLOCK).removesuffix(END_BLOCK)).control_id == "C1"


def test_receiver_tells_when_messages_have_arrived(receiver):
    assert not receiver.wait_for(1, 0.01)
    with connection(receiver.port) as client:
        client.send(message("C1"), "C1")
    assert receiver.wait_for(1, 30)


class Certificates:
    """A certificate authority with the files of a server and a client."""

    def __init__(self, folder: Path) -> None:
        self.authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self.authority.cert_pem.write_to_path(str(self.ca))
        client = self.authority.issue_cert("mu2@hospital.test")
        self.certificate, self.key = folder / "client.pem", folder / "client.key"
        client.private_key_pem.write_to_path(str(self.key))
        client.cert_chain_pems[0].write_to_path(str(self.certificate))

    def server(self, name: str = "127.0.0.1", client_certificates: bool = False) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert(name).configure_cert(context)
        if client_certificates:
            self.authority.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


def test_tls_with_client_certificate_carries_several_messages(certificates):
    files = {"tls_ca": certificates.ca, "tls_certificate": certificates.certificate, "tls_key": certificates.key}
    with (
        MllpReceiver(tls=certificates.server(client_certificates=True)) as receiver,
        connection(receiver.port, tls=True, **files) as client,
    ):
        assert [client.send(message(c), c).code for c in ("C1", "C2", "C3")] == ["AA"] * 3
    assert receiver.connections == 1


def test_tls_receiver_that_closes_after_each_message_is_survived(certificates):
    with (
        MllpReceiver(tls=certificates.server(), behaviour=Behaviour.AA_THEN_CLOSE) as receiver,
        connection(receiver.port, tls=True, tls_ca=certificates.ca) as client,
    ):
        for n in range(3):
            client.send(message(f"C{n}"), f"C{n}")
            wait_until(lambda: receiver.open_connections == 0)
    assert len(receiver.received) == 3


def test_missing_client_certificate_is_an_error_and_no_message_arrives(certificates):
    with (
        MllpReceiver(tls=certificates.server(client_certificates=True)) as receiver,
        connection(receiver.port, tls=True, tls_ca=certificates.ca) as client,
        pytest.raises(DeliveryUnavailableError),
    ):
        client.send(message("C1"), "C1")
    assert receiver.received == []


@pytest.mark.parametrize("name", ["another.host", None])
def test_receiver_whose_certificate_is_not_trusted_gets_nothing(certificates, name, tmp_path):
    context = certificates.server(name) if name else Certificates(tmp_path).server()
    with (
        MllpReceiver(tls=context) as receiver,
        connection(receiver.port, tls=True, tls_ca=certificates.ca) as client,
        pytest.raises(DeliveryUnavailableError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        client.send(message("C1"), "C1")
    assert receiver.received == []


def test_tls_handshake_that_hangs_is_given_up_in_time(certificates):
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        connection(silent.getsockname()[1], tls=True, tls_ca=certificates.ca, connect_seconds=SHORT) as client,
        pytest.raises(DeliveryUnavailableError, match="no TLS connection"),
    ):
        client.send(message("C1"), "C1")


def test_tls_file_that_is_missing_is_a_settings_error(tmp_path):
    with (
        connection(1, tls=True, tls_ca=tmp_path / "absent.pem") as client,
        pytest.raises(SettingsError, match="tls_ca"),
    ):
        client.send(message("C1"), "C1")


@pytest.mark.parametrize("encrypted", [False, True])
def test_receiver_stops_at_once_with_open_and_silent_connections(certificates, encrypted):
    receiver = MllpReceiver(tls=certificates.server() if encrypted else None)
    receiver.start()
    with (
        socket.create_connection(("127.0.0.1", receiver.port)),
        connection(receiver.port, tls=encrypted, tls_ca=certificates.ca) as client,
    ):
        client.send(message("C1"), "C1")
        wait_until(lambda: receiver.connections == 2)
        started = time.monotonic()
        receiver.stop()
        assert time.monotonic() - started < 1
    assert receiver.open_connections == 0
