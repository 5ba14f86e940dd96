"""Alembic's entry: `worker.core.schema` hands over the connection, `alembic revision` opens one by the settings."""

from alembic import context

from worker.core import consents, review_records, settings  # noqa: F401 - the import declares their tables
from worker.core.database import Database
from worker.core.records import Base, UtcDateTime


def render_item(kind: str, item: object, autogen_context) -> str | bool:
    """Writes our time type as the plain column type it is, so that a migration never imports our code."""
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    return False


def run(connection) -> None:
    """Applies the migrations on this connection, in one transaction where the database can."""
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        compare_type=True,
        render_item=render_item,
        transaction_per_migration=False,
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    with Database.from_settings(settings.current()).engine.connect() as opened:
        run(opened)
