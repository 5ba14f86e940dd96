"""Who gets in where: every route without a session, with each role, with another's token, with crafted ids."""

import re
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from itertools import product
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from starlette.routing import Route

from tests.review.builders import PASSWORD, Department, Reader
from worker.core import accounts, audit, studies
from worker.core.records import AuditEvent, Role, User
from worker.core.review_records import WebSession
from worker.review.slices import Looks

OPEN = {"/livez", "/login", "/static/htmx.js", "/oidc/login", "/oidc/callback"}
BY_SESSION_ALONE = {"/unlock", "/oidc/unlock"}  # they check the session themselves, because it is locked
READS = {Role.RADIOLOGIST, Role.VIEWER}
WRITES = {Role.RADIOLOGIST}
RUNS = {Role.ADMIN}
WATCHES = {Role.ADMIN, Role.AUDITOR}
STUDY = "/studies/{study_id}"
RULES: dict[str, set[Role]] = {
    "GET /": READS,
    "GET /events": READS,
    "GET /worklist/next": READS,
    "GET /worklist/rows": READS,
    "POST /worklist/search": READS,
    f"GET {STUDY}": READS,
    f"GET {STUDY}/print": READS,
    f"GET {STUDY}/report": READS,
    f"GET {STUDY}/report.pdf": READS,
    f"GET {STUDY}/volumes": READS,
    f"GET {STUDY}/volumes/{{number:int}}/{{plane}}/{{index:int}}": READS,
    f"GET {STUDY}/evidence/{{sentence_id}}": READS,
    f"GET {STUDY}/evidence/{{sentence_id}}/axial/{{index}}": READS,
    f"POST {STUDY}/evidence": READS,
    f"POST {STUDY}/present": READS,
    f"POST {STUDY}/accept-all": WRITES,
    f"POST {STUDY}/addend": WRITES,
    f"POST {STUDY}/communications": WRITES,
    f"POST {STUDY}/conflicts/{{edit_id}}": WRITES,
    f"POST {STUDY}/correct": WRITES,
    f"POST {STUDY}/leave-correction": WRITES,
    f"POST {STUDY}/preliminary": WRITES,
    f"POST {STUDY}/regenerate": WRITES,
    f"POST {STUDY}/reject": WRITES,
    f"POST {STUDY}/retract": WRITES,
    f"POST {STUDY}/sentences": WRITES,
    f"POST {STUDY}/sentences/{{sentence_id}}": WRITES,
    f"POST {STUDY}/sign": WRITES,
    f"POST {STUDY}/sign-correction": WRITES,
    f"POST {STUDY}/start-over": WRITES,
    "POST /oidc/prove/{study_id}": WRITES,
    "GET /admin/queue": RUNS,
    "GET /admin/messages": RUNS,
    "GET /admin/messages/{number}": RUNS,
    "GET /admin/users": RUNS,
    "POST /admin/queue/{study_id}/requeue": RUNS,
    "POST /admin/messages/{number}/renew": RUNS,
    "POST /admin/messages/{number}/resend": RUNS,
    "POST /admin/users": RUNS,
    "POST /admin/users/{user_id}/{change}": RUNS,
    "GET /admin/audit": WATCHES,
    "GET /admin/quality": WATCHES,
    "POST /admin/audit/verify": WATCHES,
    "POST /active": set(Role),
    "POST /lock": set(Role),
    "POST /logout": set(Role),
}
ENDS = {"/lock", "/logout"}  # after them the session answers nothing
USERS = {Role.RADIOLOGIST: "reader", Role.VIEWER: "viewer", Role.ADMIN: "boss", Role.AUDITOR: "auditor"}
SECRET = "ZEBRASTRIPE"


def routes(here: Department) -> list[tuple[str, str]]:
    """(method, path) of every route of the application."""
    found = []
    pending: list[Any] = list(here.app().routes)
    while pending:
        route = pending.pop()
        pending.extend(getattr(route, "routes", None) or getattr(getattr(route, "original_router", None), "routes", []))
        if isinstance(route, Route) and route.methods:
            found += [(method, route.path) for method in sorted(route.methods)]
    return sorted(set(found))


def allowed(method: str, path: str) -> set[Role]:
    """The roles that may use a route; raises `KeyError` for one without a rule."""
    return RULES[f"{'GET' if method == 'HEAD' else method} {path}"]


