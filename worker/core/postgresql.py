"""The limits of every wait for a PostgreSQL server.

The server's own limits end what it works on, and the kernel's end a connection whose packets are lost. Neither helps when
something in between (a proxy, a frozen server) takes every byte and says nothing: the connection is alive for the kernel
and nobody answers. So each wait of the client has a limit, too, and ends with a closed connection.
"""

import time
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen

RV = TypeVar("RV")

SILENCE_SECONDS = 35.0  # longer than the server may work on one statement
INTERVAL_SECONDS = 0.1  # how often a wait looks up; psycopg's own default

CONNECT_ARGUMENTS: dict[str, Any] = {
    "connect_timeout": 5,
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
    "options": "-c lock_timeout=10s -c statement_timeout=30s -c idle_in_transaction_session_timeout=60s",
}
"""A server that goes silent, or a row somebody sits on, is a database that is away: never a wait without end."""


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that is closed when its server says nothing for `SILENCE_SECONDS`."""

    def wait(self, gen: PQGen[RV], interval: float = INTERVAL_SECONDS, timeout: float | None = None) -> RV:
        """Waits as psycopg does, but never for ever; raises `psycopg.OperationalError` when the time is over."""
        began = time.monotonic()
        try:
            return super().wait(gen, interval, SILENCE_SECONDS if timeout is None else timeout)
        except psycopg.OperationalError:
            if timeout is None and time.monotonic() - began >= SILENCE_SECONDS:
                self.pgconn.finish()  # an answer that came now would be taken for the next question's
            raise


def connect(*_: Any, **arguments: Any) -> BoundedConnection:
    """Opens a connection; SQLAlchemy hands over the arguments of the URL and `CONNECT_ARGUMENTS`."""
    return BoundedConnection.connect(**arguments)
