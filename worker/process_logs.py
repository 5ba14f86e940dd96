"""What child processes write, line by line into files that are rotated, with the last lines kept for error messages.

The children's lines are JSON that can hold no patient data (`worker.core.logs`); the files are readable by their owner
only all the same, because a library in C writes to stderr what it likes.
"""

import logging
import logging.handlers
import os
import threading
from collections import deque
from pathlib import Path
from typing import IO

FILE_BYTES = 10_000_000
OLD_FILES = 5
TAIL_LINES = 8
DRAIN_SECONDS = 1.0
LONGEST_LINE_BYTES = 65_536  # a child that never ends its line must not fill the memory


class LogPump:
    """Carries the output of one service, over all its lives, into one rotated file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)  # of the process followed last
        self._file = logging.handlers.RotatingFileHandler(
            path, maxBytes=FILE_BYTES, backupCount=OLD_FILES, encoding="utf-8"
        )
        self._threads: list[threading.Thread] = []

    def follow(self, stream: IO[bytes]) -> None:
        """Reads a new process's output until it ends."""
        self._threads = [t for t in self._threads if t.is_alive()]
        self.tail.clear()
        thread = threading.Thread(target=self._carry, args=(stream,), name="log-pump", daemon=True)
        self._threads.append(thread)
        thread.start()

    def drain(self) -> None:
        """Waits, for a bounded time, until what ended processes wrote is in the file and in `tail`."""
        for thread in self._threads:
            thread.join(timeout=DRAIN_SECONDS)

    def close(self) -> None:
        """Waits for what is still in the pipes and closes the file."""
        self.drain()
        self._file.close()

    def _carry(self, stream: IO[bytes]) -> None:
        with stream:
            while raw := stream.readline(LONGEST_LINE_BYTES):
                line = raw.decode("utf-8", errors="replace").rstrip("\n")
                self.tail.append(line)
                self._file.handle(logging.makeLogRecord({"msg": line}))
