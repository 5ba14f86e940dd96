"""From studies and signed reports to what `python -m training` reads: volumes, a manifest and preference pairs.

The loop from a radiologist's corrections to the next checkpoint: what was signed is the answer to learn, and where a model
had drafted other words those are the rejected side of a pair. Which studies may leave is decided by `core.corrections`;
here their ids become pseudonyms, their texts lose what points to a person, and every one that leaves is audited first.

A second run into the same folder adds what is new and takes out what may not be used any more.
"""

import hashlib
import hmac
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from training.data import MANIFEST, Case, split_by_patient, write_manifest
from training.deidentify import deidentify
from worker.core import audit, corrections
from worker.core.corrections import LeftOut, SignedStudy
from worker.core.database import Database
from worker.core.errors import InvalidObjectError, SettingsError, StateError, StoreUnavailableError
from worker.core.report import Assessment, Section, Sentence
from worker.core.settings import Settings
from worker.imaging import nifti, stored
from worker.imaging.volume import Volume
from worker.inference.reporter import Question, questions

PAIRS = "pairs.jsonl"
IMAGES = "images"
RECORD = "export.json"
IMAGE_ENDING = ".nii.gz"
SOURCE = "hospital"
PSEUDONYM_CHARACTERS = 24  # 96 bits
SENTENCE_ENDS = (".", "!", "?")


class NotUsable(StrEnum):
    """Why a signed report that may leave gives no case."""

    PIXELS_GONE = "retention took the pixels before an export"
    DAMAGED = "its stored volume cannot be read: requeue the study"
    REGIONLESS = "several regions were asked about and a signed sentence belongs to none of them"
    NO_TEXT = "no signed text about a volume"


@dataclass(frozen=True)
class Shares:
    """The shares of patients whose studies are kept from training."""

    validation: float = 0.1
    test: float = 0.1


@dataclass(frozen=True)
class Exported:
    """What left, or would, and what did not, by reason."""

    studies: int
    patients: int
    cases: int
    pairs: int
    texts_changed: int  # by de-identification: the ones to look at first
    images_removed: int  # of an earlier export into the same folder
    left_out: dict[str, int]


@dataclass(frozen=True)
class Pseudonyms:
    """Names that only who holds the key can make again: HMAC-SHA256, shortened."""

    key: str

    def of(self, *parts: str | int) -> str:
        """The pseudonym of what these parts name."""
        text = "\0".join(map(str, parts))
        return hmac.new(self.key.encode(), text.encode(), hashlib.sha256).hexdigest()[:PSEUDONYM_CHARACTERS]


@dataclass
class _Rows:
    """What the files will hold."""

    cases: list[Case] = field(default_factory=list)
    pairs: list[dict[str, str]] = field(default_factory=list)
    studies: int = 0
    texts_changed: int = 0


@dataclass(frozen=True)
class _Answer:
    """One question of a study with the signed answer and, where a model gave another one, the drafted."""

    question: Question
    signed: str
    drafted: str | None
    changed: int  # texts that de-identification changed


