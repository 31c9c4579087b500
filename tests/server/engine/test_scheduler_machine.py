"""The scheduler under any load: order, progress, whole pools, and KV that is read as written.

A World computes plans as an engine would, with a fake KV store: a slot holds the salt and the
tokens that its KV depends on, and every chunk checks that it reads exactly its own history.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
from heedful_server.engine.scheduler import RequestTooLong, Scheduler, SchedulerConfig, StepPlan
from heedful_server.engine.sequence import EngineRequest, Sequence, SequenceStatus
from heedful_server.protocol import PRIORITY_BACKGROUND, PRIORITY_INTERACTIVE
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

RUNNING, WAITING = SequenceStatus.RUNNING, SequenceStatus.WAITING
VOCAB_SIZE = 3


def rank(sequence: Sequence) -> tuple[int, tuple[int, int]]:
    return sequence.priority, sequence.order


class World:
    """An engine without a model: it computes plans, samples tokens and ends what is complete."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.block_size = config.block_size
        self.scheduler = Scheduler(config)
        self.kv: dict[int, tuple[bytes, tuple[int, ...]]] = {}
        self.live: list[Sequence] = []
        self.expected_tokens: dict[Sequence, list[int]] = {}
        self.logits: dict[Sequence, list[int]] = {}
        self.num_added = 0

    def add(self, request: EngineRequest) -> None:
        self.num_added += 1
        sequences = self.scheduler.add(replace(request, request_id=f"r{self.num_added}"))
        self.live += sequences
        prompt = request.prompt_token_ids
        self.expected_tokens |= {sequence: list(prompt) for sequence in sequences}
        self.logits |= {sequence: [] for sequence in sequences}

    def step(self, interrupt: Callable[[], None] = lambda: None) -> StepPlan:
        """One step of an engine; interrupt runs between the forward pass and the commit."""
        plan = self.scheduler.schedule()
        self.compute(plan)
        for sample in plan.samples:
            chunk = plan.chunks[sample.chunk_idx]
            assert chunk.start + chunk.num_tokens == len(sample.sequence.token_ids)
            assert chunk.sequence.token_ids == sample.sequence.token_ids
        sampled = {sample.sequence: self.next_token(sample.sequence) for sample in plan.samples}
        interrupt()
        self.forget_finished()
        self.scheduler.commit(plan, {s: t for s, t in sampled.items() if s in self.live})
        for sequence, token_id in sampled.items():
            if sequence in self.live:
                self.expected_tokens[sequence].append(token_id)
        for sequence in [sequence for sequence in self.live if sequence.is_complete]:
            self.scheduler.finish(sequence)
        self.forget_finished()
        return plan

    def next_token(self, sequence: Sequence) -> int:
        arrival, index = sequence.order
        return (arrival + 2 * index + 5 * len(sequence.token_ids)) % VOCAB_SIZE

    def forget_finished(self) -> None:
        self.live = [s for s in self.live if s.status is not SequenceStatus.FINISHED]

    def compute(self, plan: StepPlan) -> None:
        self.copy(plan.copies)
        written = set()
        for chunk in plan.chunks:
            sequence = chunk.sequence
            assert sequence.token_ids == self.expected_tokens[sequence]
            self.logits[sequence] += chunk.logit_positions
            for position in range(chunk.start, chunk.start + chunk.num_tokens):
                slot = self.slot(sequence, position)
                assert slot not in written, "two sequences write to one slot"
                written.add(slot)
                self.kv[slot] = self.history(sequence, position)
        for chunk in plan.chunks:
            for position in range(chunk.start + chunk.num_tokens):
                slot = self.slot(chunk.sequence, position)
                assert self.kv[slot] == self.history(chunk.sequence, position)

    def copy(self, copies: list[tuple[int, int]]) -> None:
        at_once = dict(self.kv)
        for source, destination in copies:
            for offset in range(self.block_size):
                slot = destination * self.block_size + offset
                at_once[slot] = self.kv.get(source * self.block_size + offset, (b"", ()))
        for source, destination in copies:
            for offset in range(self.block_size):
                slot = destination * self.block_size + offset
                self.kv[slot] = self.kv.get(source * self.block_size + offset, (b"", ()))
        assert self.kv == at_once, "the order of the copies matters"

    def slot(self, sequence: Sequence, position: int) -> int:
        block = sequence.block_table[position // self.block_size]
        return block * self.block_size + position % self.block_size

    def history(self, sequence: Sequence, position: int) -> tuple[bytes, tuple[int, ...]]:
        return sequence.cache_salt, tuple(sequence.token_ids[: position + 1])


@st.composite
def requests(draw: st.DrawFn) -> EngineRequest:
    # Runs of one token make prefixes that many requests share.
    prompt = [0] * draw(st.integers(0, 8)) + draw(st.lists(st.integers(0, 1), max_size=3)) + [0]
    max_tokens = draw(st.integers(0, 6))
    return EngineRequest(
        request_id="unset",
        prompt_token_ids=prompt,
        max_tokens=max_tokens,
        n=draw(st.integers(1, 4)) if max_tokens else 1,
        priority=draw(st.sampled_from([PRIORITY_INTERACTIVE, PRIORITY_BACKGROUND])),
        cache_salt=draw(st.sampled_from([b"a", b"b"])),
        logits_start=draw(st.none() | st.integers(0, len(prompt) - 1)),
    )


class SchedulerMachine(RuleBasedStateMachine):
    """Any load on a tiny pool; the checks of every step are in `step`."""

    @initialize(
        num_blocks=st.integers(1, 14),
        block_size=st.integers(1, 3),
        max_sequences=st.integers(1, 5),
        max_batch_tokens=st.integers(2, 12),
        prefix_cache=st.booleans(),
        max_background_tokens=st.none() | st.integers(1, 4),
    )
    def start(self, **sizes: int) -> None:
        self.world = World(SchedulerConfig(max_model_len=20, **sizes))
        self.scheduler = self.world.scheduler
        self.max_batch_tokens = sizes["max_batch_tokens"]
        self.max_background_tokens = sizes["max_background_tokens"] or self.max_batch_tokens
        self.first: tuple[Sequence | None, int] = (None, 0)

    @rule(requests=st.lists(requests(), min_size=1, max_size=3))
    def add(self, requests: list[EngineRequest]) -> None:
        for request in requests:
            num_tokens = len(request.prompt_token_ids) + min(1, request.max_tokens)
            if num_tokens <= self.scheduler.capacity_tokens:
                self.world.add(request)
                continue
            with pytest.raises(RequestTooLong):
                self.world.add(request)

    @precondition(lambda self: self.world.live)
    @rule(data=st.data(), action=st.sampled_from(["finish", "cancel"]), during=st.booleans())
    def end(self, data: st.DataObject, action: str, during: bool) -> None:
        sequence = data.draw(st.sampled_from(self.world.live))

        def interrupt() -> None:
            if action == "finish":
                self.scheduler.finish(sequence)
            else:
                assert sequence in self.scheduler.cancel(sequence.request_id)

        if during:
            self.step(interrupt)
        else:
            interrupt()
            self.world.forget_finished()

    @precondition(lambda self: len(self.world.live) > 4)
    @rule()
    def fail_step(self) -> None:
        plan = self.scheduler.schedule()
        for request_id in {chunk.sequence.request_id for chunk in plan.chunks}:
            self.scheduler.cancel(request_id)
        self.world.forget_finished()
        # What was first may have been preempted by what is gone now.
        self.first = None, 0

    @rule(num_steps=st.integers(1, 3))
    def steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step()

    def step(self, interrupt: Callable[[], None] = lambda: None) -> None:
        before = {sequence: sequence.status for sequence in self.world.live}
        decoding = [s for s in before if len(s.token_ids) - s.num_computed == 1]
        queued = self.queued()
        after: dict[Sequence, SequenceStatus] = {}

        def check_then_interrupt() -> None:
            after.update({sequence: sequence.status for sequence in before})
            interrupt()

        plan = self.world.step(check_then_interrupt)
        self.check_limits(plan, after)
        self.check_order(before, after, queued)
        self.check_progress(plan, before, after, decoding)

    def queued(self) -> set[Sequence]:
        """Waiting sequences that no other one stands for."""
        siblings = {s for sequence in self.world.live for s in sequence.siblings}
        return {s for s in self.world.live if s.status is WAITING} - siblings

    def check_limits(self, plan: StepPlan, after: dict[Sequence, SequenceStatus]) -> None:
        assert sum(chunk.num_tokens for chunk in plan.chunks) == plan.num_tokens
        assert plan.num_tokens <= self.max_batch_tokens
        assert self.is_alone(plan) or self.num_background(plan) <= self.max_background_tokens
        assert all(chunk.num_tokens > 0 for chunk in plan.chunks)
        assert len({chunk.sequence for chunk in plan.chunks}) == len(plan.chunks)
        assert len({sample.sequence for sample in plan.samples}) == len(plan.samples)
        assert sum(status is RUNNING for status in after.values()) <= self.scheduler.max_sequences
        sources = {source for source, _ in plan.copies}
        destinations = [destination for _, destination in plan.copies]
        assert len(destinations) == len({*destinations} - sources)

    def num_background(self, plan: StepPlan) -> int:
        """Background tokens of a step."""
        return sum(c.num_tokens for c in plan.chunks if c.sequence.priority == PRIORITY_BACKGROUND)

    def is_alone(self, plan: StepPlan) -> bool:
        """Whether a step holds nothing but background."""
        return self.num_background(plan) == plan.num_tokens

    def check_order(self, before, after, queued: set[Sequence]) -> None:
        preempted = [s for s in before if before[s] is RUNNING and after[s] is WAITING]
        running = [s for s in before if after[s] is RUNNING]
        assert all(rank(s) < rank(victim) for victim in preempted for s in running)
        passed_over = [s for s in queued if after[s] is WAITING]
        started = [s for s in queued if after[s] is RUNNING]
        assert all(rank(s) < rank(other) for s in started for other in passed_over)

    def check_progress(self, plan: StepPlan, before, after, decoding: list[Sequence]) -> None:
        if not before:
            assert plan.chunks == []
            return
        computed = {chunk.sequence for chunk in plan.chunks}
        still_running = [s for s in decoding if before[s] is after[s] is RUNNING]
        if not self.is_alone(plan) and self.num_background(plan) == self.max_background_tokens:
            still_running = [s for s in still_running if s.priority == PRIORITY_INTERACTIVE]
        assert all(s in computed for s in still_running)
        first = min(before, key=rank)
        assert first in computed
        if first is self.first[0] and first in self.world.live:
            assert first.num_computed > self.first[1]
        self.first = first, first.num_computed

    @invariant()
    def nothing_leaks(self) -> None:
        self.scheduler.check_integrity()
        tables = [sequence.block_table for sequence in self.world.live]
        held = {block for table in tables for block in table}
        assert self.scheduler.num_free_blocks == self.scheduler.num_blocks - len(held)
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.world.live)

    def teardown(self) -> None:
        live = self.world.live
        reserve = max(1, self.max_batch_tokens // 8)
        bound = sum(-(-s.token_limit // reserve) + s.max_tokens for s in live)
        while self.world.live and bound > 0:
            self.step()
            bound -= 1
        assert self.world.live == []
        assert self.scheduler.num_free_blocks == self.scheduler.num_blocks
        self.scheduler.check_integrity()
        for sequence in live:
            positions = self.world.logits[sequence]
            assert positions == sorted(set(positions))
            if sequence.max_tokens == 0:
                assert positions[-1] == len(sequence.token_ids) - 1


SchedulerMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None
)
test_any_load_is_served_in_order_from_its_own_kv = SchedulerMachine.TestCase
