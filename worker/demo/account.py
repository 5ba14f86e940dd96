"""A radiologist's account for one demo, with a password that nobody knew before."""

import secrets

from sqlalchemy.orm import Session

from worker.core import accounts, audit
from worker.core.database import Database
from worker.core.errors import NotFoundError
from worker.core.records import Role

USERNAME = "demo"
PASSWORD_BYTES = 12


def make(database: Database) -> tuple[str, str]:
    """Makes the account, or gives it a new password when the demo ran here before; returns name and password."""
    password = secrets.token_urlsafe(PASSWORD_BYTES)

    def work(session: Session) -> None:
        try:
            accounts.set_password(session, accounts.by_name(session, USERNAME), password)
        except NotFoundError:
            _add(session, password)
        audit.append(session, "user_password", actor="demo", user=USERNAME)

    database.run(work)
    return USERNAME, password


def _add(session: Session, password: str) -> None:
    accounts.add(
        session,
        username=USERNAME,
        role=Role.RADIOLOGIST,
        password=password,
        family_name="Radiologist",
        given_name="Demo",
    )
