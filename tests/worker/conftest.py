"""A site of the test's own, on SQLite with the embedded broker."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worker.site import Site
from worker.core.database import Database
from worker.delivery.mllp_receiver import MllpReceiver


@pytest.fixture
def site(tmp_path: Path, sqlite_database: Database) -> Iterator[Site]:
    """Store, database and a running broker; no worker yet."""
    made = Site(tmp_path / "home", sqlite_database)
    made.broker.start()
    yield made
    made.close()


@pytest.fixture
def receiver() -> Iterator[MllpReceiver]:
    """An HL7 receiver that acknowledges."""
    with MllpReceiver() as made:
        yield made


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Shows what the workers of a failed test said."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    made = getattr(item, "funcargs", {}).get("site")
    if report.failed and made is not None:
        for number, worker in enumerate(made.workers, start=1):
            report.sections.append((f"worker {number}", "\n".join(worker.lines[-60:])))
