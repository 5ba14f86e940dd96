"""The `mu2` command: one file per noun. Commands import what they need when they run, so that `mu2 --help` is quick."""

import sys

import typer

from worker.cli import (
    audit,
    database,
    demo,
    doctor,
    listener,
    message,
    model,
    queue,
    report,
    retention,
    review,
    study,
    up,
    user,
    volume,
)
from worker.core.errors import Mu2Error, SettingsError

EXIT_FAILED = 1
EXIT_USAGE = 2

app = typer.Typer(
    name="mu2",
    help="Drafts CT reports inside a hospital: DICOM in, μ²LLM, HL7 out, a radiologist signs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a pretty trace shows local variables, and those may hold a patient
)
app.command("demo")(demo.demo)
app.command("up")(up.up)
app.command("listener")(listener.listener)
app.command("review")(review.review)
app.command("doctor")(doctor.doctor)
app.command("volume")(volume.volume_command)
for noun in (study, report, message, queue, model, user, retention, audit, database):
    app.add_typer(noun.app)


def main() -> None:
    """Runs one command; an error of ours is one sentence on stderr and exit code 1, a wrong setting 2."""
    try:
        app()
    except SettingsError as error:
        _complain(error)
        sys.exit(EXIT_USAGE)
    except Mu2Error as error:
        _complain(error)
        sys.exit(EXIT_FAILED)


def _complain(error: Mu2Error) -> None:
    print(f"mu2: {error}", file=sys.stderr)
