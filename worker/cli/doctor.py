"""`mu2 doctor`: says what is missing and what to do."""

import typer

from worker.cli.terminal import Json, note, print_json


def doctor(as_json: Json = False) -> None:
    """Checks settings, database, broker, disk, model, listener, destinations and workers; exit code 1 when one fails."""
    from dicom_listener.server import quieten_libraries
    from worker.core import logs, settings
    from worker.doctor import Outcome
    from worker.doctor import run as run_checks

    logs.configure("doctor", "error")
    quieten_libraries()
    current = settings.load()
    results = []
    for check in run_checks(current):
        results.append(check)
        if not as_json:
            print(f"{check.outcome:<4}  {check.name:<22} {check.finding}")
            if check.advice:
                print(f"{'':<4}  {'':<22} -> {check.advice}")
    failed = sum(check.outcome is Outcome.FAIL for check in results)
    warned = sum(check.outcome is Outcome.WARN for check in results)
    if as_json:
        print_json({"ok": failed == 0, "checks": results})
    note(f"{len(results)} checks, {failed} failed, {warned} with a warning.")
    if failed:
        raise typer.Exit(1)
