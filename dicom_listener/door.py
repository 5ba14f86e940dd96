"""The accept loop: never blocks on a peer, gives no thread to one that says nothing, and sheds when too many wait.

A connection waits in the lobby, without a thread, until its first byte is there. So silent clients, with or without TLS,
cost a socket each and no more; those that say a little and then stop are the server's half-open associations, which it
bounds in the same way: the oldest of the address that has most of them goes first, because an honest sender is through
in milliseconds.
"""

import errno
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog

from dicom_listener.metrics import Metrics

log = structlog.get_logger(__name__)

LOBBY_SIZE = 256
BACKLOG = 512
TICK_SECONDS = 0.1
_NO_DESCRIPTORS_PAUSE_SECONDS = 0.05
_TAKES_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_NOBODY_THERE = frozenset({errno.EAGAIN, errno.EINTR, errno.ECONNABORTED})


@dataclass(frozen=True)
class Entrance:
    """One listening port."""

    listener: socket.socket
    tls: bool = False  # who comes in by it must speak TLS


@dataclass(frozen=True)
class _Guest:
    connection: socket.socket
    address: str
    tls: bool
    deadline: float  # monotonic


def oldest_of_busiest(addresses: Iterable[str]) -> int:
    """Index of the first entry of the address that occurs most; `addresses` is not empty and in order of age."""
    entries = list(addresses)
    busiest, _ = Counter(entries).most_common(1)[0]
    return entries.index(busiest)


def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A listening socket; `shared` lets several processes accept on one port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((host, port))
    listener.listen(BACKLOG)
    listener.setblocking(False)
    return listener


class Door(threading.Thread):
    """Accepts connections and hands over, by `enter`, those that have begun to speak, with whether they must speak TLS."""

    def __init__(
        self,
        entrances: Iterable[Entrance],
        enter: Callable[[socket.socket, str, bool], None],
        patience_seconds: float,
        metrics: Metrics,
    ) -> None:
        super().__init__(name="door", daemon=True)
        self._entrances = tuple(entrances)
        self._enter = enter
        self._patience_seconds = patience_seconds
        self._metrics = metrics
        self._lobby: dict[int, _Guest] = {}  # by file descriptor, in order of age
        self._selector = selectors.DefaultSelector()  # epoll: no limit of 1,024 descriptors
        self._stopping = False

    def run(self) -> None:
        """Accepts until `close`."""
        for entrance in self._entrances:
            self._selector.register(entrance.listener, selectors.EVENT_READ, entrance)
        while not self._stopping:
            for key, _ in self._selector.select(TICK_SECONDS):
                if isinstance(key.data, Entrance):
                    self._accept(key.data)
                elif self._lobby.get(key.fd) is key.data:  # not shed by an arrival of this very round
                    self._knock(key.fd)
            self._expire()
        for fd in list(self._lobby):
            self._leave(fd).connection.close()
        self._selector.close()
        for entrance in self._entrances:
            entrance.listener.close()

    def close(self) -> None:
        """Stops accepting and closes what waits in the lobby."""
        self._stopping = True
        if self.is_alive():
            self.join()

    def _accept(self, entrance: Entrance) -> None:
        try:
            connection, address = entrance.listener.accept()
        except OSError as error:
            # Linux hands the troubles of the arriving connection to accept as well (accept(2)): none may end the door.
            if error.errno in _TAKES_ROOM:
                log.error("no_descriptors", error=errno.errorcode[error.errno])
                self._shed()
                time.sleep(_NO_DESCRIPTORS_PAUSE_SECONDS)
            elif error.errno not in _NOBODY_THERE:
                log.warning("accept_failed", error=errno.errorcode.get(error.errno or 0, "unknown"))
                time.sleep(_NO_DESCRIPTORS_PAUSE_SECONDS)
            return
        if len(self._lobby) >= LOBBY_SIZE:
            self._shed()
        guest = _Guest(connection, str(address[0]), entrance.tls, time.monotonic() + self._patience_seconds)
        self._lobby[connection.fileno()] = guest
        self._selector.register(connection, selectors.EVENT_READ, guest)

    def _knock(self, fd: int) -> None:
        guest = self._leave(fd)
        try:
            guest.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._enter(guest.connection, guest.address, guest.tls)
        except (OSError, RuntimeError) as error:  # RuntimeError: the system gives no more threads
            log.error("connection_not_served", error=type(error).__name__)
            guest.connection.close()
            self._metrics.shed.inc()

    def _expire(self) -> None:
        now = time.monotonic()
        for fd in [fd for fd, guest in self._lobby.items() if guest.deadline <= now]:
            self._leave(fd).connection.close()

    def _shed(self) -> None:
        if self._lobby:
            fds = list(self._lobby)
            self._leave(fds[oldest_of_busiest(g.address for g in self._lobby.values())]).connection.close()
            self._metrics.shed.inc()

    def _leave(self, fd: int) -> _Guest:
        guest = self._lobby.pop(fd)
        self._selector.unregister(guest.connection)
        return guest
