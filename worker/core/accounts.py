"""Accounts of the review page: passwords (argon2id), lockout, and the proofs of identity that signatures use up.

A local account has a password; an account without one belongs to the identity provider (OIDC). Nobody else can make a
proof: `prove_by_password` checks the password, `prove_by_oidc` takes the provider's checked answer.
"""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache

import sqlalchemy as sa
from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy.orm import Session

from worker.core import studies
from worker.core.database import Database
from worker.core.errors import AccessError, NotFoundError, StateError
from worker.core.records import Role, User, new_id
from worker.core.review_records import Authentication, AuthenticationMethod, WebSession

SHORTEST_PASSWORD = 12
LONGEST_PASSWORD = 200  # argon2 works on all of it: an endless one would be an attack
_USERNAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}")


@dataclass(frozen=True)
class Lockout:
    """How many wrong passwords in a row close an account, and for how long."""

    failures: int
    minutes: float


def add(
    session: Session, *, username: str, role: Role, password: str | None, family_name: str = "", given_name: str = ""
) -> User:
    """Adds an account; without a password it belongs to the identity provider.

    Raises `AccessError` for a name or password that is not fit, `StateError` when the name is taken.
    """
    if not _USERNAME.fullmatch(username):
        raise AccessError("a user name has letters, figures, dots, hyphens, underscores or @, at most 100")
    if session.scalar(sa.select(User.id).where(sa.func.lower(User.username) == username.lower())):
        raise StateError(f"there is a user {username} already; enable it or choose another name")
    user = User(
        id=new_id(),
        username=username,
        family_name=family_name,
        given_name=given_name,
        role=role,
        password_hash=None if password is None else hash_password(password),
        created_at=studies.now(),
    )
    session.add(user)
    session.flush()
    return user


def hash_password(password: str) -> str:
    """The argon2id hash of a password; raises `AccessError` when it is too short or too long."""
    if not SHORTEST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
        raise AccessError(f"a password has {SHORTEST_PASSWORD} to {LONGEST_PASSWORD} characters")
    return _hasher().hash(password)


def by_name(session: Session, username: str) -> User:
    """The account with this name; raises `NotFoundError`."""
    user = session.scalars(sa.select(User).where(sa.func.lower(User.username) == username.lower())).one_or_none()
    if user is None:
        raise NotFoundError("no user has this name; `mu2 user list` shows them")
    return user


def set_password(session: Session, user: User, password: str) -> None:
    """Gives a local account a new password, opens its lock and ends its sessions."""
    user.password_hash = hash_password(password)
    user.failed_logins = 0
    user.locked_until = None
    end_sessions(session, user.id)


def set_disabled(session: Session, user: User, disabled: bool) -> None:
    """Closes an account, which ends its sessions at once, or opens it again; nothing it wrote or signed changes."""
    user.disabled_at = studies.now() if disabled else None
    if disabled:
        end_sessions(session, user.id)
    else:
        user.failed_logins = 0
        user.locked_until = None


def set_role(session: Session, user: User, role: Role) -> None:
    """Gives an account another role and ends its sessions; what it signed in the old one stays signed."""
    user.role = role
    end_sessions(session, user.id)


def end_sessions(session: Session, user_id: str) -> None:
    """Ends every login of one person."""
    session.execute(sa.delete(WebSession).where(WebSession.user_id == user_id))


def check_password(database: Database, username: str, password: str, lockout: Lockout) -> User:
    """The account that this name and password open; counts failures.

    Raises `AccessError` with one sentence for every cause, so that nobody learns which names exist. The slow hash runs
    outside of any transaction.
    """
    with database.read() as session:
        user = session.scalars(sa.select(User).where(sa.func.lower(User.username) == username.lower())).one_or_none()
    right = _matches(user.password_hash if user else None, password)
    if user is None:
        raise _refused()
    user_id = user.id

    def settle(session: Session) -> User | None:
        row = session.get_one(User, user_id, with_for_update=True)
        if row.disabled_at is not None or (row.locked_until is not None and row.locked_until > studies.now()):
            return None
        if right:
            row.failed_logins = 0
            row.locked_until = None
            return row
        row.failed_logins += 1
        if row.failed_logins >= lockout.failures:
            row.locked_until = studies.now() + timedelta(minutes=lockout.minutes)
            row.failed_logins = 0
        return None

    opened = database.run(settle)
    if opened is None:
        raise _refused()
    return opened


def prove_by_password(
    database: Database, user_id: str, password: str, lockout: Lockout, study_id: str, session_id: str | None = None
) -> str:
    """The id of a proof that this person typed the right password just now for this study; raises `AccessError`."""
    with database.read() as session:
        username = session.get_one(User, user_id).username
    user = check_password(database, username, password, lockout)
    return database.run(
        lambda session: _add_proof(session, user.id, AuthenticationMethod.PASSWORD, study_id, session_id)
    )


def prove_by_oidc(
    session: Session, user_id: str, study_id: str, session_id: str | None, started_at: datetime, auth_time: int
) -> str:
    """The id of a proof, for this study, that the provider authenticated this person after `started_at`.

    Raises as `require_fresh`.
    """
    require_fresh(started_at, auth_time)
    return _add_proof(session, user_id, AuthenticationMethod.OIDC, study_id, session_id)


def require_fresh(started_at: datetime, auth_time: int) -> None:
    """Raises `AccessError` unless the provider authenticated the person after `started_at`.

    `auth_time` is the claim of a verified ID token, in seconds since 1970: an answer from an older login proves nothing.
    """
    if auth_time < int(started_at.timestamp()) or auth_time > studies.now().timestamp() + 60:
        raise AccessError("the identity provider did not ask for a new login; sign again, or tell the administrator")


def unused_proof(
    session: Session, user_id: str, study_id: str, session_id: str, fresh_seconds: float
) -> Authentication | None:
    """The newest proof of this login for this study that is fresh and not used up."""
    return session.scalars(
        sa.select(Authentication)
        .where(
            Authentication.user_id == user_id,
            Authentication.study_id == study_id,
            Authentication.session_id == session_id,
            Authentication.used_at.is_(None),
            Authentication.at >= studies.now() - timedelta(seconds=fresh_seconds),
        )
        .order_by(Authentication.at.desc())
        .limit(1)
    ).one_or_none()


def _add_proof(
    session: Session, user_id: str, method: AuthenticationMethod, study_id: str, session_id: str | None
) -> str:
    proof = Authentication(
        id=new_id(), user_id=user_id, study_id=study_id, method=method, session_id=session_id, at=studies.now()
    )
    session.add(proof)
    session.flush()
    return proof.id


def _matches(stored: str | None, password: str) -> bool:
    """Takes as long for an account that is not there as for one that is."""
    if len(password) > LONGEST_PASSWORD:
        return False
    try:
        _hasher().verify(stored or _decoy(), password)
    except (VerificationError, InvalidHashError):
        return False
    return stored is not None


def _refused() -> AccessError:
    return AccessError("user name or password is wrong, or the account is locked or closed")


@lru_cache(maxsize=1)
def _hasher() -> PasswordHasher:
    return PasswordHasher()


@lru_cache(maxsize=1)
def _decoy() -> str:
    return _hasher().hash("no account has this password")
