"""`mu2 retention run`: what goes, and what never does."""

from datetime import timedelta

import pytest
import sqlalchemy as sa

from tests.cli.conftest import Terminal
from tests.core import builders
from worker.core import editing, outbox, retention, studies
from worker.core.records import (
    AuditEvent,
    Base,
    Instance,
    Message,
    Report,
    ReportVersion,
    Sentence,
    Stage,
    Study,
    StudyStatus,
)
from worker.core.review_records import WorkingCopy, WorkingSentence

OLD = timedelta(days=400)


def age(terminal: Terminal) -> None:
    """Moves everything that is there into the past."""
    with terminal.database.write() as session:
        session.execute(sa.update(Study).values(status_at=studies.now() - OLD))
        session.execute(sa.update(Report).values(created_at=studies.now() - OLD))
        unsigned = ~sa.exists().where(sa.text("signatures.version_id = report_versions.id")).select_from(
            sa.table("signatures")
        )
        session.execute(sa.update(ReportVersion).where(unsigned).values(created_at=studies.now() - OLD))


def with_files(terminal: Terminal) -> None:
    """Gives every instance a file, and every study a model input."""
    with terminal.database.write() as session:
        for row in session.scalars(sa.select(Instance)):
            path = terminal.home / "store" / row.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        for study in session.scalars(sa.select(Study)):
            folder = terminal.home / "store" / "inputs" / study.id[:2] / study.id / "1"
            folder.mkdir(parents=True)
            (folder / "volume-01.npz").write_bytes(b"x")
            study.model_input = str(folder.relative_to(terminal.home / "store"))


def files(terminal: Terminal) -> list[str]:
    return sorted(p.name for p in (terminal.home / "store").rglob("*") if p.is_file())


def rows(terminal: Terminal, table: type) -> int:
    with terminal.database.read() as session:
        return session.scalar(sa.select(sa.func.count()).select_from(table)) or 0


def keep_report(terminal: Terminal) -> None:
    """Makes the report itself too young to go."""
    with terminal.database.write() as session:
        session.execute(sa.update(Report).values(created_at=studies.now()))


def test_pixels_of_a_done_study_go_when_their_time_is_over(terminal: Terminal) -> None:
    builders.drafted(terminal.database)
    with_files(terminal)
    age(terminal)
    keep_report(terminal)
    removed = terminal.data("retention", "run", "--yes")
    assert (removed["studies"], removed["instances"], removed["reports"]) == (1, 1, 0)
    assert files(terminal) == []
    with terminal.database.read() as session:
        assert session.scalars(sa.select(Instance)).one().removed_at is not None
        assert session.scalars(sa.select(AuditEvent.action)).all() == ["retention_pixels"]


def test_dry_run_counts_and_removes_nothing(terminal: Terminal) -> None:
    builders.drafted(terminal.database)
    with_files(terminal)
    age(terminal)
    counted = terminal.data("retention", "run", "--dry-run")
    assert (counted["instances"], counted["reports"]) == (1, 1)
    assert len(files(terminal)) == 2 and rows(terminal, Report) == 1 and rows(terminal, AuditEvent) == 0


def test_nothing_goes_without_an_answer(terminal: Terminal) -> None:
    builders.drafted(terminal.database)
    with_files(terminal)
    age(terminal)
    assert terminal.run("retention", "run", answer="n\n").exit_code == 1
    assert len(files(terminal)) == 2


def test_a_young_study_stays(terminal: Terminal) -> None:
    builders.drafted(terminal.database)
    with_files(terminal)
    assert terminal.data("retention", "run", "--yes")["instances"] == 0
    assert len(files(terminal)) == 2


@pytest.mark.parametrize("state", ["receiving", "complete", "preparing", "failed"])
def test_a_study_that_is_not_done_stays_however_old(terminal: Terminal, state: str) -> None:
    if state == "receiving":
        builders.received(terminal.database)
    else:
        builders.completed(terminal.database)
    if state in ("preparing", "failed"):
        claim = builders.claimed(terminal.database, Stage.PREPARE)
        if state == "failed":
            with terminal.database.write() as session:
                studies.fail(session, claim, RuntimeError())
    with_files(terminal)
    age(terminal)
    assert terminal.data("retention", "run", "--yes")["instances"] == 0
    assert len(files(terminal)) == 2


