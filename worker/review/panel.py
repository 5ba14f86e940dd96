"""The report of one study as the page shows it: sentences with their marks, what blocks signing, what may be done."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import sqlalchemy as sa
from sqlalchemy.orm import Session

from worker.core import checks, editing, late_words, records, redrafts, reports, seen, signing
from worker.core.checks import Problem
from worker.core.errors import StateError
from worker.core.records import ReportVersion
from worker.core.report import (
    DISCLOSURE,
    DISCLOSURE_REVIEWED,
    SIGNED_STATES,
    Assessment,
    Origin,
    ReportState,
    Section,
    Sentence,
)
from worker.core.review_records import (
    Communication,
    EvidenceRequest,
    SentenceEdit,
    WorkingCopy,
    WorkingSentence,
)
from worker.core.settings import ReviewSettings, Settings
from worker.core.signing import Desk
from worker.review import images, origins
from worker.review.access import Login
from worker.review.images import Images
from worker.review.origins import Drafted, Piece

CORRECTABLE_STATES = frozenset({ReportState.FINAL, ReportState.CORRECTED})
EXCERPT = 42  # characters of a sentence in the list of problems


@dataclass(frozen=True)
class Card:
    """One sentence on the page."""

    id: str  # of the working sentence, or of the version's sentence when the report is read-only
    # Both are of the images that the text was drafted from, and None and empty beside any others.
    evidence_id: str | None  # of the stored sentence whose evidence can be shown; None while there is none
    best_slice: str  # number of its volume and a point in RAS millimetres, for the viewer; empty where there is none
    section: Section
    region: str
    text: str
    origin: Origin
    assessment: Assessment
    revision: int
    is_doubtful: bool
    is_weak: bool
    difference: tuple[Piece, ...]  # to the draft; in a correction to the signed text; () where nothing differs
    problems: tuple[Problem, ...]
    mine_lost: SentenceEdit | None  # a change of this reader that another came before
    lost_to_myself: bool  # the other was this reader's own, in another window

    @property
    def mark(self) -> str:
        """Who wrote the words as they stand."""
        return {Origin.MACHINE: "machine", Origin.EDITED: "edited", Origin.PERSON: "person"}[self.origin]


@dataclass(frozen=True)
class Panel:
    """All that the report's side of the page shows."""

    study_id: str
    report_id: str
    state: ReportState
    version: ReportVersion
    images: Images
    copy: WorkingCopy | None
    revision: str  # what an act on this page names as seen (`seen.full_revision`)
    editable: bool
    cards: tuple[Card, ...]
    problems: tuple[Problem, ...]
    signer: str
    reason: str
    disclosure: str
    newer_draft: bool
    may_start_over: bool  # from the newer draft, in place of the text here
    correctable: bool
    is_correction: bool
    unsigned: tuple[tuple[Piece, ...], ...]  # what a correction had changed when the time to sign it was over
    late_words: tuple[SentenceEdit, ...]  # of this reader, that came after their text was closed
    communications: tuple[Communication, ...]
    evidence_asked: bool
    evidence_refused: str

    def section(self, section: Section) -> list[Card]:
        """The cards of one section."""
        return [card for card in self.cards if card.section is section]

    @property
    def sections(self) -> list[Section]:
        """The sections to show: the first three always while the text is under work."""
        shown = [s for s in Section if self.section(s)]
        return [s for s in Section if s in shown or (self.editable and s is not Section.ADDENDUM)]

    def anchor(self, problem: Problem) -> str:
        """Where a click on a problem leads."""
        if problem.rule is checks.Rule.CRITICAL_NOT_COMMUNICATED:
            return "communication"
        card = self.card_of(problem)
        return "section-impression" if card is None else f"card-{card.id}"

    def excerpt(self, problem: Problem) -> str:
        """The first words of the sentence that a problem is about."""
        card = self.card_of(problem)
        if card is None:
            return ""
        return card.text if len(card.text) <= EXCERPT else card.text[:EXCERPT].rstrip() + "…"

    def card_of(self, problem: Problem) -> Card | None:
        """The sentence that a problem is about."""
        if problem.index is None:
            return None
        written = [
            card
            for card in self.cards
            if card.origin is not Origin.PERSON or (card.text and card.assessment is not Assessment.REJECTED)
        ]
        return written[problem.index]


