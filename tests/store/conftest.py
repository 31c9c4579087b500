"""Stores to test on: a SQLite file, and a PostgreSQL database where a server is named."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from heedful_store import (
    Candidate,
    Comparison,
    Completion,
    CompletionPayload,
    DatabaseOptions,
    FeedbackEvent,
    Scope,
    Store,
    Thumb,
    migrate,
    now_ms,
    uuid7,
)
from sqlalchemy import create_engine, make_url, text

POSTGRES_URL = os.environ.get("HEEDFUL_TEST_POSTGRES_URL", "")
# Tests use small temporary volumes, where the reserve would refuse everything.
NO_RESERVE = DatabaseOptions(min_free_bytes=0)


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with the schema and nothing else, to copy."""
    path = tmp_path_factory.mktemp("migrated") / "store.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture
def sqlite_url(tmp_path: Path, migrated_file: Path) -> str:
    path = tmp_path / "store.db"
    shutil.copyfile(migrated_file, path)
    path.chmod(0o600)
    return f"sqlite:///{path}"


@contextmanager
def _postgres_database(template: str) -> Iterator[str]:
    """Make a database on the server that the environment names, and drop it at the end."""
    if not POSTGRES_URL:
        pytest.skip("HEEDFUL_TEST_POSTGRES_URL is not set")
    server = make_url(POSTGRES_URL).set(drivername="postgresql+psycopg")
    name = f"heedful_test_{uuid7().replace('-', '')}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template}"))
    yield server.set(database=name).render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@pytest.fixture(scope="session")
def migrated_database() -> Iterator[str]:
    """The name of a PostgreSQL database with the schema and nothing else, to copy."""
    with _postgres_database("template0") as url:
        migrate(url)
        yield str(make_url(url).database)


@pytest.fixture
def postgres_url(migrated_database: str) -> Iterator[str]:
    with _postgres_database(migrated_database) as url:
        yield url


BOTH = ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]


@pytest.fixture(params=BOTH)
def url(request: pytest.FixtureRequest) -> str:
    """The URL of a migrated database without rows, once per kind."""
    chosen: str = request.getfixturevalue(f"{request.param}_url")
    return chosen


@pytest.fixture(params=BOTH)
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database without tables, once per kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
        return
    with _postgres_database("template0") as url:
        yield url


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with Store(url, database=NO_RESERVE) as opened:
        yield opened


@dataclass(frozen=True)
class Make:
    """Builders of rows that are valid unless a field says otherwise."""

    scope: Scope = field(default_factory=Scope)

    def completion(self, **fields: Any) -> Completion:
        defaults: dict[str, Any] = {
            "completion_id": uuid7(),
            "scope": self.scope,
            "policy_version": "v1",
            "created_at_ms": now_ms(),
            "end_user": "ann",
            "payload": self.payload(),
        }
        return Completion(**(defaults | fields))

    def payload(self, prompt: str = "prompt", answer: str = "answer") -> CompletionPayload:
        ids = list(answer.encode())
        return CompletionPayload(
            prompt_ids=list(prompt.encode()),
            completion_ids=ids,
            prompt_text=prompt,
            completion_text=answer,
            logprobs=[-0.5] * len(ids),
            sampling_logprobs=[-0.25] * len(ids),
            kept_mass=[0.75] * len(ids),
        )

    def event(self, **fields: Any) -> FeedbackEvent:
        defaults: dict[str, Any] = {
            "feedback_id": uuid7(),
            "scope": self.scope,
            "judgement": Thumb(True),
            "rater_id": "ann",
        }
        return FeedbackEvent(**(defaults | fields))

    def comparison(self, *completion_ids: str, **fields: Any) -> Comparison:
        candidates = tuple(
            Candidate(name, f"v{place}", place, 0.5) for place, name in enumerate(completion_ids)
        )
        defaults: dict[str, Any] = {
            "comparison_id": uuid7(),
            "scope": self.scope,
            "purpose": "gate",
            "candidates": candidates,
            "created_at_ms": now_ms(),
            "end_user": "ann",
        }
        return Comparison(**(defaults | fields))


@pytest.fixture
def make() -> Make:
    return Make()


@pytest.fixture
def answered(store: Store, make: Make) -> Callable[..., Completion]:
    """Log an answer and return it."""

    def log(**fields: Any) -> Completion:
        completion = make.completion(**fields)
        store.append_completion(completion).result()
        return completion

    return log
