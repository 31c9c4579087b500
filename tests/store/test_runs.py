"""Runs and their leases, by a clock that the test turns."""

from collections.abc import Iterator
from typing import Any

import pytest
from heedful_store import (
    AlreadyExists,
    DatabaseOptions,
    Invalid,
    LeaseLost,
    NotFound,
    Run,
    RunInput,
    Scope,
    Store,
)

OTHER = Scope("default", "other")
LEASE_MS = 1000


class Clock:
    def __init__(self) -> None:
        self.at_ms = 1_000_000

    def __call__(self) -> int:
        return self.at_ms


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(url: str, clock: Clock) -> Iterator[Store]:
    with Store(url, database=DatabaseOptions(min_free_bytes=0), clock=clock) as opened:
        yield opened


def create(store: Store, run_id: str = "run-1", **fields: Any) -> Run:
    return store.create_run(Run(run_id=run_id, **({"scope": Scope()} | fields))).result()


def lease(store: Store, owner: str = "worker", scope: Scope | None = None) -> Run | None:
    return store.lease_run(owner, LEASE_MS, scope).result()


def test_a_run_comes_back_as_it_was_created(store: Store, clock: Clock) -> None:
    made = create(store, kind="rebuild", method="dpo", config={"dpo.beta": "0.1"}, seeds={"a": 1})
    assert made == store.get_run(Scope(), "run-1") == store.find_runs(Scope())[0]
    assert (made.kind, made.method, made.status, made.stage) == (
        "rebuild",
        "dpo",
        "queued",
        "snapshot",
    )
    assert (made.config, made.seeds, made.evidence) == ({"dpo.beta": "0.1"}, {"a": 1}, {})
    assert made.created_at_ms == clock.at_ms
    with pytest.raises(NotFound):
        store.get_run(OTHER, "run-1")


def test_a_project_has_one_unfinished_run(store: Store) -> None:
    create(store)
    with pytest.raises(AlreadyExists, match="run-1"):
        create(store, "run-2")
    create(store, "run-3", scope=OTHER)
    lease(store)
    store.update_run("run-1", "worker", status="finished").result()
    create(store, "run-2")
    assert [run.run_id for run in store.find_runs(Scope(), 1)] == ["run-2"]
    assert {run.run_id for run in store.find_runs()} == {"run-1", "run-2", "run-3"}


def test_one_worker_has_a_run_until_its_lease_lapses(store: Store, clock: Clock) -> None:
    create(store)
    mine = lease(store, "a")
    assert mine is not None
    assert (mine.status, mine.lease_owner) == ("running", "a")
    assert mine.lease_until_ms == clock.at_ms + LEASE_MS
    assert lease(store, "b") is None
    clock.at_ms += LEASE_MS - 1
    assert lease(store, "b") is None
    store.renew_run("run-1", "a", LEASE_MS).result()
    clock.at_ms += LEASE_MS - 1
    assert lease(store, "b") is None
    clock.at_ms += 1
    theirs = lease(store, "b")
    assert theirs is not None
    assert theirs.lease_owner == "b"
    for late in (
        store.renew_run("run-1", "a", LEASE_MS),
        store.update_run("run-1", "a", stage="reward"),
        store.put_run_inputs("run-1", "a", []),
    ):
        with pytest.raises(LeaseLost, match="held by b"):
            late.result()
    assert store.get_run(Scope(), "run-1").stage == "snapshot"


def test_a_lapsed_lease_that_nobody_took_is_still_its_holders(store: Store, clock: Clock) -> None:
    create(store)
    lease(store)
    clock.at_ms += 10 * LEASE_MS
    assert store.update_run("run-1", "worker", stage="reward").result().stage == "reward"
    assert store.renew_run("run-1", "worker", LEASE_MS).result().lease_owner == "worker"


def test_the_oldest_run_comes_first_and_a_scope_narrows(store: Store, clock: Clock) -> None:
    create(store, "run-2")
    clock.at_ms += 1
    create(store, "run-1", scope=OTHER)
    assert lease(store, "a", OTHER).run_id == "run-1"
    assert lease(store, "b").run_id == "run-2"
    assert lease(store, "c") is None


