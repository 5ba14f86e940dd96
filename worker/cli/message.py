"""`mu2 message`: the outbox."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli.terminal import Json, actor, opened, print_facts, print_json, print_table

if TYPE_CHECKING:
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
def resend(number: Number, as_json: Json = False) -> None:
    """Sends a parked or refused message again, the same bytes under the same control id. Audited."""
    from worker.core import audit, outbox, outbox_view

    def change(session: Any) -> dict[str, Any]:
        row = outbox.resend(session, number)
        facts = outbox_view.facts(session, row)
        audit.append(session, "resend", actor=actor(), study_id=facts["study_id"], message=number)
        return facts

    with opened() as (_, database):
        facts = database.run(change)
    if as_json:
        print_json(facts)
    else:
        print(f"Message {number} is due; a worker sends it to {facts['destination']} within seconds.")


def _state(text: str) -> Any:
    from worker.core.records import MessageState

    try:
        return MessageState(text)
    except ValueError:
        raise typer.BadParameter(f"a state is one of {', '.join(MessageState)}") from None
