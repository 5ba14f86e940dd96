"""The tables of the review page: sessions, proofs of identity, the working copy of a report and what was told to whom.

`records.py` holds what every part shares; these tables are read and written by `accounts`, `editing`, `signing` and
`worker.review` alone.
"""

from datetime import datetime
from enum import StrEnum

import sqlalchemy as sa
from sqlalchemy import CheckConstraint, ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column, relationship

from worker.core.records import (
    PHI,
    REASON_LENGTH,
    Base,
    BigId,
    Report,
    ReportVersion,
    Sentence,
    User,
    Uuid,
    named_enum,
    new_id,
)
from worker.core.report import Assessment, Origin, Section


class AuthenticationMethod(StrEnum):
    """How a person proved who they are."""

    PASSWORD = "password"  # of a local account
    OIDC = "oidc"  # by the identity provider, with prompt=login and a checked auth_time


class EditOutcome(StrEnum):
    """What became of a change that a reader made to a sentence."""

    APPLIED = "applied"
    CONFLICT = "conflict"  # the sentence had been changed elsewhere meanwhile; kept here, shown to its author


class WebSession(Base):
    """One login of one person in one browser; the browser holds a random token, this row its hash."""

    __tablename__ = "sessions"
    __table_args__ = (Index(None, "user_id"),)

    id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)  # SHA-256 of the token
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"))
    csrf_token: Mapped[str] = mapped_column(sa.String(64))
    created_at: Mapped[datetime]
    active_at: Mapped[datetime]  # of the last thing that the person did; what the page does by itself does not count
    locked_at: Mapped[datetime | None]  # locked by hand; idleness is reckoned from `active_at`

    user: Mapped[User] = relationship()


class OidcFlow(Base):
    """A trip to the identity provider that has not come back yet."""

    __tablename__ = "oidc_flows"

    id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)  # SHA-256 of `state`
    browser_sha256: Mapped[str] = mapped_column(sa.String(64))  # of the cookie that only the same browser has
    nonce: Mapped[str] = mapped_column(sa.String(64))
    code_verifier: Mapped[str] = mapped_column(sa.String(128))
    session_id: Mapped[str | None] = mapped_column(sa.String(64))  # whose person proves themselves again
    return_to: Mapped[str] = mapped_column(sa.String(200))  # path on this page, without a query
    started_at: Mapped[datetime]
    study_id: Mapped[str | None] = mapped_column(Uuid)  # whose report they want to sign; None for any other trip


class Authentication(Base):
    """A proof that a person was there just now, to sign the report of one study; a signature uses up exactly one."""

    __tablename__ = "authentications"
    __table_args__ = (CheckConstraint("(used_at IS NULL) = (version_id IS NULL)", name="used"),)

    id: Mapped[str] = mapped_column(Uuid, primary_key=True, default=new_id)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"))
    method: Mapped[AuthenticationMethod] = mapped_column(named_enum(AuthenticationMethod))
    session_id: Mapped[str | None] = mapped_column(sa.String(64))  # the login it was made in
    at: Mapped[datetime]
    used_at: Mapped[datetime | None]
    version_id: Mapped[str | None] = mapped_column(ForeignKey("report_versions.id"), unique=True)
    study_id: Mapped[str] = mapped_column(ForeignKey("studies.id"))  # signs nothing of any other

    user: Mapped[User] = relationship()


class WorkingCopy(Base):
    """The text that readers work on, between the version it started from and the one it becomes."""

    __tablename__ = "working_copies"
    __table_args__ = (
        Index(
            "uq_working_copies_open",
            "report_id",
            unique=True,
            sqlite_where=sa.text("closed_at IS NULL"),
            postgresql_where=sa.text("closed_at IS NULL"),
        ),
    )

    id: Mapped[str] = mapped_column(Uuid, primary_key=True, default=new_id)
    report_id: Mapped[str] = mapped_column(ForeignKey("reports.id"))
    base_id: Mapped[str] = mapped_column(ForeignKey("report_versions.id"))
    revision: Mapped[int] = mapped_column(default=0)  # grows with every change: a signature names the one it saw
    opened_at: Mapped[datetime]
    changed_at: Mapped[datetime]
    closed_at: Mapped[datetime | None]
    version_id: Mapped[str | None] = mapped_column(ForeignKey("report_versions.id"))  # what it became
    words_drafted: Mapped[int | None]  # words of the machine's sentences, counted when it was signed
    words_changed: Mapped[int | None]  # edit distance in words between them and what was signed

    report: Mapped[Report] = relationship()
    base: Mapped[ReportVersion] = relationship(foreign_keys=[base_id])
    sentences: Mapped[list["WorkingSentence"]] = relationship(
        back_populates="copy", order_by="WorkingSentence.position", cascade="all"
    )


