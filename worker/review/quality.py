"""Quality over time: what readers made of the drafts, by week, model version and section, as plots made here."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from statistics import median
from typing import Annotated

import sqlalchemy as sa
from fastapi import APIRouter, Query
from fastapi.responses import Response
from sqlalchemy.orm import Session, aliased

from worker.core import studies
from worker.core.changed_words import edit_distance
from worker.core.notices import NOTICES
from worker.core.records import AuthorKind, ReportVersion, Sentence, Signature
from worker.core.report import Assessment, Origin, ReportState, Section
from worker.core.review_records import WorkingCopy, WorkingSentence
from worker.review.access import AuditorLogin, OfficeOf
from worker.review.pages import render

router = APIRouter(prefix="/admin")
WEEKS = 26
_Counts = dict[str, dict[Assessment, int]]
_Words = dict[str, dict[date, list[tuple[int, int]]]]  # label, week: (changed, drafted) of each report
JUDGED = (Assessment.ACCEPTED, Assessment.EDITED, Assessment.REJECTED)


@dataclass(frozen=True)
class Shares:
    """How the sentences of one kind were judged."""

    label: str
    accepted: int
    edited: int
    rejected: int

    @property
    def total(self) -> int:
        """Sentences that were judged."""
        return self.accepted + self.edited + self.rejected

    def percent(self, name: str) -> float:
        """Share of one judgement."""
        return 100.0 * int(getattr(self, name)) / self.total if self.total else 0.0


@dataclass(frozen=True)
class Point:
    """One week of a line."""

    week: date
    value: float
    count: int


@dataclass(frozen=True)
class Line:
    """The weeks of one model version, or of all."""

    label: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Axis:
    """Weeks from left to right in an SVG of 640 x 180; a week without reports leaves its place empty."""

    first: date
    last: date
    top: float = 100.0

    WIDTH = 640
    HEIGHT = 180
    LEFT = 56
    INSET = 14  # half a column, so that the first and the last stand clear of the edge
    BOTTOM = 28

    def x(self, week: date) -> float:
        """Where a week stands; a single one stands in the middle."""
        weeks = (self.last - self.first).days / 7
        width = self.WIDTH - self.LEFT - 2 * self.INSET
        return self.LEFT + self.INSET + (width * (week - self.first).days / 7 / weeks if weeks else width / 2)

    def y(self, value: float) -> float:
        """Where a value stands."""
        return 12 + (self.HEIGHT - self.BOTTOM - 12) * (1 - value / self.top)

    @property
    def column(self) -> float:
        """Width of a week's column."""
        weeks = (self.last - self.first).days / 7 + 1
        return min(22.0, 0.7 * (self.WIDTH - self.LEFT - 2 * self.INSET) / weeks)

    @property
    def ticks(self) -> list[float]:
        """Values at the grid lines."""
        return [self.top * part for part in (0.0, 0.5, 1.0)]


@dataclass(frozen=True)
class Plot:
    """Lines over weeks."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    axis: Axis

    def path(self, line: Line) -> str:
        """A line as the `points` of an SVG polyline."""
        return " ".join(f"{self.axis.x(p.week):.1f},{self.axis.y(p.value):.1f}" for p in line.points)


@dataclass(frozen=True)
class Week:
    """How the sentences of one week's signatures were judged."""

    week: date
    shares: Shares


@router.get("/quality")
def show(found: OfficeOf, login: AuditorLogin, model: Annotated[str, Query(max_length=200)] = "") -> Response:
    """The plots, and the same figures as tables; `model` shows one model version alone."""
    with found.database.read() as session:
        by_model, by_section, weeks = shares(session, model)
        refused = rejected_drafts(session, model)
        labels = sorted({row.label for row in shares(session)[0]} | {label for label, _ in rejected_drafts(session)})
        plots = [
            plot("Words changed, by model", "%", changed_words(session, model)),
            plot("Words changed, by section", "%", changed_words_by_section(session, model)),
            plot("Time from draft to signature (median)", "min", minutes_to_sign(session, model)),
        ]
    return render(
        found,
        login,
        "admin_quality.html",
        by_model=by_model,
        by_section=by_section,
        refused=refused,
        weeks=weeks,
        week_axis=Axis(weeks[0].week, weeks[-1].week) if weeks else None,
        plots=plots,
        span=WEEKS,
        models=labels,
        chosen=model,
    )


