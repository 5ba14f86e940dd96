"""`mu2 db`: the database's schema."""

import typer

from worker.cli.terminal import Json, note, print_json

app = typer.Typer(name="db", help="The database's schema.", no_args_is_help=True)


@app.command()
def upgrade() -> None:
    """Brings the database to the newest revision; does nothing when it is there."""
    from worker.core import schema, settings
    from worker.core.database import Database

    database = Database.from_settings(settings.current())
    try:
        before = schema.current(database)
        schema.upgrade(database)
        after = schema.current(database)
    finally:
        database.close()
    print(
        f"The database is at revision {after}"
        + (" already." if before == after else f", it was at {before or 'none'}.")
    )


@app.command()
def current(as_json: Json = False) -> None:
    """Shows the database's revision and the one this code needs; exit code 1 when they differ."""
    from worker.core import schema, settings
    from worker.core.database import Database

    chosen = settings.current()
    database = Database(chosen.database_url, chosen.database.busy_seconds)  # makes no MU2_HOME, being a read
    try:
        found, needed = schema.current(database), schema.head()
    finally:
        database.close()
    if as_json:
        print_json({"current": found, "head": needed, "ok": found == needed})
    else:
        print(f"{found or 'none'} (this code needs {needed})")
    if found != needed:
        wrong_home = "" if found or chosen.database.url.get_secret_value() else f" MU2_HOME is {chosen.home}."
        note(f"Run `mu2 db upgrade`.{wrong_home}")
        raise typer.Exit(1)
