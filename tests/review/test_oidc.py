"""Log in and prove oneself at an identity provider: a real one on the loopback, sometimes a lying one."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.review.browser import Browser, needs_chromium
from tests.review.builders import Department, Reader, accept_all, department, served, version_of
from tests.review.provider import CLIENT, SECRET, Provider
from worker.core import studies
from worker.core.database import Database
from worker.core.records import AuditEvent, Report, Role, Signature, User
from worker.core.report import ReportState
from worker.core.review_records import Authentication, WebSession


class Clinic:
    """A department whose people belong to the provider, and a browser."""

    def __init__(self, here: Department, provider: Provider, address: str) -> None:
        self.here = here
        self.provider = provider
        self.browser = Reader(base_url=address, follow_redirects=True)

    def log_in(self) -> Any:
        answer = self.browser.get("/oidc/login")
        found = re.search(r'name="csrf" content="([^"]+)"', answer.text)
        self.browser.csrf = found[1] if found else ""
        return answer

    def accept_all(self, study_id: str) -> str:
        """Accepts every sentence; the revision to sign."""
        return accept_all(self.browser, study_id)

    def prove(self, study_id: str) -> Any:
        return self.browser.post(f"/oidc/prove/{study_id}", data={"csrf": self.browser.csrf})

    def proofs(self) -> int:
        with self.here.database.read() as session:
            return session.scalar(sa.select(sa.func.count()).select_from(Authentication)) or 0

    def state(self) -> ReportState:
        with self.here.database.read() as session:
            return session.scalars(sa.select(Report.state)).one()


@pytest.fixture
def clinic(sqlite_database: Database, tmp_path: Path) -> Iterator[Clinic]:
    """The provider and the page, each on its port."""
    provider = Provider()
    with served(provider.app()) as issuer:
        provider.issuer = issuer
        here = department(
            sqlite_database, tmp_path, oidc_issuer=issuer, oidc_client_id=CLIENT, oidc_client_secret=SECRET
        )
        here.user("reader", Role.RADIOLOGIST, password=None)
        with served(here.app()) as address:
            made = Clinic(here, provider, address)
            yield made
            made.browser.close()


def test_person_of_the_provider_logs_in_and_is_bound_to_their_subject(clinic: Clinic) -> None:
    assert "Worklist" in clinic.log_in().text
    with clinic.here.database.read() as session:
        assert session.scalars(sa.select(User.oidc_subject)).one() == "subject-1"
    assert clinic.provider.seen[0]["code_challenge_method"] == "S256"


def test_same_name_with_another_subject_does_not_get_in(clinic: Clinic) -> None:
    clinic.log_in()
    clinic.browser.cookies.clear()
    clinic.provider.subject = "subject-2"
    assert clinic.log_in().status_code == 403


def test_person_without_an_account_here_does_not_get_in(clinic: Clinic) -> None:
    clinic.provider.username = "stranger"
    assert clinic.log_in().status_code == 403


def test_name_of_a_local_account_is_not_taken_over(clinic: Clinic) -> None:
    clinic.here.user("local", Role.RADIOLOGIST)
    clinic.provider.username = "local"
    assert clinic.log_in().status_code == 403


@pytest.mark.parametrize(
    "lie", [{"nonce": "another"}, {"audience": "another"}, {"foreign_key": True}, {"unsigned": True}]
)
def test_id_token_that_does_not_verify_opens_nothing(clinic: Clinic, lie: dict[str, Any]) -> None:
    for name, value in lie.items():
        setattr(clinic.provider, name, value)
    assert clinic.log_in().status_code == 403
    with clinic.here.database.read() as session:
        assert session.scalars(sa.select(WebSession)).all() == []


def test_answer_is_taken_once_and_only_in_the_browser_that_asked(clinic: Clinic) -> None:
    clinic.browser.follow_redirects = False
    away = clinic.browser.get("/oidc/login").headers["location"]
    back = clinic.browser.get(away).headers["location"]
    with Reader() as other:
        assert other.get(back).status_code == 403
    assert clinic.browser.get(back).status_code == 403  # the stolen try used the state up


def test_fresh_login_at_the_provider_signs_one_report(clinic: Clinic) -> None:
    clinic.log_in()
    study_id = clinic.here.drafted(slices=2)
    revision = clinic.accept_all(study_id)
    assert clinic.browser.act(f"/studies/{study_id}/sign", revision=revision).status_code == 409
    assert clinic.prove(study_id).url.path == f"/studies/{study_id}"
    asked = clinic.provider.seen[-1]
    assert (asked["prompt"], asked["max_age"]) == ("login", "0")
    signed = clinic.browser.act(f"/studies/{study_id}/sign", revision=revision)
    assert signed.status_code == 200
    assert clinic.state() is ReportState.FINAL
    again = clinic.browser.act(f"/studies/{study_id}/addend", version=version_of(signed.text), text="More.")
    assert again.status_code == 409 and "prove who you are" in again.text.lower()  # the proof was used up
    with clinic.here.database.read() as session:
        assert len(session.scalars(sa.select(Signature)).all()) == 1


def test_login_for_one_study_signs_no_other(clinic: Clinic) -> None:
    clinic.log_in()
    one, other = (clinic.here.drafted(slices=2, accession=f"A-{number}") for number in range(2))
    revision = clinic.accept_all(other)
    clinic.prove(one)
    assert clinic.browser.act(f"/studies/{other}/sign", revision=revision).status_code == 409
    with clinic.here.database.read() as session:
        assert session.scalars(sa.select(Signature)).all() == []
    revision = clinic.accept_all(one)
    assert clinic.browser.act(f"/studies/{one}/sign", revision=revision).status_code == 200


@pytest.mark.parametrize(
    ("lie", "value"),
    [("obeys_prompt", False), ("sends_auth_time", False), ("subject", "subject-2")],
    ids=["does not ask again", "does not tell the time of the login", "somebody else"],
)
def test_provider_that_does_not_prove_who_is_there_now_signs_nothing(clinic: Clinic, lie: str, value: object) -> None:
    clinic.log_in()
    study_id = clinic.here.drafted(slices=2)
    setattr(clinic.provider, lie, value)
    assert clinic.prove(study_id).status_code == 403
    assert clinic.proofs() == 0


def test_password_field_signs_nothing_for_an_account_of_the_provider(clinic: Clinic) -> None:
    clinic.log_in()
    study_id = clinic.here.drafted(slices=2)
    revision = clinic.accept_all(study_id)
    assert clinic.browser.act(f"/studies/{study_id}/sign", revision=revision, password="anything").status_code == 409
    assert clinic.state() is ReportState.AI_DRAFT


def test_locked_session_is_opened_at_the_provider(clinic: Clinic) -> None:
    clinic.log_in()
    clinic.browser.act("/lock")
    assert clinic.browser.get("/").status_code == 401
    assert clinic.browser.post("/oidc/unlock", data={"csrf": clinic.browser.csrf}).status_code == 200
    assert clinic.browser.get("/").status_code == 200
    assert clinic.proofs() == 0  # opening a desk is no wish to sign


def test_locked_session_is_not_opened_by_an_old_login_at_the_provider(clinic: Clinic) -> None:
    clinic.log_in()
    clinic.browser.act("/lock")
    clinic.provider.obeys_prompt = False
    assert clinic.browser.post("/oidc/unlock", data={"csrf": clinic.browser.csrf}).status_code == 403
    assert clinic.browser.get("/").status_code == 401


def test_proofs_at_the_provider_are_in_the_audit(clinic: Clinic) -> None:
    clinic.log_in()
    clinic.prove(clinic.here.drafted(slices=2))
    with clinic.here.database.read() as session:
        actions = session.scalars(sa.select(AuditEvent.action).where(AuditEvent.at <= studies.now())).all()
    assert {"login", "bind_oidc", "prove"} <= set(actions)


@needs_chromium
def test_unlocking_at_the_provider_loses_no_unsaved_text(clinic: Clinic, browser: Browser) -> None:
    study_id = clinic.here.drafted(slices=2)
    address = str(clinic.browser.base_url).rstrip("/")
    page = browser.new_context().new_page()
    page.goto(f"{address}/oidc/login")
    page.goto(f"{address}/studies/{study_id}")
    field = page.locator("article.sentence textarea").nth(0)
    page.route("**/sentences/*", lambda route: route.abort())  # the network fails while the reader types
    field.fill("Typed and not saved.")
    page.click("[data-lock]")
    page.wait_for_selector("#cover[open]")
    page.unroute("**/sentences/*")
    with page.context.expect_page():
        page.click("#cover button.primary")
    page.wait_for_selector("#cover", state="hidden")
    page.wait_for_selector("ins")
    page.reload()
    assert field.input_value() == "Typed and not saved."
    page.context.close()
    assert [asked.get("prompt") for asked in clinic.provider.seen] == [None, "login"]
