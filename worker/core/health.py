"""/livez, /readyz and /metrics of one process, on a small HTTP port of its own.

/livez says that the process answers and that the threads it cannot do without live; /readyz that its dependencies answer;
/metrics is Prometheus' text format. Every answer names its process, so that a supervisor knows its own child's answer
from that of a stranger on the same port.
"""

import json
import os
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from worker.core.errors import SettingsError
from worker.core.settings import DELIMITER, PREFIX

Check = Callable[[], bool]
REQUEST_SECONDS = 5.0
PROCESS_HEADER = "Mu2-Process"  # the number of the process that answers


class HealthServer:
    """Serves the three pages until `close`; port 0 takes a free one.

    `group` is that of the settings that name host and port. Raises `SettingsError` with their names when the port cannot
    be had.
    """

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        checks: Mapping[str, Check],
        alive: Check = lambda: True,
        *,
        group: str,
    ) -> None:
        try:
            self._server = ThreadingHTTPServer((host, port), _handler(registry, checks, alive))
        except OSError as error:
            raise SettingsError(
                f"/livez, /readyz and /metrics cannot listen on {host} port {port} ({error.strerror}); stop what holds it "
                f"or set {PREFIX}{group}{DELIMITER}METRICS_PORT or METRICS_HOST"
            ) from error
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=REQUEST_SECONDS)


def _handler(registry: CollectorRegistry, checks: Mapping[str, Check], alive: Check) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_SECONDS

        def do_GET(self) -> None:
            """Answers the three paths and 404 for all others."""
            if self.path == "/livez":
                lives = alive()
                self._answer(200 if lives else 503, "application/json", json.dumps({"alive": lives}).encode())
            elif self.path == "/readyz":
                results = {name: check() for name, check in checks.items()}
                self._answer(200 if all(results.values()) else 503, "application/json", json.dumps(results).encode())
            elif self.path == "/metrics":
                self._answer(200, CONTENT_TYPE_LATEST, generate_latest(registry))
            else:
                self._answer(404, "text/plain", b"not found")

        def _answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.send_header(PROCESS_HEADER, str(os.getpid()))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Access lines are not kept."""

    return Handler
