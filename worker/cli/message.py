"""`mu2 message`: the outbox."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    from worker.core.records import Message

app = typer.Typer(name="message", help="The outbox: what was sent where, and what was answered.", no_args_is_help=True)

Number = Annotated[int, typer.Argument(metavar="NUMBER", help="Number of the message, from `mu2 message list`.")]


@app.command("list")
def list_messages(
    state: Annotated[list[str] | None, typer.Option(help="Only this state; may be given several times.")] = None,
    destination: Annotated[str | None, typer.Option(help="Only this destination.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most messages shown.")] = 50,
    as_json: Json = False,
) -> None:
    """Lists messages, the newest first, without their content."""
    from worker.core import outbox_view

    with opened() as (_, database), database.read() as session:
        lines = outbox_view.many(session, states=[_state(s) for s in state or []], destination=destination, limit=limit)
    if as_json:
        print_json(lines)
        return
    columns = {
        "number": "number",
        "study": "study_id",
        "destination": "destination",
        "status": "result_status",
        "state": "state",
        "tries": "attempts",
        "answer": "acknowledgement",
        "due": "due_at",
        "error": "error",
    }
    print_table(list(columns), [[line[key] for key in columns.values()] for line in lines])


@app.command()
def show(
    number: Number,
    raw: Annotated[bool, typer.Option("--raw", help="The bytes as sent, and nothing else.")] = False,
    as_json: Json = False,
) -> None:
    """Shows one message with its content, readable or raw. It holds the patient's data: the look is audited."""
    import sys

    from worker.core import audit, outbox_view

    def look(session: Any) -> "tuple[Message, dict[str, Any]]":
        row = outbox_view.get(session, number)
        facts = outbox_view.facts(session, row)
        audit.append(session, "message_shown", actor=actor(), study_id=facts["study_id"], message=number)
        return row, facts

    with opened() as (_, database):
        row, facts = database.run(look)
    if raw:
        sys.stdout.buffer.write(row.payload)
        return
    from worker.results import hl7_reading

    readable = hl7_reading.readable(row.payload)
    if as_json:
        content = {"payload": row.payload.decode("utf-8", errors="replace"), "readable": readable}
        print_json({**facts, "answer_text": row.answer_text, **content})
        return
    print_facts({**facts, "answer_text": row.answer_text})
    print(f"\n{readable}")


