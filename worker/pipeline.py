"""What the stages do, as plain functions: from stored instances to a model input, from there to a report and its messages.

Each function does one stage of one claim and records its result, or raises an error of `worker.core.errors`; `tasks.py`
decides what becomes of the error. Every result is recorded under the claim's token, so a stage that ran twice is
recorded once and a result that comes too late is refused.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa
import structlog
from sqlalchemy.orm import Session

from worker import variants
from worker.core import audit, model_inputs, notices, outbox, reports, studies
from worker.core.database import Database
from worker.core.errors import InvalidObjectError, NothingToReportError, StoreUnavailableError
from worker.core.records import Disposition, Instance, ReportVersion
from worker.core.settings import ImagingSettings, Settings
from worker.core.studies import Claim
from worker.imaging import preview, stored, study
from worker.imaging.rules import ImagingRules
from worker.imaging.study import StudyVolumes
from worker.imaging.volume import Volume
from worker.inference.reporter import Deadline, Drafted, Reporter
from worker.metrics import Metrics
from worker.results import hl7

log = structlog.get_logger(__name__)

T = TypeVar("T")


class Recorder(Protocol):
    """Commits a change, however long the database is away; raises `DatabaseUnavailableError` only when the worker stops."""

    def __call__(self, change: Callable[[Session], T]) -> T:
        """Runs `change` in a transaction; it must recognise its own work."""


@dataclass(frozen=True)
class Means:
    """What the stages work with."""

    database: Database
    settings: Settings
    metrics: Metrics
    worker: str
    record: Recorder


def prepare(means: Means, claim: Claim) -> None:
    """Chooses the series, builds the volumes and stores the model input.

    A study without a CT series to report is recorded as skipped here. Raises `StudyError` or `InvalidObjectError` for one
    that cannot be drafted, `StoreUnavailableError`, `InsufficientMemoryError`, `LeaseLostError` when the result came too late.
    """
    root = means.settings.store_root
    paths = [root / path for path in _kept_paths(means.database, claim)]
    variants.verify(means.database, root, claim.study_id, means.metrics)
    limits = rules(means.settings.imaging)
    found = study.assemble(study.examine(paths, limits), limits)
    choice = _choice(found)
    if isinstance(found.refusal, NothingToReportError):
        reason = str(found.refusal)
        means.record(lambda session: studies.skip(session, claim, reason, choice))
        return
    if found.refusal is not None:
        means.record(lambda session: _note_choice(session, claim, choice))
        raise found.refusal
    folder = _store_input(root, claim, found.volumes)
    means.record(lambda session: studies.store_prepared(session, claim, choice, folder))


def draft(means: Means, claim: Claim, reporter: Reporter, deadline: Deadline) -> list[str]:
    """Runs the model and stores report, messages and audit in one transaction; returns the destinations to ring.

    Raises `ModelBusyError`, `ModelError`, `StoreUnavailableError`, or `LeaseLostError` when the result came too late.
    """
    started = time.monotonic()
    volumes = load_input(means, claim)
    loaded = time.monotonic()
    drafted = reporter.draft(volumes, deadline)
    seconds = {"load": round(loaded - started, 3), "draft": round(time.monotonic() - loaded, 3)}
    provenance = _with_stage_seconds(drafted, seconds)
    return means.record(
        lambda session: _store_draft(session, means, claim, reports.Draft(drafted.sentences, provenance))
    )


def rules(settings: ImagingSettings) -> ImagingRules:
    """The settings of the choice of series as `worker.imaging` takes them."""
    usual = ImagingRules()
    return ImagingRules(
        minimum_slices=settings.min_slices,
        wanted_slice_mm=settings.wanted_slice_mm,
        preferences=settings.preferences or usual.preferences,
        kernels=settings.kernels or usual.kernels,
        reported_regions=settings.reported_regions or usual.reported_regions,
        never_descriptions=(*usual.never_descriptions, *settings.never_descriptions),
        maximum_gap_mm=settings.max_gap_mm,
        maximum_missing_in_a_row=settings.max_gap_slices,
        decode_threads=settings.threads,
    )


def load_input(means: Means, claim: Claim) -> list[Volume]:
    """The volumes that `prepare` stored, main one first; raises `StoreUnavailableError` or `InvalidObjectError`."""
    with means.database.read() as session:
        folder = studies.get(session, claim.study_id).model_input
    if folder is None:
        raise InvalidObjectError("the study has no model input; requeue it")
    paths = sorted((means.settings.store_root / folder).glob("volume-*.npz"))
    if not paths:
        raise StoreUnavailableError("the model input is not in the store; requeue the study if the store is whole")
    return [stored.load(path) for path in paths]


def _kept_paths(database: Database, claim: Claim) -> list[str]:
    with database.read() as session:
        kept = sa.select(Instance.path).where(
            Instance.study_id == claim.study_id,
            Instance.disposition == Disposition.KEPT,
            Instance.removed_at.is_(None),
        )
        return list(session.scalars(kept.order_by(Instance.path)))


def _store_input(root: Path, claim: Claim, volumes: tuple[Volume, ...]) -> str:
    """Writes the volumes under the claim's token, so that two workers never write one file; returns the folder."""
    revision = model_inputs.folder(claim.study_id) / str(claim.revision)
    folder = revision / claim.token
    try:
        for left_over in (root / revision).glob("*"):  # of tries that died
            shutil.rmtree(left_over, ignore_errors=True)
        (root / folder).mkdir(mode=0o750, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreUnavailableError.of("the model input cannot be written", error) from error
    for number, volume in enumerate(volumes, start=1):
        stored.save(volume, root / folder / f"volume-{number:02d}.npz")
        preview.write(volume, root / folder / f"preview-{number:02d}.png")
    return str(folder)


def _choice(found: StudyVolumes) -> dict[str, Any]:
    """What was decided about every series, what was repaired and what could not be read, as `mu2 study show` prints it."""
    return {
        "series": [{**asdict(verdict), "cause": verdict.cause.value} for verdict in found.verdicts],
        "volumes": [
            {
                "series_uid": volume.series_uid,
                "part": volume.part,
                "shape": list(volume.hu.shape),
                "spacing_mm": [round(mm, 4) for mm in volume.spacing_mm],
                "regions": list(volume.regions),
                "repairs": list(volume.repairs),
            }
            for volume in found.volumes
        ],
        "unreadable": len(found.unreadable),
    }


def _note_choice(session: Session, claim: Claim, choice: dict[str, Any]) -> None:
    held = studies.held(session, claim)
    if held is not None:
        held.choice = choice


def _with_stage_seconds(drafted: Drafted, seconds: dict[str, float]) -> Any:
    provenance = drafted.provenance
    return type(provenance)(
        **{**asdict(provenance), "stage_seconds": {**provenance.stage_seconds, **seconds}},
    )


def _store_draft(session: Session, means: Means, claim: Claim, draft: reports.Draft) -> list[str]:
    held = studies.held(session, claim)
    if held is None:
        return outbox.due_destinations(session)
    version = reports.add_draft(session, held, draft)
    withheld = _withheld(means.settings, draft)
    sent_to, unwritable = ([], {}) if withheld else _write_messages(session, means, version)
    studies.mark_drafted(session, held, claim)
    audit.append(
        session,
        "draft",
        actor=means.worker,
        study_id=held.id,
        revision=claim.revision,
        version=version.number,
        model=draft.provenance.model_name,
        model_version=draft.provenance.model_version,
        weights_sha256=draft.provenance.weights_sha256,
        messages=len(sent_to),
        unwritable=unwritable,
        withheld=withheld,
    )
    return sent_to


def _withheld(settings: Settings, draft: reports.Draft) -> str:
    """Why this draft leaves for nobody: a model that saw no patient says nothing about one. Empty when it may leave."""
    if settings.model.allow_not_clinical or not notices.saw_no_patient(asdict(draft.provenance)):
        return ""
    log.warning("draft_withheld", model=draft.provenance.model_name)
    return "model trained on no patient"


def _write_messages(session: Session, means: Means, version: ReportVersion) -> tuple[list[str], dict[str, str]]:
    """One message a destination; one that cannot be written stops neither the draft nor the others."""
    site = means.settings.hl7
    written, unwritable = outbox.enqueue_each(
        session,
        version,
        site.destinations,
        hl7.write,
        default_authority=site.assigning_authority,
        procedure_codes=site.procedure_codes,
    )
    for name, error in unwritable.items():
        means.metrics.unwritable.labels(name).inc()
        log.warning("message_unwritable", destination=name, reason=error)
    return written, {name: str(error) for name, error in unwritable.items()}
