"""`mu2 doctor`: what it finds on a home with real parts, and what it advises."""

import json
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from mu2_model.shipped import is_shipped
from mu2_model.untrained import make_untrained
from tests.cli.conftest import Terminal
from tests.conftest import free_port
from tests.core import builders
from worker import doctor
from worker.broker import EmbeddedBroker
from worker.core import settings, studies
from worker.core.records import Heartbeat, Study
from worker.core.settings import Settings
from worker.delivery.mllp_receiver import MllpReceiver
from worker.doctor import Check, Outcome, data, peers, work


@pytest.fixture
def config(terminal: Terminal) -> Settings:
    return settings.load(dicom={"port": free_port()}, model={"reporter": "fake"})


def found(checks: object, name: str) -> Check:
    return next(check for check in list(checks) if check.name == name)  # type: ignore[call-overload]


def beat(terminal: Terminal, *, queues: str = "prepare,draft,deliver", ago: float = 0.0) -> None:
    at = studies.now() - timedelta(seconds=ago)
    with terminal.database.write() as session:
        session.add(Heartbeat(owner=f"host:{ago}", service="worker", queues=queues, started_at=at, beat_at=at))


def test_a_migrated_database_with_room_is_well(terminal: Terminal, config: Settings) -> None:
    checks = [*data.home(config), *data.database(config)]
    assert {check.outcome for check in checks} == {Outcome.OK}


def test_a_home_that_others_can_read_is_a_warning(terminal: Terminal, config: Settings) -> None:
    terminal.home.chmod(0o755)
    assert "chmod 700" in found(data.home(config), "home").advice


def test_a_database_of_another_revision_fails_with_the_command_to_run(terminal: Terminal, config: Settings) -> None:
    with terminal.database.write() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '0000'"))
    check = found(data.database(config), "migrations")
    assert (check.outcome, check.advice) == (Outcome.FAIL, "run `mu2 db upgrade`")


def test_a_disk_below_its_floor_fails(config: Settings) -> None:
    full = config.model_copy(update={"store": config.store.model_copy(update={"floor_bytes": 10**18})})
    check = found(data.store(full), "disk")
    assert check.outcome is Outcome.FAIL and "0xA700" in check.advice


def test_a_broker_that_is_away_fails_and_one_that_answers_is_well(config: Settings) -> None:
    assert found(work.broker(config), "broker").outcome is Outcome.FAIL
    with EmbeddedBroker.from_settings(config):
        assert found(work.broker(config), "broker").outcome is Outcome.OK


def test_no_worker_fails(config: Settings) -> None:
    assert found(work.workers(config), "workers").finding == "no worker is alive"


def test_a_worker_whose_heart_stopped_does_not_count(terminal: Terminal, config: Settings) -> None:
    beat(terminal, ago=120)
    assert found(work.workers(config), "workers").finding == "no worker is alive"


def test_a_queue_that_nobody_serves_fails(terminal: Terminal, config: Settings) -> None:
    beat(terminal, queues="prepare,deliver")
    check = found(work.workers(config), "workers")
    assert (check.finding, check.outcome) == ("nobody serves draft", Outcome.FAIL)


def test_a_worker_that_lives_but_claims_nothing_is_deaf(terminal: Terminal, config: Settings) -> None:
    beat(terminal)
    study_id = builders.completed(terminal.database)
    assert found(work.workers(config), "workers").outcome is Outcome.OK
    with terminal.database.write() as session:
        session.get_one(Study, study_id).status_at = studies.now() - timedelta(minutes=5)
    check = found(work.workers(config), "workers")
    assert check.outcome is Outcome.FAIL and "alive but deaf" in check.advice


@pytest.mark.parametrize(("drafts", "word"), [("R", "delete what you had"), ("P", "verified early result")])
def test_each_destination_is_told_what_a_draft_may_be_to_it(config: Settings, drafts: str, word: str) -> None:
    with MllpReceiver() as receiver:
        destination = builders.destination(port=receiver.port, drafts=drafts)
        checks = list(peers.destinations(with_destination(config, destination)))
        assert receiver.received == []
    assert checks[0].outcome is Outcome.OK
    assert any(word in check.advice for check in checks if check.outcome is Outcome.WARN)