def build(session: Session, report: records.Report, login: Login, desk: Desk, settings: Settings) -> Panel:
    """The panel for this reader; a radiologist's open text is the working copy, everybody else's the version that stands."""
    copy = _copy(session, report, login)
    version = editing.of_record(session, report.id)
    correctable = report.state in CORRECTABLE_STATES and signing.correctable(session, report, desk)
    lapsed = None
    if copy is not None and report.state in SIGNED_STATES and not correctable:
        copy, lapsed = None, copy
    problems = signing.problems(session, report, copy) if copy is not None else ()
    lost = {e.sentence_id: e for e in editing.conflicts(session, copy.id, login.user_id)} if copy is not None else {}
    began = copy.base if copy is not None else version
    machine = origins.machine_version(session, began)
    drafted = origins.drafted(machine, began)
    beside = images.beside(session, report.study, began.study_revision, settings.store_root)
    asked = session.get(EvidenceRequest, machine.id) if machine is not None else None
    if copy is not None:
        cards = _working_cards(copy, problems, lost, settings.review, drafted)
        sentences: Sequence[Sentence] = [reports.to_sentence(row) for row in editing.written(copy)]
    else:
        cards = tuple(_read_only_card(row, settings.review, drafted.get(row.id)) for row in version.sentences)
        sentences = [reports.to_sentence(row) for row in version.sentences]
    if not beside.of_the_text:
        cards = tuple(replace(card, evidence_id=None, best_slice="") for card in cards)
    newer = _newer_draft(session, report, copy, version)
    has_machine_text = any(s.origin is not Origin.PERSON for s in sentences)
    reviewed = copy is None and version.state in SIGNED_STATES
    return Panel(
        study_id=report.study_id,
        report_id=report.id,
        state=report.state,
        version=version,
        images=beside,
        copy=copy,
        revision=seen.full_revision(copy or lapsed),
        editable=copy is not None,
        cards=cards,
        problems=problems,
        signer=_signer(version),
        reason=version.reason,
        disclosure="" if not has_machine_text else DISCLOSURE_REVIEWED if reviewed else DISCLOSURE,
        newer_draft=newer,
        may_start_over=newer and login.may_edit and redrafts.can_start_over(session, report),
        correctable=correctable,
        is_correction=copy is not None and report.state in SIGNED_STATES,
        unsigned=_changes(lapsed) if lapsed is not None else (),
        late_words=tuple(late_words.of_reader(session, report.id, login.user_id)) if login.may_edit else (),
        communications=tuple(
            session.scalars(
                sa.select(Communication).where(Communication.report_id == report.id).order_by(Communication.told_at)
            )
        ),
        evidence_asked=asked is not None and asked.done_at is None,
        evidence_refused=asked.reason.removeprefix("ModelError: ") if asked is not None else "",
    )


def _copy(session: Session, report: records.Report, login: Login) -> WorkingCopy | None:
    if not login.may_edit:
        return None
    copy = editing.current_copy(session, report.id)
    if copy is None and report.state in editing.EDITABLE_STATES:
        raise StateError("the working copy is not open")
    return copy


def _newer_draft(session: Session, report: records.Report, copy: WorkingCopy | None, version: ReportVersion) -> bool:
    text = copy.base if copy is not None and report.state in editing.EDITABLE_STATES else version
    return editing.draft_after(session, text) is not None


