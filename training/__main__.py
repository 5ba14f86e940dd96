"""`python -m training`: one command for each step from phantoms to a trained model."""

import typer

from training.phantoms.command import phantoms

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Make data, train and evaluate μ²LLM.")
app.command()(phantoms)


@app.callback()
def training() -> None:
    """Make data, train and evaluate μ²LLM."""


if __name__ == "__main__":
    app()
