"""Live updates for one open page, and the sign that somebody has a study open."""

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from worker.review.access import OfficeOf, QuietReaderLogin
from worker.review.desk import Office
from worker.review.study import find, see

router = APIRouter()


@router.get("/events")
async def listen(
    request: Request,
    found: OfficeOf,
    login: QuietReaderLogin,
    study: Annotated[str | None, Query(max_length=36)] = None,
) -> StreamingResponse:
    """Server-sent events without patient data: `worklist` and, for the study that is shown, `study`."""
    if study is not None:
        await run_in_threadpool(_require_study, found, study)
    return StreamingResponse(
        found.hub.events(study),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


@router.post("/studies/{study_id}/present", status_code=204)
def present(study_id: str, found: OfficeOf, login: QuietReaderLogin) -> Response:
    """Says that the page of this study is still open."""
    found.database.run(lambda session: see(session, find(session, study_id).id, login.user_id))
    return Response(status_code=204)


def _require_study(found: Office, study_id: str) -> None:
    with found.database.read() as session:
        find(session, study_id)
