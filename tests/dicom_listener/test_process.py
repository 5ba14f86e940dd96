"""The listener's process: killed, stopped, and watched by a trace of its system calls."""

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from pydicom.uid import generate_uid

from dicom_listener import arrivals
from dicom_listener.server import Listener, serve
from dicom_listener.statuses import Status
from tests.dicom_listener.conftest import Running
from tests.dicom_listener.process import ROOT, ListenerProcess, with_ports
from tests.dicom_listener.sending import RawPeer, connect, ct, echo, eventually, send, store_command
from worker.core.database import Database
from worker.core.errors import SettingsError
from worker.core.recorder import Recorder
from worker.core.records import Instance
from worker.core.settings import Settings
from worker.services import environment


@pytest.fixture
def begin(settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Callable[..., ListenerProcess]]:
    """Starts listener processes and ends what is left of them."""
    started: list[ListenerProcess] = []
    fixed: list[Settings] = []

    def launch(wrapper: list[str] | None = None, **changes: Any) -> ListenerProcess:
        if not fixed:
            fixed.append(with_ports(settings(**changes)))
        started.append(ListenerProcess(fixed[0], tmp_path / "listener.log", wrapper or ()))
        return started[-1]

    yield launch
    for one in started:
        if one.process.poll() is None:
            one.kill()
        one.database.close()


def stored(listener: ListenerProcess) -> dict[str, Path]:
    """Path of each kept instance by its UID, from the rows."""
    with listener.database.read() as session:
        rows = session.execute(sa.select(Instance.sop_instance_uid, Instance.path)).all()
    return {uid: listener.settings.store_root / path for uid, path in rows}


def test_acknowledged_instances_survive_kill_nine_in_the_middle_of_an_association(
    begin: Callable[..., ListenerProcess],
) -> None:
    listener = begin(quiet_seconds=2.0)
    acknowledged: dict[str, bytes] = {}
    study = generate_uid()

    def deliver() -> None:
        association = connect(listener.port, patience_seconds=3)
        with suppress(RuntimeError):  # pynetdicom's word for an association that is gone
            while True:
                image = ct(study)
                if association.send_c_store(image).get("Status") == 0:
                    acknowledged[image.SOPInstanceUID] = image.PixelData

    sender = threading.Thread(target=deliver)
    sender.start()
    eventually(lambda: len(acknowledged) >= 20)
    listener.kill()
    sender.join(20)
    again = begin()
    eventually(lambda: acknowledged.keys() <= stored(again).keys())
    files = stored(again)
    assert all(pixels in files[uid].read_bytes() for uid, pixels in acknowledged.items())
    assert again.stop() == 0


def test_sigterm_lets_the_message_under_way_finish_and_aborts_the_rest(begin: Callable[..., ListenerProcess]) -> None:
    listener = begin()
    idle = connect(listener.port)
    with RawPeer(listener.port) as busy:
        busy.socket.sendall(store_command() + bytes.fromhex("0400000000080000000401004f4b"))
        time.sleep(0.3)
        listener.process.terminate()
        eventually(lambda: idle.is_aborted)
        busy.socket.sendall(bytes.fromhex("0400000000080000000401024f4b"))
        kind, body = busy.read_pdu()
        assert kind == 4
        assert (
            int(Status.CANNOT_UNDERSTAND).to_bytes(2, "little") in body
        )  # two bytes of text are no CT, and it says so
        assert busy.read_pdu()[0] == 7
    assert listener.process.wait(15) == 0


def test_order_is_file_folder_commit_answer(begin: Callable[..., ListenerProcess], tmp_path: Path) -> None:
    if not shutil.which("strace"):
        pytest.skip("strace is not installed (Debian package strace)")
    trace = tmp_path / "trace"
    calls = "trace=writev,pwrite64,fsync,fdatasync,link,linkat,sendto"
    listener = begin(wrapper=["strace", "-f", "-y", "-e", calls, "-o", str(trace)])
    assert send(listener.port, [ct(), ct()]) == [Status.SUCCESS] * 2
    subprocess.run(["pkill", "-TERM", "-P", str(listener.process.pid)], check=True)
    listener.process.wait(30)
    traced = _steps(trace.read_text())
    assert len(traced) == 2
    for name, steps in traced.items():
        # File and folder may be synced side by side; rows come after both, the answer after the rows.
        assert (steps[:2], sorted(steps[2:4])) == (["write", "name"], ["fsync file", "fsync folder"]), name
        assert steps[4:] == ["write rows", "fsync rows", "answer"], name


