"""Evidence on request: a reader asked where the model looked, and this finds out and stores it beside the model input.

The row is the request; the `draft` doorbell serves it after the drafts that are due. One request is under way at a time over
all workers, under a named lease. The model drafts once more, greedily, and its sentences are matched to the stored ones by
their text; one that it would not write again gets no evidence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import sqlalchemy as sa
from sqlalchemy.orm import Session

from worker.core import audit, model_inputs, studies
from worker.core.errors import ModelError, RetryableError
from worker.core.records import REASON_LENGTH, Lease, Report, ReportVersion, Sentence, Study
from worker.core.review_records import EvidenceRequest
from worker.imaging import heat, stored
from worker.imaging.heat import Heat
from worker.inference.reporter import Deadline, Reporter
from worker.pipeline import Means

LEASE = "evidence"
LEASE_MARGIN_SECONDS = 30.0
AGAIN_SECONDS = 10.0  # after a retryable error
GIVE_UP = timedelta(days=1)  # a request that never ended well until then is refused


@dataclass(frozen=True)
class Request:
    """One claimed request."""

    version_id: str
    study_id: str
    weights_sha256: str  # of the model that wrote the draft
    folder: str  # of the model input that the draft was made from, below the store; empty when there is none


@dataclass(frozen=True)
class _Found:
    path: str  # of the heat volume, below the store
    support: float


def due(session: Session) -> bool:
    """Whether a request waits that nobody works on."""
    at = studies.now()
    leased = sa.exists().where(Lease.name == LEASE, Lease.until > at)
    return bool(session.scalar(sa.select(sa.exists().where(EvidenceRequest.done_at.is_(None)) & ~leased)))


def claim(session: Session, worker: str, seconds: float) -> Request | None:
    """Takes the lease and the oldest request, or None when there is none or another worker is at it."""
    at = studies.now()
    lease = session.get(Lease, LEASE, with_for_update=True)
    if lease is not None and lease.until > at:
        return None
    asked = session.scalars(
        sa.select(EvidenceRequest)
        .where(EvidenceRequest.done_at.is_(None))
        .order_by(EvidenceRequest.requested_at)
        .limit(1)
    ).one_or_none()
    if asked is None:
        return None
    if at - asked.requested_at > GIVE_UP:  # it may have ended every worker that tried
        asked.done_at, asked.reason = at, "no worker could answer within a day; see the worker log"
        return None
    until = at + timedelta(seconds=seconds + LEASE_MARGIN_SECONDS)
    if lease is None:
        session.add(Lease(name=LEASE, owner=worker, until=until))
    else:
        lease.owner, lease.until = worker, until
    version = session.get_one(ReportVersion, asked.version_id)
    study = session.scalars(sa.select(Study).join(Report).where(Report.id == version.report_id)).one()
    folder = model_inputs.of_revision(session, study, version.study_revision) or ""
    return Request(version.id, study.id, (version.provenance or {}).get("weights_sha256", ""), folder)


def answer(means: Means, request: Request, reporter: Reporter, deadline: Deadline) -> None:
    """Finds the evidence and stores it with the sentences.

    Raises `ModelError` when the draft is another model's, `ModelBusyError`, `StoreUnavailableError`.
    """
    if request.weights_sha256 != reporter.weights_sha256:
        raise ModelError("the draft was written by another model than this worker's; requeue the study for a new one")
    root = means.settings.store_root
    folder = root / request.folder
    paths = sorted(folder.glob("volume-*.npz")) if request.folder else []
    if not paths:
        raise ModelError("the model input is no longer in the store; requeue the study")
    explained = reporter.explain([stored.load(path) for path in paths], deadline)
    by_text = {(one.region, one.text): one for one in explained}
    found: dict[str, _Found] = {}
    for sentence_id, key in _sentences(means, request).items():
        one = by_text.get(key)
        if one is not None:
            path = folder / f"heat-{sentence_id}.npz"
            heat.save(Heat(one.heat, one.affine, one.support - one.control, one.volume), path)
            # A drop that patches taken at random give as well is no support.
            support = one.support - max(one.control, 0.0)
            found[sentence_id] = _Found(str(path.relative_to(root)), support)
    means.record(lambda session: _store(session, means, request, found))


def settle(session: Session, request: Request, error: Exception) -> None:
    """Records why there is no evidence; after a retryable error the request waits a little instead."""
    asked = session.get_one(EvidenceRequest, request.version_id)
    wait = isinstance(error, RetryableError) and studies.now() - asked.requested_at < GIVE_UP
    if not wait and asked.done_at is None:
        asked.done_at = studies.now()
        asked.reason = studies.describe(error)[:REASON_LENGTH]
    _release(session, AGAIN_SECONDS if wait else 0.0)


def _sentences(means: Means, request: Request) -> dict[str, tuple[str, str]]:
    """Region and text of every sentence of the draft, by its id."""
    with means.database.read() as session:
        rows = session.get_one(ReportVersion, request.version_id).sentences
        return {row.id: (row.region, row.text) for row in rows}


def _store(session: Session, means: Means, request: Request, found: Mapping[str, _Found]) -> None:
    asked = session.get_one(EvidenceRequest, request.version_id)
    if asked.done_at is not None:
        return
    for sentence_id, one in found.items():
        row = session.get_one(Sentence, sentence_id)
        row.evidence, row.support = one.path, one.support
    asked.done_at = studies.now()
    asked.reason = "" if found else "ModelError: the model would not write these sentences again"
    _release(session, 0.0)
    audit.append(session, "evidence", actor=means.worker, study_id=request.study_id, sentences=len(found))


def _release(session: Session, seconds: float) -> None:
    lease = session.get(Lease, LEASE, with_for_update=True)
    if lease is not None:
        lease.until = studies.now() + timedelta(seconds=seconds)
