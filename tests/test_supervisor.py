"""The supervisor with small real processes in the place of the services."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from worker.core.errors import StateError
from worker.core.health import HealthServer
from worker.core.settings import Settings, load
from worker.supervisor import Backoff, Service, ServiceError, Supervisor, answers

QUICK = Backoff(first_seconds=0.05, longest_seconds=0.2, steady_seconds=60.0, most_early_deaths=3)
PATIENCE_SECONDS = 30.0


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("MU2_CONFIG", os.devnull)
    return load(home=tmp_path / "home")


def service(tmp_path: Path, name: str, script: str, *, stop_seconds: float = 5.0) -> Service:
    """A Python script as a service: it is ready when it has written its process number to `<name>.pid`."""
    file = tmp_path / f"{name}.py"
    prelude = f"import os, pathlib, signal, sys, time\npid = pathlib.Path({str(tmp_path / name)!r} + '.pid')\n"
    file.write_text(prelude + textwrap.dedent(script))
    ready = tmp_path / f"{name}.pid"
    return Service(name, (sys.executable, "-S", str(file)), os.environ, stop_seconds, lambda _pid: ready.exists())


STEADY = """
    pid.write_text(str(os.getpid()))
    signal.signal(signal.SIGTERM, lambda *_: (open(pid.with_name('stopped'), 'a').write(pid.stem + ' '), sys.exit(0)))
    while True: time.sleep(60)
"""


def until(condition: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def running(settings: Settings) -> Iterator[Callable[..., Supervisor]]:
    started: list[Supervisor] = []

    def run(
        *services: Service, log_folder: Path | None = None, tell: Callable[[str], None] | None = None
    ) -> Supervisor:
        supervisor = Supervisor(settings, services, backoff=QUICK, log_folder=log_folder, tell=tell)
        started.append(supervisor)
        supervisor.start()
        return supervisor

    yield run
    for supervisor in started:
        supervisor.stop()


def test_services_stop_in_the_reverse_order_of_their_start(tmp_path, running):
    supervisor = running(*(service(tmp_path, name, STEADY) for name in ("first", "second", "third")))
    supervisor.wait_ready(PATIENCE_SECONDS)
    supervisor.stop()
    assert (tmp_path / "stopped").read_text().split() == ["third", "second", "first"]


def test_a_killed_service_is_started_again(tmp_path, running):
    supervisor = running(service(tmp_path, "one", STEADY))
    supervisor.wait_ready(PATIENCE_SECONDS)
    first = supervisor.pid("one")
    os.kill(first, signal.SIGKILL)
    until(lambda: supervisor.restarts["one"] == 1 and supervisor.is_ready)
    assert supervisor.pid("one") != first


def test_a_service_that_never_comes_up_is_given_up_with_its_last_words(tmp_path, running):
    supervisor = running(service(tmp_path, "broken", "sys.exit('the port is taken')"), log_folder=tmp_path / "logs")
    with pytest.raises(ServiceError, match=r"broken died 3 times before it was ready.*\n  the port is taken"):
        supervisor.wait_ready(PATIENCE_SECONDS)


def test_each_early_death_is_told_with_its_own_last_words(tmp_path, running):
    told: list[str] = []
    script = "tries = pid.with_suffix('.tries'); open(tries, 'a').write('x'); sys.exit(f'try {tries.stat().st_size}')"
    supervisor = running(service(tmp_path, "broken", script), log_folder=tmp_path / "logs", tell=told.append)
    with pytest.raises(ServiceError):
        supervisor.wait_ready(PATIENCE_SECONDS)
    start = "broken died before it was ready (exit code 1); its last lines:\n  try "
    assert told == [f"{start}{number}" for number in (1, 2, 3)]


def test_a_service_is_not_ready_because_a_stranger_answers_on_its_port():
    stranger = HealthServer("127.0.0.1", 0, CollectorRegistry(), {}, group="WORKER")
    try:
        assert answers("127.0.0.1", stranger.port, os.getpid())
        assert not answers("127.0.0.1", stranger.port, os.getpid() + 1)
    finally:
        stranger.close()


def test_a_service_that_was_ready_once_is_never_given_up(tmp_path, running):
    supervisor = running(service(tmp_path, "weak", "pid.write_text('1'); time.sleep(0.1)"))
    until(lambda: supervisor.restarts["weak"] > QUICK.most_early_deaths)
    supervisor.check()


def test_the_wait_before_a_restart_doubles_up_to_its_bound():
    backoff = Backoff(first_seconds=0.5, longest_seconds=3.0)
    assert [backoff.wait_seconds(n) for n in (1, 2, 3, 4, 50)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_a_service_that_ignores_the_stop_is_killed_with_its_children(tmp_path, running):
    stubborn = """
        import subprocess
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])
        pid.write_text(str(child.pid))
        time.sleep(60)
    """
    supervisor = running(service(tmp_path, "stubborn", stubborn, stop_seconds=0.2))
    supervisor.wait_ready(PATIENCE_SECONDS)
    until(lambda: (tmp_path / "stubborn.pid").read_text())
    pids = supervisor.pid("stubborn"), int((tmp_path / "stubborn.pid").read_text())
    supervisor.stop()
    until(
        lambda: not any(map(alive, pids))
    )  # a killed process dies when the system gives it its turn; else it sleeps longer


def test_a_killed_supervisor_leaves_no_process_behind(tmp_path, settings):
    script = tmp_path / "supervise.py"
    one = service(tmp_path, "one", STEADY)
    script.write_text(
        "import os, time\nfrom pathlib import Path\n"
        "from worker.core.settings import load\nfrom worker.supervisor import Service, Supervisor\n"
        f"ready = Path({str(tmp_path / 'one.pid')!r})\n"
        f"one = Service('one', {one.command!r}, dict(os.environ), 5.0, lambda _pid: ready.exists())\n"
        f"Supervisor(load(home=Path({str(settings.home)!r})), [one]).start()\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    until(lambda: (tmp_path / "one.pid").exists() and (tmp_path / "one.pid").read_text())
    child = int((tmp_path / "one.pid").read_text())
    assert alive(child)
    parent.kill()
    parent.wait()
    until(lambda: not alive(child))


def test_one_home_has_one_supervisor(tmp_path, running, settings):
    running(service(tmp_path, "one", STEADY))
    second = Supervisor(settings, [])
    with pytest.raises(StateError, match=f"process {os.getpid()} runs the services"):
        second.start()


def test_a_home_is_free_again_after_the_stop(tmp_path, running, settings):
    running(service(tmp_path, "one", STEADY)).stop()
    with Supervisor(settings, []) as second:
        assert second.is_ready


def test_what_services_write_lands_in_a_file_that_only_the_owner_reads(tmp_path, running):
    chatty = "print('to stdout', flush=True); print('to stderr', file=sys.stderr)\n" + textwrap.dedent(STEADY)
    supervisor = running(service(tmp_path, "chatty", chatty), log_folder=tmp_path / "logs")
    supervisor.wait_ready(PATIENCE_SECONDS)
    supervisor.stop()
    file = tmp_path / "logs" / "chatty.log"
    assert file.read_text().splitlines() == ["to stdout", "to stderr"]
    assert file.stat().st_mode & 0o777 == 0o600
