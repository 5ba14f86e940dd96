"""`mu2 study`: studies, their states and reasons, and how to put one back to work.

The terminal shows ids and states. Who the patient is shows only with `--patient`, and each such look is audited.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli import study_training
from worker.cli.terminal import (
    DryRun,
    Json,
    StudyArgument,
    Yes,
    actor,
    ask,
    note,
    opened,
    parse_since,
    print_facts,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from worker.core.database import Database
    from worker.core.records import StudyStatus

app = typer.Typer(name="study", help="Studies: list, show, put back to work, export.", no_args_is_help=True)

Patient = Annotated[bool, typer.Option("--patient", help="Show whose studies these are; the look is audited.")]
Since = Annotated[str | None, typer.Option(help="Changed since: 90m, 12h, 3d ago, or a date or time.", metavar="WHEN")]
_SHORT_ID = 8


@app.command("list")
def list_studies(
    status: Annotated[list[str] | None, typer.Option(help="Only this state; may be given several times.")] = None,
    since: Since = None,
    limit: Annotated[int, typer.Option(min=1, help="Most studies shown.")] = 50,
    patient: Patient = False,
    as_json: Json = False,
) -> None:
    """Lists studies, the latest change first."""
    from worker.core import worklist

    statuses = [_status(s) for s in status or []]
    with opened() as (_, database):
        with database.read() as session:
            lines = worklist.many(session, statuses=statuses, since=parse_since(since) if since else None, limit=limit)
        patients = _patients(database, [line.id for line in lines]) if patient else {}
    if as_json:
        print_json([{**_fields(line), **patients.get(line.id, {})} for line in lines])
        return
    columns = ["study", "state", "rev", "priority", "objects", "changed", "reason"]
    rows = [
        [line.id[:_SHORT_ID], line.status, line.revision, line.priority, line.instances, line.status_at, line.reason]
        for line in lines
    ]
    if patient:
        columns += ["patient", "id", "accession"]
        for row, line in zip(rows, lines, strict=True):
            who = patients[line.id]
            row += [who["patient_name"], who["patient_identifier"], who["accession"]]
    print_table(columns, rows)
    if len(lines) == limit:
        note(f"The latest {limit} are shown; --limit shows more.")


@app.command()
def show(study: StudyArgument, patient: Patient = False, as_json: Json = False) -> None:
    """Shows everything about one study: state, series chosen and why, repairs, attempts, report versions, messages."""
    from worker.core import consents, worklist

    with opened() as (_, database):
        with database.read() as session:
            row = worklist.find(session, study)
            decision = consents.decision_of(session, row.id)
            details = {**worklist.details(session, row), "training_consent": decision.value if decision else None}
        who = _patients(database, [row.id])[row.id] if patient else {}
    if as_json:
        print_json({**details, **who})
        return
    parts = ("series", "choice", "attempts", "report_versions", "messages")
    print_facts({**{k: v for k, v in details.items() if k not in parts}, **who})
    _print_choice(details["choice"] or {})
    for title in ("attempts", "report_versions", "messages"):
        if details[title]:
            print(f"\n{title.replace('_', ' ')}")
            print_table(list(details[title][0]), [list(entry.values()) for entry in details[title]])


@app.command()
def requeue(
    study: Annotated[str | None, typer.Argument(metavar="[STUDY]", help="Study id, its beginning, or UID.")] = None,
    failed: Annotated[bool, typer.Option("--failed", help="All failed studies.")] = False,
    all_skipped: Annotated[bool, typer.Option("--all-skipped", help="All skipped studies.")] = False,
    since: Since = None,
    force: Annotated[bool, typer.Option("--force", help="Also take a study from the worker that has it.")] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Puts studies back to work in a new revision: one, or with --failed or --all-skipped many."""
    if (study is not None) == (failed or all_skipped) or (study is not None and since is not None):
        raise typer.BadParameter("name one study, or choose many with --failed or --all-skipped (and --since)")
    with opened() as (_, database):
        chosen = _chosen(database, study, failed, all_skipped, since)
        if dry_run:
            results = [_would_requeue(database, study_id, reason, force) for study_id, reason in chosen]
        else:
            if len(chosen) > 1:
                ask(f"Put {len(chosen)} studies back to work?", yes)
            results = [_requeue(database, study_id, force) for study_id, _ in chosen]
    column = "would_be_requeued" if dry_run else "requeued"
    taken = sum(result[column] for result in results)
    if as_json:
        print_json(results)
    else:
        rows = [[r["id"], "yes" if r[column] else "no", r["reason"]] for r in results]
        print_table(["study", column.replace("_", " "), "reason"], rows)
    if dry_run:
        note(f"{taken} of {len(results)} would be put back to work; nothing was done.")
    if taken < len(results):
        raise typer.Exit(1)


@app.command()
def discard(study: StudyArgument, yes: Yes = False, as_json: Json = False) -> None:
    """Removes all that is here of one study, so that the PACS can send it again. Audited.

    For two patients in one study, or a damaged object. Signed reports and instances under a storage commitment never go.
    """
    from worker.core import discard as removal
    from worker.core import worklist

    with opened() as (settings, database):
        with database.read() as session:
            study_id = worklist.find(session, study).id
            found = removal.look(session, study_id)
        ask(
            f"Remove {found.instances} instances, {found.versions} unsigned report versions and {found.messages} messages "
            f"of study {study_id} for good?",
            yes,
        )
        gone = removal.run(database, settings.store_root, study_id, actor=actor())
    if as_json:
        print_json({"id": study_id, **_fields(gone)})
    else:
        print_facts({"id": study_id, **_fields(gone)})
    note("Nothing is left of it here; have the PACS send it again.")
    if gone.messages_sent:
        note(f"{gone.messages_sent} messages about it had left before: tell the owners of their receivers.")


