"""`mu2 queue`: what waits, who works, what is rung."""

import typer

from worker.cli.terminal import Json, note, opened, print_json, print_table

app = typer.Typer(name="queue", help="What waits and who works.", no_args_is_help=True)


@app.callback()
def queue() -> None:
    """What waits and who works."""


@app.command()
def status(as_json: Json = False) -> None:
    """Shows studies by state, work due by stage, messages by destination, workers and doorbells."""
    from worker import queue_status

    with opened() as (settings, database):
        found = queue_status.read(settings, database)
    if as_json:
        print_json(found)
        return
    print_table(["state", "studies"], list(found.studies.items()))
    print()
    print_table(["stage", "due", "oldest waits s"], [[d.stage, d.count, f"{d.oldest_seconds:.0f}"] for d in found.due])
    print()
    messages = [[name, state, count] for name, states in found.messages.items() for state, count in states.items()]
    print_table(["destination", "message state", "count"], messages)
    print()
    workers = [[w.service, w.queues, w.alive, f"{w.beat_age_seconds:.0f}", w.owner] for w in found.processes]
    print_table(["service", "queues", "alive", "last beat s", "process"], workers)
    if found.doorbells is None:
        note("The broker does not answer: no doorbell rings; `mu2 doctor` says more.")
    else:
        print()
        print_table(["queue", "doorbells"], list(found.doorbells.items()))
