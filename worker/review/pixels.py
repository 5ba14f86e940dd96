"""Images for the viewer: which volumes there are, their slices, and where the model looked."""

from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Request
from fastapi import Path as InPath
from fastapi.responses import JSONResponse, Response
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.routing import Route

from worker import queues
from worker.core import audit, editing, studies
from worker.core.errors import NotFoundError
from worker.core.records import Sentence, Study
from worker.core.review_records import EvidenceRequest
from worker.imaging import heat
from worker.review import origins, slices
from worker.review.access import OfficeOf, QuietReaderLogin, ReaderLogin, admit_reader, cookie_name
from worker.review.desk import Office, office
from worker.review.slices import OpenVolume
from worker.review.study import find, find_report, report_side

router = APIRouter(prefix="/studies/{study_id}")
Index = Annotated[int, InPath(ge=0, le=100_000)]
KEEP_SECONDS = 1800  # in the browser's private cache; logging out clears it


@router.get("/volumes")
def describe(study_id: str, found: OfficeOf, login: QuietReaderLogin) -> JSONResponse:
    """The volumes that the model saw, the main one first."""
    with found.database.read() as session:
        study = find(session, study_id)
    facts = (study.choice or {}).get("volumes", [])
    described = []
    for number, path in enumerate(_paths(found, study), start=1):
        fact = facts[number - 1] if number <= len(facts) else {}
        label = ", ".join(fact.get("regions", [])) or "CT"
        described.append(
            {
                "number": number,
                "label": f"{number}: {label}",
                "repairs": fact.get("repairs", []),
                "input": path.parent.name,
                **slices.open_volume(path).describe(),
            }
        )
    return JSONResponse(described)


async def show_slice(request: Request) -> Response:
    """One slice: gzip-compressed int16 Hounsfield units, row by row.

    A reader scrolls: the look at session and study holds for `Looks.SECONDS` of this reader, study and volume. A page
    names the model input that it shows (`?input=`): when slices came late and the volume was made anew, neither the
    browser's cache nor this server mixes two volumes. Raises what `find`, `OpenVolume.plane` and the access checks raise.
    """
    found, place = office(request), request.path_params
    study_id, number, plane, index = place["study_id"], place["number"], place["plane"], place["index"]
    if plane not in slices.PLANES:
        raise NotFoundError("a volume is cut axial, coronal or sagittal")
    cookie = request.cookies.get(cookie_name(found.settings.review), "")
    path = found.looks.get(cookie, study_id, number)
    wanted = request.query_params.get("input", "")
    if path is None or wanted not in {"", path.parent.name}:
        path = await run_in_threadpool(_look, found, request, study_id, number)
        found.looks.put(cookie, study_id, number, path)
    if wanted not in {"", path.parent.name}:
        raise NotFoundError("the volume was made anew; load the page again")
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
    """The slice where the evidence for a sentence is strongest, and how faithful it is."""
    evidence, path = _evidence(found, study_id, sentence_id)
    volume = slices.open_volume(path)
    return JSONResponse(
        {
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


def _look(found: Office, request: Request, study_id: str, number: int) -> Path:
    admit_reader(request, found)
    return _path(found, study_id, number)


def _path(found: Office, study_id: str, number: int) -> Path:
    with found.database.read() as session:
        study = find(session, study_id)
    if study.model_input is None:
        raise NotFoundError("the study has no volume now")
    return found.settings.store_root / study.model_input / f"volume-{number:02d}.npz"


def _paths(found: Office, study: Study) -> list[Path]:
    if study.model_input is None:
        return []
    return sorted((found.settings.store_root / study.model_input).glob("volume-*.npz"))


def _evidence(found: Office, study_id: str, sentence_id: str) -> tuple[heat.Heat, Path]:
    with found.database.read() as session:
        study = find(session, study_id)
        row = session.get(Sentence, sentence_id)
        if row is None or row.version.report.study_id != study.id or row.evidence is None:
            raise NotFoundError("there is no evidence for this sentence")
        stored = row.evidence
    evidence = heat.load(found.settings.store_root / stored)
    return evidence, _path(found, study_id, evidence.volume)
