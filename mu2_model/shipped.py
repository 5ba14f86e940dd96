"""The checkpoint that comes with the package: mu2-phantom, trained on synthetic CTs alone."""

from pathlib import Path

from mu2_model.errors import CheckpointError

FOLDER = Path(__file__).parent / "checkpoints" / "mu2-phantom"


def is_shipped() -> bool:
    """Whether this installation holds it."""
    return (FOLDER / "config.json").is_file()


def shipped_checkpoint() -> Path:
    """The folder of mu2-phantom; CheckpointError when this installation came without it."""
    if not is_shipped():
        raise CheckpointError(
            f"mu2-phantom is not in this installation ({FOLDER} holds no config.json): name a checkpoint folder, or make it "
            "with `python -m training mu2-phantom`"
        )
    return FOLDER