def test_changes_merge_evidence_and_end_the_lease_with_the_run(store: Store, clock: Clock) -> None:
    create(store)
    lease(store)
    store.update_run(
        "run-1",
        "worker",
        stage="reward",
        dataset_id="d",
        to_log_seq=9,
        method="kto",
        evidence={"snapshot": {"events": 3}},
        progress={"fraction": 0.5, "figures": {"loss": 0.6}},
    ).result()
    clock.at_ms += 5
    done = store.update_run(
        "run-1",
        "worker",
        stage="done",
        status="finished",
        evidence={"reward": {"accuracy": 0.7}},
        verdict="pass",
        policy_version="v1",
    ).result()
    assert done.evidence == {"snapshot": {"events": 3}, "reward": {"accuracy": 0.7}}
    assert done.progress == {"fraction": 0.5, "figures": {"loss": 0.6}}
    assert (done.method, done.to_log_seq, done.verdict, done.policy_version) == (
        "kto",
        9,
        "pass",
        "v1",
    )
    assert (done.finished_at_ms, done.lease_owner) == (clock.at_ms, None)
    with pytest.raises(LeaseLost, match="finished"):
        store.update_run("run-1", "worker", stage="policy").result()
    assert lease(store) is None


def test_a_worker_is_told_to_pause_and_to_go_on(store: Store, clock: Clock) -> None:
    create(store)
    lease(store)
    store.control_run(Scope(), "run-1", "pause").result()
    assert store.renew_run("run-1", "worker", LEASE_MS).result().control == "pause"
    store.update_run("run-1", "worker", status="paused").result()
    assert store.control_run(Scope(), "run-1", "").result().status == "paused"
    assert store.renew_run("run-1", "worker", LEASE_MS).result().control == ""
    store.update_run("run-1", "worker", status="running").result()
    clock.at_ms += LEASE_MS
    assert lease(store, "b").run_id == "run-1"


def test_a_paused_run_whose_worker_died_waits_and_is_queued_again(
    store: Store, clock: Clock
) -> None:
    create(store)
    lease(store)
    store.control_run(Scope(), "run-1", "pause").result()
    clock.at_ms += LEASE_MS
    assert lease(store, "b") is None
    assert store.control_run(Scope(), "run-1", "").result().status == "queued"
    assert lease(store, "b").run_id == "run-1"


def test_a_run_that_nobody_works_on_is_controlled_at_once(store: Store, clock: Clock) -> None:
    create(store)
    assert store.control_run(Scope(), "run-1", "pause").result().status == "paused"
    assert lease(store) is None
    assert store.control_run(Scope(), "run-1", "").result().status == "queued"
    stopped = store.control_run(Scope(), "run-1", "stop").result()
    assert (stopped.status, stopped.finished_at_ms) == ("stopped", clock.at_ms)
    with pytest.raises(Invalid, match="stopped"):
        store.control_run(Scope(), "run-1", "").result()
    with pytest.raises(NotFound):
        store.control_run(OTHER, "run-1", "stop").result()


def test_inputs_are_replaced_as_a_whole(store: Store) -> None:
    create(store)
    lease(store)
    store.put_run_inputs("run-1", "worker", [RunInput(1, "train"), RunInput(2, "gate")]).result()
    rows = [RunInput(2, "excluded", "rater_cap"), RunInput(3, "train")]
    for _ in range(2):
        assert store.put_run_inputs("run-1", "worker", rows).result() == 2
    assert store.run_inputs("run-1") == rows
    assert store.put_run_inputs("run-1", "worker", []).result() == 0
    assert store.run_inputs("run-1") == []


@pytest.mark.parametrize(("owner", "lease_ms", "field"), [("", 1, "owner"), ("a", 0, "lease_ms")])
def test_a_lease_needs_an_owner_and_a_length(
    store: Store, owner: str, lease_ms: int, field: str
) -> None:
    with pytest.raises(Invalid) as caught:
        store.lease_run(owner, lease_ms).result()
    assert caught.value.field == field
