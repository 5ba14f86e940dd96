"""Quality over time: what readers made of the drafts, by week, model version and section, as plots made here."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from statistics import median

import sqlalchemy as sa
from fastapi import APIRouter
from fastapi.responses import Response
from sqlalchemy.orm import Session

from worker.core import studies
from worker.core.records import Report, ReportVersion, Sentence, Signature, Study
from worker.core.report import Assessment, Origin, ReportState
from worker.core.review_records import WorkingCopy
from worker.review.access import AuditorLogin, OfficeOf
from worker.review.pages import SECTION_TITLES, render

router = APIRouter(prefix="/admin")
WEEKS = 26
_Counts = dict[str, dict[Assessment, int]]
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
def show(found: OfficeOf, login: AuditorLogin) -> Response:
    """The plots, and the same figures as tables."""
    with found.database.read() as session:
        by_model, by_section, weeks = shares(session)
        plots = [
            plot("Words changed between draft and signature", "%", changed_words(session)),
            plot("Time from draft to signature (median)", "min", minutes_to_sign(session)),
        ]
    return render(
        found,
        login,
        "admin_quality.html",
        by_model=by_model,
        by_section=by_section,
        weeks=weeks,
        week_axis=Axis(weeks[0].week, weeks[-1].week) if weeks else None,
        plots=plots,
        span=WEEKS,
    )


def shares(session: Session) -> tuple[list[Shares], list[Shares], list[Week]]:
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
        models[_model(provenance)][assessment] += count
        sections[SECTION_TITLES[section]][assessment] += count
        weeks[_week(at.date()).isoformat()][assessment] += count
    by_week = [Week(date.fromisoformat(found.label), found) for found in _shares(weeks)]
    return _shares(models), _shares(sections), by_week


def changed_words(session: Session) -> list[Line]:
    """Edit distance in words, in percent of the draft's words, by model version and week of the signature."""
    rows = session.execute(
        sa.select(ReportVersion.provenance, WorkingCopy.closed_at, WorkingCopy.words_changed, WorkingCopy.words_drafted)
        .join(ReportVersion, WorkingCopy.version_id == ReportVersion.id)
        .where(WorkingCopy.words_drafted > 0, WorkingCopy.closed_at >= _since())
    )
    lines: dict[str, dict[date, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    for provenance, at, changed, drafted in rows:
        if at is not None and changed is not None and drafted is not None:
            lines[_model(provenance)][_week(at.date())].append((changed, drafted))
    return [
        Line(
            label,
            tuple(
                Point(week, 100.0 * sum(c for c, _ in pairs) / sum(d for _, d in pairs), len(pairs))
                for week, pairs in sorted(weeks.items())
            ),
        )
        for label, weeks in sorted(lines.items())
    ]


def minutes_to_sign(session: Session) -> list[Line]:
    """Median minutes from the draft to the first signature, by week; one line or none."""
    rows = session.execute(
        sa.select(sa.func.min(Signature.signed_at), Report.created_at)
        .join(ReportVersion, Signature.version_id == ReportVersion.id)
        .join(Report, ReportVersion.report_id == Report.id)
        .join(Study, Report.study_id == Study.id)
        .where(Signature.signed_at >= _since())
        .group_by(Report.id, Report.created_at)
    )
    weeks: dict[date, list[float]] = defaultdict(list)
    for signed_at, drafted_at in rows:
        weeks[_week(signed_at.date())].append((signed_at - drafted_at).total_seconds() / 60)
    points = tuple(Point(week, median(values), len(values)) for week, values in sorted(weeks.items()))
    return [Line("all models", points)] if points else []


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
