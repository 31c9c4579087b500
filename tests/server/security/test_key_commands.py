"""The commands that make, list and revoke API keys, on a store of their own."""

import json
from pathlib import Path

import pytest
from heedful_server.config import load_config, to_toml
from heedful_server.errors import InvalidConfig, StartupError
from heedful_server.main import app
from heedful_store import Store
from typer.testing import CliRunner, Result


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str) -> Result:
        free = ["--set", "feedback.reserve_bytes=0"]
        return CliRunner().invoke(app, ["keys", *arguments, "--home", str(tmp_path), *free])

    return invoke


@pytest.fixture
def store(tmp_path: Path):
    """The same store, held open as a server does."""
    with Store(f"sqlite:///{tmp_path / 'heedful.db'}") as store:
        yield store


def test_made_key_is_valid_and_its_secret_is_shown_once(run, store):
    made = run("create", "--tenant", "acme", "--scope", "generate", "--scope", "erase")
    secret = made.stdout.strip()
    key = store.verify_key(secret)
    assert key is not None
    assert (key.scope.tenant, key.scope.project) == ("acme", "")
    assert key.scopes == {"generate", "erase"}
    listed = run("list").stdout
    assert key.key_id in listed
    assert secret not in listed
    assert secret.rpartition("_")[2] not in run("list", "--json").stdout


def test_json_holds_all_of_a_new_key(run, store):
    made = json.loads(
        run(
            *("create", "--scope", "admin", "--project", "app", "--name", "bot"),
            *("--expires-days", "1", "--json"),
        ).stdout
    )
    assert store.verify_key(made["secret"]).key_id == made["key_id"]
    assert (made["tenant"], made["project"], made["name"]) == ("local", "app", "bot")
    assert made["expires_at_ms"] - made["created_at_ms"] == pytest.approx(86_400_000, abs=10_000)
    (listed,) = json.loads(run("list", "--json").stdout)
    assert listed == {name: value for name, value in made.items() if name != "secret"}


def test_revoked_key_is_listed_as_such_and_no_longer_valid(run, store):
    made = json.loads(run("create", "--tenant", "acme", "--scope", "train", "--json").stdout)
    done = run("revoke", made["key_id"])
    assert done.exit_code == 0
    assert store.verify_key(made["secret"]) is None
    assert "revoked" in run("list", "--tenant", "acme").stdout
    assert json.loads(run("list", "--tenant", "other", "--json").stdout) == []


def test_unknown_scope_is_refused_and_the_scopes_are_named(run):
    result = run("create", "--scope", "everything")
    assert isinstance(result.exception, InvalidConfig)
    assert "feedback:any" in str(result.exception)


@pytest.mark.parametrize("option", ["--tenant", "--project"])
@pytest.mark.parametrize("name", ["..", "a/b", ".hidden", "x" * 129, "two words"])
def test_a_name_that_cannot_be_part_of_a_path_is_refused(run, store, option, name):
    refused = run("create", option, name, "--scope", "generate")
    assert isinstance(refused.exception, InvalidConfig)
    assert str(refused.exception).startswith(f"{option}: must be letters")
    assert store.list_keys(name) == []


def test_unknown_key_is_refused(run):
    result = run("revoke", "none")
    assert isinstance(result.exception, StartupError)
    assert "'none'" in str(result.exception)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:hunter2@db/heedful",
        "postgresql://me:hun/ter@hunter2@db:5432/heedful",
        "postgresql://db/heedful?user=me&password=hunter2&sslmode=require",
    ],
)
def test_shown_configuration_masks_the_password_of_the_store(url):
    text = to_toml(load_config(None, {}, [("feedback.store_url", url)]))
    assert "hunter2" not in text
    assert "***" in text
    assert "db" in text