class WorkingSentence(Base):
    """One sentence as it stands in the working copy."""

    __tablename__ = "working_sentences"
    __table_args__ = (UniqueConstraint("copy_id", "position"),)

    id: Mapped[str] = mapped_column(Uuid, primary_key=True, default=new_id)
    copy_id: Mapped[str] = mapped_column(ForeignKey("working_copies.id"))
    source_id: Mapped[str | None] = mapped_column(ForeignKey("sentences.id"))  # None for a sentence that was added
    position: Mapped[float]  # an added sentence stands between its neighbours
    section: Mapped[Section] = mapped_column(named_enum(Section))
    region: Mapped[str] = mapped_column(sa.String(32), default="")
    text: Mapped[str] = mapped_column(sa.Text, info=PHI)
    confidence: Mapped[float | None]
    support: Mapped[float | None]
    origin: Mapped[Origin] = mapped_column(named_enum(Origin))
    assessment: Mapped[Assessment] = mapped_column(named_enum(Assessment))
    revision: Mapped[int] = mapped_column(default=1)
    assessed_by: Mapped[str | None] = mapped_column(ForeignKey("users.id"))
    assessed_at: Mapped[datetime | None]

    copy: Mapped[WorkingCopy] = relationship(back_populates="sentences")
    source: Mapped[Sentence | None] = relationship()


class SentenceEdit(Base):
    """Every change that a reader sent, applied or not, so that nobody's text is lost."""

    __tablename__ = "sentence_edits"
    __table_args__ = (Index(None, "sentence_id"),)

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    sentence_id: Mapped[str] = mapped_column(ForeignKey("working_sentences.id"))
    revision: Mapped[int]  # of the sentence that it was applied to; in a conflict the one that its author saw
    text: Mapped[str] = mapped_column(sa.Text, info=PHI)
    assessment: Mapped[Assessment] = mapped_column(named_enum(Assessment))
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"))
    at: Mapped[datetime]
    outcome: Mapped[EditOutcome] = mapped_column(named_enum(EditOutcome))
    settled_at: Mapped[datetime | None]  # its author took it over or let it go
    page: Mapped[str] = mapped_column(sa.String(32), default="")  # one page in one browser; "" for none that says so
    sequence: Mapped[int] = mapped_column(default=0)  # of the page's request: the network may turn two around

    user: Mapped[User] = relationship()


class Communication(Base):
    """Who was told of a critical finding, how and when."""

    __tablename__ = "communications"
    __table_args__ = (Index(None, "report_id"),)

    id: Mapped[str] = mapped_column(Uuid, primary_key=True, default=new_id)
    report_id: Mapped[str] = mapped_column(ForeignKey("reports.id"))
    told: Mapped[str] = mapped_column(sa.String(200), info=PHI)
    means: Mapped[str] = mapped_column(sa.String(50))
    told_at: Mapped[datetime]
    recorded_by: Mapped[str] = mapped_column(ForeignKey("users.id"))
    recorded_at: Mapped[datetime]

    recorder: Mapped[User] = relationship()


class Presence(Base):
    """Who has a study open; a row older than a minute says nothing."""

    __tablename__ = "presences"

    study_id: Mapped[str] = mapped_column(ForeignKey("studies.id"), primary_key=True)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"), primary_key=True)
    seen_at: Mapped[datetime]

    user: Mapped[User] = relationship()


class EvidenceRequest(Base):
    """A reader asked where the model looked; a worker answers with `Sentence.evidence` of this version."""

    __tablename__ = "evidence_requests"

    version_id: Mapped[str] = mapped_column(ForeignKey("report_versions.id"), primary_key=True)
    requested_by: Mapped[str] = mapped_column(ForeignKey("users.id"))
    requested_at: Mapped[datetime]
    done_at: Mapped[datetime | None]
    reason: Mapped[str] = mapped_column(sa.String(REASON_LENGTH), default="")  # why there is none
