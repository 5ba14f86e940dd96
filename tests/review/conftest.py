"""One department a test, on SQLite; the page itself is tested with real requests."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.review.builders import Department, Reader, department, served
from worker.core.database import Database
from worker.core.records import Role

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="package")
def browser() -> "Iterator[Browser]":
    """One Chromium for this folder; each test opens its own context."""
    from tests.review.browser import chromium  # skips, with its reason, where there is none

    with chromium() as started:
        yield started


@pytest.fixture(autouse=True)
def quick_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Argon2 with little work: the same algorithm, a thousandth of the time."""
    from argon2 import PasswordHasher

    from worker.core import accounts

    hasher = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    monkeypatch.setattr(accounts, "_hasher", lambda: hasher)
    accounts._decoy.cache_clear()


@pytest.fixture
def here(sqlite_database: Database, tmp_path: Path) -> Department:
    """A department with one person of each role and two radiologists."""
    found = department(sqlite_database, tmp_path)
    for name, role in (
        ("reader", Role.RADIOLOGIST),
        ("second", Role.RADIOLOGIST),
        ("viewer", Role.VIEWER),
        ("boss", Role.ADMIN),
        ("auditor", Role.AUDITOR),
    ):
        found.user(name, role)
    return found


@pytest.fixture
def page(here: Department) -> Iterator[str]:
    """The address of the running page."""
    with served(here.app()) as address:
        yield address


@pytest.fixture
def reader(page: str) -> Iterator[Reader]:
    """A radiologist who is logged in."""
    with Reader(base_url=page) as client:
        assert client.log_in("reader").status_code == 200
        yield client
