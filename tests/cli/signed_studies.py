"""Studies as a hospital leaves them: drafted by a model, signed by a radiologist, with the volumes they were drafted from."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.core import builders
from worker.core import consents, records, reports, studies
from worker.core.consents import Decision
from worker.core.database import Database
from worker.core.records import AuthorKind, ReportVersion, Signature, User, new_id
from worker.core.report import Assessment, ReportState, Section, Sentence
from worker.imaging import stored
from worker.imaging.volume import Volume

AFFINE = np.array([[0, 0, -4.0, 70], [0, -4.0, 0, 70], [4.0, 0, 0, 0], [0, 0, 0, 1]])
CHEST = (("chest",),)


def ct(seed: int, slices: int = 12, regions: tuple[str, ...] = ("chest",)) -> Volume:
    """A body of soft tissue in air, noisy, with a mark on one side."""
    rng = np.random.default_rng(seed)
    _, row, column = np.meshgrid(np.arange(slices), np.arange(36), np.arange(36), indexing="ij")
    hu = np.where((row - 18) ** 2 + (column - 18) ** 2 < 15**2, 40, -1000) + rng.integers(-20, 20, row.shape)
    hu[4:6, 16:20, 8:12] = 300
    return Volume(hu.astype(np.float32), AFFINE, None, regions=regions)


def sentence(text: str, section: Section = Section.FINDINGS, region: str = "", **changes: object) -> Sentence:
    """A sentence that the reader accepted."""
    return replace(Sentence(section, text, assessment=Assessment.ACCEPTED, region=region), **changes)


class Archive:
    """A database and the store beside it."""

    def __init__(self, database: Database, store: Path) -> None:
        self.database, self.store = database, store

    def drafted(
        self, draft: Sequence[Sentence], volumes: Sequence[Volume], trained_on: str = "patients", **changes: object
    ) -> str:
        """The id of a drafted study whose model input lies in the store."""
        text = reports.Draft(tuple(draft), replace(builders.draft().provenance, decoding={"trained_on": trained_on}))
        claim = builders.drafting(self.database, **changes)
        folder = f"inputs/{claim.study_id[:2]}/{claim.study_id}"
        (self.store / folder).mkdir(parents=True)
        for number, volume in enumerate(volumes, start=1):
            stored.save(volume, self.store / folder / f"volume-{number:02d}.npz")
        with self.database.write() as session:
            study = studies.held(session, claim)
            assert study is not None
            study.choice = {"series": [], "volumes": [{"regions": list(volume.regions)} for volume in volumes]}
            study.model_input = folder
            reports.add_draft(session, study, text)
            studies.mark_drafted(session, study, claim)
        return claim.study_id

    def sign(self, study_id: str, text: Sequence[Sentence], state: ReportState = ReportState.FINAL) -> None:
        """A version that a person signed."""
        with self.database.write() as session:
            report = session.get_one(records.Study, study_id).report
            assert report is not None
            user = User(
                id=new_id(),
                username=f"reader-{new_id()}",
                family_name="Canaryreader",
                role=records.Role.RADIOLOGIST,
                created_at=studies.now(),
            )
            session.add(user)
            session.flush()
            version = reports.add_version(
                session,
                report,
                state=state,
                sentences=text,
                study_revision=report.study.revision,
                author_kind=AuthorKind.PERSON,
                author_id=user.id,
            )
            report.state = state
            builders.prove(session, user.id, version.id)
            signature = Signature(id=new_id(), version_id=version.id, text_sha256=version.text_sha256, user_id=user.id)
            signature.signed_at = studies.now()
            session.add(signature)

    def retract(self, study_id: str) -> None:
        """A version that withdraws the signed one."""
        with self.database.write() as session:
            report = session.get_one(records.Study, study_id).report
            assert report is not None
            report.state = ReportState.RETRACTED
            session.add(
                ReportVersion(
                    id=new_id(),
                    report_id=report.id,
                    number=len(report.versions) + 1,
                    study_revision=report.study.revision,
                    state=ReportState.RETRACTED,
                    author_kind=AuthorKind.PERSON,
                    created_at=studies.now(),
                    status_time=studies.now(),
                    text_sha256="0" * 64,
                )
            )

    def decide(self, study_id: str, decision: Decision = Decision.GIVEN) -> None:
        """Consent, or its refusal."""
        with self.database.write() as session:
            consents.record(session, study_id, decision, actor="test")

    def signed(self, seed: int, drafted: str, signed: str, **changes: object) -> str:
        """A study of one chest volume, drafted in one sentence, signed in another, with consent."""
        study_id = self.drafted([Sentence(Section.FINDINGS, drafted)], [ct(seed)], **changes)
        self.sign(study_id, [sentence(signed)])
        self.decide(study_id)
        return study_id
