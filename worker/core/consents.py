"""Consent to train on a study: asked for one by one, recorded by a person, and no study trains a model without it.

A study without a row was not asked about, which counts as no. The row holds the answer that stands; every answer ever
given is an event of the audit.
"""

from datetime import datetime
from enum import StrEnum

import sqlalchemy as sa
from sqlalchemy import ForeignKey
from sqlalchemy.orm import Mapped, Session, mapped_column

from worker.core import audit, studies
from worker.core.records import Base, named_enum


class Decision(StrEnum):
    """What was decided about a study's use in training."""

    GIVEN = "given"
    REFUSED = "refused"  # also a consent that was taken back


class TrainingConsent(Base):
    """Whether one study may train a model, who recorded it and when."""

    __tablename__ = "training_consents"

    study_id: Mapped[str] = mapped_column(ForeignKey("studies.id"), primary_key=True)
    decision: Mapped[Decision] = mapped_column(named_enum(Decision))
    recorded_at: Mapped[datetime]
    recorded_by: Mapped[str] = mapped_column(sa.String(100))


def record(session: Session, study_id: str, decision: Decision, *, actor: str) -> None:
    """Records the decision that stands from now on, and audits it; raises `NotFoundError`."""
    studies.get(session, study_id)
    audit.append(session, "training_consent", actor=actor, study_id=study_id, decision=decision.value)
    row = session.get(TrainingConsent, study_id, with_for_update=True, populate_existing=True)
    if row is None:
        row = TrainingConsent(study_id=study_id)
        session.add(row)
    row.decision, row.recorded_at, row.recorded_by = decision, studies.now(), actor[:100]
    session.flush()


def decision_of(session: Session, study_id: str) -> Decision | None:
    """What was decided about a study, or None when nobody asked."""
    return session.scalar(sa.select(TrainingConsent.decision).where(TrainingConsent.study_id == study_id))
