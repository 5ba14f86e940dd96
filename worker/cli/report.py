"""`mu2 report`: acts of a radiologist that must not wait for a browser."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.terminal import Json, StudyArgument, Yes, actor, ask, note, opened, print_json

if TYPE_CHECKING:
    from worker.core.database import Database
    from worker.core.settings import Settings

app = typer.Typer(name="report", help="Reports: withdraw a signed one.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Reports: withdraw a signed one."""


@app.command()
def retract(
    study: StudyArgument,
    reader: Annotated[str, typer.Option("--reader", metavar="USERNAME", help="The radiologist who withdraws it.")],
    reason: Annotated[
        str, typer.Option(help="Why; asked for when left out. Others see arguments: name no patient here.")
    ] = "",
    password_stdin: Annotated[
        bool, typer.Option("--password-stdin", help="Read the radiologist's password from standard input.")
    ] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Withdraws a signed report from everybody who has it, for a reason: as final an act as a signature.

    The radiologist proves who they are by the password, here as on the page. Receivers get W (OBX-11) for the text they
    have; the signed text stays on record. Audited.
    """
    from worker.core import editing, seen, signing, worklist
    from worker.core.editing import Reader
    from worker.core.errors import NotFoundError
    from worker.results import hl7

    with opened() as (settings, database):
        with database.read() as session:
            row = worklist.find(session, study)
            if row.report is None:
                raise NotFoundError("this study has no report")
            study_id, report_id = row.id, row.report.id
            standing = editing.of_record(session, report_id)
            version, revision = standing.number, seen.full_revision(editing.current_copy(session, report_id))
        reason = reason or typer.prompt("Reason", err=True)
        ask(f"Withdraw the report of study {study_id}, version {version} ({standing.state})?", yes)
        user_id, proof = _prove(settings, database, study_id, reader, password_stdin)
        desk = signing.Desk.from_settings(settings, hl7.write)
        acting = Reader(user_id, origin=actor())
        done = database.run(
            lambda session: signing.retract(
                session,
                report_id,
                acting,
                desk,
                reason=reason,
                version=version,
                revision=revision,
                authentication_id=proof,
            )
        )
    for name, why in done.unwritable.items():
        note(f"No message to {name}: {why}")
    if as_json:
        print_json({"study_id": study_id, "version": done.version.number, "messages_to": done.destinations})
    else:
        told = ", ".join(done.destinations) or "nobody: no receiver has it"
        print(f"The report of study {study_id} is retracted; told within seconds: {told}.")


def _prove(
    settings: "Settings", database: "Database", study_id: str, username: str, from_stdin: bool
) -> tuple[str, str]:
    """Who this is, and a proof made now; raises `NotFoundError`, `StateError` without a password here, `AccessError`."""
    from worker.core import accounts, audit
    from worker.core.accounts import Lockout
    from worker.core.errors import AccessError, StateError

    with database.read() as session:
        user = accounts.by_name(session, username)
    if user.password_hash is None:
        raise StateError("this account has its password at the identity provider; retract on the review page")
    typed = (
        sys.stdin.readline().rstrip("\n") if from_stdin else str(typer.prompt("Password", hide_input=True, err=True))
    )
    lockout = Lockout(settings.review.lockout_failures, settings.review.lockout_minutes)
    try:
        return user.id, accounts.prove_by_password(database, user.id, typed, lockout, study_id)
    except AccessError:
        database.run(
            lambda session: audit.append(
                session, "prove", actor=user.username, study_id=study_id, origin=actor(), outcome="refused"
            )
        )
        raise
