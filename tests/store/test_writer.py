import asyncio
import fcntl
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from heedful_store import (
    Correction,
    DatabaseOptions,
    Failpoints,
    FeedbackFilter,
    GroupReport,
    NotFound,
    Scope,
    Store,
    StoreBusy,
    StoreClosed,
    StoreDead,
    StoreFault,
    StoreLocked,
    StoreUnavailable,
    WriterOptions,
)
from sqlalchemy import text

IMPATIENT = DatabaseOptions(lock_timeout_s=0.2, min_free_bytes=0)


def names(store: Store) -> set[str]:
    return {stored.feedback_id for stored in store.list_feedback(FeedbackFilter(), limit=9999)}


async def test_writes_that_arrive_together_share_a_commit(store: Store, make) -> None:
    answer = make.completion()
    await store.append_completion(answer)
    before = store.stats.groups
    events = [make.event(completion_id=answer.completion_id, rater_id=f"r{i}") for i in range(200)]
    receipts = await asyncio.gather(*[store.append_feedback(event) for event in events])
    assert [receipt.feedback_id for receipt in receipts] == [e.feedback_id for e in events]
    assert [receipt.seq for receipt in receipts] == list(range(1, 201))
    assert store.stats.groups - before <= 5
    assert store.stats.largest_group_items >= 50


