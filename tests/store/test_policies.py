"""Versions, aliases and the deployment log."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from heedful_store import (
    AliasMoved,
    AlreadyExists,
    DatabaseOptions,
    Deployment,
    Invalid,
    NotFound,
    PolicyVersion,
    Scope,
    Store,
)
from heedful_store.registry_schema import policies
from sqlalchemy import update

BASE = "tiny@0123456789abcdef"
OTHER = Scope("other", "default")

Publish = Callable[..., PolicyVersion]


def a_policy(number: int, **fields: Any) -> PolicyVersion:
    defaults: dict[str, Any] = {
        "scope": Scope(),
        "version": "",
        "content_hash": f"{number:064x}",
        "base_id": BASE,
        "path": f"policies/default/default/{number}",
        "run_id": f"run-{number}",
    }
    return PolicyVersion(**(defaults | fields))


@pytest.fixture
def publish(store: Store) -> Publish:
    def run(number: int, **fields: Any) -> PolicyVersion:
        return store.publish_policy(a_policy(number, **fields)).result()

    return run


def move(store: Store, version: str | None, action: str = "promote", **fields: Any) -> Deployment:
    alias = fields.pop("alias", "champion")
    scope = fields.pop("scope", Scope())
    base = fields.pop("base_id", BASE)
    fields.setdefault("actor", "ann")
    return store.move_alias(scope, base, alias, version, action=action, **fields).result()


def state(store: Store, version: str) -> str:
    return store.get_policy(Scope(), version).state


def taint(store: Store, version: str) -> None:
    mark = update(policies).where(policies.c.version == version).values(tainted_at_ms=1)
    store.write(lambda c: c.execute(mark).rowcount).result()


def test_names_count_on_by_role_and_by_project(store: Store, publish: Publish) -> None:
    assert [publish(n).version for n in (1, 2)] == ["v1", "v2"]
    assert publish(3, role="reward").version == "r1"
    assert publish(4, version="v10").version == "v10"
    assert store.next_version(Scope()) == "v11"
    assert publish(5, scope=OTHER).version == "v1"
    assert [p.version for p in store.find_policies(OTHER)] == ["v1"]
    assert len(store.find_policies()) == 5


def test_publishing_is_idempotent_and_a_taken_name_is_refused(
    store: Store, publish: Publish
) -> None:
    first = publish(1, card={"pairs": 3}, method="dpo")
    assert publish(1, card={"pairs": 4}) == first
    assert store.get_policy(Scope(), "v1") == first
    assert (first.card, first.method, first.state) == ({"pairs": 3}, "dpo", "candidate")
    assert publish(1, role="reward").version == "r1"
    assert publish(1, run_id=None).version == "v2"
    assert publish(1, run_id=None).version == "v2"
    for taken in ("v1", "base"):
        with pytest.raises(AlreadyExists, match=taken):
            publish(7, version=taken)
    assert [d.action for d in store.deployments(Scope())] == ["publish"] * 3


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"content_hash": "abc"}, "content_hash"),
        ({"base_id": ""}, "base_id"),
        ({"path": "/etc"}, "path"),
        ({"path": "policies/../../x"}, "path"),
        ({"path": ""}, "path"),
    ],
)
def test_a_version_that_could_not_be_found_again_is_refused(
    publish: Publish, fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(Invalid) as caught:
        publish(1, **fields)
    assert caught.value.field == field


def test_versions_of_others_look_unknown(store: Store, publish: Publish) -> None:
    publish(1, scope=OTHER)
    with pytest.raises(NotFound):
        store.get_policy(Scope(), "v1")
    with pytest.raises(NotFound):
        store.set_policy_state(Scope(), "v1", "failed").result()
    with pytest.raises(NotFound):
        move(store, "v1")
    assert store.aliases(Scope(), BASE) == {}
    assert store.get_policy(OTHER, "v1").state == "candidate"


def test_a_verdict_keeps_the_card_unless_a_new_one_comes(store: Store, publish: Publish) -> None:
    publish(1, card={"a": 1})
    judged = store.set_policy_state(Scope(), "v1", "rejected", verdict="fail").result()
    assert (judged.state, judged.verdict, judged.card) == ("rejected", "fail", {"a": 1})
    card = {"b": {"c": [1, 2]}}
    assert store.set_policy_state(Scope(), "v1", "candidate", card=card).result().card == card


def test_a_promotion_moves_alias_states_and_log_together(store: Store, publish: Publish) -> None:
    publish(1)
    publish(2)
    first = move(store, "v1", verdict="approved", approved=True, evidence={"n": 8}, reason="why")
    assert (first.from_version, first.to_version, first.alias) == ("base", "v1", "champion")
    move(store, "v2", "canary", alias="challenger")
    assert state(store, "v2") == "challenger"
    second = move(store, "v2")
    assert (second.from_version, second.to_version) == ("v1", "v2")
    assert store.aliases(Scope(), BASE) == {"champion": "v2"}
    assert (state(store, "v1"), state(store, "v2")) == ("retired", "champion")
    log = store.deployments(Scope())
    assert [(d.action, d.to_version) for d in log] == [
        ("publish", "v1"),
        ("publish", "v2"),
        ("promote", "v1"),
        ("canary", "v2"),
        ("promote", "v2"),
    ]
    assert [d.deployment_id for d in log] == [1, 2, 3, 4, 5]
    assert log[2] == first
    assert (log[2].evidence, log[2].reason, log[2].approved) == ({"n": 8}, "why", True)
    assert store.deployments(Scope(), after_id=3, limit=1) == [log[3]]
    assert store.last_move(Scope(), BASE, "challenger") == log[3]


def test_a_refused_move_changes_nothing(store: Store, publish: Publish) -> None:
    publish(1)
    publish(2)
    move(store, "v1")
    before = store.deployments(Scope()), store.find_policies(), store.aliases(Scope(), BASE)
    with pytest.raises(AliasMoved, match="at v1, not at base"):
        move(store, "v2", expected_version="base")
    with pytest.raises(NotFound):
        move(store, "v9")
    after = store.deployments(Scope()), store.find_policies(), store.aliases(Scope(), BASE)
    assert after == before
    assert move(store, "v2", expected_version="v1").to_version == "v2"


def test_rejecting_a_challenger_takes_its_alias_away(store: Store, publish: Publish) -> None:
    publish(1)
    publish(2)
    move(store, "v1", "canary", alias="challenger")
    move(store, "v2", "canary", alias="challenger")
    assert (state(store, "v1"), state(store, "v2")) == ("candidate", "challenger")
    gone = move(store, None, "reject", alias="challenger")
    assert (gone.from_version, gone.to_version) == ("v2", "")
    assert state(store, "v2") == "rejected"
    assert store.aliases(Scope(), BASE) == {}


def test_a_roll_back_goes_to_the_newest_sound_champion(store: Store, publish: Publish) -> None:
    assert store.champion_before(Scope(), BASE) == "base"
    for number in (1, 2, 3, 4):
        publish(number)
        move(store, f"v{number}")
    assert store.champion_before(Scope(), BASE) == "v3"
    taint(store, "v3")
    assert store.champion_before(Scope(), BASE) == "v2"
    back = move(store, "v2", "roll_back")
    assert (back.from_version, back.to_version) == ("v4", "v2")
    assert (state(store, "v2"), state(store, "v4")) == ("champion", "rejected")
    assert store.champion_before(Scope(), BASE) == "v1"
    move(store, "v1", "roll_back")
    assert store.champion_before(Scope(), BASE) == "base"
    last = move(store, "base", "roll_back")
    assert last.to_version == "base"
    assert store.aliases(Scope(), BASE) == {}
    assert state(store, "v1") == "rejected"


def test_a_base_that_was_champion_in_between_is_a_roll_back_target(
    store: Store, publish: Publish
) -> None:
    for number in (1, 2):
        publish(number)
    move(store, "v1")
    move(store, "base", "roll_back")
    move(store, "v2")
    assert store.champion_before(Scope(), BASE) == "base"


def test_aliases_are_per_base_and_per_project(store: Store, publish: Publish) -> None:
    publish(1)
    publish(2, base_id="new@1")
    publish(3, scope=OTHER)
    move(store, "v1")
    move(store, "v2", base_id="new@1")
    move(store, "v1", scope=OTHER)
    assert store.aliases(Scope(), BASE) == {"champion": "v1"}
    assert store.aliases(Scope(), "new@1") == {"champion": "v2"}
    assert store.champion_before(Scope(), "new@1") == "base"
    versions, aliases = store.registry(BASE)
    assert {(p.scope, p.version) for p in versions} == {
        (Scope(), "v1"),
        (Scope(), "v2"),
        (OTHER, "v1"),
    }
    assert aliases == {Scope(): {"champion": "v1"}, OTHER: {"champion": "v1"}}


def test_the_mark_changes_with_every_deployment_and_every_taint(
    store: Store, publish: Publish
) -> None:
    marks = [store.registry_mark()]
    publish(1)
    marks.append(store.registry_mark())
    move(store, "v1")
    marks.append(store.registry_mark())
    taint(store, "v1")
    marks.append(store.registry_mark())
    assert len(set(marks)) == 4
    assert store.last_deployment_id() == 2


def test_a_rejection_without_an_alias_is_logged(store: Store, publish: Publish) -> None:
    publish(1)
    entry = Deployment(scope=Scope(), base_id=BASE, action="reject", to_version="v1", actor="gate")
    assert store.record_deployment(entry).result().deployment_id == 2
    again = Deployment(scope=Scope(), base_id=BASE, action="publish", to_version="v1")
    assert store.record_deployment(again).result().deployment_id == 1
    assert store.last_deployment_id() == 2


def test_two_processes_that_promote_at_once_leave_one_line_of_champions(url: str) -> None:
    with (
        Store(url, database=DatabaseOptions(min_free_bytes=0)) as store,
        Store(url, database=DatabaseOptions(min_free_bytes=0)) as second,
    ):
        for number in (1, 2):
            store.publish_policy(a_policy(number)).result()

        def promote(at: Store, version: str) -> None:
            for _ in range(10):
                move(at, version)

        threads = [
            threading.Thread(target=promote, args=(store, "v1")),
            threading.Thread(target=promote, args=(second, "v2")),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        log = [d for d in store.deployments(Scope()) if d.action == "promote"]
        assert [d.deployment_id for d in log] == list(range(3, 23))
        at = "base"
        for entry in log:
            assert entry.from_version == at
            at = entry.to_version
        assert store.aliases(Scope(), BASE) == {"champion": at}
        assert sorted(p.state for p in store.find_policies()) == ["champion", "retired"]
