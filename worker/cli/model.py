"""`mu2 model`: thin over `mu2_model`, which stands alone."""

import typer

app = typer.Typer(
    name="model", help="The model: look at it, convert weights, draft from one file.", no_args_is_help=True
)


@app.callback()
def model() -> None:
    """The model."""
