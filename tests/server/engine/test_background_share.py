"""How much of a step background gets beside interactive tokens."""

import pytest
from heedful_server.engine.scheduler import Scheduler, SchedulerConfig, StepPlan
from heedful_server.engine.sequence import EngineRequest
from heedful_server.protocol import PRIORITY_BACKGROUND, PRIORITY_INTERACTIVE


def scheduler(max_background_tokens: int | None) -> Scheduler:
    return Scheduler(
        SchedulerConfig(
            num_blocks=64,
            block_size=4,
            max_sequences=16,
            max_batch_tokens=32,
            max_model_len=200,
            max_background_tokens=max_background_tokens,
        )
    )


def add(at: Scheduler, name: str, num_tokens: int, priority: int, max_tokens: int = 50) -> None:
    # A token of its own for each request, so that none begins like another.
    prompt = [100 + ord(name[-1])] * num_tokens
    request = EngineRequest(
        request_id=name, prompt_token_ids=prompt, max_tokens=max_tokens, priority=priority
    )
    at.add(request)


def step(at: Scheduler) -> StepPlan:
    plan = at.schedule()
    at.commit(plan, {sample.sequence: 0 for sample in plan.samples})
    at.check_integrity()
    return plan


def tokens(plan: StepPlan) -> dict[str, int]:
    return {chunk.sequence.request_id: chunk.num_tokens for chunk in plan.chunks}


def test_a_long_background_prompt_comes_in_small_chunks_beside_a_decode():
    at = scheduler(3)
    add(at, "user", 1, PRIORITY_INTERACTIVE)
    step(at)
    add(at, "score", 20, PRIORITY_BACKGROUND, max_tokens=0)
    assert [tokens(step(at)) for _ in range(3)] == [{"user": 1, "score": 3}] * 3


def test_of_many_background_decodes_the_first_ones_go_on_beside_a_prompt():
    at = scheduler(2)
    for number in range(5):
        add(at, f"b{number}", 1, PRIORITY_BACKGROUND)
    assert tokens(step(at)) == {f"b{number}": 1 for number in range(5)}
    add(at, "user", 8, PRIORITY_INTERACTIVE)
    assert tokens(step(at)) == {"user": 8, "b0": 1, "b1": 1}
    at.cancel("b0")
    assert tokens(step(at)) == {"user": 1, "b1": 1, "b2": 1}


def test_an_interactive_prompt_leaves_room_for_no_more_background_than_may_run():
    at = scheduler(2)
    for number in range(5):
        add(at, f"b{number}", 1, PRIORITY_BACKGROUND)
    step(at)
    add(at, "user", 100, PRIORITY_INTERACTIVE)
    assert tokens(step(at)) == {"user": 30, "b0": 1, "b1": 1}


def test_background_alone_has_the_whole_step():
    at = scheduler(1)
    add(at, "score", 40, PRIORITY_BACKGROUND, max_tokens=0)
    assert tokens(step(at)) == {"score": 32}


def test_without_a_bound_background_gets_what_is_left():
    at = scheduler(None)
    add(at, "user", 1, PRIORITY_INTERACTIVE)
    step(at)
    add(at, "score", 40, PRIORITY_BACKGROUND, max_tokens=0)
    assert tokens(step(at)) == {"user": 1, "score": 31}


def test_a_bound_that_would_stop_background_is_refused():
    with pytest.raises(ValueError, match="max_background_tokens must be at least 1"):
        scheduler(0)
