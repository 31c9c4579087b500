import logging
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from heedful_store import (
    SchemaMismatch,
    Scope,
    Store,
    StoreError,
    downgrade,
    migrate,
    sqlite_warning,
)
from heedful_store.database import normalise_url
from heedful_store.registry_schema import policies
from heedful_store.schema import SCHEMA_REVISION, metadata
from sqlalchemy import create_engine, inspect, text


def test_migrations_give_exactly_the_declared_schema(empty_url: str) -> None:
    migrate(empty_url)
    engine = create_engine(normalise_url(empty_url))
    with engine.connect() as connection:
        assert policies.metadata is metadata
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_every_migration_can_be_taken_back_and_applied_again(empty_url: str) -> None:
    migrate(empty_url)
    downgrade(empty_url, "0001")
    engine = create_engine(normalise_url(empty_url))
    assert "completions" in inspect(engine).get_table_names()
    assert "policies" not in inspect(engine).get_table_names()
    downgrade(empty_url, "base")
    assert set(inspect(engine).get_table_names()) <= {"alembic_version"}
    engine.dispose()
    with Store(empty_url) as store:
        assert store.get_project(Scope()).profile == "personal"


def test_rows_survive_an_upgrade_from_the_first_revision(empty_url: str) -> None:
    migrate(empty_url)
    downgrade(empty_url, "0001")
    engine = create_engine(normalise_url(empty_url))
    with engine.begin() as connection:
        connection.execute(text("UPDATE counters SET value = 41 WHERE name = 'feedback'"))
    engine.dispose()
    migrate(empty_url)
    with Store(empty_url) as store, store.read() as connection:
        query = text("SELECT value FROM counters WHERE name = 'feedback'")
        assert connection.execute(query).scalar_one() == 41


def test_a_registry_of_the_second_revision_keeps_its_rows_and_counts_on(empty_url: str) -> None:
    migrate(empty_url)
    downgrade(empty_url, "0002")
    engine = create_engine(normalise_url(empty_url))
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO deployments (deployment_id, tenant, project, action, version, actor, "
                "approved, evidence, at_ms) "
                "VALUES (7, 'default', 'default', 'promote', 'v1', 'ann', true, '{}', 5)"
            )
        )
    engine.dispose()
    migrate(empty_url)
    with Store(empty_url) as store:
        (old,) = store.deployments(Scope())
        assert (old.deployment_id, old.to_version, old.alias, old.reason) == (7, "v1", "", "")
        entry = replace(old, base_id="b", action="reject")
        assert store.record_deployment(entry).result().deployment_id == 8


def test_head_is_the_revision_that_the_code_expects() -> None:
    location = Path(__file__).parents[2] / "server" / "heedful_store" / "migrations"
    assert ScriptDirectory(str(location)).get_current_head() == SCHEMA_REVISION


def test_a_database_of_a_newer_version_is_refused_and_left_alone(empty_url: str) -> None:
    migrate(empty_url)
    engine = create_engine(normalise_url(empty_url))
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SchemaMismatch, match="9999"):
        Store(empty_url)
    with engine.connect() as connection:
        assert (
            connection.execute(text("SELECT version_num FROM alembic_version")).scalar() == "9999"
        )
    engine.dispose()


@pytest.mark.parametrize("bad", ["sqlite://", "sqlite:///:memory:", "mysql://localhost/x"])
def test_a_url_that_cannot_be_durable_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="store needs"):
        Store(bad)


def test_files_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    with Store(f"sqlite:///{tmp_path / 'new' / 's.db'}"):
        files = sorted((tmp_path / "new").iterdir())
        assert [file.name for file in files] == ["s.db", "s.db-shm", "s.db-wal", "s.db-writer"]
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_a_file_that_others_can_read_is_reported(
    sqlite_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "store.db").chmod(0o644)
    with caplog.at_level(logging.WARNING), Store(sqlite_url):
        assert "can be read by others" in caplog.text


@pytest.mark.parametrize(
    ("version", "warned"),
    [
        ((3, 6, 23), False),
        ((3, 7, 0), True),
        ((3, 40, 1), True),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
    ],
)
def test_the_sqlite_warning_covers_the_range_of_the_bug(
    version: tuple[int, ...], warned: bool
) -> None:
    message = sqlite_warning(version)
    assert (message is not None) == warned
    assert message is None or "WAL-reset" in message


def test_settings_of_the_writer_are_those_that_durability_needs(sqlite_url: str) -> None:
    expected = {
        "journal_mode": "wal",
        "synchronous": 2,
        "mmap_size": 0,
        "wal_autocheckpoint": 0,
        "secure_delete": 1,
    }
    with Store(sqlite_url) as store:
        found = store.write(
            lambda c: {name: c.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in expected}
        ).result()
    assert found == expected


def test_readers_cannot_write(sqlite_url: str) -> None:
    with (
        Store(sqlite_url) as store,
        pytest.raises(StoreError, match="readonly"),
        store.read() as connection,
    ):
        connection.execute(text("DELETE FROM counters"))
