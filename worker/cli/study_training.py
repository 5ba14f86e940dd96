"""`mu2 study consent` and `mu2 study export-training`: from signed reports to the next round of fine-tuning."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.terminal import DryRun, Json, actor, note, opened, print_facts, print_json, print_table

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


def consent(
    decision: Annotated[str, typer.Argument(metavar="given|refused", help="What was decided.")],
    study: Annotated[list[str], typer.Argument(metavar="STUDY...", help="Study ids, their beginnings, or UIDs.")],
    as_json: Json = False,
) -> None:
    """Records whether studies may be used in training. Audited; a later decision takes the place of an earlier one.

    Without a recorded consent no study is exported. What an earlier export holds leaves it when the export runs again.
    """
    from worker.core import consents, worklist

    try:
        decided = consents.Decision(decision)
    except ValueError:
        raise typer.BadParameter(f"a decision is one of {', '.join(consents.Decision)}") from None
    with opened() as (_, database):
        with database.read() as session:
            study_ids = [worklist.find(session, name).id for name in study]

        def record_all(session: "Session") -> None:
            for study_id in study_ids:
                consents.record(session, study_id, decided, actor=actor())

        database.run(record_all)
    if as_json:
        print_json([{"id": study_id, "training_consent": decided.value} for study_id in study_ids])
        return
    print_table(["study", "training consent"], [[study_id, decided.value] for study_id in study_ids])


def export_training(
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder, or one that an earlier export wrote.")],
    validation: Annotated[float, typer.Option(min=0, max=0.5, help="Share of patients kept for validation.")] = 0.1,
    test: Annotated[float, typer.Option(min=0, max=0.5, help="Share of patients kept for the test.")] = 0.1,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Writes signed reports with a recorded consent as training data: volumes, manifest, preference pairs. Audited.

    Needs MU2_TRAINING__EXPORT. Ids become pseudonyms, texts are de-identified by rules: read a sample before you use it.
    """
    from worker.cli.training_export import Shares, TrainingExport

    with opened() as (settings, database):
        export = TrainingExport(settings, database, out, Shares(validation, test), actor())
        with typer.progressbar(
            length=len(export.study_ids), label="studies", file=sys.stderr, hidden=not sys.stderr.isatty()
        ) as bar:
            exported = export.run(dry_run, lambda: bar.update(1))
    facts = {"dry_run": dry_run, **{name: getattr(exported, name) for name in exported.__dataclass_fields__}}
    if as_json:
        print_json(facts)
        return
    print_facts({name: value for name, value in facts.items() if name != "left_out"})
    for reason, count in exported.left_out.items():
        print(f"left out {count}: {reason}")
    if dry_run:
        note("Nothing was written.")
    elif exported.cases:
        note(f"Next: python -m training check --data {out}, and read a sample of the {exported.texts_changed} texts.")
