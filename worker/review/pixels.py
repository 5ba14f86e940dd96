"""Images for the viewer: which volumes there are, their slices, and where the model looked."""

from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Query, Request
from fastapi import Path as InPath
from fastapi.responses import JSONResponse, Response
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.routing import Route

from worker import queues
from worker.core import audit, editing, model_inputs, studies
from worker.core.errors import NotFoundError
from worker.core.records import Sentence
from worker.core.review_records import EvidenceRequest
from worker.imaging import heat
from worker.review import origins, slices
from worker.review.access import OfficeOf, QuietReaderLogin, ReaderLogin, admit_reader, cookie_name
from worker.review.desk import Office, office
from worker.review.slices import OpenVolume
from worker.review.study import find, find_report, report_side

router = APIRouter(prefix="/studies/{study_id}")
Input = Annotated[str, Query(alias="input", max_length=100)]  # the name of a model input
Index = Annotated[int, InPath(ge=0, le=100_000)]
KEEP_SECONDS = 1800  # in the browser's private cache; logging out clears it


@router.get("/volumes")
def describe(study_id: str, found: OfficeOf, login: QuietReaderLogin, wanted: Input = "") -> JSONResponse:
    """The volumes that the model saw, the main one first: those of the model input that the page names, else the newest.

    Raises what `_folder` raises.
    """
    described = []
    for number, path in enumerate(sorted(_folder(found, study_id, wanted).glob("volume-*.npz")), start=1):
        volume = slices.open_volume(path)
        label = ", ".join(volume.regions) or "CT"
        facts = {"number": number, "label": f"{number}: {label}", "input": path.parent.name}
        described.append(facts | volume.describe())
    return JSONResponse(described)


async def show_slice(request: Request) -> Response:
    """One slice: gzip-compressed int16 Hounsfield units, row by row.

    A reader scrolls: the look at session and study holds for `Looks.SECONDS` of this reader, study and volume. A page
    names the model input that it shows (`?input=`): when slices came late and the volume was made anew, neither the
    browser's cache nor this server mixes two volumes, and a text goes on standing beside its own. Raises what `_folder`,
    `OpenVolume.plane` and the access checks raise.
    """
    found, place = office(request), request.path_params
    study_id, number, plane, index = place["study_id"], place["number"], place["plane"], place["index"]
    if plane not in slices.PLANES:
        raise NotFoundError("a volume is cut axial, coronal or sagittal")
    cookie = request.cookies.get(cookie_name(found.settings.review), "")
    path = found.looks.get(cookie, study_id, number)
    wanted = request.query_params.get("input", "")
    if path is None or wanted not in {"", path.parent.name}:
        path = await run_in_threadpool(_look, found, request, study_id, number, wanted)
        found.looks.put(cookie, study_id, number, path)
    tag = f'"{path.parent.name}-{number}-{plane}-{index}"'
    headers = {"Cache-Control": f"private, max-age={KEEP_SECONDS}", "ETag": tag, "Vary": "Cookie"}
    if request.headers.get("If-None-Match") == tag:
        return Response(status_code=304, headers=headers)
    body = found.slices.peek(path, plane, index)
    if body is None:
        body = await run_in_threadpool(found.slices.get, path, plane, index)
    return Response(body, media_type="application/octet-stream", headers={**headers, "Content-Encoding": "gzip"})


SLICE_ROUTE = Route("/studies/{study_id}/volumes/{number:int}/{plane}/{index:int}", show_slice, methods=["GET"])
"""Plain and first of all routes: through FastAPI's routing a cached slice cost 0.50 ms of processor time, not 0.03."""


@router.post("/evidence")
def ask_for_evidence(study_id: str, found: OfficeOf, login: ReaderLogin, after: BackgroundTasks) -> Response:
    """Asks a worker to work out where the model looked, again after a refusal; the answer comes by a live update."""

    def work(session: Session) -> Response:
        report = find_report(session, study_id)
        copy = editing.current_copy(session, report.id)
        draft = origins.machine_version(session, copy.base if copy else editing.of_record(session, report.id))
        if draft is None:
            raise NotFoundError("this report has no draft of a machine")
        asked = session.get(EvidenceRequest, draft.id)
        if asked is None or asked.reason:
            if asked is None:
                asked = EvidenceRequest(version_id=draft.id)
                session.add(asked)
            asked.requested_by, asked.requested_at = login.user_id, studies.now()
            asked.done_at, asked.reason = None, ""
            session.flush()
            audit.append(session, "ask_evidence", actor=login.username, study_id=study_id, origin=login.origin)
        return report_side(session, found, login, study_id)

    response = found.database.run(work)
    after.add_task(found.ring, queues.DRAFT, study_id)
    return response


@router.get("/evidence/{sentence_id}")
def describe_evidence(study_id: str, sentence_id: str, found: OfficeOf, login: QuietReaderLogin) -> JSONResponse:
    """The slice where the evidence for a sentence is strongest, of which model input, and how faithful it is."""
    evidence, path = _evidence(found, study_id, sentence_id)
    volume = slices.open_volume(path)
    return JSONResponse(
        {
            "input": path.parent.name,
            "volume": evidence.volume,
            "slice": evidence.strongest_plane(volume.affine, volume.count("axial")),
            "faithfulness": evidence.faithfulness,
        }
    )


@router.get("/evidence/{sentence_id}/axial/{index}")
def show_evidence(study_id: str, sentence_id: str, index: Index, found: OfficeOf, login: QuietReaderLogin) -> Response:
    """Where the model looked on one axial slice: 128 x 128 bytes from 0 (nowhere) to 255."""
    evidence, path = _evidence(found, study_id, sentence_id)
    volume: OpenVolume = slices.open_volume(path)
    _, rows, columns = volume.hu.shape
    body = evidence.plane(volume.affine, index, (rows, columns))
    headers = {"Cache-Control": f"private, max-age={KEEP_SECONDS}", "Vary": "Cookie"}
    return Response(body.tobytes(), media_type="application/octet-stream", headers=headers)


def _look(found: Office, request: Request, study_id: str, number: int, wanted: str) -> Path:
    admit_reader(request, found)
    return _folder(found, study_id, wanted) / _file(number)


def _folder(found: Office, study_id: str, wanted: str) -> Path:
    """The study's model input of this name, else its newest; raises `NotFoundError` where the store has it no more."""
    with found.database.read() as session:
        study = find(session, study_id)
        folder = model_inputs.named(session, study, wanted) if wanted else study.model_input
        current = folder == study.model_input
    if folder is None and not wanted:
        raise NotFoundError("the study has no volume now")
    path = found.settings.store_root / (folder or "")
    if folder is None or not (current or path.is_dir()):
        raise NotFoundError("the volume was made anew; load the page again")
    return path


def _file(number: int) -> str:
    return f"volume-{number:02d}.npz"


def _evidence(found: Office, study_id: str, sentence_id: str) -> tuple[heat.Heat, Path]:
    """The evidence for a sentence and the volume that it was found in: they lie side by side."""
    with found.database.read() as session:
        study = find(session, study_id)
        row = session.get(Sentence, sentence_id)
        if row is None or row.version.report.study_id != study.id or row.evidence is None:
            raise NotFoundError("there is no evidence for this sentence")
        path = found.settings.store_root / row.evidence
    evidence = heat.load(path)
    return evidence, path.parent / _file(evidence.volume)