def test_a_destination_that_is_away_fails_with_its_address(config: Settings) -> None:
    port = free_port()
    check = next(iter(peers.destinations(with_destination(config, builders.destination(port=port)))))
    assert check.outcome is Outcome.FAIL and f"127.0.0.1:{port}" in check.finding


def test_a_listener_that_is_down_fails(config: Settings) -> None:
    assert found(peers.listener(config), "listener").outcome is Outcome.FAIL


@pytest.mark.parametrize(
    ("allowed", "outcome", "word"), [(False, Outcome.WARN, "nobody"), (True, Outcome.FAIL, "leave")]
)
@pytest.mark.parametrize(("trained_on", "learned"), [("nothing", "random"), ("phantoms", "synthetic CTs alone")])
def test_a_model_that_saw_no_patient_is_named_and_fails_where_its_drafts_leave(
    config: Settings, tmp_path: Path, trained_on: str, learned: str, allowed: bool, outcome: Outcome, word: str
) -> None:
    checkpoint = make_untrained(tmp_path / "checkpoint")
    told = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**told, "trained_on": trained_on}))
    changes = {"reporter": "mu2", "path": checkpoint, "allow_not_clinical": allowed}
    check = next(work.model(config.model_copy(update={"model": config.model.model_copy(update=changes)})))
    assert check.outcome is outcome and word in check.finding and "MU2_MODEL__PATH" in check.advice
    assert learned in check.finding


def test_without_a_path_the_doctor_looks_at_the_model_that_drafts(config: Settings) -> None:
    check = next(work.model(config.model_copy(update={"model": config.model.model_copy(update={"reporter": "mu2"})})))
    assert check.outcome is Outcome.WARN
    assert ("mu2-phantom" if is_shipped() else "no checkpoint is set") in check.finding


def test_a_checkpoint_that_is_not_there_fails(config: Settings, tmp_path: Path) -> None:
    chosen = config.model.model_copy(update={"reporter": "mu2", "path": tmp_path})
    check = next(work.model(config.model_copy(update={"model": chosen})))
    assert check.outcome is Outcome.FAIL and "MU2_MODEL__PATH" in check.advice


def test_doctor_exits_with_1_when_a_check_fails(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MU2_DICOM__PORT", str(free_port()))
    monkeypatch.setenv("MU2_MODEL__REPORTER", "fake")
    shutil.rmtree(terminal.home)
    result = terminal.run("doctor", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert not report["ok"] and {"database", "broker", "listener"} <= {c["name"] for c in report["checks"]}


def test_doctor_says_all_it_can_of_a_database_that_was_never_migrated(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MU2_DICOM__PORT", str(free_port()))
    monkeypatch.setenv("MU2_MODEL__REPORTER", "fake")
    for file in terminal.home.glob("mu2.sqlite*"):
        file.unlink()
    (terminal.home / "mu2.sqlite").touch()  # an empty file is an empty database
    result = terminal.run("doctor", "--json")
    report = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert report["migrations"]["advice"] == "run `mu2 db upgrade`"
    assert "listener" in report and "workers" not in report


def test_a_check_that_meets_what_nobody_foresaw_fails_and_the_others_go_on(
    config: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def workers(_settings: Settings) -> Iterator[Check]:
        raise sa.exc.ProgrammingError("SELECT 'DOE^JANE'", None, Exception())

    monkeypatch.setattr(work, "workers", workers)
    checks = list(doctor.run(config))
    check = found(checks, "workers")
    assert check.outcome is Outcome.FAIL and "ProgrammingError" in check.finding and "DOE" not in check.finding
    assert "listener" in {check.name for check in checks}


def with_destination(config: Settings, destination: object) -> Settings:
    return config.model_copy(update={"hl7": config.hl7.model_copy(update={"destinations": (destination,)})})
