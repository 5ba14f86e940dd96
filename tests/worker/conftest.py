"""A site of the test's own with the embedded broker, on SQLite where a test does not say otherwise."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from tests.worker.hospital_site import Site
from worker import queues
from worker.core.database import Database
from worker.delivery.mllp_receiver import MllpReceiver
from worker.process import WorkerProcess


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Parts of a worker that run inside the test's process keep silent; worker processes log as they do."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


@pytest.fixture
def site_database(sqlite_database: Database) -> Database:
    """The database of the site; `test_postgres.py` takes another one."""
    return sqlite_database


@pytest.fixture
def site(tmp_path: Path, site_database: Database) -> Iterator[Site]:
    """Store, database and a running broker; no worker yet."""
    made = Site(tmp_path / "home", site_database)
    made.broker.start()
    yield made
    made.close()


@pytest.fixture
def receiver() -> Iterator[MllpReceiver]:
    """An HL7 receiver that acknowledges."""
    with MllpReceiver() as made:
        yield made


@pytest.fixture
def worker_process(site: Site) -> Iterator[WorkerProcess]:
    """What a worker process holds, inside the test's own process and without Celery; its threads run."""
    made = WorkerProcess(site.settings(), queues.QUEUES, 8, site.doorbell())
    made.start()
    yield made
    made.halting.set()
    made.stop()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Shows what the workers of a failed test said."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    made = getattr(item, "funcargs", {}).get("site")
    if report.failed and made is not None:
        for number, worker in enumerate(made.workers, start=1):
            report.sections.append((f"worker {number}", "\n".join(worker.lines[-60:])))
