"""`mu2 audit`: the hash-chained record of who did what."""

import typer

from worker.cli.terminal import Json, opened, print_json

app = typer.Typer(name="audit", help="The hash-chained record of who did what.", no_args_is_help=True)


@app.callback()
def audit() -> None:
    """The hash-chained record of who did what."""


@app.command()
def verify(as_json: Json = False) -> None:
    """Walks the whole audit chain; exit code 1 names the first row that does not fit."""
    from worker.core import audit as chain

    with opened() as (_, database), database.read() as session:
        verified = chain.verify(session)
    if as_json:
        print_json({"ok": True, "events": verified.events, "head": verified.head})
        return
    print(f"The chain of {verified.events} events holds. Its head is {verified.head};")
    print("noted elsewhere, it proves later that nothing was cut off the end.")
