"""The journey from files to volumes: read headers, choose, build, and fall back where a chosen series does not build."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from worker.core.errors import FinalError, GeometryError, InvalidObjectError, NothingToReportError, PixelDataError
from worker.imaging import folder, volume
from worker.imaging.headers import Header, Unreadable, read_headers
from worker.imaging.rules import ImagingRules
from worker.imaging.series import Cause, Choice, Verdict, choose
from worker.imaging.volume import Volume


@dataclass(frozen=True)
class StudyVolumes:
    """The volumes to report of one study, main one first, and what was decided about all its objects."""

    volumes: tuple[Volume, ...]
    verdicts: tuple[Verdict, ...]
    unreadable: tuple[Unreadable, ...]
    refusal: FinalError | None = None
    """Why there is no volume; None when there is one."""


@dataclass(frozen=True)
class Examination:
    """What the headers of a study tell, before any pixel is read."""

    headers: tuple[Header, ...]
    choice: Choice
    unreadable: tuple[Unreadable, ...]


def examine(paths: Iterable[Path | str], rules: ImagingRules) -> Examination:
    """Read the headers of a study's objects and choose.

    Raises PatientMismatchError, StoreUnavailableError.
    """
    return _examined(*read_headers(paths), rules)


def examine_folder(path: Path, rules: ImagingRules) -> Examination:
    """As `examine`, for every file below a plain folder that holds one study. Raises PatientMismatchError."""
    return _examined(*folder.read(path), rules)


def _examined(headers: list[Header], unreadable: list[Unreadable], rules: ImagingRules) -> Examination:
    return Examination(tuple(headers), choose(headers, rules), tuple(unreadable))


def build_study(paths: Iterable[Path | str], rules: ImagingRules) -> StudyVolumes:
    """From the stored objects of one study to its volumes.

    Raises NothingToReportError, GeometryError, PixelDataError or InvalidObjectError when no volume can be had,
    PatientMismatchError when the objects are of two patients, StoreUnavailableError when a file cannot be read,
    InsufficientMemoryError.
    """
    return build_examined(examine(paths, rules), rules)


def build_examined(examination: Examination, rules: ImagingRules) -> StudyVolumes:
    """As `build_study`, from headers already read."""
    found = assemble(examination, rules)
    if found.refusal is not None:
        raise found.refusal
    return found


def assemble(examination: Examination, rules: ImagingRules) -> StudyVolumes:
    """Build the chosen stacks; where one does not build, the next best takes its place and the verdicts say so.

    A study that gives no volume comes back with its refusal, so that the verdicts are there too.

    Raises StoreUnavailableError, InsufficientMemoryError.
    """
    choice = examination.choice
    refused: dict[str, tuple[Cause, str]] = {}
    built: dict[str, Volume] = {}
    while waiting := [stack for stack in choice.selected if stack.key not in built]:
        stack = waiting[0]
        try:
            built[stack.key] = volume.build_stack(stack, rules)
        except GeometryError as error:
            refused[stack.key] = (Cause.GEOMETRY, str(error))
        except PixelDataError as error:
            refused[stack.key] = (Cause.PIXELS, str(error))
        choice = choose(examination.headers, rules, refused)
    volumes = tuple(built[stack.key] for stack in choice.selected)
    refusal = None if volumes else _refusal(choice, examination.unreadable)
    return StudyVolumes(volumes, choice.verdicts, examination.unreadable, refusal)


def _refusal(choice: Choice, unreadable: Sequence[Unreadable]) -> FinalError:
    """Why a study gives no volume. A damaged object may have been part of one, so with it the study fails."""
    refusal = choice.refusal()
    if unreadable and isinstance(refusal, NothingToReportError):
        return InvalidObjectError(
            f"Objects of the study that cannot be read: {len(unreadable)}. {unreadable[0].reason} {refusal}"
        )
    return refusal
