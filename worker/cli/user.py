"""`mu2 user`: who may log in to the review page."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.terminal import Json, Yes, actor, ask, note, opened, print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.orm import Session

    from worker.core.records import Role, User

app = typer.Typer(name="user", help="Who may log in to the review page.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="USERNAME", help="The user's name at the login.")]
ROLES = "viewer, radiologist, admin or auditor"
RoleOption = Annotated[str, typer.Option(help=f"{ROLES}.")]
PasswordStdin = Annotated[bool, typer.Option("--password-stdin", help="Read the password from standard input.")]


@app.command()
def add(
    username: Name,
    role: RoleOption,
    family_name: Annotated[str, typer.Option(help="As it stands under signed reports.")] = "",
    given_name: Annotated[str, typer.Option(help="As it stands under signed reports.")] = "",
    oidc: Annotated[bool, typer.Option("--oidc", help="The identity provider has the password.")] = False,
    password_stdin: PasswordStdin = False,
) -> None:
    """Adds a user; asks for the password, which is never an argument, because others could read it there."""
    from worker.core import accounts, audit

    chosen = _role(role)
    with opened() as (_, database):
        password = None if oidc else _ask_password(password_stdin)

        def work(session: "Session") -> None:
            user = accounts.add(
                session,
                username=username,
                role=chosen,
                password=password,
                family_name=family_name,
                given_name=given_name,
            )
            audit.append(session, "user_add", actor=actor(), user=user.username, role=role)

        database.run(work)
    note(f"User {username} may log in as {role}.")


@app.command("list")
def list_users(as_json: Json = False) -> None:
    """Lists the users."""
    import sqlalchemy as sa

    from worker.core.records import User

    with opened() as (_, database), database.read() as session:
        users = session.scalars(sa.select(User).order_by(User.username)).all()
        rows = [
            {
                "username": user.username,
                "role": user.role.value,
                "family_name": user.family_name,
                "given_name": user.given_name,
                "account": "local" if user.password_hash else "oidc",
                "created_at": user.created_at,
                "disabled_at": user.disabled_at,
                "locked_until": user.locked_until,
            }
            for user in users
        ]
    if as_json:
        print_json(rows)
    else:
        columns = ["username", "role", "family_name", "given_name", "account", "disabled_at", "locked_until"]
        print_table([c.replace("_", " ") for c in columns], [[row[c] for c in columns] for row in rows])


@app.command()
def password(username: Name, password_stdin: PasswordStdin = False) -> None:
    """Gives a local user a new password and ends their sessions."""
    from worker.core import accounts

    with opened() as (_, database):
        typed = _ask_password(password_stdin)
        database.run(
            lambda session: _change(session, username, "password", lambda u: accounts.set_password(session, u, typed))
        )
    note(f"User {username} has a new password.")


@app.command()
def disable(username: Name, yes: Yes = False) -> None:
    """Closes an account and ends its sessions; what it signed stays signed."""
    from worker.core import accounts

    with opened() as (_, database):
        ask(f"Close the account of {username}?", yes)
        database.run(
            lambda session: _change(session, username, "disable", lambda u: accounts.set_disabled(session, u, True))
        )
    note(f"User {username} may no longer log in.")


@app.command()
def enable(username: Name) -> None:
    """Opens a closed or locked account again."""
    from worker.core import accounts

    with opened() as (_, database):
        database.run(
            lambda session: _change(session, username, "enable", lambda u: accounts.set_disabled(session, u, False))
        )
    note(f"User {username} may log in again.")


@app.command()
def role(
    username: Name,
    role: Annotated[str, typer.Argument(metavar="ROLE", help=f"{ROLES}.")],
    yes: Yes = False,
) -> None:
    """Gives an account another role and ends its sessions; what it signed stays signed."""
    from worker.core import accounts

    chosen = _role(role)
    with opened() as (_, database):
        with database.read() as session:
            before = accounts.by_name(session, username).role
        ask(f"Make {username} {chosen} instead of {before}?", yes)
        database.run(
            lambda session: _change(
                session, username, "role", lambda u: accounts.set_role(session, u, chosen), before=before, after=chosen
            )
        )
    note(f"User {username} is {chosen} from the next login on.")


def _role(text: str) -> "Role":
    from worker.core.records import Role

    try:
        return Role(text)
    except ValueError:
        raise typer.BadParameter(f"a role is {ROLES}") from None


def _change(session: "Session", username: str, change: str, apply: "Callable[[User], None]", **detail: str) -> None:
    from worker.core import accounts, audit

    user = accounts.by_name(session, username)
    apply(user)
    audit.append(session, f"user_{change}", actor=actor(), user=user.username, **detail)


def _ask_password(from_stdin: bool) -> str:
    if from_stdin:
        return sys.stdin.readline().rstrip("\n")
    return str(typer.prompt("Password", hide_input=True, confirmation_prompt=True, err=True))
