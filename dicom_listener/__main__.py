"""`python -m dicom_listener`: the listener until SIGTERM or SIGINT."""

import signal
import sys
import threading

from dicom_listener.server import serve
from worker.core import logs, settings
from worker.core.errors import Mu2Error
from worker.queues import submit_study


def main() -> int:
    """Runs the listener with the settings of the environment; returns the exit code."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        current = settings.current()
        logs.configure("listener", current.log.level)
        return 0 if serve(current, stop, submit_study) else 1
    except Mu2Error as error:
        sys.stderr.write(f"{error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
