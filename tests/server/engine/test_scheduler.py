"""The scheduler by example: what a step computes, who waits for whom, and what is refused."""

import pytest
from heedful_server.engine.scheduler import RequestTooLong, Scheduler, SchedulerConfig, StepPlan
from heedful_server.engine.sequence import EngineRequest, Sequence, SequenceStatus
from heedful_server.protocol import PRIORITY_BACKGROUND

RUNNING, WAITING = SequenceStatus.RUNNING, SequenceStatus.WAITING


class World:
    """An engine without a model: every sample gets token 0, what is complete is finished."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.scheduler = Scheduler(config)
        self.live: list[Sequence] = []
        self.logits: dict[Sequence, list[int]] = {}
        self.num_added = 0

    def add(self, prompt: list[int], max_tokens: int = 100, **options: object) -> list[Sequence]:
        self.num_added += 1
        request = EngineRequest(
            request_id=f"r{self.num_added}",
            prompt_token_ids=prompt,
            max_tokens=max_tokens,
            **options,  # type: ignore[arg-type]
        )
        sequences = self.scheduler.add(request)
        self.live += sequences
        self.logits |= {sequence: [] for sequence in sequences}
        return sequences

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        for chunk in plan.chunks:
            self.logits[chunk.sequence] += chunk.logit_positions
        self.scheduler.commit(plan, {sample.sequence: 0 for sample in plan.samples})
        for sequence in [sequence for sequence in self.live if sequence.is_complete]:
            self.scheduler.finish(sequence)
        self.forget_finished()
        self.scheduler.check_integrity()
        return plan

    def forget_finished(self) -> None:
        self.live = [s for s in self.live if s.status is not SequenceStatus.FINISHED]


def world(
    num_blocks: int = 64,
    block_size: int = 4,
    max_sequences: int = 8,
    max_batch_tokens: int = 64,
    max_model_len: int = 1000,
    prefix_cache: bool = True,
) -> World:
    return World(
        SchedulerConfig(
            num_blocks, block_size, max_sequences, max_batch_tokens, max_model_len, prefix_cache
        )
    )


def chunks(plan: StepPlan) -> list[tuple[str, int, int, int]]:
    return [(c.sequence.request_id, c.sequence.index, c.start, c.num_tokens) for c in plan.chunks]


def samples(plan: StepPlan) -> list[tuple[str, int, int]]:
    return [(s.sequence.request_id, s.sequence.index, s.chunk_idx) for s in plan.samples]


def test_a_prompt_is_computed_in_chunks_and_sampled_once_at_its_end():
    w = world(max_batch_tokens=8)
    w.add(list(range(18)))
    plans = [w.step() for _ in range(4)]
    assert [chunks(plan) for plan in plans] == [
        [("r1", 0, 0, 8)],
        [("r1", 0, 8, 8)],
        [("r1", 0, 16, 2)],
        [("r1", 0, 18, 1)],
    ]
    assert [samples(plan) for plan in plans] == [[], [], [("r1", 0, 0)], [("r1", 0, 0)]]


def test_prompts_share_what_decodes_of_any_priority_leave_in_order_of_arrival():
    w = world(max_batch_tokens=10)
    w.add([1])
    w.add([1], priority=PRIORITY_BACKGROUND)
    w.step()
    w.add([1] * 5)
    w.add([2] * 20)
    plan = w.step()
    assert chunks(plan) == [("r1", 0, 1, 1), ("r3", 0, 0, 5), ("r4", 0, 0, 3), ("r2", 0, 1, 1)]
    assert samples(plan) == [("r1", 0, 0), ("r3", 0, 1), ("r2", 0, 3)]
    assert plan.num_tokens == 10


def test_a_step_that_is_small_beside_its_sequences_still_advances_prompts():
    w = world(max_sequences=64, max_batch_tokens=16)
    assert w.scheduler.max_sequences == 14
    for _ in range(20):
        w.add([1])
    for _ in range(3):
        w.step()
    assert (w.scheduler.num_running, w.scheduler.num_waiting) == (14, 6)
    w.scheduler.cancel("r1")
    w.forget_finished()
    assert ("r15", 0, 0, 1) in chunks(w.step())


def test_samples_of_a_prompt_share_its_blocks_and_get_their_own_when_they_write():
    w = world(block_size=4)
    sequences = w.add([7] * 6, n=3)
    plan = w.step()
    assert chunks(plan) == [("r1", 0, 0, 6)]
    assert samples(plan) == [("r1", 0, 0), ("r1", 1, 0), ("r1", 2, 0)]
    full, partial = sequences[0].block_table
    assert [sequence.block_table for sequence in sequences] == [[full, partial]] * 3
    plan = w.step()
    assert [source for source, _ in plan.copies] == [partial, partial]
    assert {sequence.block_table[0] for sequence in sequences} == {full}
    assert len({sequence.block_table[1] for sequence in sequences}) == 3
    assert w.step().copies == []


def test_samples_of_a_prompt_that_fills_its_blocks_need_no_copy():
    w = world(block_size=4)
    w.add([7] * 8, n=2)
    w.step()
    assert w.step().copies == []
    assert w.scheduler.num_blocks - w.scheduler.num_free_blocks == 2 + 2


def test_more_samples_than_places_run_in_turns():
    w = world(max_sequences=2, block_size=2)
    w.add([1, 1, 1, 1, 1], n=5, max_tokens=3)
    w.add([2], max_tokens=1)
    finished_by_step = []
    for _ in range(30):
        before = set(w.live)
        w.step()
        assert w.scheduler.num_running <= 2
        finished_by_step.append(sorted((s.request_id, s.index) for s in before - set(w.live)))
    assert [finished for finished in finished_by_step if finished] == [
        [("r1", 0), ("r1", 1)],
        [("r1", 2), ("r1", 3)],
        [("r2", 0)],
        [("r1", 4)],
    ]


def test_a_known_prefix_is_not_computed_again_but_the_last_prompt_token_is():
    w = world(block_size=4)
    w.add(list(range(8)), max_tokens=1)
    w.step()
    (again,) = w.add(list(range(8)), max_tokens=1)
    (longer,) = w.add([*range(8), 9, 9], max_tokens=1)
    (other,) = w.add([0, 1, 2, 9, 4, 5, 6, 7], max_tokens=1)
    group = w.add([0, 1, 2, 3, 9, 9], max_tokens=1, n=2)
    expected = [("r2", 0, 4, 4), ("r3", 0, 8, 2), ("r4", 0, 0, 8), ("r5", 0, 4, 2)]
    assert chunks(w.step()) == expected
    assert (again.num_cached_prompt_tokens, longer.num_cached_prompt_tokens) == (4, 8)
    assert other.num_cached_prompt_tokens == 0
    assert [s.num_cached_prompt_tokens for s in group] == [4, 4]
    assert w.scheduler.prefix_cache_queries == 8 + 8 + 10 + 8 + 6
    assert w.scheduler.prefix_cache_hits == 4 + 8 + 4


def test_sampled_tokens_are_known_to_the_next_turn_of_a_conversation():
    w = world(block_size=4)
    (first,) = w.add([1, 2, 3], max_tokens=6)
    for _ in range(6):
        w.step()
    # The ninth token was sampled but never computed.
    assert len(first.token_ids) == 9
    w.add([*first.token_ids, 1, 1])
    assert chunks(w.step()) == [("r2", 0, 8, 3)]


def test_a_block_is_not_known_before_it_is_computed():
    w = world(block_size=4, max_batch_tokens=8)
    w.add([1] * 20)
    assert [w.step().num_tokens for _ in range(2)] == [8, 8]
    w.add([1] * 24)
    # The first prompt's last block is computed in this step, too late to be taken up.
    assert chunks(w.step()) == [("r1", 0, 16, 4), ("r2", 0, 16, 4)]


def test_blocks_are_not_shared_across_salts_nor_without_prefix_cache():
    w = world(block_size=4)
    w.add(list(range(9)), max_tokens=1, cache_salt=b"a")
    w.step()
    w.add(list(range(9)), max_tokens=1, cache_salt=b"b")
    assert chunks(w.step()) == [("r2", 0, 0, 9)]
    w = world(block_size=4, prefix_cache=False)
    for request_id in ("r1", "r2"):
        w.add(list(range(9)), max_tokens=1)
        assert chunks(w.step()) == [(request_id, 0, 0, 9)]
    assert w.scheduler.num_cached_blocks == w.scheduler.prefix_cache_hits == 0


def test_known_blocks_are_used_only_before_the_first_wanted_logits():
    w = world(block_size=4)
    w.add(list(range(12)), max_tokens=1)
    w.step()
    w.add(list(range(12)), max_tokens=0, logits_start=6)
    plan = w.step()
    assert chunks(plan) == [("r2", 0, 4, 8)]
    assert w.logits[plan.chunks[0].sequence] == [6, 7, 8, 9, 10, 11]


def test_a_score_request_gives_logits_chunk_by_chunk_and_samples_nothing():
    w = world(max_batch_tokens=4)
    (sequence,) = w.add([1, 2, 3, 4, 5, 6], max_tokens=0, logits_start=2)
    plans = []
    while w.live:
        assert not sequence.is_complete
        plans.append(w.step())
    assert [chunks(plan) for plan in plans] == [[("r1", 0, 0, 4)], [("r1", 0, 4, 2)]]
    assert [plan.samples for plan in plans] == [[], []]
    assert w.logits[sequence] == [2, 3, 4, 5]


def test_the_newest_sequence_is_preempted_keeps_its_tokens_and_samples_on_from_there():
    w = world(num_blocks=4, block_size=2)
    (old,) = w.add([1, 1, 1], max_tokens=5)
    (new,) = w.add([2, 2], max_tokens=3)
    while w.scheduler.preemptions == 0:
        w.step()
    assert (old.status, new.status) == (RUNNING, WAITING)
    assert (new.block_table, new.num_computed, new.num_sampled) == ([], 0, 2)
    tokens = list(new.token_ids)
    while old in w.live:
        assert ("r2", 0) not in [chunk[:2] for chunk in chunks(w.step())]
    plan = w.step()
    assert samples(plan) == [("r2", 0, 0)]
    assert new.token_ids[:-1] == tokens
    assert w.logits[new] == [1, 2, 3]
    # A second start says nothing about how well prompts are cached.
    assert w.scheduler.prefix_cache_queries == 3 + 2
    assert new.num_cached_prompt_tokens == 0


def test_background_is_preempted_even_if_it_is_older():
    w = world(num_blocks=4, block_size=2)
    (background,) = w.add([1], priority=PRIORITY_BACKGROUND)
    w.add([2, 2, 2])
    w.step()
    assert background.status is RUNNING
    while w.scheduler.preemptions == 0:
        w.step()
    assert background.status is WAITING
    assert w.scheduler.num_running == 1


def test_a_waiting_interactive_request_takes_the_place_of_background():
    w = world(max_sequences=2)
    first, second = (w.add([1], priority=PRIORITY_BACKGROUND)[0] for _ in range(2))
    w.step()
    (interactive,) = w.add([2])
    plan = w.step()
    assert (first.status, second.status, interactive.status) == (RUNNING, WAITING, RUNNING)
    assert chunks(plan) == [("r3", 0, 0, 1), ("r1", 0, 1, 1)]


def test_a_waiting_interactive_request_takes_just_the_blocks_that_it_needs():
    w = world(num_blocks=7, block_size=2)
    first, second = (w.add([1] * 4, priority=PRIORITY_BACKGROUND)[0] for _ in range(2))
    w.step()
    (interactive,) = w.add([3] * 8)
    w.step()
    assert (first.status, second.status, interactive.status) == (RUNNING, WAITING, RUNNING)


def test_background_is_left_alone_when_preempting_it_would_not_be_enough():
    w = world(num_blocks=6, block_size=2)
    w.add([1] * 7)
    (background,) = w.add([2], priority=PRIORITY_BACKGROUND)
    w.step()
    assert background.status is RUNNING
    (too_big,) = w.add([3] * 6)
    w.step()
    assert (too_big.status, background.status) == (WAITING, RUNNING)
    assert w.scheduler.preemptions == 0


@pytest.mark.parametrize("num_blocks", [6, 7])
def test_blocks_shared_with_a_victim_are_not_counted_as_room(num_blocks: int):
    w = world(num_blocks=num_blocks, block_size=2)
    w.add([2, 2])
    (background,) = w.add([1] * 5, priority=PRIORITY_BACKGROUND)
    w.step()
    (interactive,) = w.add([1] * 7)
    plan = w.step()
    # Of background's blocks two are shared, so only its third one would be set free.
    if num_blocks == 7:
        assert ("r3", 0, 4, 3) in chunks(plan)
        assert background.status is WAITING
    else:
        assert (background.status, interactive.status) == (RUNNING, WAITING)


def test_known_blocks_that_nobody_holds_are_not_counted_as_room():
    w = world(num_blocks=5, block_size=2)
    w.add([1] * 4, max_tokens=1)
    w.step()
    w.add([2, 2, 2])
    (second,) = w.add([1] * 5)
    w.step()
    assert second.status is WAITING


def test_a_group_frees_all_its_places_at_once():
    w = world(max_sequences=3, max_batch_tokens=8)
    (old,) = w.add([1], priority=PRIORITY_BACKGROUND)
    group = w.add([2] * 20, n=2, priority=PRIORITY_BACKGROUND)
    w.step()
    assert (w.scheduler.num_running, group[0].status) == (3, RUNNING)
    w.add([3], n=2)
    w.step()
    assert (old.status, group[0].status) == (RUNNING, WAITING)
    assert (w.scheduler.num_running, w.scheduler.preemptions) == (3, 1)


def test_a_group_waits_for_places_for_all_its_samples():
    w = world(max_sequences=3)
    (first,) = w.add([1], max_tokens=3)
    group = w.add([2], n=3, max_tokens=1)
    while first in w.live:
        assert group[0].status is WAITING
        w.step()
    assert len(w.step().samples) == 3


def test_background_starts_nothing_while_an_interactive_request_waits():
    w = world(num_blocks=6, block_size=2)
    w.add([1] * 4, max_tokens=2)
    w.step()
    (background,) = w.add([2], max_tokens=1, priority=PRIORITY_BACKGROUND)
    (interactive,) = w.add([3] * 8, max_tokens=1)
    w.step()
    assert (background.status, interactive.status) == (WAITING, WAITING)
    assert w.scheduler.num_free_blocks == 6
    w.step()
    assert w.live == []


def test_a_prompt_does_not_start_on_the_block_that_a_decode_needs_next():
    w = world(num_blocks=4, block_size=2)
    (first,) = w.add([1, 1, 1], max_tokens=4)
    w.step()
    (second,) = w.add([2] * 3, max_tokens=1)
    while first in w.live:
        w.step()
        assert second.status is WAITING
    w.step()
    assert second not in w.live
    assert w.scheduler.preemptions == 0


def test_samples_do_not_start_together_without_a_block_for_each():
    w = world(num_blocks=6, block_size=2)
    (first,) = w.add([1], max_tokens=2)
    w.step()
    group = w.add([2, 2], n=5, max_tokens=2)
    w.step()
    assert (first in w.live, group[0].status) == (False, WAITING)
    while w.live:
        w.step()
    assert w.scheduler.preemptions == 0


def test_a_small_request_does_not_overtake_a_big_one_that_waits_for_blocks():
    w = world(num_blocks=4, block_size=2)
    w.add([1] * 4, max_tokens=2)
    w.step()
    (big,) = w.add([2] * 6, max_tokens=1)
    (small,) = w.add([3], max_tokens=1)
    w.step()
    assert (big.status, small.status) == (WAITING, WAITING)
    w.step()
    assert big not in w.live


def test_a_sequence_is_complete_at_its_own_limit_or_at_that_of_the_pool():
    w = world(num_blocks=2, block_size=4)
    assert w.scheduler.capacity_tokens == 8
    (short,) = w.add([1, 1], max_tokens=3)
    (long,) = w.add([1, 1], max_tokens=100)
    assert (short.token_limit, long.token_limit) == (5, 8)
    while w.live:
        w.step()
    assert (len(short.token_ids), len(long.token_ids)) == (5, 8)
    assert world(max_model_len=7).scheduler.capacity_tokens == 7


def test_a_request_that_can_never_fit_is_refused_before_it_holds_anything():
    w = world(num_blocks=2, block_size=4)
    with pytest.raises(RequestTooLong, match="9 tokens are needed, 8 can be held") as caught:
        w.add([1] * 8)
    assert (caught.value.num_tokens, caught.value.capacity_tokens) == (9, 8)
    w.add([1] * 8, max_tokens=0)
    w.add([1] * 7)
    assert w.scheduler.num_waiting == 2


@pytest.mark.parametrize("field", ["max_sequences", "max_batch_tokens", "max_model_len"])
def test_a_size_too_small_for_progress_is_refused(field: str):
    with pytest.raises(ValueError, match=field):
        world(**{field: 1 if field == "max_batch_tokens" else 0})


def test_an_id_can_be_used_again_only_after_its_request_has_finished():
    scheduler = world().scheduler
    request = EngineRequest(request_id="r", prompt_token_ids=[1], max_tokens=1, n=2)
    first, second = scheduler.add(request)
    scheduler.finish(first)
    with pytest.raises(ValueError, match="'r' is not finished"):
        scheduler.add(request)
    scheduler.finish(second)
    assert len(scheduler.add(request)) == 2


def test_cancelling_returns_what_was_unfinished_and_frees_it_at_once():
    w = world(num_blocks=3, block_size=4)
    running = w.add([1] * 6, n=2)
    w.step()
    waiting = w.add([2] * 8)
    w.step()
    assert waiting[0].status is WAITING
    w.scheduler.finish(running[0])
    assert w.scheduler.cancel("r1") == running[1:]
    assert w.scheduler.num_free_blocks == 3
    assert w.scheduler.cancel("r2") == waiting
    assert w.scheduler.cancel("r2") == w.scheduler.cancel("unknown") == []
    assert w.scheduler.num_running == w.scheduler.num_waiting == 0
    w.scheduler.check_integrity()


@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_ending_one_sample_before_its_prompt_is_computed_leaves_the_others(
    index: int, steps_before: int
):
    w = world(max_batch_tokens=8)
    sequences = w.add([1] * 12, n=3, max_tokens=2)
    for _ in range(steps_before):
        w.step()
    w.scheduler.finish(sequences[index])
    w.scheduler.finish(sequences[index])
    w.forget_finished()
    assert w.scheduler.num_running + w.scheduler.num_waiting == 2
    w.scheduler.check_integrity()
    plans = [w.step() for _ in range(3 - steps_before)]
    assert sum(plan.num_tokens for plan in plans) == 12 - 8 * steps_before + 2
    assert w.live == []
    assert [sequence.num_sampled for sequence in sequences] == [
        0 if sequence.index == index else 2 for sequence in sequences
    ]


def test_deadlines_are_reported_until_their_requests_are_cancelled():
    w = world()
    w.add([1], deadline_at_s=3.0, n=2)
    w.add([2], deadline_at_s=5.0)
    w.add([3])
    assert w.scheduler.expired(2.9) == []
    assert w.scheduler.expired(3.0) == w.scheduler.expired(4.0) == ["r1"]
    assert w.scheduler.expired(5.0) == ["r1", "r2"]
    w.scheduler.cancel("r1")
    assert w.scheduler.expired(4.9) == []
    assert w.scheduler.expired(9.0) == ["r2"]
    w.scheduler.cancel("r2")
    assert w.scheduler.expired(9.0) == []


def test_a_plan_must_be_committed_unless_all_that_it_holds_was_ended():
    w = world()
    assert w.step().chunks == []
    w.add([1], n=2)
    stale = w.scheduler.schedule()
    with pytest.raises(AssertionError, match="neither committed nor finished"):
        w.scheduler.schedule()
    w.scheduler.cancel("r1")
    assert w.scheduler.schedule().chunks == []
    with pytest.raises(AssertionError, match="not the plan of the last"):
        w.scheduler.commit(stale, {})


def test_integrity_fails_when_a_block_leaks_or_a_sequence_is_lost():
    w = world()
    (sequence,) = w.add([1] * 9)
    w.step()
    w.scheduler.check_integrity()
    block = sequence.block_table.pop()
    with pytest.raises(AssertionError, match="holders counted"):
        w.scheduler.check_integrity()
    sequence.block_table.append(block)
    sequence.status = WAITING
    with pytest.raises(AssertionError, match="wrong queue"):
        w.scheduler.check_integrity()