def filled(path: str, study_id: str) -> str:
    """The path with ids in it."""
    values = {
        "study_id": study_id, "sentence_id": str(uuid.uuid4()), "number": "1", "plane": "axial", "index": "1",
        "edit_id": "1", "user_id": str(uuid.uuid4()), "change": "disable",
    }  # fmt: skip
    return re.sub(r"\{(\w+)[^}]*\}", lambda m: values[m[1]], path)


@pytest.fixture
def study_id(here: Department) -> str:
    """A study of a patient whose name must not come out."""
    return here.drafted(
        patient_name=f"{SECRET}^ANNA", patient_identifier=f"{SECRET}-1", accession=f"{SECRET}-2", slices=2
    )


@pytest.fixture
def stranger(page: str) -> Iterator[httpx.Client]:
    """Somebody without a session."""
    with httpx.Client(base_url=page) as client:
        yield client


def test_every_route_has_its_rule_and_every_rule_its_route(here: Department) -> None:
    found = {f"{method} {path}" for method, path in routes(here) if method != "HEAD"}
    ruled = {route for route in found if route.split(" ")[1] not in OPEN | BY_SESSION_ALONE}
    assert ruled == set(RULES)


def test_every_route_opens_to_the_roles_that_it_is_for(here: Department, study_id: str, page: str) -> None:
    for role, username in USERS.items():
        with Reader(base_url=page) as client:
            client.log_in(username)
            mine = [(m, p) for m, p in routes(here) if p not in OPEN | BY_SESSION_ALONE and role in allowed(m, p)]
            for method, path in sorted(mine, key=lambda route: route[1] in ENDS):
                if path in ENDS:
                    client.log_in(username)
                headers = {"X-CSRF-Token": client.csrf}
                with client.stream(method, filled(path, study_id), headers=headers) as answer:  # one never ends
                    assert answer.status_code not in {401, 403, 405, 500}, (role, method, path, answer.status_code)


def test_no_route_answers_without_a_session(here: Department, study_id: str, stranger: httpx.Client) -> None:
    for method, path in routes(here):
        if path in OPEN:
            continue
        answer = stranger.request(method, filled(path, study_id), headers={"X-CSRF-Token": "x"})
        expected = {303, 401} if path in BY_SESSION_ALONE else {401}
        assert answer.status_code in expected, (method, path, answer.status_code)
        assert SECRET not in answer.text and "Traceback" not in answer.text


def test_no_route_answers_a_role_that_it_is_not_for(here: Department, study_id: str, page: str) -> None:
    for role, username in USERS.items():
        with Reader(base_url=page) as client:
            client.log_in(username)
            for method, path in routes(here):
                if path in OPEN | BY_SESSION_ALONE or role in allowed(method, path):
                    continue
                answer = client.request(method, filled(path, study_id), headers={"X-CSRF-Token": client.csrf})
                assert answer.status_code == 403, (role, method, path, answer.status_code)
                assert SECRET not in answer.text


def test_no_change_is_made_with_the_token_of_another_session(here: Department, study_id: str, page: str) -> None:
    with Reader(base_url=page) as mine, Reader(base_url=page) as other:
        other.log_in("second")
        for role, username in USERS.items():
            mine.cookies.clear()
            mine.log_in(username)
            for method, path in routes(here):
                if (
                    method in {"GET", "HEAD"}
                    or path in OPEN
                    or (path not in BY_SESSION_ALONE and role not in allowed(method, path))
                ):
                    continue
                for token in ("", "guess", other.csrf):
                    answer = mine.request(method, filled(path, study_id), headers={"X-CSRF-Token": token})
                    assert answer.status_code == 403, (role, method, path, token)


def test_request_from_another_site_is_refused_whatever_its_token(study_id: str, reader: Reader) -> None:
    headers = {"X-CSRF-Token": reader.csrf, "Sec-Fetch-Site": "cross-site"}
    assert reader.post(f"/studies/{study_id}/preliminary", data={"revision": 0}, headers=headers).status_code == 403


CRAFTED = (
    "../../etc/passwd", "1", "%00", "2.25.1", "' OR 1=1 --", "00000000-0000-0000-0000-000000000000", "a" * 3000,
)  # fmt: skip


