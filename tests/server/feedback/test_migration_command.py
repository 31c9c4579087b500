"""`heedful-server migrate-base` on a store of its own."""

import json
from pathlib import Path

import pytest
from heedful_server.main import app
from heedful_store import (
    Completion,
    CompletionPayload,
    DatabaseOptions,
    FeedbackEvent,
    Scope,
    Store,
    Thumb,
    now_ms,
    uuid7,
)
from typer.testing import CliRunner, Result


@pytest.fixture
def run(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str) -> Result:
        options = ["--to", str(tiny_model_dir), "--home", str(tmp_path)]
        return CliRunner().invoke(app, ["migrate-base", *options, *arguments])

    return invoke


@pytest.fixture
def two_projects(tmp_path: Path) -> None:
    options = DatabaseOptions(min_free_bytes=0)
    with Store(f"sqlite:///{tmp_path / 'heedful.db'}", database=options) as store:
        for project in ("app", "default"):
            scope = Scope("local", project)
            answer = Completion(
                completion_id=uuid7(),
                scope=scope,
                policy_version="base",
                created_at_ms=now_ms(),
                base_id="old@1",
                payload=CompletionPayload([1], [2], prompt_text="p", completion_text="c"),
            )
            store.append_completion(answer).result()
            event = FeedbackEvent(
                feedback_id=uuid7(),
                scope=scope,
                judgement=Thumb(True),
                completion_id=answer.completion_id,
            )
            store.append_feedback(event).result()


@pytest.mark.usefixtures("two_projects")
def test_every_project_is_carried_and_a_repetition_finds_it_there(run):
    done = run()
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[:2] == ["app: 1 copied", "default: 1 copied"]
    assert lines[2].startswith("base: tiny-llama@")
    assert "app: 0 copied, 1 there before" in run().stdout


@pytest.mark.usefixtures("two_projects")
def test_one_project_dry_as_json(run):
    document = json.loads(run("--project", "app", "--dry-run", "--json").stdout)
    assert document["dry_run"] is True
    assert [(item["project"], item["copied"]) for item in document["projects"]] == [("app", 1)]
    assert "1 copied" in run("--project", "app").stdout


def test_an_empty_store_has_nothing_to_carry(run):
    assert run().stdout == "there is no feedback to carry\n"