async def test_an_event_loop_is_woken_once_for_a_group(
    store: Store, make, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, wakings = asyncio.get_running_loop(), []
    original = loop.call_soon_threadsafe

    def count(*arguments, **keywords):
        wakings.append(arguments)
        return original(*arguments, **keywords)

    before = store.stats.groups
    monkeypatch.setattr(loop, "call_soon_threadsafe", count)
    await asyncio.gather(*[store.append_completion(make.completion()) for _ in range(50)])
    assert len(wakings) == store.stats.groups - before


async def test_a_cancelled_wait_does_not_undo_the_write(store: Store, make) -> None:
    logged = make.completion()
    waiting = asyncio.ensure_future(_wait(store.append_completion(logged)))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert waiting.cancelled()
    assert await store.append_completion(logged) is False


async def _wait(ack):
    return await ack


async def test_an_ack_made_in_a_loop_cannot_block_it(store: Store, make) -> None:
    ack = store.append_completion(make.completion())
    with pytest.raises(RuntimeError, match="await it"):
        ack.result()
    assert await ack is True


async def test_an_ack_made_in_a_thread_can_be_awaited(store: Store, make) -> None:
    ack = await asyncio.to_thread(store.append_completion, make.completion())
    assert await ack is True


async def test_one_bad_item_fails_alone(store: Store, make) -> None:
    answer = make.completion()
    await store.append_completion(answer)
    events = [make.event(completion_id=answer.completion_id, rater_id=f"r{i}") for i in range(5)]
    # A lone surrogate is no text for either database, and no rule of ours refuses it.
    events[2] = make.event(completion_id=answer.completion_id, judgement=Correction("\ud800"))
    outcomes = await asyncio.gather(
        *[store.append_feedback(event) for event in events], return_exceptions=True
    )
    assert [isinstance(outcome, Exception) for outcome in outcomes] == [i == 2 for i in range(5)]
    assert isinstance(outcomes[2], StoreFault)
    assert names(store) == {e.feedback_id for i, e in enumerate(events) if i != 2}


def test_a_body_that_fails_is_rolled_back(store: Store) -> None:
    def fail(error: Exception) -> Callable[..., None]:
        def body(connection) -> None:
            connection.execute(text("UPDATE counters SET value = 99 WHERE name = 'feedback'"))
            raise error

        return body

    with pytest.raises(NotFound):
        store.write(fail(NotFound("x"))).result()
    with pytest.raises(StoreFault, match="KeyError"):
        store.write(fail(KeyError("x"))).result()
    with store.read() as connection:
        query = text("SELECT value FROM counters WHERE name = 'feedback'")
        assert connection.execute(query).scalar_one() == 0


def test_a_full_queue_refuses_at_once(url: str, make) -> None:
    release = threading.Event()
    with Store(url, writer=WriterOptions(queue_items=2)) as store:
        first = store.write(lambda _: release.wait(10))
        while store.queued_items:
            time.sleep(0.001)
        waiting = [store.append_completion(make.completion()) for _ in range(2)]
        with pytest.raises(StoreBusy):
            store.append_completion(make.completion())
        release.set()
        assert first.result() is True
        assert [ack.result() for ack in waiting] == [True, True]


def test_closing_writes_what_waits_and_refuses_what_comes_later(url: str, make) -> None:
    store = Store(url)
    acks = [store.append_completion(make.completion()) for _ in range(20)]
    store.close()
    store.close()
    assert [ack.result(timeout_s=0) for ack in acks] == [True] * 20
    with pytest.raises(StoreClosed):
        store.append_completion(make.completion())


def test_a_failure_after_the_commit_is_never_acknowledged_and_ends_the_writer(
    url: str, make
) -> None:
    logged = make.completion()
    traps = Failpoints("after_commit=2:raise")
    with Store(url, failpoints=traps) as store:
        store.append_completion(make.completion()).result()
        with pytest.raises(StoreDead):
            store.append_completion(logged).result()
        assert store.death == "after_commit"
        with pytest.raises(StoreDead):
            store.append_completion(make.completion())
        with store.read() as connection:
            assert connection.execute(text("SELECT count(*) FROM completions")).scalar_one() == 2
    with Store(url) as store:
        assert store.append_completion(logged).result() is False


def test_a_failure_before_the_commit_costs_one_item_at_most(url: str, make) -> None:
    with Store(url, failpoints=Failpoints("before_commit=2:raise")) as store:
        first, second = make.completion(), make.completion()
        store.append_completion(first).result()
        with pytest.raises(StoreFault, match="before_commit"):
            store.append_completion(second).result()
        assert store.append_completion(second).result() is True


def test_the_observer_sees_every_group_and_cannot_harm_the_writer(url: str, make) -> None:
    reports: list[GroupReport] = []

    def observe(report: GroupReport) -> None:
        reports.append(report)
        raise ValueError("metrics are down")

    with Store(url, observer=observe) as store:
        for _ in range(3):
            store.append_completion(make.completion()).result()
    assert sum(report.items for report in reports) == 3
    assert all(report.commit_s > 0 and report.failure is None for report in reports)


def test_a_locked_sqlite_database_is_a_bounded_wait_then_works_again(
    sqlite_url: str, tmp_path: Path, make
) -> None:
    with Store(sqlite_url, database=IMPATIENT) as store:
        other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        started_s = time.monotonic()
        with pytest.raises(StoreLocked):
            store.append_completion(make.completion()).result()
        assert 0.1 < time.monotonic() - started_s < 5
        assert store.death is None
        other.execute("ROLLBACK")
        other.close()
        assert store.append_completion(make.completion()).result() is True


def test_two_processes_take_turns_through_the_lock_file(
    sqlite_url: str, tmp_path: Path, make
) -> None:
    with Store(sqlite_url, database=IMPATIENT) as store:
        descriptor = os.open(tmp_path / "store.db-writer", os.O_RDWR)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(StoreLocked):
            store.append_completion(make.completion()).result()
        os.close(descriptor)
        assert store.append_completion(make.completion()).result() is True


def test_a_lost_postgres_connection_is_unavailable_and_then_reconnected(
    postgres_url: str, make
) -> None:
    with Store(postgres_url) as store:
        pid = store.write(lambda c: c.exec_driver_sql("SELECT pg_backend_pid()").scalar()).result()
        with store.read() as connection:
            connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        logged = make.completion()
        with pytest.raises(StoreUnavailable):
            store.append_completion(logged).result()
        assert store.death is None
        assert store.append_completion(logged).result() is True


def test_a_locked_postgres_log_is_a_bounded_wait(postgres_url: str, make) -> None:
    with Store(postgres_url, database=IMPATIENT) as store, Store(postgres_url) as other:
        answer = make.completion()
        store.append_completion(answer).result()
        event = make.event(completion_id=answer.completion_id)
        locked, release = threading.Event(), threading.Event()

        def hold(connection) -> None:
            connection.execute(text("SELECT value FROM counters FOR UPDATE"))
            locked.set()
            release.wait(10)

        holding = other.write(hold)
        locked.wait(10)
        with pytest.raises(StoreLocked):
            store.append_feedback(event).result()
        release.set()
        holding.result()
        assert store.append_feedback(event).result().duplicate is False


def test_readers_never_skip_an_event_of_a_slow_committer(url: str, make) -> None:
    slow_traps = Failpoints("before_commit=*:sleep_15")
    seen: list[int] = []
    finished = threading.Event()

    def follow(store: Store) -> None:
        last_round = False
        while not last_round:
            last_round = finished.is_set()
            cursor = seen[-1] if seen else 0
            seen.extend(s.log_seq for s in store.feedback_since(Scope(), cursor) if s.log_seq)

    with Store(url, failpoints=slow_traps) as slow, Store(url) as fast:
        answer = make.completion()
        fast.append_completion(answer).result()
        reader = threading.Thread(target=follow, args=(fast,))
        reader.start()
        accepted: list[int] = []
        writers = [
            threading.Thread(target=_write_some, args=(store, answer.completion_id, make, accepted))
            for store in (slow, fast)
            for _ in range(3)
        ]
        for thread in writers:
            thread.start()
        for thread in writers:
            thread.join()
        finished.set()
        reader.join()
    assert len(accepted) == 90
    assert seen == sorted(accepted)


def _write_some(store: Store, answer: str, make, accepted: list[int]) -> None:
    for _ in range(15):
        event = make.event(completion_id=answer, rater_id=f"r{threading.get_ident()}")
        accepted.append(store.append_feedback(event).result().seq)


def test_readers_see_one_instant_and_are_bounded(url: str, make) -> None:
    options = DatabaseOptions(readers=2, lock_timeout_s=0.1, min_free_bytes=0)
    query = text("SELECT count(*) FROM completions")
    with Store(url, database=options) as store, ExitStack() as held:
        connection = held.enter_context(store.read())
        before = connection.execute(query).scalar_one()
        store.append_completion(make.completion()).result()
        assert connection.execute(query).scalar_one() == before
        held.enter_context(store.read())
        with pytest.raises(StoreBusy, match="reading"):
            held.enter_context(store.read())


def test_importing_the_store_loads_neither_torch_nor_grpc() -> None:
    heavy = ("torch", "grpc", "transformers", "alembic", "numpy")
    script = f"import sys, heedful_store; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.strip() == "[]"
