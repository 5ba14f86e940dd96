"""`mu2 up`: everything on one machine until Ctrl-C, SIGTERM, or the end of its terminal."""

import signal
import threading
from typing import Annotated

import typer

from worker.cli.terminal import note


def up(
    to_stderr: Annotated[
        bool, typer.Option("--stderr", help="Log lines to stderr instead of files in MU2_HOME/logs.")
    ] = False,
) -> None:
    """Runs broker, worker, listener and review page until Ctrl-C, and starts what dies again."""
    from worker.core import logs, settings
    from worker.services import services, with_chosen_ports
    from worker.supervisor import Supervisor

    current = with_chosen_ports(settings.current())
    logs.configure("supervisor", current.log.level if to_stderr else "error")
    log_folder = None if to_stderr else current.home / "logs"
    stop, hung_up = threading.Event(), threading.Event()

    def say(sentence: str) -> None:
        if not hung_up.is_set():  # a terminal that is gone takes no more words
            note(sentence)

    supervisor = Supervisor(current, services(current, review=True), log_folder=log_folder, tell=say)

    def on_signal(number: int, _frame: object) -> None:
        if number == signal.SIGHUP:  # comes from kernel and shell, so a second one is no haste
            hung_up.set()
        elif stop.is_set():
            supervisor.hurry()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores it: go on
            signal.signal(number, on_signal)
    with supervisor:
        say(f"Starting in {current.home} ...")
        ready = False
        while not stop.wait(0.5):
            supervisor.check()
            if not ready and supervisor.is_ready:
                ready = True
                say(f"Ready: DICOM {current.dicom.ae_title} on {current.dicom.host}:{current.dicom.port}.")
                page = current.review
                scheme = "http" if page.tls_certificate is None else "https"
                say(f"Review page: {scheme}://{page.host}:{page.port} (`mu2 user add` makes accounts).")
                say(f"Logs: {log_folder or 'stderr'}. `mu2 doctor` checks everything. Ctrl-C stops.")
        say("Stopping: the listener, then the worker with what it has in hand, then the broker. Ctrl-C again: at once.")
    say("Stopped.")
