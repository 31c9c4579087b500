"""Completion tokens and their keys."""

import json
import stat
import time
from os.path import commonpath

import pytest
from heedful_server.errors import InvalidRequest, RequestError, StartupError
from heedful_server.feedback import token_keys
from heedful_server.feedback.access import claims_of, scope_of
from heedful_server.feedback.tokens import BadToken, Tokens
from heedful_server.identity import FEEDBACK_OWN, LOCAL_CALLER, Caller
from heedful_store import NotFound, Scope, uuid7

OWN = Caller("t1", "k", frozenset({FEEDBACK_OWN}))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "home" / "token_keys.json"


def sign(tokens: Tokens, id: str, **fields: str) -> str:
    names = {"tenant": "t1", "project": "p", "end_user": "ann", "policy_version": "v7"} | fields
    return tokens.sign("completion", id, **names)


def test_a_token_says_what_was_signed(path):
    tokens, id = Tokens(path, 90), uuid7()
    claims = tokens.verify(sign(tokens, id))
    assert (claims.kind, claims.id, claims.tenant) == ("completion", id, "t1")
    assert (claims.end_user, claims.policy_version) == ("ann", "v7")
    assert claims.expires_at_s == pytest.approx(time.time() + 90 * 86_400, abs=5)


def test_a_token_shows_none_of_it(path):
    tokens, id = Tokens(path, 90), uuid7()
    one, other = sign(tokens, id), sign(tokens, id, policy_version="v8")
    assert one.startswith("v1.")
    assert one.count(".") == 2
    common = commonpath([one, other])
    # Version and key id only: not even whether two candidates share a policy can be seen.
    assert len(common) < len("v1.00000000.") + 8


def test_the_keys_are_private_and_outlive_a_restart(path):
    token = sign(Tokens(path, 90), "x")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Tokens(path, 90).verify(token).id == "x"


@pytest.mark.parametrize("at", [0, 1, 4, 15, 30, -1])
def test_a_token_changed_anywhere_is_refused(path, at):
    tokens = Tokens(path, 90)
    token = sign(tokens, uuid7())
    position = at if at >= 0 else len(token) // 2
    changed = "A" if token[position] != "A" else "B"
    with pytest.raises(BadToken):
        tokens.verify(token[:position] + changed + token[position + 1 :])


@pytest.mark.parametrize("text", ["x", "v1", "v1..", "v1.a.b", "....", "v1.é.é", "v1." * 1000])
def test_text_that_is_no_token_is_refused(path, text):
    with pytest.raises(BadToken, match="not a token"):
        Tokens(path, 90).verify(text)


def test_a_token_of_another_server_is_refused(path, tmp_path):
    with pytest.raises(BadToken):
        Tokens(path, 90).verify(sign(Tokens(tmp_path / "other.json", 90), "x"))


def test_a_token_expires(path, monkeypatch):
    tokens = Tokens(path, 1)
    token = sign(tokens, "x")
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + 86_399 - 1)
    tokens.verify(token)
    monkeypatch.setattr(time, "time", lambda: now_s + 86_401)
    with pytest.raises(BadToken, match="expired"):
        tokens.verify(token)


def test_rotation_signs_with_the_new_key_and_keeps_verifying(path):
    tokens = Tokens(path, 90)
    old = sign(tokens, "x")
    key = token_keys.rotate(path, 90)
    from_elsewhere = sign(Tokens(path, 90), "y")
    assert tokens.verify(from_elsewhere).id == "y", "an unknown key id is looked up in the file"
    assert sign(tokens, "z").split(".")[1] == key.kid
    assert tokens.verify(old).id == "x"


def test_rotation_drops_keys_whose_tokens_have_all_expired(path):
    Tokens(path, 90)
    content = json.loads(path.read_text())
    content["keys"][0]["created_at_s"] -= 200 * 86_400
    middle = dict(content["keys"][0], kid="middle")
    middle["created_at_s"] += 50 * 86_400
    content["keys"].append(middle)
    path.write_text(json.dumps(content))
    new = token_keys.rotate(path, 90)
    assert [key.kid for key in token_keys.load(path)] == ["middle", new.kid]


@pytest.mark.parametrize("text", ["", "{}", '{"keys": []}', '{"keys": [{"kid": "a"}]}', "[1]"])
def test_a_damaged_key_file_is_an_error_of_the_start(path, text):
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(StartupError, match="does not hold token keys"):
        Tokens(path, 90)


def test_a_token_is_needed_without_the_scope_for_any(path):
    tokens, scope = Tokens(path, 90), Scope("t1", "p")
    with pytest.raises(InvalidRequest, match="completion_token"):
        claims_of(tokens, "completion", "", "x", "event.completion_token", OWN, scope)
    assert claims_of(tokens, "completion", "", "x", "f", LOCAL_CALLER, scope) is None


@pytest.mark.parametrize(
    "fields", [{"tenant": "t2"}, {"project": "q"}, {"id": "other"}, {"kind": "comparison"}]
)
def test_a_genuine_token_for_something_else_looks_like_an_unknown_thing(path, fields):
    tokens = Tokens(path, 90)
    names = {"kind": "completion", "id": "x", "tenant": "t1", "project": "p", "end_user": ""}
    names |= fields
    token = tokens.sign(names.pop("kind"), names.pop("id"), **names)
    with pytest.raises(NotFound) as caught:
        claims_of(tokens, "completion", token, "x", "f", OWN, Scope("t1", "p"))
    assert "token" not in str(caught.value)


def test_projects_of_a_caller():
    bound = Caller("t", "k", frozenset(), project="app")
    assert scope_of(LOCAL_CALLER, "") == Scope("local", "default")
    assert scope_of(bound, "") == scope_of(bound, "app") == Scope("t", "app")
    assert scope_of(LOCAL_CALLER, "demo-brief") == Scope("local", "demo-brief")
    with pytest.raises(RequestError, match="no project 'other'"):
        scope_of(bound, "other")


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "a b", "a\n", "x" * 129, "é"])
def test_a_project_is_named_so_that_its_name_can_be_a_directory(name):
    with pytest.raises(InvalidRequest) as caught:
        scope_of(LOCAL_CALLER, name)
    assert caught.value.field == "project"
