"""PDUs on a socket: lengths and waits are bounded before memory is given."""

import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from dicom_listener import pdus
from dicom_listener.pdus import PduStream, PeerGoneError, PeerStalledError, ProtocolError

Pair = tuple[socket.socket, PduStream]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """The sender's end, and a stream on the other."""
    ours, theirs = socket.socketpair()
    ours.settimeout(0.2)
    yield theirs, PduStream(ours, 0.2)
    ours.close()
    theirs.close()


def pdv(context: int, control: int, data: bytes) -> bytes:
    return struct.pack(">IBB", len(data) + 2, context, control) + data


def test_fragments_of_several_pdvs_come_in_order(pair: Pair) -> None:
    theirs, stream = pair
    body = pdv(1, 0, b"abc") + pdv(3, 2, b"") + pdv(5, 3, b"xyz")
    theirs.sendall(struct.pack(">BxI", 4, len(body)) + body)
    _, length = stream.header()
    assert [(c, k, bytes(p)) for c, k, p in stream.fragments(length, 1000)] == [
        (1, 0, b"abc"),
        (3, 2, b""),
        (5, 3, b"xyz"),
    ]


def test_fragment_larger_than_the_buffer_comes_in_pieces_and_only_the_last_says_so(pair: Pair) -> None:
    theirs, stream = pair
    data = bytes(range(256)) * 12_000
    body = pdv(1, 2, data)
    threading.Thread(target=theirs.sendall, args=(struct.pack(">BxI", 4, len(body)) + body,)).start()
    stream.enlarge()
    kept: list[memoryview] = []
    collected = bytearray()

    def write_out() -> None:
        for view in kept:
            collected.extend(view)
        kept.clear()

    stream.before_reuse = write_out
    _, length = stream.header()
    controls = []
    for _, control, piece in stream.fragments(length, len(body)):
        kept.append(piece)
        controls.append(control)
    write_out()
    assert bytes(collected) == data
    assert set(controls[:-1]) == {0}
    assert controls[-1] == 2


@pytest.mark.parametrize(
    ("length", "body"),
    [
        (0xFFFFFFFF, b""),
        (10, struct.pack(">IBB", 100, 1, 0) + b"abcd"),
        (6, struct.pack(">IBB", 1, 1, 0)),
        (3, b"abc"),
        (8, pdv(1, 0, b"") + b"xy"),
    ],
    ids=[
        "four gigabytes",
        "PDV longer than its PDU",
        "PDV shorter than its header",
        "no PDV",
        "rest behind the last PDV",
    ],
)
def test_length_that_cannot_be_is_a_protocol_error(pair: Pair, length: int, body: bytes) -> None:
    theirs, stream = pair
    theirs.sendall(struct.pack(">BxI", 4, length) + body)
    _, claimed = stream.header()
    with pytest.raises(ProtocolError):
        list(stream.fragments(claimed, 262_144))


@pytest.mark.parametrize(("kind", "length"), [(1, 0xFFFFFFFF), (4, 10), (9, 10)])
def test_first_pdu_must_be_a_request_of_bounded_length(pair: Pair, kind: int, length: int) -> None:
    theirs, stream = pair
    theirs.sendall(struct.pack(">BxI", kind, length) + bytes(10))
    with pytest.raises(ProtocolError):
        stream.request()


def test_silence_ends_after_the_time_out(pair: Pair) -> None:
    _, stream = pair
    with pytest.raises(PeerStalledError):
        stream.header()


def test_peer_that_drips_bytes_ends_at_the_deadline(pair: Pair) -> None:
    theirs, stream = pair
    stream.deadline = time.monotonic() + 0.5
    theirs.sendall(struct.pack(">BxI", 1, 1000))

    def drip() -> None:
        for _ in range(100):
            try:
                theirs.sendall(b"x")
            except OSError:
                return
            time.sleep(0.1)

    thread = threading.Thread(target=drip)
    thread.start()
    began = time.monotonic()
    with pytest.raises(PeerStalledError):
        stream.request()
    assert time.monotonic() - began < 5  # it would drip for ten
    theirs.close()
    thread.join()


def test_end_of_the_connection_is_told_from_silence(pair: Pair) -> None:
    theirs, stream = pair
    theirs.close()
    with pytest.raises(PeerGoneError):
        stream.header()


def test_peer_that_takes_no_bytes_ends_after_the_time_out(pair: Pair) -> None:
    _, stream = pair
    with pytest.raises(PeerStalledError):
        stream.send(bytes(50_000_000))


def test_abort_names_the_provider_and_the_reason() -> None:
    assert pdus.abort(pdus.AbortReason.INVALID_PARAMETER) == b"\x07\0\0\0\0\4\0\0\2\6"
