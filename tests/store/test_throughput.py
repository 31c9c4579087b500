"""Prints how many durable events a second one process appends; asserts only that all are there."""

import asyncio
import time

import pytest
from heedful_store import FeedbackFilter, Store

WRITERS, EACH = 64, 30


async def test_print_the_rate_of_acknowledged_events(
    store: Store, make, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [make.completion() for _ in range(WRITERS)]
    await asyncio.gather(*[store.append_completion(answer) for answer in answers])
    waits_s: list[float] = []

    async def write(writer: int) -> None:
        for _ in range(EACH):
            event = make.event(completion_id=answers[writer].completion_id, rater_id=f"r{writer}")
            started_s = time.perf_counter()
            await store.append_feedback(event)
            waits_s.append(time.perf_counter() - started_s)

    started_s, cpu_s, groups = time.perf_counter(), time.process_time(), store.stats.groups
    await asyncio.gather(*[write(writer) for writer in range(WRITERS)])
    wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
    count = WRITERS * EACH
    waits_s.sort()
    with capsys.disabled():
        print(
            f"\n{count / wall_s:.0f} events/s from {WRITERS} tasks, "
            f"{cpu_s / count * 1e6:.0f} us CPU each, {store.stats.groups - groups} groups, "
            f"p50 {waits_s[count // 2] * 1e3:.1f} ms, p99 {waits_s[count * 99 // 100] * 1e3:.1f} ms"
        )
    assert len(store.list_feedback(FeedbackFilter(), limit=2 * count)) == count
