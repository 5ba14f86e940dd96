"""A proxy between client and server that can fall silent: it takes every byte, keeps every connection, and says nothing."""

import contextlib
import socket
import threading

CHUNK_BYTES = 65536


class SilentProxy:
    """Forwards to a loopback port until `silence`; `speak` lets new connections through again."""

    def __init__(self, upstream_port: int) -> None:
        self._upstream_port = upstream_port
        self._silent = threading.Event()
        self._sockets: list[socket.socket] = []
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._door.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def silence(self) -> None:
        """Swallows everything from now on, in both directions."""
        self._silent.set()

    def speak(self) -> None:
        """Forwards again."""
        self._silent.clear()

    def close(self) -> None:
        """Closes the door and every connection."""
        for one in (self._door, *self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._door.accept()
                server = socket.create_connection(("127.0.0.1", self._upstream_port))
                self._sockets += [client, server]
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self._carry, args=(source, target), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                if not self._silent.is_set():
                    target.sendall(data)
            if not self._silent.is_set():
                target.shutdown(socket.SHUT_WR)
