"""Who does the work: broker, workers, the model and the device it runs on."""

import json
import secrets
import time
from collections.abc import Iterator
from importlib.util import find_spec

from redis import Redis
from redis.exceptions import RedisError, ResponseError

from worker import queue_status
from worker.core import schema
from worker.core.database import Database
from worker.core.errors import DatabaseUnavailableError
from worker.core.settings import ModelSettings, Settings
from worker.doctor import Check, fail, ok, warn
from worker.queue_status import DEAF_SECONDS, QueueStatus

BROKER_SECONDS = 3.0
_PROBE_KEY_SECONDS = 10


def broker(settings: Settings) -> Iterator[Check]:
    """A message goes through the broker and back, and the broker never drops one to save memory."""
    embedded = not settings.queue.url.get_secret_value()
    try:
        with _client(settings) as client:
            began = time.monotonic()
            key, value = f"mu2-doctor-{secrets.token_hex(8)}", secrets.token_hex(8)
            client.rpush(key, value)
            client.expire(key, _PROBE_KEY_SECONDS)
            came_back = client.lpop(key) == value.encode()
            seconds = time.monotonic() - began
            policy = _eviction_policy(client)
    except (RedisError, ValueError) as error:
        advice = "start `mu2 up`" if embedded else "start the broker, or mend MU2_QUEUE__URL and the way to it"
        name = "the embedded Valkey" if embedded else "the broker"
        yield fail("broker", f"{name} does not answer ({type(error).__name__})", advice)
        return
    if not came_back:
        yield fail(
            "broker", "a message did not come back", "another program empties its keys: give mu2 its own database"
        )
    elif policy not in ("noeviction", ""):
        yield warn("broker", f"evicts keys under memory pressure ({policy})", "set maxmemory-policy noeviction")
    else:
        yield ok("broker", f"{'embedded Valkey' if embedded else 'broker'} answers in {seconds * 1000:.1f} ms")


def workers(settings: Settings) -> Iterator[Check]:
    """Live workers serve every queue, and none of them is deaf; nothing waits for a person."""
    if not settings.database.url.get_secret_value() and not (settings.home / "mu2.sqlite").exists():
        return  # `data.database` has said so
    opened = Database.from_settings(settings)
    try:
        if schema.current(opened) != schema.head():
            return  # `data.database` has said so
        status = queue_status.read(settings, opened)
    except DatabaseUnavailableError:
        return
    finally:
        opened.close()
    yield _alive(status)
    yield from _waiting_for_a_person(status)


def model(settings: Settings) -> Iterator[Check]:
    """The device is there and the checkpoint is what it says."""
    chosen = settings.model
    if chosen.reporter == "fake":
        yield warn("model", "the fake reporter writes canned text", "set MU2_MODEL__REPORTER=mu2 before any use")
        return
    if find_spec("torch") is None:
        yield ok("model", "torch is not installed here: this machine drafts nothing")
        return
    yield _checkpoint(chosen)
    yield _device(chosen)


def _alive(status: QueueStatus) -> Check:
    alive = [p for p in status.processes if p.service == "worker" and p.alive]
    if not alive:
        return fail("workers", "no worker is alive", "start `mu2 up` or `celery -A worker worker`")
    deaf = status.deaf_stages()
    if deaf:
        return fail(
            "workers",
            f"{len(alive)} alive, but {' and '.join(deaf)} is due for more than {DEAF_SECONDS:.0f} s",
            "alive but deaf, or too few: see the workers' logs and restart them",
        )
    unserved = status.unserved_queues()
    if unserved:
        return fail(
            "workers", f"nobody serves {', '.join(unserved)}", f"start `celery -A worker worker -Q {unserved[0]}`"
        )
    return ok("workers", f"{len(alive)} alive, every queue is served, nothing waits for long")


def _waiting_for_a_person(status: QueueStatus) -> Iterator[Check]:
    failed = status.studies.get("failed", 0)
    if failed:
        yield warn("failed studies", f"{failed} failed", "`mu2 study list --status failed` says why; then requeue")
    held = {
        name: sum(states.get(state, 0) for state in ("parked", "refused")) for name, states in status.messages.items()
    }
    for name, count in held.items():
        if count:
            advice = f"`mu2 message list --destination {name}` says why; then `mu2 message resend`"
            yield warn("messages", f"{count} for {name} are parked or refused", advice)


def _device(chosen: ModelSettings) -> Check:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return ok("device", f"{torch.cuda.get_device_name()}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free")
    if chosen.device.startswith("cuda"):
        return fail(
            "device", f"{chosen.device} is set, no GPU is there", "see nvidia-smi, or set MU2_MODEL__DEVICE=cpu"
        )
    return warn("device", "no GPU: drafts are written on the CPU", "fine for a demo; slow for a hospital")


def _checkpoint(chosen: ModelSettings) -> Check:
    from mu2_model.checkpoint_folder import hash_weights
    from mu2_model.errors import CheckpointError
    from mu2_model.shipped import is_shipped, shipped_checkpoint

    path = chosen.path
    if path is None:
        if not is_shipped():
            return _not_clinical(chosen, "no checkpoint is set: drafts come from random weights")
        path = shipped_checkpoint()
    if not (path / "config.json").is_file():
        return fail("model", f"{path} holds no checkpoint", "set MU2_MODEL__PATH to a folder of `mu2 model convert`")
    try:
        trained_on = json.loads((path / "config.json").read_text(encoding="utf-8")).get("trained_on", "nothing")
        found = f"{path.name}, weights {hash_weights(path)[:12]}"
    except (CheckpointError, OSError, ValueError) as error:
        return fail("model", f"{path} cannot be read ({type(error).__name__})", "copy the checkpoint again")
    if trained_on == "patients":
        return ok("model", found)
    learned = "synthetic CTs alone" if trained_on == "phantoms" else "nothing, its weights are random"
    return _not_clinical(chosen, f"{found}: trained on {learned}")


def _not_clinical(chosen: ModelSettings, found: str) -> Check:
    """A model that was trained on no patient: its drafts may be looked at, and must not leave."""
    if chosen.allow_not_clinical:
        advice = "unset MU2_MODEL__ALLOW_NOT_CLINICAL and set MU2_MODEL__PATH to a checkpoint trained on patients before any use"
        return fail("model", f"{found}; its drafts leave", advice)
    advice = "set MU2_MODEL__PATH to a checkpoint trained on patients before any use"
    return warn("model", f"{found}; its drafts say so and are sent to nobody", advice)


def _client(settings: Settings) -> Redis:
    url = settings.broker_url.replace("redis+socket://", "unix://", 1)
    return Redis.from_url(url, socket_timeout=BROKER_SECONDS, socket_connect_timeout=BROKER_SECONDS)


def _eviction_policy(client: Redis) -> str:
    """The policy, or nothing where a managed broker does not tell."""
    try:
        found = client.config_get("maxmemory-policy")
    except ResponseError:
        return ""
    return str(found.get("maxmemory-policy", ""))
