"""Which images stand beside a text: those that the model saw when it wrote it, as long as the store has them."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sqlalchemy.orm import Session

from worker.core import model_inputs
from worker.core.records import Study


@dataclass(frozen=True)
class Images:
    """The model input that the viewer shows."""

    folder: str | None  # below the store; None while there is none
    of_the_text: bool  # it is what the text was drafted from: places and evidence of its sentences fit

    @property
    def name(self) -> str:
        """How the page asks for them; empty while there are none."""
        return PurePosixPath(self.folder).name if self.folder is not None else ""


def beside(session: Session, study: Study, revision: int, root: Path) -> Images:
    """The images for a text that was drafted in this revision of a study; `root` is the store.

    Where retention took that revision's, the study's newest stand in, and nothing of the text is shown on them.
    """
    own = model_inputs.of_revision(session, study, revision)
    if own is not None and (own == study.model_input or (root / own).is_dir()):
        return Images(own, True)
    return Images(study.model_input, False)
