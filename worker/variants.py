"""Instances that arrived a second time in another transfer syntax: are they the same picture?

The listener never decodes, so it keeps the first and sets the second aside as a variant. Before a study is prepared its
variants are decoded and compared; one that differs becomes a conflict, which raises an alarm and changes nothing else.
"""

from pathlib import Path

import numpy as np
import pydicom
import sqlalchemy as sa
import structlog
from sqlalchemy.orm import Session, aliased

from worker.core import audit
from worker.core.database import Database
from worker.core.errors import InvalidObjectError, PixelDataError
from worker.core.records import Disposition, Instance
from worker.imaging.headers import Header, read_header
from worker.imaging.pixels import PixelFile, stored_values
from worker.metrics import Metrics

log = structlog.get_logger(__name__)

SCOPE = "variants"
"""Actor of the audit events."""


def verify(database: Database, root: Path, study_id: str, metrics: Metrics) -> None:
    """Compares every variant of a study with the kept instance and marks those that differ as conflicts.

    Raises `StoreUnavailableError`, `DatabaseUnavailableError`.
    """
    with database.read() as session:
        pairs = _pairs(session, study_id)
    differing = [variant for variant, kept, other in pairs if not same_content(root / kept, root / other)]
    if not differing:
        return
    database.run(lambda session: _mark(session, study_id, differing))
    metrics.conflicts.inc(len(differing))
    log.error("instance_conflict", study_id=study_id, instances=len(differing))


def same_content(kept: Path, other: Path) -> bool:
    """Whether two stored objects hold equal pixels, or equal elements where there are none.

    A lossy copy differs from its original and counts as other content. So does one that cannot be decoded.
    Raises `StoreUnavailableError`.
    """
    try:
        first, second = read_header(kept), read_header(other)
        if len(first.slices) != len(second.slices):
            return False
        if not first.slices:
            return bool(pydicom.dcmread(kept) == pydicom.dcmread(other))
        return _same_pixels(first, second)
    except (InvalidObjectError, PixelDataError):
        return False


def _same_pixels(first: Header, second: Header) -> bool:
    with (
        PixelFile(first.path, first.slices[0].pixels) as one,
        PixelFile(second.path, second.slices[0].pixels) as two,
    ):
        return all(
            np.array_equal(stored_values(a, one), stored_values(b, two))
            and (a.position, a.slope, a.intercept) == (b.position, b.slope, b.intercept)
            for a, b in zip(first.slices, second.slices, strict=True)
        )


def _pairs(session: Session, study_id: str) -> list[tuple[str, str, str]]:
    """(id of the variant, path of the kept instance, path of the variant)."""
    kept = aliased(Instance)
    found = session.execute(
        sa.select(Instance.id, kept.path, Instance.path)
        .join(kept, sa.and_(kept.sop_instance_uid == Instance.sop_instance_uid, kept.disposition == Disposition.KEPT))
        .where(Instance.study_id == study_id, Instance.disposition == Disposition.VARIANT)
        .where(Instance.transfer_syntax_uid != kept.transfer_syntax_uid)  # else an earlier header, compared on arrival
        .where(Instance.removed_at.is_(None), kept.removed_at.is_(None))
    )
    return [(variant, path, other) for variant, path, other in found]


def _mark(session: Session, study_id: str, variants: list[str]) -> None:
    marked = session.execute(
        sa.update(Instance)
        .where(Instance.id.in_(variants), Instance.disposition == Disposition.VARIANT)
        .values(disposition=Disposition.CONFLICT)
    )
    if marked.rowcount:  # type: ignore[attr-defined]
        audit.append(session, "conflict", actor=SCOPE, study_id=study_id, outcome="alarm", instances=marked.rowcount)  # type: ignore[attr-defined]