class TrainingExport:
    """One run of `mu2 study export-training` into a folder."""

    def __init__(self, settings: Settings, database: Database, out: Path, shares: Shares, actor: str):
        """Raises `SettingsError` unless the site opted in, `StateError` when the folder is not this export's own."""
        if not settings.training.export:
            raise SettingsError(
                "no study may leave for training here: set MU2_TRAINING__EXPORT=true and MU2_TRAINING__PSEUDONYM_KEY "
                "where the hospital allows it"
            )
        self.settings, self.database, self.out, self.shares, self.actor = settings, database, out, shares, actor
        self.pseudonyms = Pseudonyms(settings.training.pseudonym_key.get_secret_value())
        self._require_own_folder()
        with database.read() as session:
            self.readers = corrections.reader_names(session)
            self.study_ids = corrections.signed_ids(session)

    def run(self, dry_run: bool = False, progress: Callable[[], None] = lambda: None) -> Exported:
        """Writes images, manifest and pairs; with `dry_run` only counts. Raises `StoreUnavailableError`."""
        rows, left_out = _Rows(), Counter[str]()
        if not dry_run:
            self._make_folder()
        for study_id in self.study_ids:
            reason = self._study(study_id, rows, dry_run)
            if reason is not None:
                left_out[reason.value] += 1
            progress()
        removed = 0 if dry_run else self._write(rows)
        return Exported(
            studies=rows.studies,
            patients=len({case.patient_id for case in rows.cases}),
            cases=len(rows.cases),
            pairs=len(rows.pairs),
            texts_changed=rows.texts_changed,
            images_removed=removed,
            left_out=dict(left_out),
        )

    def _study(self, study_id: str, rows: _Rows, dry_run: bool) -> LeftOut | NotUsable | None:
        with self.database.read() as session:
            found = corrections.look(session, study_id)
        if isinstance(found, LeftOut):
            return found
        answers = self._answers(found)
        if isinstance(answers, NotUsable):
            return answers
        volumes = self._volumes(found, answers)
        if isinstance(volumes, NotUsable):
            return volumes
        if not dry_run:
            refused = self.database.run(lambda session: self._release(session, found, len(answers)))
            if refused is not None:
                return refused
            for path, volume in volumes.items():
                nifti.write(volume, path)
        self._note(found, answers, rows)
        return None

    def _release(self, session: Session, found: SignedStudy, cases: int) -> LeftOut | None:
        """Audits the study that leaves, unless its consent or its report changed since it was looked at."""
        now = corrections.look(session, found.study_id)
        if isinstance(now, LeftOut):
            return now
        if now.signed != found.signed or now.revision != found.revision:
            return LeftOut.OTHER_IMAGES
        audit.append(
            session,
            "training_export",
            actor=self.actor,
            study_id=found.study_id,
            revision=found.revision,
            cases=cases,
        )
        return None

    def _answers(self, found: SignedStudy) -> list[_Answer] | NotUsable:
        shown = [_Shown(regions) for regions in found.regions]
        asked = questions(shown, self.settings.model)
        several = len(asked) > 1
        regions = {question.region for question in asked}
        if several and any(s.region not in regions for s in found.signed if s.assessment is not Assessment.REJECTED):
            return NotUsable.REGIONLESS
        names = (*found.names, *self.readers)
        answers = []
        for question in asked:
            signed = report_text(s for s in found.signed if not several or s.region == question.region)
            drafted = report_text(s for s in found.draft or () if not several or s.region == question.region)
            if not signed:
                continue
            clean_signed, clean_drafted = deidentify(signed, names), deidentify(drafted, names)
            differs = bool(clean_drafted) and clean_drafted.split() != clean_signed.split()
            changed = (clean_signed != signed) + (differs and clean_drafted != drafted)
            answers.append(_Answer(question, clean_signed, clean_drafted if differs else None, changed))
        return answers or NotUsable.NO_TEXT

    def _image(self, found: SignedStudy, volume: int) -> Path:
        name = self.pseudonyms.of("image", found.study_id, found.revision, volume)
        return self.out / IMAGES / f"{name}{IMAGE_ENDING}"

    def _volumes(self, found: SignedStudy, answers: list[_Answer]) -> dict[Path, Volume] | NotUsable:
        """The volumes that the folder does not hold yet."""
        wanted = {answer.question.volume: self._image(found, answer.question.volume) for answer in answers}
        missing = {number: path for number, path in wanted.items() if not path.is_file()}
        if not missing:
            return {}
        if found.model_input is None:
            return NotUsable.PIXELS_GONE
        paths = sorted((self.settings.store_root / found.model_input).glob("volume-*.npz"))
        if len(paths) != len(found.regions):
            return NotUsable.PIXELS_GONE
        try:
            return {path: stored.load(paths[number]) for number, path in missing.items()}
        except InvalidObjectError:
            return NotUsable.DAMAGED

    def _note(self, found: SignedStudy, answers: list[_Answer], rows: _Rows) -> None:
        patient = self.pseudonyms.of("patient", found.patient)
        study = self.pseudonyms.of("study", found.study_id)
        split = split_by_patient(patient, self.shares.validation, self.shares.test)
        for number, answer in enumerate(answers, start=1):
            image = str(self._image(found, answer.question.volume).relative_to(self.out))
            case_id = f"{study}-{number}"
            question = answer.question.text
            rows.cases.append(Case(case_id, image, question, answer.signed, split, patient, study, SOURCE))
            # Pairs of patients that evaluation or the choice of a checkpoint rests on would leak into DPO.
            if answer.drafted is not None and split == "train":
                pair = {"case_id": case_id, "image": image, "question": question, "source": SOURCE}
                rows.pairs.append({**pair, "chosen": answer.signed, "rejected": answer.drafted})
            rows.texts_changed += answer.changed
        rows.studies += 1

    def _require_own_folder(self) -> None:
        record = self.out / RECORD
        if not record.is_file():
            if self.out.exists() and (not self.out.is_dir() or _holds_something(self.out)):
                raise StateError("the folder is not empty and holds no earlier export; name a new one")
            return
        key, shares = _read_record(record)
        if key != self.pseudonyms.of("key"):
            raise StateError("the export in this folder was made with another pseudonym key; name a new folder")
        if shares != vars(self.shares):
            raise StateError(
                f"the export in this folder was split by other shares {shares}: patients would move between "
                "training and test; name the same shares or a new folder"
            )

    def _make_folder(self) -> None:
        try:
            self.out.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Before anything else: a folder without it is nobody's, and the next run would not touch it.
            _write_lines(self.out / RECORD, [{"key": self.pseudonyms.of("key"), "shares": vars(self.shares)}])
            (self.out / IMAGES).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise _unwritable(error) from error

    def _write(self, rows: _Rows) -> int:
        """Writes both files, then removes the images that no case names; returns how many."""
        try:
            write_manifest(rows.cases, self.out / MANIFEST)
            _write_lines(self.out / PAIRS, rows.pairs)
            named = {Path(case.image).name for case in rows.cases}
            stale = [path for path in (self.out / IMAGES).glob(f"*{IMAGE_ENDING}") if path.name not in named]
            for path in stale:
                path.unlink()
        except OSError as error:
            raise _unwritable(error) from error
        return len(stale)


