"""Delivery against receivers that misbehave: every message is accepted once, under one control id."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worker.hospital_site import Site, wait_for
from worker import tasks
from worker.core import outbox
from worker.core.records import MessageState, Stage
from worker.core.settings import Destination, Hl7Settings
from worker.delivery.mllp_receiver import Behaviour, MllpReceiver
from worker.metrics import Metrics
from worker.process import WorkerProcess
from worker.senders import Senders


@pytest.fixture
def bad() -> Iterator[MllpReceiver]:
    with MllpReceiver() as made:
        yield made


@pytest.fixture
def good() -> Iterator[MllpReceiver]:
    with MllpReceiver() as made:
        yield made


@pytest.fixture
def outbox_of(site: Site, bad: MllpReceiver, good: MllpReceiver) -> Hl7Settings:
    """The settings of a site with two receivers; nobody sends yet."""
    site.deliver_to(
        {"name": "bad", "host": "127.0.0.1", "port": bad.port, "drafts": "R", "answer_seconds": 0.4},
        {"name": "good", "host": "127.0.0.1", "port": good.port, "drafts": "R"},
    )
    return site.settings().hl7


@pytest.fixture
def drafted(site: Site, outbox_of: Hl7Settings, worker_process: WorkerProcess) -> None:
    """Two studies drafted by a process whose senders stand still."""
    worker_process.senders.close(0)
    for _ in range(2):
        site.add_study()
    for stage in Stage:
        tasks.answer(worker_process, stage, "task")


@pytest.fixture
def senders(site: Site, outbox_of: Hl7Settings, drafted: None) -> Iterator[Senders]:
    made = Senders(site.database, outbox_of, Metrics())
    yield made
    made.close(5)


def ring_until(site: Site, senders: Senders, done: dict[str, MessageState]) -> None:
    """Rings as the sweep does until the messages of each destination are in a state."""

    def settled() -> bool:
        with site.database.read() as session:
            for name in outbox.due_destinations(session):
                senders.ring(name)
        return all(m.state is done[m.destination] for m in site.messages() if m.destination in done)

    wait_for(settled, what=str([(m.destination, m.state) for m in site.messages()]))


ACKNOWLEDGED = {"bad": MessageState.ACKNOWLEDGED, "good": MessageState.ACKNOWLEDGED}


@pytest.mark.parametrize(
    "behaviour",
    [
        Behaviour.AE,
        Behaviour.GARBAGE,
        Behaviour.HALF,
        Behaviour.HANG,
        Behaviour.CLOSE,
        Behaviour.OTHER_CONTROL_ID,
    ],
)
def test_message_is_sent_again_with_its_control_id_until_it_is_taken(
    site: Site, senders: Senders, bad: MllpReceiver, good: MllpReceiver, behaviour: Behaviour
) -> None:
    bad.behaviour = behaviour
    ring_until(site, senders, {"good": MessageState.ACKNOWLEDGED})
    wait_for(lambda: bad.received)
    bad.behaviour = Behaviour.AA
    ring_until(site, senders, ACKNOWLEDGED)

    taken = Counter(m.control_id for m in bad.received if m.behaviour is Behaviour.AA)
    assert taken == {m.control_id: 1 for m in site.messages() if m.destination == "bad"}
    assert {m.control_id for m in bad.received} == set(taken)


@pytest.mark.parametrize("behaviour", [Behaviour.AR, Behaviour.CR])
def test_refused_message_is_not_sent_again(
    site: Site, senders: Senders, bad: MllpReceiver, behaviour: Behaviour
) -> None:
    bad.behaviour = behaviour
    ring_until(site, senders, {"bad": MessageState.REFUSED, "good": MessageState.ACKNOWLEDGED})
    assert len(bad.received) == 2


def test_receiver_that_closes_after_each_message_gets_every_message_once(
    site: Site, senders: Senders, bad: MllpReceiver
) -> None:
    bad.behaviour = Behaviour.AA_THEN_CLOSE
    ring_until(site, senders, ACKNOWLEDGED)
    assert len(bad.received) == 2


def test_one_connection_carries_all_messages(site: Site, senders: Senders, good: MllpReceiver) -> None:
    ring_until(site, senders, ACKNOWLEDGED)
    assert (len(good.received), good.connections) == (2, 1)


def test_message_is_parked_after_its_last_try(
    site: Site, outbox_of: Hl7Settings, drafted: None, bad: MllpReceiver
) -> None:
    bad.behaviour = Behaviour.AE
    settings = outbox_of.model_copy(update={"max_attempts": 2, "backoff_seconds": 0.01})
    senders = Senders(site.database, settings, Metrics())
    ring_until(site, senders, {"bad": MessageState.PARKED})
    senders.close(5)
    assert Counter(m.control_id for m in bad.received) == {
        m.control_id: 2 for m in site.messages() if m.destination == "bad"
    }


def test_answer_is_recorded_when_the_database_comes_back(site: Site, senders: Senders, good: MllpReceiver) -> None:
    senders.ring("good")
    wait_for(lambda: good.received)
    lock = site.lock_database()
    time.sleep(1.5)
    lock.rollback()
    ring_until(site, senders, {"good": MessageState.ACKNOWLEDGED})
    assert len(good.received) == 2


def test_two_processes_with_senders_for_one_destination_send_each_message_once(
    site: Site, outbox_of: Hl7Settings, drafted: None, good: MllpReceiver
) -> None:
    pair = [Senders(site.database, outbox_of, Metrics()) for _ in range(2)]
    gate = threading.Barrier(2)

    def ring(senders: Senders) -> None:
        gate.wait()
        senders.ring("good")

    threads = [threading.Thread(target=ring, args=(senders,)) for senders in pair]
    for thread in threads:
        thread.start()
    wait_for(lambda: all(m.state is MessageState.ACKNOWLEDGED for m in site.messages() if m.destination == "good"))
    for thread in threads:
        thread.join()
    for senders in pair:
        senders.close(5)
    assert Counter(m.control_id for m in good.received) == {
        m.control_id: 1 for m in site.messages() if m.destination == "good"
    }


def test_unknown_destination_is_not_rung(senders: Senders) -> None:
    assert not senders.ring("nowhere")


def test_tls_files_that_cannot_be_read_leave_the_message_for_later(
    site: Site, outbox_of: Hl7Settings, drafted: None, tmp_path: Path
) -> None:
    first = outbox_of.destinations[0]
    broken = Destination.model_validate({**first.model_dump(), "tls": True, "tls_ca": tmp_path / "absent.pem"})
    senders = Senders(site.database, outbox_of.model_copy(update={"destinations": (broken,)}), Metrics())
    senders.ring("bad")
    wait_for(lambda: any(m.attempts for m in site.messages() if m.destination == "bad"))
    senders.close(5)
    assert {m.state for m in site.messages() if m.destination == "bad"} == {MessageState.PENDING}
