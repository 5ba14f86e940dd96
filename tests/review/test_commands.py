"""`mu2 user` and `mu2 review` as an administrator types them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa
from pydantic import ValidationError
from typer.testing import CliRunner

from tests.conftest import free_port
from worker.cli import app
from worker.core import accounts, studies
from worker.core import settings as settings_module
from worker.core.database import Database
from worker.core.health import PROCESS_HEADER
from worker.core.records import AuditEvent, Role
from worker.core.review_records import WebSession
from worker.core.settings import ReviewSettings


@pytest.fixture
def mu2(sqlite_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a command over the test's database; the password comes from standard input."""
    monkeypatch.setenv("MU2_HOME", str(tmp_path))
    monkeypatch.setenv("MU2_CONFIG", os.devnull)
    settings_module.current.cache_clear()
    yield lambda *words, typed="": CliRunner().invoke(app, list(words), input=typed)
    settings_module.current.cache_clear()


def test_user_is_added_listed_and_closed_and_all_of_it_is_audited(mu2, sqlite_database: Database) -> None:
    added = mu2("user", "add", "ada", "--role", "radiologist", "--password-stdin", typed="a long enough password\n")
    assert added.exit_code == 0, added.output
    (shown,) = json.loads(mu2("user", "list", "--json").stdout)
    assert (shown["username"], shown["role"], shown["account"], shown["disabled_at"]) == (
        "ada",
        "radiologist",
        "local",
        None,
    )
    assert mu2("user", "disable", "ada", "--yes").exit_code == 0
    (shown,) = json.loads(mu2("user", "list", "--json").stdout)
    assert shown["disabled_at"] is not None
    with sqlite_database.read() as session:
        actions = session.scalars(sa.select(AuditEvent.action).order_by(AuditEvent.id)).all()
    assert actions == ["user_add", "user_disable"]


def test_new_role_ends_the_sessions_and_is_audited_with_the_old_one(mu2, sqlite_database: Database) -> None:
    mu2("user", "add", "ada", "--role", "viewer", "--password-stdin", typed="a long enough password\n")
    with sqlite_database.write() as session:
        user = accounts.by_name(session, "ada")
        at = studies.now()
        session.add(WebSession(id="s", user_id=user.id, csrf_token="c", created_at=at, active_at=at))
    assert mu2("user", "role", "ada", "radiologist", "--yes").exit_code == 0
    with sqlite_database.read() as session:
        assert accounts.by_name(session, "ada").role is Role.RADIOLOGIST
        assert session.scalars(sa.select(WebSession)).all() == []
        event = session.scalars(sa.select(AuditEvent).where(AuditEvent.action == "user_role")).one()
    assert event.detail == {"user": "ada", "before": "viewer", "after": "radiologist"}


def test_role_that_there_is_not_is_wrong_usage(mu2) -> None:
    assert mu2("user", "role", "ada", "surgeon", "--yes").exit_code == 2


def test_password_is_never_an_argument(mu2) -> None:
    assert mu2("user", "add", "ada", "--role", "radiologist", "--password", "secret").exit_code == 2


def test_page_refuses_to_send_passwords_in_clear_over_the_network() -> None:
    with pytest.raises(ValidationError, match="in clear"):
        ReviewSettings(host="0.0.0.0")
    assert ReviewSettings(host="0.0.0.0", behind_tls_proxy=True).encrypted


def test_review_answers_on_its_port_and_stops_when_told(sqlite_database: Database, tmp_path: Path) -> None:
    port, health = free_port(), free_port()
    (tmp_path / "store").mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MU2_")}
    environment |= {"MU2_HOME": str(tmp_path), "MU2_CONFIG": os.devnull}
    environment |= {"MU2_REVIEW__PORT": str(port), "MU2_REVIEW__METRICS_PORT": str(health)}
    process = subprocess.Popen(
        [sys.executable, "-m", "worker", "review"], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                assert httpx.get(f"http://127.0.0.1:{port}/livez").json() == {"alive": True}
                ready = httpx.get(f"http://127.0.0.1:{health}/readyz")
                assert (ready.status_code, ready.headers[PROCESS_HEADER]) == (200, str(process.pid))
                break
            except httpx.TransportError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
    finally:
        process.terminate()
        _, told = process.communicate(timeout=20)
    assert process.returncode in {0, -15}
    assert any(json.loads(line)["event"] == "review_listening" for line in told.splitlines())