def _steps(trace: str) -> dict[str, list[str]]:
    """What happened to each instance, in order and without repetition, by its incoming file's name."""
    found: dict[str, list[str]] = {}
    current = ""
    for line in trace.splitlines():
        if "resumed>" in line:
            continue
        part = re.search(r"/(\w+\.part)", line)
        step = ""
        if part and re.search(r"\bwritev?\(", line):
            current, step = part[1], "write"
        elif part and "fsync(" in line:
            step = "fsync file"
        elif re.search(r"\blink(at)?\(", line):
            step = "name"
        elif re.search(r"fsync\(\d+</.*/instances/..?/\w+>", line):
            step = "fsync folder"
        elif "pwrite64" in line and "-wal>" in line:
            step = "write rows"
        elif re.search(r"f(data)?sync\(\d+</.*-wal>", line):
            step = "fsync rows"
        elif "sendto(" in line and current and re.search(r"sendto\(\d+<(TCP|socket)", line) and '"\\4\\0' in line:
            step = "answer"
        if step and current:
            steps = found.setdefault(current, [])
            if not steps or (steps[-1] != step and steps[-1] != "answer"):
                steps.append(step)
            if steps[-2:] == steps[-4:-2]:  # a new write-ahead log syncs its header on its own
                del steps[-2:]
    return found


def test_sqlite_syncs_at_every_commit(settings: Callable[..., Settings]) -> None:
    database = Database.from_settings(settings())
    recorder = Recorder(database)
    recorder._connection = database.engine.raw_connection()
    cursor = recorder._connection.cursor()
    cursor.execute("PRAGMA synchronous")
    assert cursor.fetchone() == (2,)
    recorder.close()
    database.close()


def test_health_and_metrics_are_served_and_name_no_patient(begin: Callable[..., ListenerProcess]) -> None:
    listener = begin()
    send(listener.port, [ct(PatientName="CANARY^ZEBRA", PatientID="CANARY-7", AccessionNumber="CANARY-A")])
    base = f"http://127.0.0.1:{listener.settings.dicom.metrics_port}"

    def ready() -> bool:
        try:
            with urllib.request.urlopen(f"{base}/readyz", timeout=5) as answer:
                return all(json.load(answer).values())
        except urllib.error.HTTPError:
            return False

    eventually(ready)
    with urllib.request.urlopen(f"{base}/metrics", timeout=5) as answer:
        metrics = answer.read().decode()
    assert 'mu2_dicom_instances_total{status="success"} 1.0' in metrics
    assert listener.stop() == 0
    assert "CANARY" not in metrics + listener.log.read_text()
    assert "listener_stopped" in listener.log.read_text()


@pytest.mark.parametrize("part", ["door", "completer", "recovery"])
def test_listener_whose_thread_died_says_so_and_leaves_with_an_error(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    owner = {"door": "door.Door._expire", "completer": "arrivals.Completer.complete_quiet"}
    alive: list[bool] = []

    def break_it(listener: Listener) -> None:
        if part == "recovery":
            monkeypatch.setattr(listener._recovery, "_work", broken)
            listener._recovery.request()
        else:
            monkeypatch.setattr(f"dicom_listener.{owner[part]}", broken)
        eventually(lambda: not listener.is_alive())
        address = f"http://127.0.0.1:{listener.metrics_port}/livez"
        with pytest.raises(urllib.error.HTTPError) as answered:
            urllib.request.urlopen(address, timeout=5)
        alive.append(answered.value.code != 503)

    monkeypatch.setattr(arrivals, "RECOVERY_RETRY_SECONDS", 0.05)
    assert serve(settings(quiet_seconds=0.2), threading.Event(), lambda _: None, break_it) is False
    assert alive == [False]


def test_association_that_dies_ends_no_other(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    stop = threading.Event()

    def break_one(listener: Listener) -> None:
        with monkeypatch.context() as fault:
            fault.setattr("dicom_listener.association.Association._negotiate", broken)
            assert not echo(listener.port)
        assert echo(listener.port)
        assert listener.is_alive()
        stop.set()

    assert serve(settings(), stop, lambda _: None, break_one) is True


def test_metrics_have_an_address_of_their_own(start: Callable[..., Running]) -> None:
    running = start(host="127.0.0.2")
    with urllib.request.urlopen(f"http://127.0.0.1:{running.listener.metrics_port}/livez", timeout=5) as answer:
        assert json.load(answer) == {"alive": True}


def test_port_that_is_taken_is_a_clear_error(settings: Callable[..., Settings], tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        taken = settings(port=holder.getsockname()[1])
        ended = subprocess.run(
            [sys.executable, "-m", "dicom_listener"],
            env={**environment(taken), "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert ended.returncode == 1
    assert "set MU2_DICOM__PORT" in ended.stderr


def test_nothing_on_the_listeners_path_imports_torch() -> None:
    code = "import sys, dicom_listener.__main__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize(
    ("port", "setting"), [("port", "MU2_DICOM__PORT"), ("metrics_port", "MU2_DICOM__METRICS_PORT")]
)
def test_a_port_that_is_taken_is_named_with_its_setting(
    settings: Callable[..., Settings], port: str, setting: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        taken = held.getsockname()[1]
        listener = Listener(settings(**{port: taken}), lambda _study_id: None)
        try:
            with pytest.raises(SettingsError, match=f"cannot listen on 127.0.0.1 port {taken} .*{setting}"):
                listener.start()
        finally:
            listener.close()