def _holds_something(folder: Path) -> bool:
    """Whether there is more in a folder than a record that a killed run had begun to write."""
    return any(path.name != _partial(folder / RECORD).name for path in folder.iterdir())


def _read_record(record: Path) -> tuple[str, dict[str, float]]:
    """Pseudonym of the key, and shares, of an earlier export; StateError when the file does not tell them."""
    try:
        told = json.loads(record.read_text(encoding="utf-8"))
        return told["key"], told["shares"]
    except (ValueError, KeyError, TypeError) as error:
        raise StateError(
            f"{RECORD} of the earlier export in this folder is damaged, so its key and shares are not known: "
            "name a new folder"
        ) from error


@dataclass(frozen=True)
class _Shown:
    regions: tuple[str, ...]


def report_text(sentences: Iterable[Sentence]) -> str:
    """Sentences as a model writes a report: a section's name and a colon, then its sentences; "" when there is none.

    A sentence without an end gets a line of its own, so that `mu2_model.report_text` reads the same sentences back.
    """
    parts = []
    told = [s for s in sentences if s.assessment is not Assessment.REJECTED]
    for section in Section:
        texts = [s.text for s in told if s.section is section]
        if texts:
            parts.append(f"{section.value.upper()}:\n" + _joined(texts))
    return "\n".join(parts)


def _joined(texts: list[str]) -> str:
    return "".join(text + (" " if text.endswith(SENTENCE_ENDS) else "\n") for text in texts).rstrip()


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One row a line, all or nothing."""
    partial = _partial(path)
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def _partial(path: Path) -> Path:
    return path.with_suffix(".partial")


def _unwritable(error: OSError) -> StoreUnavailableError:
    return StoreUnavailableError(f"the export cannot be written: {error.strerror or 'output error'}")
