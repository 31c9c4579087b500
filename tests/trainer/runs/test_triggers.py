"""When a project is trained by itself."""

from collections.abc import Callable
from typing import Any

import pytest
from heedful_store import FeedbackEvent, PolicyVersion, Run, Scope, Store, Thumb, uuid7
from heedful_trainer.config import WatchSettings
from heedful_trainer.runs.triggers import Triggers


@pytest.fixture
def thumbs(store: Store, add_answer: Any) -> Callable[..., None]:
    def add(count: int, rater: str = "ann") -> None:
        for _ in range(count):
            event = FeedbackEvent(
                feedback_id=uuid7(),
                scope=Scope(),
                judgement=Thumb(True),
                rater_id=rater,
                completion_id=add_answer().completion_id,
            )
            store.append_feedback(event).result()

    return add


def look(store: Store, **settings: Any) -> list[Run]:
    watch = WatchSettings(**{"min_events": 5, "min_interval_s": 0, **settings})
    return Triggers(store, watch, "personal").look()


def finish(store: Store, run: Run, **changes: Any) -> None:
    leased = store.lease_run("w", 60_000).result()
    assert leased is not None
    store.update_run(run.run_id, "w", status="finished", **changes).result()


def test_enough_new_events_start_one_run(store: Store, thumbs: Any) -> None:
    thumbs(4)
    assert look(store) == []
    thumbs(1)
    (run,) = look(store)
    assert (run.kind, run.status) == ("refresh", "queued")
    assert look(store) == []  # it is not finished
    finish(store, run, to_log_seq=5)
    assert look(store) == []  # nothing is new
    thumbs(5)
    assert len(look(store)) == 1


def test_few_people_or_a_recent_run_make_it_wait(store: Store, thumbs: Any) -> None:
    thumbs(6)
    assert look(store, min_raters=2) == []
    thumbs(1, rater="bob")
    (run,) = look(store, min_raters=2)
    finish(store, run, to_log_seq=7)
    thumbs(6)
    assert look(store, min_interval_s=3600) == []


def test_after_long_enough_any_new_event_is_enough(store: Store, thumbs: Any) -> None:
    thumbs(5)
    (run,) = look(store)
    finish(store, run, to_log_seq=5)
    assert look(store, max_wait_s=1e-9) == []
    thumbs(1)
    assert len(look(store, max_wait_s=1e-9)) == 1


def test_a_tainted_champion_is_rebuilt_once(store: Store) -> None:
    version = PolicyVersion(
        scope=Scope(), version="v1", content_hash="a" * 64, base_id="tiny@1", path="x"
    )
    store.publish_policy(version).result()
    store.set_policy_state(Scope(), "v1", "champion").result()
    assert look(store) == []

    def taint(connection: Any) -> None:
        from heedful_store.registry_schema import policies

        connection.execute(policies.update().values(tainted_at_ms=1 << 41))

    store.write(taint).result()
    assert look(store, rebuild=False) == []
    (run,) = look(store)
    assert run.kind == "rebuild"


def test_between_two_polls_nothing_is_read(store: Store, thumbs: Any) -> None:
    triggers = Triggers(store, WatchSettings(min_events=1, min_interval_s=0), "personal")
    assert triggers.look() == []
    thumbs(3)
    assert triggers.look() == []
