"""From stored instances to complete studies: what a data set says becomes a row, and quiet studies are submitted.

A study is complete when nothing of it arrived for `quiet_seconds` and no open association that sent to it holds it back;
an association that sent nothing for it within `open_association_limit_seconds` no longer does. The rows carry the
arrival times, so a listener that was killed goes on where it stopped; what it finds then is quiet no sooner than
`quiet_seconds` after its start, because senders waited for it.
"""

import itertools
import re
import threading
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Self

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import SQLAlchemyError

from dicom_listener.attributes import Attributes, Phi
from dicom_listener.corrected_headers import Corrections
from dicom_listener.metrics import Metrics
from dicom_listener.part10 import Held, read_file
from dicom_listener.storage import Store
from worker.core import arrivals, studies
from worker.core.arrivals import LONGEST_CODE, Arrival, CodedProcedure
from worker.core.database import Database
from worker.core.errors import DatabaseUnavailableError, InvalidObjectError, RetryableError
from worker.core.records import Instance, Priority
from worker.core.settings import Settings

log = structlog.get_logger(__name__)

RECOVERY_GROUP = 200
RECOVERY_RETRY_SECONDS = 5.0
LONGEST_TICK_SECONDS = 1.0
# Study Priority ID (0032,000C) and Requested Procedure Priority (0040,1003) as they are sent.
_RANK_OF_VALUE = {"STAT": Priority.STAT, "HIGH": Priority.URGENT, "ASAP": Priority.URGENT}
_RANK_OF_NAME = {"stat": Priority.STAT, "urgent": Priority.URGENT, "routine": Priority.ROUTINE}
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f]")  # PostgreSQL refuses NUL; none belongs into a one-line value

Submit = Callable[[str], None]


@dataclass(frozen=True)
class Ranking:
    """How a study ranks: by who sends it, by what it asks for, by a word in its texts; the most urgent of them counts."""

    by_word: Mapping[str, str]  # word → stat, urgent or routine
    by_sender: Mapping[str, str] = field(default_factory=dict)  # AE title → the same, where only the title is known

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The ranking that the settings ask for; of peers who share a title the first counts."""
        peers = {p.ae_title.strip(): p.priority for p in reversed(settings.dicom.peers)}
        return cls(settings.queue.priority_rules, {title: rank for title, rank in peers.items() if rank})

    def rank(self, attributes: Attributes, peer_priority: str | None) -> Priority:
        """The priority of a study that `attributes` describe."""
        asked = (attributes.study_priority.upper(), attributes.requested_priority.upper())
        ranks = [_RANK_OF_VALUE[value] for value in asked if value in _RANK_OF_VALUE]
        if peer_priority:
            ranks.append(_RANK_OF_NAME[peer_priority])
        if self.by_word:
            words = {attributes.requested_priority, attributes.requested_procedure, attributes.study_description}
            text = " ".join(words).casefold()
            ranks += [
                _RANK_OF_NAME[rank]
                for word, rank in self.by_word.items()
                if re.search(rf"(?<!\w){re.escape(word.casefold())}(?!\w)", text)
            ]
        return min(ranks, default=Priority.ROUTINE)


def arrival(
    held: Held, said: Attributes, name: str, calling_ae: str, priority: Priority, received_at: datetime
) -> Arrival:
    """The row of a stored instance."""
    return Arrival(
        path=name,
        size_bytes=held.size_bytes,
        sha256=held.sha256,
        sop_class_uid=said.sop_class_uid,
        sop_instance_uid=said.sop_instance_uid,
        transfer_syntax_uid=held.transfer_syntax,
        study_instance_uid=said.study_uid,
        series_instance_uid=said.series_uid,
        received_at=received_at,
        calling_ae=calling_ae,
        priority=priority,
        patient_identifier=_line(said.patient_id, 64),
        patient_authority=_line(said.issuer_of_patient_id, 64),
        patient_name=_line(said.patient_name, 324),
        patient_birth_date=_date(said.birth_date),
        patient_sex=_line(said.sex, 16),
        accession=_line(said.accession_number, 64),
        placer=_line(said.placer, 64),
        filler=_line(said.filler, 64),
        referring_physician=_line(said.referring_physician, 324),
        requesting_physician=_line(said.requesting_physician, 324),
        procedure=_procedure(said),
        procedure_reason=_line(said.requested_procedure_reason, 64),
        visit=_line(said.admission_id, 64),
        study_time=_study_time(said.study_date, said.study_time),
        study_description=_line(said.study_description, 64),
        modality=_line(said.modality, 16),
        series_number=_number(said.series_number),
        series_description=_line(said.series_description, 64),
    )


def _line(text: str, most: int) -> str:
    """`text` as its column takes it. The lengths are the standard's own; a longer value breaks it and is cut."""
    if text.isprintable():
        return text[:most]
    return _CONTROL_CHARACTERS.sub("", text)[:most]


