"""A department of its own for each test: users, drafted studies with a synthetic volume, and a running page."""

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path

import httpx
import numpy as np
import sqlalchemy as sa
import uvicorn
from fastapi import FastAPI

from tests.core.builders import claimed, completed, destination
from worker.core import accounts, model_inputs, reports, studies
from worker.core.database import Database
from worker.core.records import Report, Role, Stage, User
from worker.core.report import Provenance, ReportState, Section, Sentence
from worker.core.settings import ReviewSettings, Settings
from worker.imaging import heat, stored
from worker.imaging.volume import Volume
from worker.review.app import create_app
from worker.review.server import PageServer

PASSWORD = "correct horse battery"
SENTENCES = (
    Sentence(Section.FINDINGS, "The lungs are clear.", confidence=-0.1, support=0.9),
    Sentence(Section.FINDINGS, "There is a 12 mm cyst in the left kidney.", confidence=-0.2, support=0.8),
    Sentence(Section.FINDINGS, "The liver is of normal size.", confidence=-1.4, support=0.02),
    Sentence(Section.IMPRESSION, "Simple cyst of the left kidney.", confidence=-0.2, support=0.7),
)


@dataclass
class Department:
    """What the tests of the page stand on."""

    database: Database
    settings: Settings
    rung: list[tuple[str, str]] = field(default_factory=list)

    def app(self) -> FastAPI:
        """The application; the queues are rung into `rung`."""
        return create_app(self.settings, self.database, lambda queue, subject: self.rung.append((queue, subject)))

    def rang(self, queue: str, subject: str) -> bool:
        """Whether a queue was rung; a bell rings shortly after its answer is out."""
        deadline = time.monotonic() + 30
        while (queue, subject) not in self.rung and time.monotonic() < deadline:
            time.sleep(0.01)
        return (queue, subject) in self.rung

    def user(self, username: str, role: Role, *, password: str | None = PASSWORD) -> User:
        """An account."""
        with self.database.write() as session:
            return accounts.add(
                session,
                username=username,
                role=role,
                password=password,
                family_name=username.capitalize(),
                given_name="Ada",
            )

    def drafted(
        self,
        *,
        sentences: tuple[Sentence, ...] = SENTENCES,
        slices: int = 24,
        size: int = 256,
        evidence: bool = False,
        model_version: str = "0.1",
        **changes: object,
    ) -> str:
        """The id of a study with a draft and its volume."""
        completed(self.database, **{"patient_name": "DOE^JANE", **changes})
        volume = phantom(slices, size)
        folder = self.prepared(volume)
        claim = claimed(self.database, Stage.DRAFT)
        with self.database.write() as session:
            study = studies.held(session, claim)
            assert study is not None
            study.patient_birth_date = date(1961, 4, 2)
            study.study_time = datetime(2026, 3, 31, 8, 15)
            study.description = str(changes.get("study_description", "CT chest and abdomen"))
            draft = reports.Draft(sentences, Provenance("mu2LLM", model_version, "0" * 64, "prompt"))
            version = reports.add_draft(session, study, draft)
            if evidence:
                hot = np.zeros((slices // 4, 8, 8), np.float32)
                hot[slices // 8, 3, 5] = 1.0
                grid = volume.affine @ np.diag([4.0, volume.hu.shape[1] / 8, volume.hu.shape[2] / 8, 1.0])
                heat.save(heat.Heat(hot, grid, 0.42), self.settings.store_root / folder / "heat.npz")
                version.sentences[1].evidence = f"{folder}/heat.npz"
            studies.mark_drafted(session, study, claim)
            return study.id

    def prepared(self, volume: Volume) -> str:
        """Prepares the study that is due; the folder of its model input, below the store."""
        prepare = claimed(self.database, Stage.PREPARE)
        folder = str(model_inputs.folder(prepare.study_id) / str(prepare.revision) / prepare.token)
        (self.settings.store_root / folder).mkdir(parents=True)
        stored.save(volume, self.settings.store_root / folder / "volume-01.npz")
        shown = {"regions": list(volume.regions), "repairs": [], "shape": list(volume.hu.shape)}
        with self.database.write() as session:
            studies.store_prepared(session, prepare, {"series": [], "volumes": [shown]}, folder)
        return folder

    def drafted_again(self, study_id: str, volume: Volume, sentences: tuple[Sentence, ...]) -> None:
        """A new revision: another volume, and another draft from it."""
        with self.database.write() as session:
            studies.requeue(session, study_id)
        self.prepared(volume)
        claim = claimed(self.database, Stage.DRAFT)
        with self.database.write() as session:
            study = studies.held(session, claim)
            assert study is not None
            reports.add_draft(session, study, reports.Draft(sentences, Provenance("mu2LLM", "0.2", "0" * 64, "prompt")))
            studies.mark_drafted(session, study, claim)


def department(database: Database, folder: Path, **review: object) -> Department:
    """A department whose reports go to one receiver."""
    settings = Settings(
        home=folder,
        review=ReviewSettings.model_validate({"port": 0, **review}),
        hl7={"destinations": (destination("ris", processing_id="T"),)},
    )
    return Department(database, settings)


def phantom(slices: int, size: int = 256) -> Volume:
    """A body with two lungs, a spine and a bright lesion on the patient's left; LPS-like order, foot to head."""
    rows, columns = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    hu = np.full((slices, size, size), -1000, np.float32)
    body = (columns / 0.85) ** 2 + (rows / 0.6) ** 2 < 1
    for index in range(slices):
        plane = hu[index]
        plane[body] = 45 + 8 * np.sin(index / 3)
        for side in (-1, 1):
            plane[((columns - side * 0.38) / 0.25) ** 2 + ((rows + 0.05) / 0.38) ** 2 < 1 - index / (2 * slices)] = -850
        plane[(columns / 0.1) ** 2 + ((rows - 0.4) / 0.1) ** 2 < 1] = 700
        plane[((columns - 0.5) / 0.06) ** 2 + ((rows - 0.3) / 0.06) ** 2 < 1] = 160
    rng = np.random.default_rng(1)
    hu += rng.integers(-15, 16, hu.shape).astype(np.float32)
    spacing = 360 / size
    affine = np.array(
        [[0, 0, -spacing, 180], [0, -spacing, 0, 180], [3, 0, 0, -600], [0, 0, 0, 1]], float
    )  # columns to the left, rows to the back, slices to the head
    return Volume(hu=np.round(hu), affine=affine, padding=None, regions=("chest", "abdomen"))


class Reader(httpx.Client):
    """A browser without a screen: cookies, and the CSRF token of the page it saw last."""

    csrf = ""

    def log_in(self, username: str, password: str = PASSWORD) -> httpx.Response:
        """Logs in by the form."""
        form = self.get("/login")
        token = form.text.split('name="token" value="')[1].split('"')[0]
        answer = self.post(
            "/login", data={"username": username, "password": password, "token": token}, follow_redirects=True
        )
        if 'name="csrf" content="' in answer.text:
            self.csrf = answer.text.split('name="csrf" content="')[1].split('"')[0]
        return answer

    def act(self, path: str, **data: object) -> httpx.Response:
        """A changing request as the page sends it."""
        return self.post(path, data=data, headers={"X-CSRF-Token": self.csrf, "HX-Request": "true"})


def card_ids(text: str) -> list[str]:
    """Ids of the sentences on a page."""
    return re.findall(r'<article class="sentence" id="card-([0-9a-f-]+)"', text)


def revision_of(text: str, card: str) -> str:
    """The revision that the page shows of a sentence."""
    found = re.search(rf'id="revision-{card}" value="(\d+)"', text)
    assert found is not None
    return found[1]


def copy_revision(text: str) -> str:
    """The text under work that a signature names."""
    found = re.search(r'id="copy-revision" value="([0-9a-f-]+/\d+)"', text)
    assert found is not None
    return found[1]


def version_of(text: str) -> str:
    """The signed version that an addendum or a retraction names."""
    found = re.search(r'name="version" value="(\d+)"', text)
    assert found is not None
    return found[1]


def accept_all(client: Reader, study_id: str) -> str:
    """Accepts every sentence; the copy's revision."""
    text = client.get(f"/studies/{study_id}").text
    for card in card_ids(text):
        text = client.act(f"/studies/{study_id}/sentences/{card}", act="accept", revision=1).text
    return copy_revision(text)


def state_of(here: Department, study_id: str) -> ReportState:
    """The report's state as it is now."""
    with here.database.read() as session:
        return session.scalars(sa.select(Report.state).where(Report.study_id == study_id)).one()


@contextlib.contextmanager
def served(app: FastAPI, port: int = 0) -> Iterator[str]:
    """The application on a loopback port, a free one or this, as the base address."""
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_config=None, timeout_graceful_shutdown=1)
    ours = hasattr(app.state, "office")
    server = PageServer(config) if ours else uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < deadline, "the page did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=15)
