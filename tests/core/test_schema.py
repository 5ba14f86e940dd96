"""The migrations and the declared tables are the same thing, on both databases."""

from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from worker.core import consents, review_records, schema  # noqa: F401 - the import declares their tables
from worker.core.database import Database
from worker.core.errors import SettingsError
from worker.core.records import Base


def declared(database: Database) -> Database:
    """A second database made from the declarations, beside the migrated one."""
    if database.is_sqlite:
        other = Database(f"sqlite:///{database.url.database}.declared")
        Base.metadata.create_all(other.engine)
        return other
    other = Database(database.url.render_as_string(hide_password=False))
    with other.write() as session:
        session.execute(sa.text("CREATE SCHEMA declared"))
        session.execute(sa.text("SET LOCAL search_path TO declared"))
        Base.metadata.create_all(session.connection())
    return other


def checks_and_keys(database: Database, schema_name: str | None) -> dict[str, object]:
    """Every constraint and index as the server itself tells it."""
    inspector = sa.inspect(database.engine)
    told: dict[str, object] = {}
    for table in Base.metadata.tables:
        told[table] = {
            "columns": [
                (c["name"], str(c["type"]), c["nullable"]) for c in inspector.get_columns(table, schema=schema_name)
            ],
            "checks": sorted(
                (c["name"], " ".join(c["sqltext"].split()))
                for c in inspector.get_check_constraints(table, schema=schema_name)
            ),
            "primary": inspector.get_pk_constraint(table, schema=schema_name)["constrained_columns"],
            "unique": sorted(
                (u["name"], u["column_names"]) for u in inspector.get_unique_constraints(table, schema=schema_name)
            ),
            "foreign": sorted(
                (f["name"], f["constrained_columns"], f["referred_table"], f["referred_columns"])
                for f in inspector.get_foreign_keys(table, schema=schema_name)
            ),
            "indexes": sorted(
                (
                    i["name"],
                    i["column_names"],
                    i["unique"],
                    str(sorted((k, str(v)) for k, v in i.get("dialect_options", {}).items())),
                )
                for i in inspector.get_indexes(table, schema=schema_name)
            ),
        }
    return told


def test_autogenerate_finds_nothing_to_migrate(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_migrated_constraints_and_indexes_equal_the_declared_ones(database: Database) -> None:
    other = declared(database)
    migrated = checks_and_keys(database, None)
    assert migrated == checks_and_keys(other, None if database.is_sqlite else "declared")
    assert migrated["messages"]["checks"]  # the comparison saw something
    other.close()


def test_asking_a_sqlite_file_that_is_not_there_for_its_revision_does_not_make_it(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'none.sqlite'}")
    assert schema.current(database) is None
    database.close()
    assert list(tmp_path.iterdir()) == []


def test_upgrade_twice_changes_nothing(database: Database) -> None:
    schema.upgrade(database)
    assert schema.current(database) == schema.head()


def test_a_service_refuses_a_database_that_is_not_at_head(tmp_path) -> None:
    empty = Database(f"sqlite:///{tmp_path}/empty.sqlite")
    with pytest.raises(SettingsError, match="mu2 db upgrade"):
        schema.require_head(empty)
    empty.close()


def test_sqlite_commits_are_durable_and_foreign_keys_hold(sqlite_database: Database) -> None:
    with sqlite_database.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
