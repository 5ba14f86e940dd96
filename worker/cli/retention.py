"""`mu2 retention`: removes what is over its time."""

import typer

from worker.cli.terminal import DryRun, Json, Yes, actor, ask, note, opened, print_facts, print_json

app = typer.Typer(name="retention", help="Removes what is over its time.", no_args_is_help=True)


@app.callback()
def retention() -> None:
    """Removes what is over its time."""


@app.command()
def run(dry_run: DryRun = False, yes: Yes = False, as_json: Json = False) -> None:
    """Removes pixels of done studies and unsigned reports that are over their time. Audited.

    Instances under a storage commitment, failed studies, signed reports and the audit stay.
    """
    from worker.core import retention as removal

    with opened() as (settings, database):
        keep, root = settings.retention, settings.store_root
        planned = removal.run(database, root, keep, actor=actor(), dry_run=True)
        removed = planned
        if not dry_run and planned != removal.Removed():
            ask(
                f"Remove {planned.instances} instances of {planned.studies} studies "
                f"({planned.instance_bytes / 1e9:.2f} GB) and {planned.reports} unsigned reports for good?",
                yes,
            )
            removed = removal.run(database, root, keep, actor=actor(), dry_run=False)
    facts = {
        "dry_run": dry_run,
        "pixels_days": keep.pixels_days,
        "drafts_days": keep.drafts_days,
        **{name: getattr(removed, name) for name in removed.__dataclass_fields__},
    }
    if as_json:
        print_json(facts)
    else:
        print_facts(facts)
    if dry_run:
        note("Nothing was removed.")