def shares(session: Session, model: str = "") -> tuple[list[Shares], list[Shares], list[Week]]:
    """How machine sentences of signed reports were judged: by model version, by section, by week of the signature."""
    rows = session.execute(
        sa.select(
            ReportVersion.provenance,
            ReportVersion.created_at,
            Sentence.section,
            Sentence.assessment,
            sa.func.count(),
        )
        .join(Sentence, Sentence.version_id == ReportVersion.id)
        .where(
            ReportVersion.state == ReportState.FINAL,
            ReportVersion.created_at >= _since(),
            Sentence.origin != Origin.PERSON,
        )
        .group_by(ReportVersion.id, Sentence.section, Sentence.assessment)
    )
    models: _Counts = defaultdict(lambda: defaultdict(int))
    sections: _Counts = defaultdict(lambda: defaultdict(int))
    weeks: _Counts = defaultdict(lambda: defaultdict(int))
    for provenance, at, section, assessment, count in rows:
        if model and _model(provenance) != model:
            continue
        models[_model(provenance)][assessment] += count
        sections[section.heading][assessment] += count
        weeks[_week(at.date()).isoformat()][assessment] += count
    by_week = [Week(date.fromisoformat(found.label), found) for found in _shares(weeks)]
    return _shares(models), _shares(sections), by_week


def rejected_drafts(session: Session, model: str = "") -> list[tuple[str, int]]:
    """Drafts that a reader refused whole, by model version: their sentences are in no signed report."""
    found: dict[str, int] = defaultdict(int)
    for (provenance,) in session.execute(
        sa.select(ReportVersion.provenance).where(
            ReportVersion.state == ReportState.REJECTED, ReportVersion.created_at >= _since()
        )
    ):
        if not model or _model(provenance) == model:
            found[_model(provenance)] += 1
    return sorted(found.items())


def changed_words(session: Session, model: str = "") -> list[Line]:
    """Edit distance in words, in percent of the draft's words, by model version and week of the signature."""
    rows = session.execute(
        sa.select(ReportVersion.provenance, WorkingCopy.closed_at, WorkingCopy.words_changed, WorkingCopy.words_drafted)
        .join(ReportVersion, WorkingCopy.version_id == ReportVersion.id)
        .where(*_signed())
    )
    found: _Words = defaultdict(lambda: defaultdict(list))
    for provenance, at, changed, drafted in rows:
        if not model or _model(provenance) == model:
            found[_model(provenance)][_week(at.date())].append((changed, drafted))
    return _percent(found)


def changed_words_by_section(session: Session, model: str = "") -> list[Line]:
    """The same by section, sentence by sentence: what was edited, struck out and added there, in percent of its draft.

    A section that no draft of the week has, as a reader's own recommendations, has no percentage.
    """
    copies = {
        copy_id: _week(at.date())
        for copy_id, at, provenance in session.execute(
            sa.select(WorkingCopy.id, WorkingCopy.closed_at, ReportVersion.provenance)
            .join(ReportVersion, WorkingCopy.version_id == ReportVersion.id)
            .where(*_signed())
        )
        if not model or _model(provenance) == model
    }
    drafted: dict[tuple[str, Section], int] = defaultdict(int)
    changed: dict[tuple[str, Section], int] = defaultdict(int)
    for copy_id, section, words in session.execute(_drafted_words()):
        drafted[copy_id, section] += words
    for copy_id, section, words in session.execute(_words_added_or_struck_out()):
        changed[copy_id, section] += words
    for copy_id, section, old, new in session.execute(_edited_pairs()):
        changed[copy_id, section] += edit_distance(old.split(), new.split())
    found: _Words = defaultdict(lambda: defaultdict(list))
    for copy_id, section in [*drafted, *(key for key in changed if key not in drafted)]:
        if copy_id in copies:
            pair = (changed.get((copy_id, section), 0), drafted.get((copy_id, section), 0))
            found[section.heading][copies[copy_id]].append(pair)
    return _percent(found)


def _percent(words: _Words) -> list[Line]:
    lines = []
    for label, weeks in sorted(words.items()):
        points = [
            Point(week, 100.0 * sum(c for c, _ in pairs) / sum(d for _, d in pairs), len(pairs))
            for week, pairs in sorted(weeks.items())
            if any(d for _, d in pairs)
        ]
        if points:
            lines.append(Line(label, tuple(points)))
    return lines


