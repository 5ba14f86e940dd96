"""The heart: one thread of a process renews the leases of all claims that the process holds."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog

from worker.core import studies
from worker.core.database import Database
from worker.core.errors import DatabaseUnavailableError
from worker.core.studies import Claim

log = structlog.get_logger(__name__)

RENEWALS_PER_LEASE = 3
RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class Hold:
    """A claim under way; `lost` is set when another worker or a new revision took the study over."""

    claim: Claim
    lost: threading.Event = field(default_factory=threading.Event)


class Heart:
    """Renews every claim inside a `hold` block three times a lease. Safe for threads."""

    def __init__(self, database: Database, lease_seconds: float) -> None:
        self._database = database
        self._lease_seconds = lease_seconds
        self._holds: dict[str, Hold] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; leases that are still held run out by themselves."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._lease_seconds)

    @contextmanager
    def hold(self, claim: Claim) -> Iterator[Hold]:
        """Keeps the lease of `claim` alive while the block runs."""
        hold = Hold(claim)
        with self._lock:
            self._holds[claim.token] = hold
        try:
            yield hold
        finally:
            with self._lock:
                del self._holds[claim.token]

    def beat(self) -> None:
        """Renews every lease once and marks the claims that are lost; raises `DatabaseUnavailableError`."""
        with self._lock:
            holds = dict(self._holds)
        if not holds:
            return
        held = self._database.run(
            lambda session: studies.renew(session, holds, self._lease_seconds), busy_seconds=RETRY_SECONDS
        )
        for token, hold in holds.items():
            with self._lock:
                finished = token not in self._holds
            if token not in held and not finished and not hold.lost.is_set():
                hold.lost.set()
                log.warning(
                    "lease_lost",
                    study_id=hold.claim.study_id,
                    revision=hold.claim.revision,
                    stage=hold.claim.stage.value,
                )

    def _run(self) -> None:
        wait = self._lease_seconds / RENEWALS_PER_LEASE
        while not self._stop.wait(wait):
            try:
                self.beat()
                wait = self._lease_seconds / RENEWALS_PER_LEASE
            except DatabaseUnavailableError:
                wait = min(RETRY_SECONDS, self._lease_seconds / RENEWALS_PER_LEASE)  # nobody else can claim meanwhile
