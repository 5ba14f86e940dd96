"""Where the model inputs of a study lie: inputs/<2>/<study id>/<revision>/<token>/volume-<n>.npz below the store.

`<2>` is the first two characters of the study's id; the study's row names the last folder. The inputs of earlier revisions
stay beside it until retention takes the study's pixels: a text that was drafted from one is read beside that one.
"""

import uuid
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.orm import Session

from worker.core.records import Attempt, AttemptOutcome, Stage, Study


def folder(study_id: str) -> Path:
    """The folder of all revisions of a study's model input, relative to the store."""
    return Path("inputs", study_id[:2], study_id)


def of_revision(session: Session, study: Study, revision: int) -> str | None:
    """The folder, below the store, of what was prepared in a revision; None when nothing was. Its files may be gone."""
    if revision == study.revision and study.model_input is not None:
        return study.model_input
    made = _made(study).where(Attempt.revision == revision).order_by(Attempt.started_at.desc()).limit(1)
    return _folder_of(session.scalars(made).one_or_none())


def named(session: Session, study: Study, name: str) -> str | None:
    """The folder, below the store, of the study's model input whose last folder has this name; None when none has."""
    if study.model_input is not None and Path(study.model_input).name == name:
        return study.model_input
    try:
        token = str(uuid.UUID(name))
    except ValueError:
        return None
    return _folder_of(session.scalars(_made(study).where(Attempt.token == token)).one_or_none())


def _made(study: Study) -> sa.Select[Attempt]:
    return sa.select(Attempt).where(
        Attempt.study_id == study.id, Attempt.stage == Stage.PREPARE, Attempt.outcome == AttemptOutcome.DONE
    )


def _folder_of(made: Attempt | None) -> str | None:
    return None if made is None else str(folder(made.study_id) / str(made.revision) / made.token)