def _counted(text: sa.SQLColumnExpression[str]) -> sa.ColumnElement[int]:
    """Words of a text of single spaces, counted in the database: half a year of reports need not travel."""
    words = sa.func.length(text) - sa.func.length(sa.func.replace(text, " ", "")) + 1
    return sa.func.coalesce(sa.func.sum(words), 0)


def _signed() -> tuple[sa.ColumnElement[bool], ...]:
    """Working copies that became a first signature, and had words of a machine."""
    return WorkingCopy.words_drafted > 0, WorkingCopy.closed_at >= _since()


def _drafted_words() -> sa.Select[str, Section, int]:
    return (
        sa.select(WorkingCopy.id, Sentence.section, _counted(Sentence.text))
        .join(Sentence, Sentence.version_id == WorkingCopy.base_id)
        .where(*_signed(), Sentence.origin == Origin.MACHINE, Sentence.text.not_in(NOTICES))
        .group_by(WorkingCopy.id, Sentence.section)
    )


def _words_added_or_struck_out() -> sa.Select[str, Section, int]:
    added = sa.and_(WorkingSentence.source_id.is_(None), WorkingSentence.assessment != Assessment.REJECTED)
    struck = sa.and_(WorkingSentence.source_id.is_not(None), WorkingSentence.assessment == Assessment.REJECTED)
    text = sa.func.coalesce(Sentence.text, WorkingSentence.text)
    return (
        sa.select(WorkingCopy.id, WorkingSentence.section, _counted(text))
        .join(WorkingSentence, WorkingSentence.copy_id == WorkingCopy.id)
        .outerjoin(Sentence, WorkingSentence.source_id == Sentence.id)
        .where(*_signed(), sa.or_(added, struck), text != "", text.not_in(NOTICES))
        .group_by(WorkingCopy.id, WorkingSentence.section)
    )


def _edited_pairs() -> sa.Select[str, Section, str, str]:
    return (
        sa.select(WorkingCopy.id, WorkingSentence.section, Sentence.text, WorkingSentence.text)
        .join(WorkingSentence, WorkingSentence.copy_id == WorkingCopy.id)
        .join(Sentence, WorkingSentence.source_id == Sentence.id)
        .where(*_signed(), WorkingSentence.assessment == Assessment.EDITED, Sentence.text.not_in(NOTICES))
    )


def minutes_to_sign(session: Session, model: str = "") -> list[Line]:
    """Median minutes from the draft that was read to the first signature, by week; one line or none."""
    draft = aliased(ReportVersion)
    rows = session.execute(
        sa.select(Signature.signed_at, draft.created_at, ReportVersion.provenance)
        .join(ReportVersion, Signature.version_id == ReportVersion.id)
        .join(
            draft,
            sa.and_(
                draft.report_id == ReportVersion.report_id,
                draft.study_revision == ReportVersion.study_revision,
                draft.author_kind == AuthorKind.MACHINE,
            ),
        )
        .where(ReportVersion.state == ReportState.FINAL, Signature.signed_at >= _since())
    )
    weeks: dict[date, list[float]] = defaultdict(list)
    for signed_at, drafted_at, provenance in rows:
        if not model or _model(provenance) == model:
            weeks[_week(signed_at.date())].append((signed_at - drafted_at).total_seconds() / 60)
    points = tuple(Point(week, median(values), len(values)) for week, values in sorted(weeks.items()))
    return [Line(model or "all models", points)] if points else []


def plot(title: str, unit: str, lines: Sequence[Line]) -> Plot | None:
    """Lines with a round number at their top; None when there is nothing to show."""
    points = [point for line in lines for point in line.points]
    if not points:
        return None
    highest = max(p.value for p in points)
    top = next(
        (size * 10**power for power in range(-1, 7) for size in (1, 2, 5) if size * 10**power >= highest), highest
    )
    weeks = [p.week for p in points]
    return Plot(title, unit, tuple(lines), Axis(min(weeks), max(weeks), float(top)))


def _model(provenance: dict[str, object] | None) -> str:
    made = provenance or {}
    return f"{made.get('model_name', 'unknown')} {made.get('model_version', '')}".strip()


def _shares(counted: _Counts) -> list[Shares]:
    return [
        Shares(label, *(found.get(assessment, 0) for assessment in JUDGED)) for label, found in sorted(counted.items())
    ]


def _since() -> object:
    return studies.now() - timedelta(weeks=WEEKS)


def _week(day: date) -> date:
    return day - timedelta(days=day.weekday())
