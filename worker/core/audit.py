"""Who did what to which study: rows that are only ever appended, each holding the hash of the one before.

`sha256` of a row covers its own fields and `previous_sha256`; changing, removing or reordering a row breaks the chain at
that row. Triggers refuse UPDATE and DELETE; the chain shows what was done around them.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from worker.core.errors import AuditError
from worker.core.records import AuditEvent

GENESIS = "0" * 64
_POSTGRES_LOCK = 0x6D753261  # "mu2a": one writer of the chain at a time
_PAGE = 1000


@dataclass(frozen=True)
class Verified:
    """A chain that holds."""

    events: int
    head: str  # hash of the last row; note it elsewhere to prove later that nothing was cut off the end


def append(
    session: Session,
    action: str,
    *,
    actor: str,
    study_id: str | None = None,
    origin: str = "",
    outcome: str = "ok",
    **detail: Any,
) -> None:
    """Appends one event in the caller's transaction. `detail` holds no patient data: ids, counts, reasons."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(sa.select(sa.func.pg_advisory_xact_lock(_POSTGRES_LOCK)))
    last = session.execute(sa.select(AuditEvent.id, AuditEvent.sha256).order_by(AuditEvent.id.desc()).limit(1)).first()
    number, previous = (last.id + 1, last.sha256) if last else (1, GENESIS)
    fields: dict[str, Any] = {
        "id": number,
        "at": datetime.now(UTC),
        "actor": actor[:100],
        "action": action,
        "study_id": study_id,
        "origin": origin[:64],
        "outcome": outcome,
        "detail": detail,
        "previous_sha256": previous,
    }
    session.execute(sa.insert(AuditEvent), [{**fields, "sha256": _hash(fields)}])


def verify(session: Session) -> Verified:
    """Walks the whole chain; raises `AuditError` that names the first row that does not fit."""
    previous, count = GENESIS, 0
    for event in _events(session):
        fields = {
            name: getattr(event, name)
            for name in (
                "id",
                "at",
                "actor",
                "action",
                "study_id",
                "origin",
                "outcome",
                "detail",
                "previous_sha256",
            )
        }
        if event.previous_sha256 != previous or event.id != count + 1 or _hash(fields) != event.sha256:
            raise AuditError(
                f"the audit chain breaks at event {event.id} (expected {count + 1}); "
                "compare with a backup and keep this database as evidence"
            )
        previous, count = event.sha256, count + 1
    return Verified(count, previous)


def _events(session: Session) -> Iterator[AuditEvent]:
    after = 0
    while True:
        page = session.scalars(
            sa.select(AuditEvent).where(AuditEvent.id > after).order_by(AuditEvent.id).limit(_PAGE)
        ).all()
        if not page:
            return
        yield from page
        after = page[-1].id


def _hash(fields: dict[str, Any]) -> str:
    at = fields["at"].astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    canonical = json.dumps({**fields, "at": at}, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
