"""What every route works with: settings, database, templates, slices, live updates, and the doorbell of the queues."""

from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
from fastapi import Request
from jinja2 import Environment

from worker.core.accounts import Lockout
from worker.core.database import Database
from worker.core.errors import BrokerUnavailableError
from worker.core.settings import Settings
from worker.core.signing import Desk
from worker.results import hl7
from worker.review.live import Hub
from worker.review.metrics import Metrics
from worker.review.slices import Looks, SliceCache

log = structlog.get_logger(__name__)

Ring = Callable[[str, str], object]
"""Rings a queue with an opaque id; raises `BrokerUnavailableError` when the broker is away."""


@dataclass(frozen=True)
class Office:
    """The one object that the application hands to its routes."""

    settings: Settings
    database: Database
    templates: Environment
    slices: SliceCache
    hub: Hub
    metrics: Metrics
    looks: Looks = field(repr=False)  # its keys are cookies
    ring_queue: Ring = field(repr=False)

    @property
    def desk(self) -> Desk:
        """What the acts of `worker.core.signing` need."""
        return Desk.from_settings(self.settings, hl7.write)

    @property
    def lockout(self) -> Lockout:
        """When wrong passwords lock an account."""
        return Lockout(self.settings.review.lockout_failures, self.settings.review.lockout_minutes)

    def ring(self, queue: str, *subjects: str) -> None:
        """Rings after a commit; a broker that is away is logged, because the sweeper rings later."""
        for subject in subjects:
            try:
                self.ring_queue(queue, subject)
            except BrokerUnavailableError as error:
                log.warning("broker_unavailable", queue=queue, error=type(error).__name__)


def office(request: Request) -> Office:
    """The application's `Office`."""
    found: Office = request.app.state.office
    return found


async def office_of(request: Request) -> Office:
    """The same as a dependency; a plain function would cost each request a thread."""
    return office(request)