def test_crafted_id_is_not_found_and_tells_nothing(study_id: str, reader: Reader) -> None:
    paths = ("/studies/{}", "/studies/{}/volumes", "/studies/{}/volumes/1/axial/1", "/studies/{}/report.pdf")
    for crafted, path in product((*CRAFTED, study_id.upper()), paths):
        answer = reader.get(path.format(httpx.URL("/" + crafted).raw_path.decode()[1:]))
        assert answer.status_code in {404, 422}, (crafted, path)
        assert SECRET not in answer.text and "Traceback" not in answer.text
        assert len(crafted) < 4 or crafted not in answer.text
        if path == "/studies/{}":
            act = path.format(httpx.URL("/" + crafted).raw_path.decode()[1:]) + "/sign"
            assert reader.act(act, revision=0, password=PASSWORD).status_code in {404, 405, 422}, crafted


def test_slice_that_is_not_there_is_an_error_of_the_reader(study_id: str, reader: Reader) -> None:
    for path in ("/volumes/1/axial/9999", "/volumes/9/axial/0", "/volumes/1/oblique/0", "/volumes/0/axial/0"):
        assert reader.get(f"/studies/{study_id}{path}").status_code in {404, 422, 503}, path


def test_sentence_of_another_study_is_not_found(here: Department, study_id: str, reader: Reader) -> None:
    other = here.drafted(slices=2)
    text = reader.get(f"/studies/{other}").text
    sentence = re.search(r'id="card-([0-9a-f-]+)"', text)
    assert sentence is not None
    reader.get(f"/studies/{study_id}")
    answer = reader.act(f"/studies/{study_id}/sentences/{sentence[1]}", act="accept", revision=1)
    assert answer.status_code == 404


def test_headers_of_every_answer_forbid_foreign_scripts_and_frames(stranger: httpx.Client) -> None:
    for path in ("/", "/login", "/livez", "/static/review.css", "/nowhere"):
        headers = stranger.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"


def test_pages_with_patients_are_not_kept_by_the_browser(study_id: str, reader: Reader) -> None:
    for path in ("/", f"/studies/{study_id}", f"/studies/{study_id}/print", f"/studies/{study_id}/report.pdf"):
        assert reader.get(path).headers["cache-control"] == "no-store"


def test_login_needs_the_form_of_this_browser(stranger: httpx.Client) -> None:
    answer = stranger.post("/login", data={"username": "reader", "password": PASSWORD, "token": "x"})
    assert answer.status_code == 403


def test_wrong_password_and_unknown_name_get_the_same_answer(page: str) -> None:
    told = set()
    for username, password in (("reader", "wrong"), ("nobody", "wrong")):
        with Reader(base_url=page) as client:
            answer = client.log_in(username, password)
            assert answer.status_code == 401
            told.add(re.sub(r'value="[^"]*"', "", answer.text))
    assert len(told) == 1


def test_account_locks_after_wrong_passwords_and_opens_again(here: Department) -> None:
    lockout = accounts.Lockout(failures=3, minutes=15)
    for _ in range(3):
        with pytest.raises(accounts.AccessError):
            accounts.check_password(here.database, "reader", "wrong", lockout)
    with pytest.raises(accounts.AccessError):
        accounts.check_password(here.database, "reader", PASSWORD, lockout)
    with here.database.write() as session:
        session.execute(sa.update(User).values(locked_until=studies.now() - timedelta(seconds=1)))
    assert accounts.check_password(here.database, "reader", PASSWORD, lockout).username == "reader"


def test_closed_account_loses_its_session_at_once(here: Department, study_id: str, reader: Reader) -> None:
    with here.database.write() as session:
        accounts.set_disabled(session, accounts.by_name(session, "reader"), True)
    assert reader.get(f"/studies/{study_id}").status_code == 401


@pytest.mark.parametrize("path", ["/lock", "/logout"])
def test_slices_end_at_once_with_the_session_that_the_page_ends(study_id: str, reader: Reader, path: str) -> None:
    address = f"/studies/{study_id}/volumes/1/axial/0"
    cookies = dict(reader.cookies)
    assert reader.get(address).status_code == 200
    assert reader.act(path).status_code in {204, 303}
    assert httpx.get(f"{reader.base_url}{address}", cookies=cookies).status_code == 401