def _procedure(said: Attributes) -> CodedProcedure:
    """The procedure's code, without which its words mean nothing; a cut code would be another one, so it is left out."""
    code, system = _line(said.procedure_code, LONGEST_CODE + 1), _line(said.procedure_system, 16)
    if not code or len(code) > LONGEST_CODE:
        return CodedProcedure()
    return CodedProcedure(code, _line(said.procedure_text, 64), system)


def _date(value: str) -> date | None:
    digits = value.replace(".", "")[:8]  # ACR-NEMA wrote 1993.08.22
    if not (len(digits) == 8 and digits.isascii() and digits.isdigit()):
        return None
    try:
        return date(int(digits[:4]), int(digits[4:6]), int(digits[6:]))
    except ValueError:
        return None


def _study_time(day: str, time_of_day: str) -> datetime | None:
    found = _date(day)
    if found is None:
        return None
    digits = time_of_day.replace(":", "").partition(".")[0]
    if not (digits.isascii() and digits.isdigit() and len(digits) in (2, 4, 6)):
        return datetime(found.year, found.month, found.day)
    hour, minute, second = (int(digits[i : i + 2] or 0) for i in (0, 2, 4))
    try:
        return datetime(found.year, found.month, found.day, hour, minute, second)
    except ValueError:  # 24:00, or a leap second
        return datetime(found.year, found.month, found.day)


def _number(value: str) -> int | None:
    try:
        number = int(value)
    except ValueError:
        return None
    return number if -(2**31) <= number < 2**31 else None


class Holds:
    """Which studies open associations hold back, by Study Instance UID. Safe for threads.

    A study is noted before its rows are committed, so that one whose commit took longer than its quiet period is not
    complete in the moment between its commit and the next instance.
    """

    def __init__(self, limit_seconds: float) -> None:
        self._limit_seconds = limit_seconds
        self._lock = threading.Lock()
        self._sent: dict[int, dict[str, float]] = {}  # association → study UID → when it last sent to it (monotonic)

    def note(self, association: int, study_uid: Phi) -> None:
        """An open association sends an instance of a study."""
        with self._lock:
            self._sent.setdefault(association, {})[study_uid] = time.monotonic()

    def __contains__(self, study_uid: object) -> bool:
        """Whether a study is not complete however quiet it is."""
        return study_uid in self.held()

    def end(self, association: int) -> None:
        """The association ended, one way or another."""
        with self._lock:
            self._sent.pop(association, None)

    def held(self) -> set[Phi]:
        """All studies that are held back now."""
        since = time.monotonic() - self._limit_seconds
        with self._lock:
            for sent in self._sent.values():
                for study_uid in [s for s, at in sent.items() if at < since]:
                    del sent[study_uid]
            return {study_uid for sent in self._sent.values() for study_uid in sent}


class Completer:
    """The thread that completes quiet studies and rings the doorbell for each."""

    def __init__(
        self,
        database: Database,
        quiet_seconds: float,
        held: Container[str],
        submit: Submit,
        metrics: Metrics,
    ) -> None:
        self._database = database
        self._quiet_seconds = quiet_seconds
        self._held = held
        self._submit = submit
        self._metrics = metrics
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="completer", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; what is quiet by then waits for the next start."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        # A study's sender may have waited for this start: its quiet period begins no earlier.
        wait = self._quiet_seconds
        while not self._stop.wait(wait):
            wait = min(LONGEST_TICK_SECONDS, self._quiet_seconds / 4)
            try:
                self.complete_quiet()
            except DatabaseUnavailableError as error:
                log.warning("completion_postponed", error=type(error).__name__)
            except SQLAlchemyError as error:  # the next round may go through
                log.error("completion_postponed", exc_info=error)

    def complete_quiet(self) -> list[str]:
        """Completes what is quiet now; returns the study ids. Raises `DatabaseUnavailableError`."""
        done = self._database.run(lambda session: studies.complete_quiet(session, self._quiet_seconds, self._held))
        for study_id in done:
            self._metrics.completed.inc()
            log.info("study_complete", study_id=study_id)
            try:
                self._submit(study_id)
            except RetryableError as error:  # the row says that it is due; the sweeper rings
                log.warning("doorbell_unheard", study_id=study_id, error=type(error).__name__)
        return done


