"""Small parts of the feedback layer: bounded memories, derived ids, the rotate command."""

import json
import stat

import pytest
from heedful_server.feedback.importing import derived_id
from heedful_server.feedback.recent import Recent, RecentAnswers
from heedful_server.main import app
from heedful_store import Scope, is_uuid7
from typer.testing import CliRunner


def test_a_memory_is_bounded_and_forgets_the_oldest():
    recent: Recent[int] = Recent(most=2)
    for value, key in enumerate("abc"):
        recent.put(key, value)
    assert "a" not in recent
    assert (recent["b"], recent["c"]) == (1, 2)


def test_an_unlogged_answer_is_known_within_its_scope_only():
    recent = RecentAnswers()
    recent.unlogged.put("x", Scope("t", "p"))
    assert recent.is_unlogged(Scope("t", "p"), "x")
    assert not recent.is_unlogged(Scope("t", "q"), "x")
    assert not recent.is_unlogged(Scope("t", "p"), "y")


def test_derived_ids_are_stable_and_differ_in_every_name():
    names = [
        (Scope("t", "p"), "file", "1", "0"),
        (Scope("u", "p"), "file", "1", "0"),
        (Scope("t", "q"), "file", "1", "0"),
        (Scope("t", "p"), "fil", "e1", "0"),
        (Scope("t", "p"), "file", "2", "0"),
        (Scope("t", "p"), "file", "1", "feedback"),
    ]
    ids = [derived_id(*name) for name in names]
    assert ids == [derived_id(*name) for name in names]
    assert len(set(ids)) == len(ids)
    assert all(is_uuid7(id) for id in ids)


@pytest.mark.parametrize("times", [1, 2])
def test_the_command_adds_a_key(tmp_path, times):
    for _ in range(times):
        result = CliRunner().invoke(app, ["tokens", "rotate", "--home", str(tmp_path)])
        assert result.exit_code == 0, result.output
    path = tmp_path / "token_keys.json"
    keys = json.loads(path.read_text())["keys"]
    # The first start made one; each rotation adds one and drops none that may still verify.
    assert len(keys) == 1 + times
    assert keys[-1]["kid"] in result.output
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keys[-1]["secret"] not in result.output