@app.command()
def resend(
    number: Annotated[int | None, typer.Argument(metavar="[NUMBER]", help="One message, by its number.")] = None,
    parked: Annotated[bool, typer.Option("--parked", help="All that are out of retries.")] = False,
    refused: Annotated[bool, typer.Option("--refused", help="All that a receiver refused.")] = False,
    destination: Annotated[str | None, typer.Option(help="Of these, only this destination's.")] = None,
    since: Annotated[
        str | None, typer.Option(help="Of these, written since: 90m, 12h, 3d ago, or a date or time.", metavar="WHEN")
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Sends parked or refused messages again, the same bytes under the same control id: one, or many. Audited."""
    if (number is not None) == (parked or refused) or (number is not None and (destination or since)):
        raise typer.BadParameter(
            "name one message, or choose many with --parked or --refused (and --destination, --since)"
        )
    with opened() as (_, database):
        chosen = [number] if number is not None else _chosen(database, parked, refused, destination, since)
        if dry_run and number is not None:
            results = [_would_resend(database, number)]
        elif dry_run:
            results = [_if_possible(_would_resend, database, one, "would_be_resent") for one in chosen]
        elif number is not None:
            results = [_resend(database, number)]
        else:
            if len(chosen) > 1:
                ask(f"Send {len(chosen)} messages again?", yes)
            results = [_if_possible(_resend, database, one, "resent") for one in chosen]
    column = "would_be_resent" if dry_run else "resent"
    taken = sum(line[column] for line in results)
    if as_json:
        print_json(results[0] if number is not None else results)
    elif number is not None and not dry_run:
        print(f"Message {number} is due; a worker sends it to {results[0]['destination']} within seconds.")
    else:
        lines = [[line["number"], "yes" if line[column] else "no", line["reason"]] for line in results]
        print_table(["number", column.replace("_", " "), "reason"], lines)
    if dry_run:
        note(f"{taken} of {len(results)} would be sent again; nothing was done.")
    if taken < len(results):
        raise typer.Exit(1)


@app.command()
def renew(
    number: Number,
    force: Annotated[
        bool, typer.Option("--force", help="Also one that had a try without an answer: its receiver was asked.")
    ] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Writes a refused or parked message again by the present settings, under a new control id. Audited.

    For a receiver that refuses the content, a procedure code for instance: mend the settings, then renew. The old message
    stays on record as superseded.
    """
    from worker.core import renewal
    from worker.core.signing import Desk
    from worker.results import hl7

    with opened() as (settings, database):
        ask(f"Write message {number} again under a new control id?", yes)
        desk = Desk.from_settings(settings, hl7.write)
        row = renewal.run(database, number, desk, actor=actor(), force=force)
    if as_json:
        print_json({"number": row.id, "renews": number, "destination": row.destination, "control_id": row.control_id})
    else:
        print(f"Message {row.id} takes the place of {number}; a worker sends it to {row.destination} within seconds.")


@app.command()
def write(study: StudyArgument, as_json: Json = False) -> None:
    """Writes the messages of a signed report that could not be written when it was signed. Audited.

    The page says at the signature which receiver gets none, and why (no patient id, a name that its character set lacks).
    Mend the cause, then write.
    """
    from worker.core import renewal, worklist
    from worker.core.errors import NotFoundError
    from worker.core.signing import Desk
    from worker.results import hl7

    with opened() as (settings, database):
        with database.read() as session:
            report = worklist.find(session, study).report
            if report is None:
                raise NotFoundError("this study has no report")
            report_id = report.id
        written = renewal.write_missing(database, report_id, Desk.from_settings(settings, hl7.write), actor=actor())
    if as_json:
        print_json({"written_for": written})
    else:
        print(f"Written for {', '.join(written)}." if written else "Every receiver that may have it has its message.")


def _chosen(database: "Database", parked: bool, refused: bool, destination: str | None, since: str | None) -> list[int]:
    from worker.core import outbox_view
    from worker.core.records import MessageState

    states = [s for s, wanted in ((MessageState.PARKED, parked), (MessageState.REFUSED, refused)) if wanted]
    with database.read() as session:
        return outbox_view.to_resend(
            session, states=states, destination=destination, since=parse_since(since) if since else None
        )


def _resend(database: "Database", number: int) -> dict[str, Any]:
    """Makes one message due again; raises `NotFoundError` or `StateError`."""
    return {**database.run(_resending(number)), "resent": True, "reason": ""}


def _would_resend(database: "Database", number: int) -> dict[str, Any]:
    """Says that `_resend` would make the message due; raises what it would."""
    database.rehearse(_resending(number))
    return {"number": number, "would_be_resent": True, "reason": ""}


def _resending(number: int) -> "Callable[[Session], dict[str, Any]]":
    """The change that makes one message due again and returns its facts."""
    from worker.core import audit, outbox, outbox_view

    def change(session: "Session") -> dict[str, Any]:
        row = outbox.resend(session, number)
        facts = outbox_view.facts(session, row)
        audit.append(session, "resend", actor=actor(), study_id=facts["study_id"], message=number)
        return facts

    return change


def _if_possible(
    act: "Callable[[Database, int], dict[str, Any]]", database: "Database", number: int, column: str
) -> dict[str, Any]:
    """The act on one of many: one that cannot be is reported and does not stop the others."""
    from worker.core.errors import StateError

    try:
        return act(database, number)
    except StateError as error:
        return {"number": number, column: False, "reason": str(error)}


def _state(text: str) -> Any:
    from worker.core.records import MessageState

    try:
        return MessageState(text)
    except ValueError:
        raise typer.BadParameter(f"a state is one of {', '.join(MessageState)}") from None
