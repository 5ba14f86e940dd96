"""What an operator sees of the page: whether it is ready, what it counts, and that no person is in either."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
import sqlalchemy as sa
import uvicorn
from fastapi import FastAPI

from tests.review.builders import PASSWORD, Department, Reader, accept_all, card_ids
from worker.review import server as page_server
from worker.review.server import PageServer, serve_health


@dataclass(frozen=True)
class Served:
    """A running page and the port of its health."""

    page: str
    health: str

    def ready(self) -> tuple[int, dict[str, bool]]:
        """Status and answers of /readyz."""
        answer = httpx.get(f"{self.health}/readyz", timeout=10)
        return answer.status_code, answer.json()

    def metrics(self) -> str:
        """The figures as Prometheus reads them."""
        return httpx.get(f"{self.health}/metrics", timeout=10).text


@contextlib.contextmanager
def watched(here: Department, app: FastAPI | None = None) -> Iterator[Served]:
    """The page with its health on another port."""
    here.settings.store_root.mkdir(exist_ok=True)
    review = here.settings.review.model_copy(update={"metrics_port": 0})
    server = PageServer(uvicorn.Config(app or here.app(), host="127.0.0.1", port=0, log_config=None))
    health = serve_health(here.settings.model_copy(update={"review": review}), here.database, server)
    thread = threading.Thread(target=server.run, daemon=True)
    try:
        thread.start()
        deadline = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < deadline, "the page did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Served(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{health.port}")
    finally:
        server.should_exit = True
        thread.join(timeout=15)
        health.close()


def test_page_is_ready_with_database_and_store(here: Department) -> None:
    with watched(here) as served:
        assert served.ready() == (200, {"database": True, "store": True, "page": True})


def test_page_is_not_ready_while_its_database_is_gone(here: Department) -> None:
    file = here.settings.home / "mu2.sqlite"
    with watched(here) as served:
        here.database.engine.dispose()
        file.rename(file.with_suffix(".away"))
        file.mkdir()
        assert served.ready() == (503, {"database": False, "store": True, "page": True})
        assert httpx.get(f"{served.health}/livez").status_code == 200
        file.rmdir()
        file.with_suffix(".away").rename(file)
        assert served.ready()[0] == 200


def test_page_is_not_ready_over_a_database_of_another_revision(here: Department) -> None:
    with watched(here) as served:
        with here.database.write() as session:
            session.execute(sa.text("UPDATE alembic_version SET version_num = '0001'"))
        assert served.ready() == (503, {"database": False, "store": True, "page": True})


def test_page_is_not_ready_without_the_store_that_it_shows_slices_from(here: Department) -> None:
    with watched(here) as served:
        here.settings.store_root.rmdir()
        assert served.ready() == (503, {"database": True, "store": False, "page": True})


def test_page_whose_event_loop_stands_still_is_not_alive(here: Department, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_server, "STALLED_SECONDS", 1.0)
    app, released = here.app(), threading.Event()

    async def stall() -> None:
        released.wait(30)

    app.add_api_route("/stall", stall)
    with watched(here, app) as served:
        asking = threading.Thread(target=httpx.get, args=(f"{served.page}/stall",), kwargs={"timeout": 60})
        asking.start()
        try:
            deadline = time.monotonic() + 20
            while httpx.get(f"{served.health}/livez").status_code == 200 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert httpx.get(f"{served.health}/livez").status_code == 503
            assert served.ready() == (503, {"database": True, "store": True, "page": False})
        finally:
            released.set()
            asking.join(timeout=60)


def test_requests_are_counted_by_template_and_no_person_or_id_is_in_the_figures(here: Department) -> None:
    study = here.drafted(patient_name="ZEBRASTRIPE^ANNA", accession="ZEBRASTRIPE-2", slices=2)
    with watched(here) as served, Reader(base_url=served.page) as client:
        client.log_in("reader")
        client.get(f"/studies/{study}")
        client.get(f"/studies/{study}/volumes/1/axial/1")
        client.get("/static/review.css")
        client.get("/ZEBRASTRIPE/secret")
        client.delete("/login")
        figures = served.metrics()
    counted = 'mu2_review_requests_total{method="%s",route="%s",status="%s"} 1.0'
    for facts in (
        ("POST", "/login", 303),
        ("GET", "/studies/{study_id}", 200),
        ("GET", "/studies/{study_id}/volumes/{number:int}/{plane}/{index:int}", 200),
        ("GET", "/static", 200),
        ("GET", "none", 404),
        ("other", "/login", 405),
    ):
        assert counted % facts in figures
    assert 'mu2_review_request_seconds_count{route="/studies/{study_id}"} 1.0' in figures
    assert [word for word in (study, "ZEBRASTRIPE", "reader", "Ada") if word in figures] == []


def test_a_signature_is_counted_once_and_a_refused_one_is_none(here: Department) -> None:
    study = here.drafted(slices=2)
    with watched(here) as served, Reader(base_url=served.page) as client:
        client.log_in("reader")
        revision = accept_all(client, study)
        assert client.act(f"/studies/{study}/sign", revision=revision, password="wrong").status_code == 409
        assert 'mu2_review_versions_total{state="final"}' not in served.metrics()
        assert client.act(f"/studies/{study}/sign", revision=revision, password=PASSWORD).status_code == 200
        assert 'mu2_review_versions_total{state="final"} 1.0' in served.metrics()


def test_an_edit_that_somebody_overtook_is_counted_as_a_conflict(here: Department) -> None:
    study = here.drafted(slices=2)
    with watched(here) as served, Reader(base_url=served.page) as one, Reader(base_url=served.page) as two:
        one.log_in("reader")
        two.log_in("second")
        card = card_ids(one.get(f"/studies/{study}").text)[0]
        path = f"/studies/{study}/sentences/{card}"
        one.act(path, act="edit", revision=1, text="The lungs are clear of disease.")
        assert "mu2_review_edit_conflicts_total 0.0" in served.metrics()
        two.act(path, act="edit", revision=1, text="The lungs are emphysematous.")
        assert "mu2_review_edit_conflicts_total 1.0" in served.metrics()


def test_figures_are_not_on_the_page_that_readers_reach(here: Department) -> None:
    with watched(here) as served:
        assert [httpx.get(served.page + path).status_code for path in ("/metrics", "/readyz")] == [404, 404]


def test_pages_that_listen_are_counted(here: Department) -> None:
    with watched(here) as served, Reader(base_url=served.page) as client:
        client.log_in("reader")
        assert "mu2_review_live_pages 0.0" in served.metrics()
        with client.stream("GET", "/events") as stream:
            lines = stream.iter_lines()  # the stream ends with it
            next(lines)
            assert "mu2_review_live_pages 1.0" in served.metrics()
