"""The embedded broker: private, durable, and back after a crash."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from worker import queues
from worker.broker import EmbeddedBroker
from worker.core import settings as settings_module
from worker.core.errors import BrokerUnavailableError, SettingsError
from worker.core.settings import QueueSettings, Settings


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    made = EmbeddedBroker(tmp_path / "valkey" / "valkey.sock")
    made.start()
    yield made
    made.kill()


def client(broker: EmbeddedBroker) -> "redis.Redis":
    return redis.Redis(unix_socket_path=str(broker.socket_path), decode_responses=True)


def test_only_its_owner_reaches_it_and_no_port_is_open(broker: EmbeddedBroker) -> None:
    assert stat.S_IMODE(broker.socket_path.stat().st_mode) == 0o700
    assert stat.S_IMODE(broker.socket_path.parent.stat().st_mode) == 0o700
    with client(broker) as asked:
        assert asked.config_get("port") == {"port": "0"}


def test_rung_doorbells_survive_a_crash(broker: EmbeddedBroker) -> None:
    with client(broker) as asked:
        asked.config_set("appendfsync", "always")
        asked.lpush("prepare", "x")
    broker.kill()
    assert not broker.answers()
    broker.start()
    with client(broker) as asked:
        assert asked.llen("prepare") == 1


def test_starting_twice_keeps_the_first(broker: EmbeddedBroker) -> None:
    pid = broker.pid
    broker.start()
    assert broker.pid == pid


def test_memory_is_bounded_and_nothing_is_evicted(broker: EmbeddedBroker) -> None:
    with client(broker) as asked:
        assert asked.config_get("maxmemory") == {"maxmemory": str(256 * 1024 * 1024)}
        assert asked.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}


def test_path_too_long_for_a_socket_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="shorter"):
        EmbeddedBroker(tmp_path / ("x" * 120) / "valkey.sock").start()


def test_broker_by_url_is_not_embedded() -> None:
    settings = Settings(queue=QueueSettings(url="redis://127.0.0.1:1/0"))  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=r"queue\.url"):
        EmbeddedBroker.from_settings(settings)


def test_absent_broker_is_an_error_within_seconds(tmp_path: Path) -> None:
    settings = Settings(queue=QueueSettings(url="redis://127.0.0.1:1/0"))  # type: ignore[arg-type]
    with pytest.raises(BrokerUnavailableError):
        queues.Doorbell(queues.new_app(settings)).ring(queues.PREPARE, "x")


def test_doorbell_rings_again_after_the_broker_came_back(broker: EmbeddedBroker) -> None:
    doorbell = queues.Doorbell(queues.new_app(Settings(queue=QueueSettings(url=broker.url))))  # type: ignore[arg-type]
    doorbell.ring(queues.PREPARE, "first")
    broker.kill()
    with pytest.raises(BrokerUnavailableError):
        doorbell.ring(queues.PREPARE, "second")
    broker.start()
    with client(broker) as asked:
        asked.flushall()
    assert doorbell.ring(queues.PREPARE, "third")
    assert doorbell.waiting(queues.PREPARE) == 1


def test_submitting_a_study_imports_neither_torch_nor_the_worker(broker: EmbeddedBroker, tmp_path: Path) -> None:
    code = (
        "import sys; from worker import queues; queues.submit_study('00000000-0000-0000-0000-000000000000');"
        "print(sorted({'torch', 'numpy', 'pydicom', 'worker.celery', 'worker.process'} & set(sys.modules)))"
    )
    environment = {**os.environ, "MU2_QUEUE__URL": broker.url, "MU2_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr
    with client(broker) as asked:
        assert asked.llen("prepare") == 1


def test_long_home_gets_a_short_socket_and_keeps_its_file(tmp_path: Path) -> None:
    config = settings_module.load(home=tmp_path / ("x" * 120))
    with EmbeddedBroker.from_settings(config) as broker:
        assert broker.answers()
        assert broker.socket_path == settings_module.load(home=tmp_path / ("x" * 120)).broker_socket
        assert list((config.home / "valkey").iterdir())
    broker.socket_path.parent.rmdir()


def test_socket_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "valkey").mkdir()
    os.chown(tmp_path / "valkey", 65534, 65534)
    with pytest.raises(SettingsError, match="another user"):
        EmbeddedBroker(tmp_path / "valkey" / "valkey.sock").start()