def test_slices_end_a_moment_after_another_process_closes_the_account(
    here: Department, study_id: str, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Looks.SECONDS <= 3
    monkeypatch.setattr(Looks, "SECONDS", 0.2)
    address = f"/studies/{study_id}/volumes/1/axial/0"
    assert reader.get(address).status_code == 200
    with here.database.write() as session:
        accounts.set_disabled(session, accounts.by_name(session, "reader"), True)
    time.sleep(0.25)
    assert reader.get(address).status_code == 401


def test_idle_session_locks_and_its_person_opens_it_again(here: Department, study_id: str, reader: Reader) -> None:
    with here.database.write() as session:
        session.execute(sa.update(WebSession).values(active_at=studies.now() - timedelta(minutes=16)))
    answer = reader.get(f"/studies/{study_id}")
    assert (answer.status_code, answer.headers["x-session"]) == (401, "locked")
    assert SECRET not in answer.text
    assert reader.act(f"/studies/{study_id}/preliminary", revision=0).status_code == 401
    assert reader.act("/unlock", password="wrong").status_code == 401
    assert reader.act("/unlock", password=PASSWORD).status_code == 303
    assert reader.get(f"/studies/{study_id}").status_code == 200


def test_what_the_page_asks_by_itself_keeps_no_session_awake(here: Department, study_id: str, reader: Reader) -> None:
    long_ago = studies.now() - timedelta(minutes=14)
    with here.database.write() as session:
        session.execute(sa.update(WebSession).values(active_at=long_ago))
    reader.get("/worklist/rows")
    reader.get(f"/studies/{study_id}/report")
    reader.get(f"/studies/{study_id}/volumes/1/axial/0")
    reader.act(f"/studies/{study_id}/present")
    with here.database.read() as session:
        assert session.scalars(sa.select(WebSession.active_at)).one() == long_ago


def test_session_ends_after_its_hours(here: Department, reader: Reader) -> None:
    with here.database.write() as session:
        session.execute(sa.update(WebSession).values(created_at=studies.now() - timedelta(hours=13)))
    assert reader.get("/").headers["x-session"] == "none"


def test_cookie_is_out_of_reach_of_scripts(page: str) -> None:
    with Reader(base_url=page) as client:
        client.log_in("reader")
        form = client.get("/login").text.split('name="token" value="')[1].split('"')[0]
        answer = client.post("/login", data={"username": "reader", "password": PASSWORD, "token": form})
    cookie = next(c for c in answer.headers.get_list("set-cookie") if c.startswith("mu2_session="))
    assert "HttpOnly" in cookie and "SameSite=lax" in cookie


def test_database_holds_no_token_that_opens_a_session(here: Department, reader: Reader) -> None:
    token = reader.cookies["mu2_session"]
    with here.database.read() as session:
        assert session.get(WebSession, token) is None


def test_login_never_leads_to_another_site(page: str) -> None:
    for target in ("https://evil.example", "//evil.example", "/\\evil.example", "javascript:alert(1)"):
        with Reader(base_url=page) as client:
            token = client.get("/login").text.split('name="token" value="')[1].split('"')[0]
            answer = client.post(
                "/login", data={"username": "reader", "password": PASSWORD, "token": token, "next": target}
            )
            assert answer.headers["location"] == "/"


def test_views_edits_exports_and_refused_logins_are_in_the_audit(
    here: Department, study_id: str, reader: Reader, page: str
) -> None:
    reader.get(f"/studies/{study_id}/print")
    reader.get(f"/studies/{study_id}/report.pdf")
    text = reader.get(f"/studies/{study_id}").text
    sentence = re.search(r'id="card-([0-9a-f-]+)"', text)
    assert sentence is not None
    reader.act(f"/studies/{study_id}/sentences/{sentence[1]}", act="accept", revision=1)
    reader.act("/worklist/search", patient=SECRET)
    with Reader(base_url=page) as other:
        other.log_in("reader", "wrong password")
    with here.database.read() as session:
        events = session.execute(sa.select(AuditEvent.action, AuditEvent.outcome, AuditEvent.detail)).all()
        audit.verify(session)
    done = {(action, outcome) for action, outcome, _ in events}
    assert {("view", "ok"), ("edit", "ok"), ("export", "ok"), ("search", "ok"), ("login", "refused")} <= done
    assert SECRET not in str(events)


def test_endless_body_is_refused(reader: Reader) -> None:
    assert reader.act("/worklist/search", patient="x" * 300_000).status_code == 413


def test_markup_in_names_and_reports_is_shown_as_text(here: Department, reader: Reader) -> None:
    from worker.core.report import Section, Sentence

    evil = '<script>alert("x")</script><img src=x onerror=alert(1)>'
    study = here.drafted(
        patient_name=f"{evil}^A", patient_identifier=evil[:60], sentences=(Sentence(Section.FINDINGS, evil),), slices=2
    )
    for path in ("/", f"/studies/{study}", f"/studies/{study}/print"):
        text = reader.get(path).text
        assert "<script>alert" not in text and "<img src=x" not in text
        assert "&lt;script&gt;" in text
