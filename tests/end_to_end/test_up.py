"""`mu2 up`: everything on one machine, whatever dies, until it is told to stop."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from tests.conftest import free_port
from tests.end_to_end.running_services import drop_environment, processes_of, run_mu2, settings
from tests.worker.hospital_site import wait_for
from worker.core.health import HealthServer
from worker.services import listener_service, with_chosen_ports
from worker.supervisor import Backoff, ServiceError, Supervisor, answers

READY_SECONDS = 60.0


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    names = ("DICOM__PORT", "DICOM__METRICS_PORT", "WORKER__METRICS_PORT", "REVIEW__PORT", "REVIEW__METRICS_PORT")
    ports = {name: str(free_port()) for name in names}
    return {**{f"MU2_{name}": port for name, port in ports.items()}, "MU2_MODEL__REPORTER": "fake"}


@pytest.fixture
def up(tmp_path: Path, variables: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    """`mu2 up`, ready."""
    home = tmp_path / "home"
    process = subprocess.Popen(
        [sys.executable, "-m", "worker", "up"],
        env={**os.environ, **variables, "MU2_HOME": str(home)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # whatever nohup left to these tests
    )
    assert process.stderr is not None
    said: list[str] = []
    while not said or not said[-1].startswith("Ready:"):
        said.append(process.stderr.readline())
        assert said[-1], "".join(said)
    yield process
    process.kill()
    process.wait()


def service_pid(home: Path, word: str) -> int:
    found = subprocess.run(["pgrep", "-f", word], capture_output=True, text=True, check=False).stdout.split()
    for pid in map(int, found):
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        if f"MU2_HOME={home}".encode() in environment and os.getpgid(pid) == pid:
            return pid
    return 0


def test_up_starts_a_killed_service_again_and_stops_cleanly_on_ctrl_c(
    up: "subprocess.Popen[str]", tmp_path: Path, variables: dict[str, str]
) -> None:
    home = tmp_path / "home"
    first = service_pid(home, "dicom_listener")
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: service_pid(home, "dicom_listener") not in (0, first), 20, "another listener")
    port, another = int(variables["MU2_DICOM__METRICS_PORT"]), service_pid(home, "dicom_listener")
    wait_for(lambda: answers("127.0.0.1", port, another), READY_SECONDS, "the listener")
    doctor = run_mu2("doctor", home=home, **variables)
    assert doctor.returncode == 0 and "answers C-ECHO" in doctor.stdout, doctor.stdout

    second = run_mu2("up", home=home, **variables)
    assert second.returncode == 1 and "runs the services of this MU2_HOME already" in second.stderr

    up.send_signal(signal.SIGINT)
    assert up.wait(60) == 0
    assert processes_of(home) == []


def test_up_stops_its_services_in_order_when_its_terminal_closes(up: "subprocess.Popen[str]", tmp_path: Path) -> None:
    home = tmp_path / "home"
    for _ in range(2):  # from the kernel and from the shell
        up.send_signal(signal.SIGHUP)
    assert up.wait(60) == 0
    assert processes_of(home) == []
    for service in ("listener", "worker"):
        assert f'"{service}_stopped"' in (home / "logs" / f"{service}.log").read_text()


def test_services_whose_ports_another_home_holds_are_given_up_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop_environment(monkeypatch)
    stranger = HealthServer("127.0.0.1", 0, CollectorRegistry(), {}, group="WORKER")
    with socket.create_server(("127.0.0.1", 0)) as held:
        dicom = {"port": held.getsockname()[1], "metrics_port": stranger.port}
        config = with_chosen_ports(settings(tmp_path / "home", dicom=dicom))
        backoff = Backoff(first_seconds=0.05, most_early_deaths=2)
        try:
            with (
                Supervisor(config, [listener_service(config)], backoff=backoff, log_folder=tmp_path) as supervisor,
                pytest.raises(
                    ServiceError, match=f"(?s)listener died 2 times.*port {config.dicom.port}.*MU2_DICOM__PORT"
                ),
            ):
                supervisor.wait_ready(READY_SECONDS)
        finally:
            stranger.close()


def test_a_killed_up_leaves_no_service_behind(up: "subprocess.Popen[str]", tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert len(processes_of(home)) >= 4
    up.kill()
    up.wait()
    wait_for(lambda: processes_of(home) == [], 10, "the services to go")
