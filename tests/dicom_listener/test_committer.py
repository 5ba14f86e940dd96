"""Group commit: one transaction for many, and one bad instance never takes the others with it."""

import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from sqlalchemy.exc import StatementError

from dicom_listener.committer import Committer, RowRefusedError
from dicom_listener.metrics import Metrics
from tests.core.builders import arrival, uid
from worker.core.arrivals import Arrival, Recorded
from worker.core.database import Database
from worker.core.errors import DatabaseUnavailableError, Mu2Error
from worker.core.recorder import Recorder
from worker.core.records import Disposition


class Bench:
    """A committer whose recorder a test can slow down or break."""

    def __init__(self, database: Database) -> None:
        self.failures = 0
        self.committer = Committer(database, Metrics(), self._count)

    def _count(self) -> None:
        self.failures += 1

    def commit(self, study: str) -> Recorded:
        return self.committer.commit(arrival(study))

    def commit_at_once(self, study: str, count: int) -> list[Recorded | Mu2Error]:
        outcomes: list[Recorded | Mu2Error] = []

        def one() -> None:
            try:
                outcomes.append(self.commit(study))
            except Mu2Error as error:
                outcomes.append(error)

        threads = [threading.Thread(target=one) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
        return outcomes


@pytest.fixture
def bench(sqlite_database: Database) -> Iterator[Bench]:
    made = Bench(sqlite_database)
    yield made
    made.committer.close()


def test_instances_that_come_during_a_commit_share_the_next(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []
    record = Recorder.record

    def slow(self: Recorder, group: Sequence[Arrival]) -> list[Recorded]:
        groups.append(len(group))
        time.sleep(0.2)
        return record(self, group)

    monkeypatch.setattr(Recorder, "record", slow)
    outcomes = bench.commit_at_once(uid(), 8)
    assert [type(o) for o in outcomes] == [Recorded] * 8
    assert sum(groups) == 8
    assert len(groups) <= 3


def test_row_that_the_database_refuses_fails_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Recorder.record
    bad: list[str] = []

    def picky(self: Recorder, group: Sequence[Arrival]) -> list[Recorded]:
        time.sleep(0.1)
        bad[:] = bad or [group[-1].sop_instance_uid]
        if any(a.sop_instance_uid in bad for a in group):
            raise StatementError("injected", None, None, ValueError())
        return record(self, group)

    monkeypatch.setattr(Recorder, "record", picky)
    outcomes = bench.commit_at_once(uid(), 6)
    assert sorted(type(o).__name__ for o in outcomes) == ["Recorded"] * 5 + ["RowRefusedError"]
    assert bench.failures == 1


def test_database_that_is_away_fails_the_group_and_asks_for_recovery(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: Recorder, group: Sequence[Arrival]) -> list[Recorded]:
        raise DatabaseUnavailableError("away")

    with monkeypatch.context() as broken:
        broken.setattr(Recorder, "record", away)
        with pytest.raises(DatabaseUnavailableError):
            bench.commit(uid())
    assert bench.failures == 1
    assert bench.commit(uid()).disposition is Disposition.KEPT


def test_fault_of_ours_hangs_nobody(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Recorder, group: Sequence[Arrival]) -> list[Recorded]:
        time.sleep(0.1)
        raise ZeroDivisionError

    monkeypatch.setattr(Recorder, "record", broken)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    outcomes = bench.commit_at_once(uid(), 4)
    monkeypatch.undo()
    assert {type(o) for o in outcomes} == {RowRefusedError}  # of those who led a group, the fault is their own
    assert bench.commit(uid()).disposition is Disposition.KEPT
