"""Several receiving processes behind one door."""

import os
import signal
import urllib.request
from collections.abc import Callable

from pydicom.uid import generate_uid

from dicom_listener.statuses import Status
from tests.dicom_listener.conftest import Running
from tests.dicom_listener.sending import connect, ct, echo, eventually, send


def metrics(running: Running) -> dict[str, float]:
    """The samples of /metrics by name and labels."""
    address = f"http://127.0.0.1:{running.listener.metrics_port}/metrics"
    with urllib.request.urlopen(address, timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_associations_are_shared_out_held_counted_and_released(start: Callable[..., Running]) -> None:
    running = start(processes=2, quiet_seconds=1.0)
    study = generate_uid()
    first, second = connect(running.port), connect(running.port)
    receivers = running.listener._pool._receivers  # type: ignore[union-attr]
    eventually(lambda: [r.present for r in receivers] == [1, 1])
    for association in (first, second):
        assert [association.send_c_store(ct(study)).Status for _ in range(3)] == [Status.SUCCESS] * 3
    assert len(running.sent.studies()) == 1
    eventually(lambda: metrics(running)['mu2_dicom_instances_total{status="success"}'] == 6)
    assert metrics(running)["mu2_dicom_open_associations"] == 2
    first.release()
    assert not running.submitted
    held_for = running.sent.studies()[0].id
    eventually(lambda: running.listener._holds.held() == {study})
    second.release()
    eventually(lambda: running.submitted == [held_for])


def test_receiving_process_that_dies_is_replaced_and_counts_are_kept(start: Callable[..., Running]) -> None:
    running = start(processes=2)
    send(running.port, [ct()])
    eventually(lambda: metrics(running).get('mu2_dicom_instances_total{status="success"}') == 1)
    for receiver in list(running.listener._pool._receivers):  # type: ignore[union-attr]
        os.kill(receiver.process.pid, signal.SIGKILL)
    eventually(lambda: all(r.started.is_set() for r in running.listener._pool._receivers), 60)  # type: ignore[union-attr]
    assert eventually(lambda: echo(running.port), 60)
    assert send(running.port, [ct()]) == [Status.SUCCESS]
    eventually(lambda: metrics(running)['mu2_dicom_instances_total{status="success"}'] == 2)
