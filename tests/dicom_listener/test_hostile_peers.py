"""Hostile peers: an honest sender's study still arrives, C-ECHO still answers, memory stays."""

import errno
import gc
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from pydicom.uid import generate_uid

from dicom_listener.association import Association
from dicom_listener.door import LOBBY_SIZE, Door, Entrance, listen, oldest_of_busiest
from dicom_listener.metrics import Metrics
from dicom_listener.reception import HALF_OPEN
from dicom_listener.statuses import Status
from dicom_listener.storage import Incoming
from tests.dicom_listener.conftest import Running
from tests.dicom_listener.sending import RawPeer, ct, echo, eventually, request_pdu, send, silent, store_command

MOST_GROWTH_BYTES = 20_000_000


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def an_honest_study_arrives(running: Running) -> None:
    study = generate_uid()
    assert send(running.port, [ct(study) for _ in range(5)]) == [Status.SUCCESS] * 5
    assert echo(running.port)


@pytest.mark.parametrize("first_words", [b"", request_pdu()[:16]], ids=["silent", "sixteen bytes of a request"])
def test_two_hundred_half_open_clients_stop_nobody(running: Running, first_words: bytes) -> None:
    an_honest_study_arrives(running)
    gc.collect()
    before = resident_bytes()
    with silent(running.port, 200, first_words):
        an_honest_study_arrives(running)
        assert resident_bytes() - before < MOST_GROWTH_BYTES
    an_honest_study_arrives(running)


def test_no_more_threads_wait_for_half_open_clients_when_those_that_are_shed_leave_slowly(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    present = []

    def slowly(association: Association, leave: Callable[[Association], None] = Association._let_go) -> None:
        present.append(running.listener._reception.present)
        time.sleep(0.02)
        leave(association)

    with monkeypatch.context() as busy:
        busy.setattr(Association, "_let_go", slowly)
        with silent(running.port, 3 * HALF_OPEN, request_pdu()[:16]):
            eventually(lambda: running.sent.counted("mu2_dicom_shed_connections_total") == 2 * HALF_OPEN)
            an_honest_study_arrives(running)
    assert len(present) > 2 * HALF_OPEN
    assert max(present) <= HALF_OPEN + 1


def test_half_open_clients_are_let_go_after_their_time(start: Callable[..., Running]) -> None:
    running = start(artim_seconds=0.5)
    with silent(running.port, 5) as mute, silent(running.port, 5, request_pdu()[:16]) as halting:
        for client in mute:  # each waits until it is let go, and fails after five seconds
            assert client.recv(1) == b""
        for client in halting:
            assert client.recv(100)[:1] in (b"", b"\x07")
    eventually(lambda: running.sent.counted("mu2_dicom_half_open") == 0)


@pytest.mark.parametrize("kind", [1, 4], ids=["association request", "data"])
def test_pdu_that_claims_four_gigabytes_is_aborted_at_once(running: Running, kind: int) -> None:
    before = resident_bytes()
    with RawPeer(running.port, associate=kind == 4) as peer:
        peer.socket.sendall(struct.pack(">BxI", kind, 0xFFFFFFFF) + bytes(4096))
        assert peer.read_pdu() == (7, b"\0\0\2\6")
    assert resident_bytes() - before < MOST_GROWTH_BYTES
    an_honest_study_arrives(running)


def test_association_that_stalls_inside_a_pdv_ends_and_leaves_nothing(start: Callable[..., Running]) -> None:
    running = start(idle_seconds=0.5)
    with RawPeer(running.port) as peer:
        peer.socket.sendall(store_command() + struct.pack(">BxIIBB", 4, 100_006, 100_002, 1, 0) + bytes(50))
        an_honest_study_arrives(running)
        assert peer.read_pdu()[0] == 7
    eventually(lambda: running.sent.counted("mu2_dicom_associations_total", outcome="stalled") == 1)
    assert not list((running.sent.root / "incoming").rglob("*.part"))


def test_connection_lost_inside_a_data_set_leaves_nothing(running: Running) -> None:
    with RawPeer(running.port) as peer:
        peer.socket.sendall(store_command() + struct.pack(">BxIIBB", 4, 100_006, 100_002, 1, 0) + bytes(50))
    eventually(lambda: running.sent.counted("mu2_dicom_associations_total", outcome="connection_lost") == 1)
    assert not list((running.sent.root / "incoming").rglob("*.part"))
    assert not running.sent.instances()


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">BxI", 9, 4) + bytes(4),
        struct.pack(">BxI", 1, 100) + bytes(100),
        struct.pack(">BxI", 5, 8) + bytes(8),
        store_command(context=77),
        struct.pack(">BxIIBB", 4, 10, 6, 1, 2) + b"data",
        struct.pack(">BxIIBB", 4, 10, 6, 1, 3) + b"junk",
        store_command() + store_command(),
        struct.pack(">BxIIBB", 4, 20_006, 20_002, 1, 1) + bytes(20_000),
    ],
    ids=[
        "unknown PDU",
        "second request",
        "release of a wrong length",
        "context that was not accepted",
        "data without a command",
        "command that is none",
        "command inside a data set",
        "command without end",
    ],
)
def test_broken_protocol_is_aborted_and_counted(running: Running, data: bytes) -> None:
    with RawPeer(running.port) as peer:
        peer.socket.sendall(data)
        assert peer.read_pdu()[0] == 7
    eventually(lambda: running.sent.counted("mu2_dicom_associations_total", outcome="protocol_error") == 1)
    assert echo(running.port)


