"""`python -m training`: one command for each step from phantoms to a trained model."""

import sys

import typer

from training.errors import TrainingError
from training.phantoms.command import phantoms

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Make data, train and evaluate μ²LLM.")
app.command()(phantoms)


@app.callback()
def training() -> None:
    """Make data, train and evaluate μ²LLM."""


def mount() -> None:
    """Add the commands that need torch."""
    from training import (
        ablate,
        commands,
        contrast,
        evaluation_commands,
        floors_command,
        novelty,
        phantom_model,
        ship,
        smoke,
        synthesize_command,
        tokenizer_stage,
    )

    commands.mount(app)
    evaluation_commands.mount(app)
    app.command()(contrast.contrast)
    app.command()(tokenizer_stage.tokenizer)
    app.command()(floors_command.floors)
    app.command()(novelty.novelty)
    app.command()(ship.ship)
    app.command()(smoke.smoke)
    app.command("mu2-phantom")(phantom_model.mu2_phantom)
    app.command()(ablate.ablate)
    app.command()(synthesize_command.synthesize)


def main() -> None:
    """Run the command; what its user can mend ends it with one line and exit status 1.

    `phantoms` needs no torch, so it does not wait for it.
    """
    if sys.argv[1:2] == ["phantoms"]:
        app()
        return
    mount()
    from mu2_model.errors import Mu2ModelError

    try:
        app()
    except (TrainingError, Mu2ModelError) as error:
        sys.exit(f"python -m training: {error}")


if __name__ == "__main__":
    main()
