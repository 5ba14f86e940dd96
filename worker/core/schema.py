"""The database's schema: made and changed by the numbered migrations only."""

from importlib.util import find_spec
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from worker.core.database import Database
from worker.core.errors import SettingsError


def upgrade(database: Database) -> None:
    """Brings the database to the newest revision; does nothing when it is there."""
    config = _config()
    with database.write() as session:
        config.attributes["connection"] = session.connection()
        command.upgrade(config, "head")


def current(database: Database) -> str | None:
    """The revision that the database is at, or None when it is empty or, on SQLite, not there: a look makes no file."""
    file = database.url.database or ""
    if database.is_sqlite and file and not file.startswith((":memory:", "file:")) and not Path(file).exists():
        return None
    with database.read() as session:
        return MigrationContext.configure(session.connection()).get_current_revision()


def head() -> str:
    """The newest revision that this code knows."""
    return str(ScriptDirectory.from_config(_config()).get_current_head())


def require_head(database: Database) -> None:
    """Raises `SettingsError` unless the database is at the newest revision."""
    found = current(database)
    if found != head():
        raise SettingsError(
            f"the database is at revision {found or 'none'}, this code needs {head()}; run `mu2 db upgrade`"
        )


def _config() -> Config:
    spec = find_spec("migrations")
    if spec is None or spec.origin is None:
        raise SettingsError("the package `migrations` is not installed; install the project again")
    config = Config()
    config.set_main_option("script_location", str(Path(spec.origin).parent))
    return config
