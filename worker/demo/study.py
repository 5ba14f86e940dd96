"""The default study of the demo, and what is known to be true of a synthetic study."""

from pathlib import Path

FOLDER = Path(__file__).parent / "study"
TRUTH_NAME = "truth.json"


def truth(folder: Path) -> list[str]:
    """Sentences that hold of the study in `folder` because it was made so; empty for any other study."""
    return []