def test_services_that_are_not_offered_have_a_status_and_the_association_goes_on(running: Running) -> None:
    with RawPeer(running.port) as peer:
        for field in (0x0020, 0x0150):
            elements = [(0x0100, struct.pack("<H", field)), (0x0110, b"\5\0"), (0x0800, b"\1\1")]
            command = b"".join(struct.pack("<HHI", 0, e, len(v)) + v for e, v in elements)
            pdv = struct.pack(">IBB", len(command) + 2, 1, 3) + command
            peer.socket.sendall(struct.pack(">BxI", 4, len(pdv)) + pdv)
            kind, body = peer.read_pdu()
            assert (kind, b"\0\0\x00\t\2\0\0\0\x11\2" in body) == (4, True)


def test_a_thousand_more_descriptors_than_select_takes_do_not_matter(running: Running) -> None:
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        with RawPeer(running.port) as peer:  # associates, over descriptors of this process on both ends
            assert peer.socket.fileno() > 1024
            peer.socket.sendall(struct.pack(">BxI", 5, 4) + bytes(4))
            assert peer.read_pdu()[0] == 6
    finally:
        for fd in held:
            os.close(fd)
    assert echo(running.port)


def test_busiest_address_is_shed_first() -> None:
    assert oldest_of_busiest(["a", "b", "b", "a", "b"]) == 1


def test_newcomers_to_a_full_lobby_do_not_close_the_door_on_anybody(running: Running) -> None:
    with silent(running.port, LOBBY_SIZE) as old, ExitStack() as stack:
        for guest in old[:44]:
            # He speaks while one comes in for whom he, the oldest, is shed: both may be heard in one round.
            stack.enter_context(silent(running.port, 1))
            with suppress(OSError):
                guest.send(b"\x01")
    assert running.listener._door.is_alive()  # type: ignore[union-attr]
    an_honest_study_arrives(running)


class _Selector:
    """Reports, in one round, an arrival and then a word from the guest who is shed for it."""

    def __init__(self, real: selectors.BaseSelector, listener: socket.socket) -> None:
        self._real, self._listener = real, listener

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)

    def select(self, timeout: float) -> list[tuple[selectors.SelectorKey, int]]:
        found = self._real.select(timeout)
        if len(found) < 2:
            return []
        return sorted(found, key=lambda ready: ready[0].fileobj is not self._listener)


def test_guest_who_speaks_in_the_round_in_which_he_is_shed_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicom_listener.door.LOBBY_SIZE", 1)
    entered: list[socket.socket] = []
    listener = listen("127.0.0.1", 0)
    opened = Door([Entrance(listener)], lambda connection, *_: entered.append(connection), 10.0, Metrics())
    opened.start()
    address = listener.getsockname()
    with socket.create_connection(address) as guest:
        eventually(lambda: opened._lobby)
        opened._selector = _Selector(opened._selector, listener)  # type: ignore[assignment]
        with socket.create_connection(address) as newcomer:
            guest.send(b"x")
            eventually(lambda: opened._metrics.shed._value.get() == 1)
            opened._selector = opened._selector._real  # type: ignore[attr-defined]
            newcomer.send(b"x")
            eventually(lambda: entered)
    assert opened.is_alive()
    opened.close()
    entered[0].close()


@pytest.mark.parametrize("number", [errno.EPROTO, errno.ENETDOWN, errno.EPERM, errno.ECONNABORTED, errno.EMFILE])
def test_error_of_an_arriving_connection_does_not_end_the_door(number: int) -> None:
    class Troubled(socket.socket):
        troubles = 2

        def accept(self) -> tuple[socket.socket, object]:
            self.troubles -= 1
            if self.troubles >= 0:
                raise OSError(number, "injected")
            return super().accept()

    plain = listen("127.0.0.1", 0)
    listener = Troubled(fileno=plain.detach())
    entered: list[socket.socket] = []
    opened = Door([Entrance(listener)], lambda connection, *_: entered.append(connection), 10.0, Metrics())
    opened.start()
    with socket.create_connection(listener.getsockname()) as client:
        client.send(b"x")
        eventually(lambda: entered)
    opened.close()
    entered[0].close()


def test_connection_for_which_there_is_no_thread_is_closed_and_the_next_is_served(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as full:
        full.setattr("dicom_listener.association.Association.start", refused)
        with RawPeer(running.port, associate=False) as peer:
            peer.socket.sendall(request_pdu())
            assert peer.read_pdu()[0] == 0
    assert running.listener._reception.present == 0
    an_honest_study_arrives(running)


def test_incoming_file_that_cannot_be_removed_leaves_no_association_behind(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(_: Incoming) -> None:
        raise OSError(errno.EIO, "injected")

    with monkeypatch.context() as broken:
        broken.setattr(Incoming, "discard", stuck)
        with RawPeer(running.port) as peer:
            peer.socket.sendall(store_command() + struct.pack(">BxIIBB", 4, 100_006, 100_002, 1, 0) + bytes(50))
            eventually(lambda: list((running.sent.root / "incoming").rglob("*.part")))
        eventually(lambda: running.listener._reception.present == 0)
    assert running.sent.counted("mu2_dicom_open_associations") == 0