app.command()(study_training.consent)
app.command("export-training")(study_training.export_training)


@app.command()
def export(
    study: StudyArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT.nii.gz", help="NIfTI file to write.")],
    as_json: Json = False,
) -> None:
    """Writes the volume that the model saw as NIfTI; several volumes get a number each. Audited."""
    from worker.core import audit, worklist
    from worker.core.errors import StateError
    from worker.imaging import nifti, stored

    if not out.name.endswith((".nii", ".nii.gz")):
        raise typer.BadParameter("the name of a NIfTI file ends in .nii or .nii.gz")
    with opened() as (settings, database):
        with database.read() as session:
            row = worklist.find(session, study)
        if row.model_input is None:
            raise StateError(f"study {row.id} is {row.status} and has no volume now; `mu2 study show` says why")
        paths = sorted((settings.store_root / row.model_input).glob("volume-*.npz"))
        database.run(
            lambda session: audit.append(
                session, "study_export", actor=actor(), study_id=row.id, format="nifti", volumes=len(paths)
            )
        )
        written = []
        for number, path in enumerate(paths, start=1):
            volume = stored.load(path)
            target = out if len(paths) == 1 else nifti.numbered(out, number)
            nifti.write(volume, target)
            written.append({"file": str(target), "shape": list(volume.hu.shape), "repairs": list(volume.repairs)})
    if as_json:
        print_json(written)
        return
    for entry in written:
        print(f"{entry['file']}  {' x '.join(map(str, entry['shape']))} (slices, rows, columns)")
        for repair in entry["repairs"]:
            print(f"  repaired: {repair}")


def _status(text: str) -> "StudyStatus":
    from worker.core.records import StudyStatus

    try:
        return StudyStatus(text)
    except ValueError:
        raise typer.BadParameter(f"a state is one of {', '.join(StudyStatus)}") from None


def _fields(line: Any) -> dict[str, Any]:
    return {name: getattr(line, name) for name in line.__dataclass_fields__}


def _patients(database: "Database", study_ids: list[str]) -> dict[str, dict[str, Any]]:
    """Whose studies these are, by study id; written into the audit before it is shown."""
    from worker.core import audit, studies, worklist

    who = actor()

    def look(session: Any) -> dict[str, dict[str, Any]]:
        found = {}
        for study_id in study_ids:
            audit.append(session, "patient_shown", actor=who, study_id=study_id)
            found[study_id] = worklist.patient(studies.get(session, study_id))
        return found

    return database.run(look)


def _chosen(
    database: "Database", study: str | None, failed: bool, all_skipped: bool, since: str | None
) -> list[tuple[str, str]]:
    from worker.core import worklist
    from worker.core.records import StudyStatus

    with database.read() as session:
        if study is not None:
            row = worklist.find(session, study)
            return [(row.id, row.reason)]
        statuses = [s for s, wanted in ((StudyStatus.FAILED, failed), (StudyStatus.SKIPPED, all_skipped)) if wanted]
        return worklist.to_requeue(session, statuses=statuses, since=parse_since(since) if since else None)


def _requeue(database: "Database", study_id: str, force: bool) -> dict[str, Any]:
    """Requeues one study and rings; one that cannot be is reported and does not stop the others."""
    from worker import queues
    from worker.core.errors import BrokerUnavailableError, StateError

    try:
        database.run(_requeueing(study_id, force))
    except StateError as error:
        return {"id": study_id, "requeued": False, "reason": str(error)}
    try:
        queues.submit_study(study_id)
    except BrokerUnavailableError as error:
        note(f"study {study_id}: {error}")
    return {"id": study_id, "requeued": True, "reason": ""}


def _would_requeue(database: "Database", study_id: str, reason: str, force: bool) -> dict[str, Any]:
    """Whether `_requeue` would take the study: then its own reason stands there, else what speaks against it."""
    from worker.core.errors import StateError

    try:
        database.rehearse(_requeueing(study_id, force))
    except StateError as error:
        return {"id": study_id, "would_be_requeued": False, "reason": str(error)}
    return {"id": study_id, "would_be_requeued": True, "reason": reason}


def _requeueing(study_id: str, force: bool) -> "Callable[[Session], None]":
    """The change that requeues a study; raises `StateError` where its state or its pixels do not allow it."""
    from worker.core import audit, studies, worklist
    from worker.core.errors import StateError

    def change(session: "Session") -> None:
        if worklist.pixels_removed(session, study_id):
            raise StateError(f"retention removed the pixels of study {study_id}; have the PACS send it again")
        studies.requeue(session, study_id, force=force)
        audit.append(session, "requeue", actor=actor(), study_id=study_id, force=force)

    return change


def _print_choice(choice: dict[str, Any]) -> None:
    series = choice.get("series", [])
    if series:
        print("\nseries")
        rows = [[s["series_number"], s["part"], s["images"], s["cause"], s["reason"]] for s in series]
        print_table(["number", "part", "images", "verdict", "why"], rows)
    for number, volume in enumerate(choice.get("volumes", []), start=1):
        shape, spacing = (" x ".join(map(str, volume[key])) for key in ("shape", "spacing_mm"))
        print(f"\nvolume {number}: {shape} at {spacing} mm, {', '.join(volume['regions']) or 'region unknown'}")
        for repair in volume["repairs"]:
            print(f"  repaired: {repair}")
    if choice.get("unreadable"):
        print(f"\n{choice['unreadable']} objects could not be read")
