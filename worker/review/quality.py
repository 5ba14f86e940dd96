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
class Plot:
    """A line over weeks, scaled for an SVG of 640 x 180."""

    title: str
    unit: str
    points: tuple[Point, ...]
    top: float

    WIDTH = 640
    HEIGHT = 180
    LEFT = 56
    BOTTOM = 28

    def x(self, index: int) -> float:
        """Where a week stands."""
        step = (self.WIDTH - self.LEFT - 16) / max(1, len(self.points) - 1)
        return self.LEFT + index * step if len(self.points) > 1 else (self.WIDTH + self.LEFT) / 2

    def y(self, value: float) -> float:
        """Where a value stands."""
        return 12 + (self.HEIGHT - self.BOTTOM - 12) * (1 - value / self.top)

    @property
    def path(self) -> str:
        """The line as the `points` of an SVG polyline."""
        return " ".join(f"{self.x(i):.1f},{self.y(p.value):.1f}" for i, p in enumerate(self.points))

    @property
    def ticks(self) -> list[float]:
        """Values at the grid lines."""
        return [self.top * part for part in (0.0, 0.5, 1.0)]


@router.get("/quality")
def show(found: OfficeOf, login: AuditorLogin) -> Response:
    """The plots, and the same figures as tables."""
    with found.database.read() as session:
        by_model, by_section = shares(session)
        plots = [
            plot("Words changed between draft and signature", "%", changed_words(session)),
            plot("Time from draft to signature (median)", "min", minutes_to_sign(session)),
        ]
    return render(
        found, login, "admin_quality.html", by_model=by_model, by_section=by_section, plots=plots, weeks=WEEKS
    )


def shares(session: Session) -> tuple[list[Shares], list[Shares]]:
    """How machine sentences of signed reports were judged: by model version, by section."""
    rows = session.execute(
        sa.select(ReportVersion.provenance, Sentence.section, Sentence.assessment, sa.func.count())
        .join(Sentence, Sentence.version_id == ReportVersion.id)
        .where(
            ReportVersion.state == ReportState.FINAL,
            ReportVersion.created_at >= _since(),
            Sentence.origin != Origin.PERSON,
        )
        .group_by(ReportVersion.id, Sentence.section, Sentence.assessment)
    )
    models: dict[str, dict[Assessment, int]] = defaultdict(lambda: defaultdict(int))
    sections: dict[str, dict[Assessment, int]] = defaultdict(lambda: defaultdict(int))
    for provenance, section, assessment, count in rows:
        made = provenance or {}
        models[f"{made.get('model_name', 'unknown')} {made.get('model_version', '')}".strip()][assessment] += count
        sections[SECTION_TITLES[section]][assessment] += count
    return _shares(models), _shares(sections)


def changed_words(session: Session) -> list[Point]:
    """Edit distance in words, in percent of the draft's words, by week of the signature."""
    rows = session.execute(
        sa.select(WorkingCopy.closed_at, WorkingCopy.words_changed, WorkingCopy.words_drafted).where(
            WorkingCopy.words_drafted > 0, WorkingCopy.closed_at >= _since()
        )
    )
    weeks: dict[date, list[tuple[int, int]]] = defaultdict(list)
    for at, changed, drafted in rows:
        if at is not None and changed is not None and drafted is not None:
            weeks[_week(at.date())].append((changed, drafted))
    return [
        Point(week, 100.0 * sum(c for c, _ in pairs) / sum(d for _, d in pairs), len(pairs))
        for week, pairs in sorted(weeks.items())
    ]


def minutes_to_sign(session: Session) -> list[Point]:
    """Median minutes from the draft to the first signature, by week."""
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
    return [Point(week, median(values), len(values)) for week, values in sorted(weeks.items())]


def plot(title: str, unit: str, points: Sequence[Point]) -> Plot:
    """A line with a round number at its top."""
    highest = max((p.value for p in points), default=0.0)
    top = next(
        (size * 10**power for power in range(-1, 7) for size in (1, 2, 5) if size * 10**power >= highest), highest
    )
    return Plot(title, unit, tuple(points), float(top or 1.0))


def _shares(counted: dict[str, dict[Assessment, int]]) -> list[Shares]:
    return [
        Shares(label, *(found.get(assessment, 0) for assessment in JUDGED)) for label, found in sorted(counted.items())
    ]


def _since() -> object:
    return studies.now() - timedelta(weeks=WEEKS)


def _week(day: date) -> date:
    return day - timedelta(days=day.weekday())