def _working_cards(
    copy: WorkingCopy,
    problems: tuple[Problem, ...],
    lost: dict[str, SentenceEdit],
    settings: ReviewSettings,
    drafted: Drafted,
) -> tuple[Card, ...]:
    written = {row.id: index for index, row in enumerate(editing.written(copy))}
    return tuple(
        _card(
            row,
            tuple(p for p in problems if p.index is not None and p.index == written.get(row.id)),
            lost.get(row.id),
            settings,
            drafted,
        )
        for row in editing.in_order(copy.sentences)
        if row.origin is not Origin.PERSON or row.assessment is not Assessment.REJECTED
    )


def _card(
    row: WorkingSentence,
    problems: tuple[Problem, ...],
    lost: SentenceEdit | None,
    settings: ReviewSettings,
    drafted: Drafted,
) -> Card:
    source = row.source
    return Card(
        id=row.id,
        evidence_id=_evidence_of(source, drafted.get(source.id)) if source is not None else None,
        best_slice=_best_slice_of(source, drafted.get(source.id)) if source is not None else "",
        section=row.section,
        region=row.region,
        text=row.text,
        origin=row.origin,
        assessment=row.assessment,
        revision=row.revision,
        is_doubtful=is_doubtful(row.confidence, settings),
        is_weak=is_weak(row.support, settings),
        difference=_difference(source, row.text),
        problems=problems,
        mine_lost=lost,
        lost_to_myself=lost is not None and lost.user_id == row.assessed_by,
    )


def _read_only_card(row: records.Sentence, settings: ReviewSettings, draft: records.Sentence | None) -> Card:
    return Card(
        id=row.id,
        evidence_id=_evidence_of(row, draft),
        best_slice=_best_slice_of(row, draft),
        section=row.section,
        region=row.region,
        text=row.text,
        origin=row.origin,
        assessment=row.assessment,
        revision=0,
        is_doubtful=is_doubtful(row.confidence, settings),
        is_weak=is_weak(row.support, settings),
        difference=_difference(draft, row.text),
        problems=(),
        mine_lost=None,
        lost_to_myself=False,
    )


def _evidence_of(row: records.Sentence, draft: records.Sentence | None) -> str | None:
    """The sentence that the evidence is stored with: this one, or the draft's that it was made from."""
    return next((found.id for found in (row, draft) if found is not None and found.evidence is not None), None)


def _best_slice_of(row: records.Sentence, draft: records.Sentence | None) -> str:
    """The slice that was found with the draft: this sentence's own, or that of the draft's that it was made from."""
    found = next((s.best_slice for s in (row, draft) if s is not None and s.best_slice is not None), None)
    return " ".join(str(value) for value in (found["volume"], *found["ras_mm"])) if found is not None else ""


def _difference(before: records.Sentence | None, text: str) -> tuple[Piece, ...]:
    return origins.difference(before.text, text) if before is not None and before.text != text else ()


def _changes(copy: WorkingCopy) -> tuple[tuple[Piece, ...], ...]:
    """What a working copy changed: sentences edited, struck out and added, each as its difference."""
    found: list[tuple[Piece, ...]] = []
    for row in editing.in_order(copy.sentences):
        struck = row.assessment is Assessment.REJECTED
        if row.source is None:
            found += [] if struck or not row.text else [(Piece("added", row.text),)]
        elif struck and row.source.assessment is not Assessment.REJECTED:
            found.append((Piece("removed", row.source.text),))
        elif row.text != row.source.text:
            found.append(_difference(row.source, row.text))
    return tuple(found)


def is_doubtful(confidence: float | None, settings: ReviewSettings) -> bool:
    """Whether the model was unsure of its words."""
    return confidence is not None and confidence < settings.low_confidence


def is_weak(support: float | None, settings: ReviewSettings) -> bool:
    """Whether the image hardly supports the sentence."""
    return support is not None and support < settings.weak_support


def _signer(version: ReportVersion) -> str:
    if version.signature is None:
        return ""
    user = version.signature.user
    return f"{user.given_name} {user.family_name}".strip() or user.username