def recover(store: Store, database: Database, ranking: Ranking, metrics: Metrics) -> int:
    """Makes the rows of stored instances that have none; returns how many. Raises `DatabaseUnavailableError`.

    Looks through the folders that changed since the last recovery. It may run beside live arrivals: a row that both
    make is made once, because both name the same path. A row that the database refuses stops no other; the next
    recovery looks at its file again.
    """
    began = time.time()
    corrections = Corrections(store, database)
    made = refused = 0
    names = store.stored_since(store.recovered_at())
    while group := list(itertools.islice(names, RECOVERY_GROUP)):
        found = _without_rows(store, database, ranking, group)
        made_of_group, refused_of_group = _record(database, corrections, found)
        made += made_of_group
        refused += refused_of_group
    if not refused:
        store.note_recovery(began)
    if made:
        log.warning("rows_recovered", instances=made)
        metrics.recovered.inc(made)
    return made


def _without_rows(store: Store, database: Database, ranking: Ranking, names: list[str]) -> list[Arrival]:
    """The rows that files of these names should have and have not; what is torn is set aside."""
    with database.read() as session:
        known = set(session.scalars(sa.select(Instance.path).where(Instance.path.in_(names))))
    found = []
    for name in names:
        if name in known:
            continue
        try:
            held = read_file(store.path(name))
            said = held.attributes()
        except InvalidObjectError:
            said = None
        if said is None or store.name(held, said.study_uid, said.sop_instance_uid) != name:
            # Never acknowledged: a power cut tore it before its fsync was over, or it is not ours.
            log.error("stored_file_torn", bytes=held.size_bytes if said else 0)
            store.set_aside(name)
            continue
        store.settle(name)
        received_at = datetime.fromtimestamp(store.path(name).stat().st_mtime, UTC)
        sender = held.source_ae_title
        priority = ranking.rank(said, ranking.by_sender.get(sender))
        found.append(arrival(held, said, name, sender, priority, received_at))
    return found


def _record(database: Database, corrections: Corrections, found: list[Arrival]) -> tuple[int, int]:
    """Commits the rows together, or one by one when the database refuses one; how many were made and refused."""
    if not found:
        return 0, 0
    try:
        rows = arrivals.record(database, found)
        settled = [corrections.settle(one, recorded) for one, recorded in zip(found, rows, strict=True)]
        return sum(not recorded.duplicate for recorded in settled), 0
    except SQLAlchemyError as error:
        if len(found) == 1:
            log.error("row_refused", exc_info=error)
            return 0, 1
    outcomes = [_record(database, corrections, [one]) for one in found]
    return sum(made for made, _ in outcomes), sum(refused for _, refused in outcomes)


class Recovery:
    """The thread that runs `recover` at start-up, and again whenever a group of instances was left without rows."""

    def __init__(self, store: Store, database: Database, ranking: Ranking, metrics: Metrics) -> None:
        self._work = lambda: recover(store, database, ranking, metrics)
        self._wanted = threading.Event()
        self._wanted.set()
        self._owed = True
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recovery", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._stopping.set()
        self._wanted.set()
        if self._thread.is_alive():
            self._thread.join()

    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def request(self) -> None:
        """Asks for another run, soon."""
        self._owed = True
        self._wanted.set()

    def done(self) -> bool:
        """True when no run is owed."""
        return not self._owed

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._stopping.is_set():
                return
            try:
                self._work()
                self._owed = self._wanted.is_set()
            except RetryableError as error:
                log.warning("recovery_postponed", error=type(error).__name__)
                self._wanted.set()
            except (OSError, SQLAlchemyError) as error:
                log.error("recovery_postponed", exc_info=error)
                self._wanted.set()
            self._stopping.wait(RECOVERY_RETRY_SECONDS)