def test_a_committed_instance_stays(terminal: Terminal) -> None:
    builders.drafted(terminal.database)
    with_files(terminal)
    age(terminal)
    with terminal.database.write() as session:
        session.execute(sa.update(Instance).values(committed_at=studies.now()))
    removed = terminal.data("retention", "run", "--yes")
    assert (removed["instances"], removed["kept_committed"]) == (0, 1)
    assert len([name for name in files(terminal) if name.endswith(".dcm")]) == 1


def test_an_unsigned_report_goes_with_its_text_and_messages(terminal: Terminal) -> None:
    version_id = builders.drafted(terminal.database)
    with terminal.database.write() as session:
        outbox.enqueue(session, session.get_one(ReportVersion, version_id), [builders.destination()], builders.render)
        claimed = outbox.claim(session, "ris", 60)
        assert claimed is not None
        outbox.acknowledge(session, claimed, "AA")
    age(terminal)
    removed = terminal.data("retention", "run", "--yes")
    assert (removed["reports"], removed["messages"]) == (1, 1)
    assert [rows(terminal, table) for table in (Report, ReportVersion, Sentence, Message)] == [0, 0, 0, 0]


def test_what_readers_did_with_an_unsigned_report_goes_with_it(terminal: Terminal) -> None:
    version_id = builders.drafted(terminal.database)
    with terminal.database.write() as session:
        editing.begin(session, session.get_one(ReportVersion, version_id))
        session.execute(sa.update(WorkingCopy).values(changed_at=studies.now() - OLD))
    age(terminal)
    assert terminal.data("retention", "run", "--yes")["reports"] == 1
    assert [rows(terminal, table) for table in (WorkingCopy, WorkingSentence, Report)] == [0, 0, 0]


def test_a_report_that_someone_works_on_stays(terminal: Terminal) -> None:
    version_id = builders.drafted(terminal.database)
    with terminal.database.write() as session:
        editing.begin(session, session.get_one(ReportVersion, version_id))
    age(terminal)
    assert terminal.data("retention", "run", "--yes")["reports"] == 0


def test_every_table_that_hangs_on_a_report_is_thought_of() -> None:
    hanging = {"reports"}
    for table in Base.metadata.sorted_tables:  # parents first
        if {key.column.table.name for key in table.foreign_keys} & hanging:
            hanging.add(table.name)
    removal = retention._ReportRemoval("", studies.now(), "test")
    removed = {statement.table.name for statement in removal._deletions()}
    assert hanging - removed == {"signatures", "authentications"}  # who has those is never removed


def test_a_report_whose_message_is_still_on_its_way_stays(terminal: Terminal) -> None:
    version_id = builders.drafted(terminal.database)
    with terminal.database.write() as session:
        outbox.enqueue(session, session.get_one(ReportVersion, version_id), [builders.destination()], builders.render)
    age(terminal)
    assert terminal.data("retention", "run", "--yes")["reports"] == 0


def test_a_signed_report_stays_whole_however_old(terminal: Terminal) -> None:
    version_id = builders.drafted(terminal.database)
    with terminal.database.write() as session:
        builders.sign(session, version_id)
    age(terminal)
    assert terminal.data("retention", "run", "--yes")["reports"] == 0
    assert rows(terminal, ReportVersion) == 2


def test_a_run_that_died_half_way_is_finished_by_the_next(terminal: Terminal) -> None:
    builders.drafted(terminal.database)
    with_files(terminal)
    age(terminal)
    keep_report(terminal)
    for path in (terminal.home / "store").rglob("*.dcm"):
        path.unlink()  # as if the last run had ended between the file and the row
    assert terminal.data("retention", "run", "--yes")["instances"] == 1
    assert builders.study_of(terminal.database, _only_study(terminal)).status is StudyStatus.DRAFTED


def _only_study(terminal: Terminal) -> str:
    with terminal.database.read() as session:
        return session.scalars(sa.select(Study.id)).one()
