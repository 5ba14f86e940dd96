"""Where the model inputs of a study lie: inputs/<2>/<study id>/<revision>/<token>/volume-<n>.npz below the store.

`<2>` is the first two characters of the study's id; the study's row names the last folder.
"""

from pathlib import Path


def folder(study_id: str) -> Path:
    """The folder of all revisions of a study's model input, relative to the store."""
    return Path("inputs", study_id[:2], study_id)
