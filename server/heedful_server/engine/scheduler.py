"""Decides what each step computes: continuous batching, priorities, preemption, a prefix cache.

Owns every sequence's progress and KV blocks. It knows token ids and counts only: no tensors, no
text, no sampling parameters, no clock. Pure Python without torch; runs in the engine child's main
thread. The engine alternates schedule() and commit(). add(), cancel() and finish() may come in
between, but not between schedule() and the moment at which the engine has read the block tables of
the plan.

Order. Sequences stand in order of priority, then arrival, then index. A step computes
1. one token of each interactive sequence that decodes,
2. chunks of interactive prompts: of running sequences, then of waiting ones, in order,
3. and 4. the same for background, which starts prompts only while no interactive sequence waits.
Beside interactive tokens a step computes at most max_background_tokens of background, so that the
trainer's questions lengthen nobody's wait for the next token by much; alone it gets whole steps.
A waiting sequence starts when there are places for it and its siblings, and blocks for all its
tokens and for one more of each sequence that it must not disturb, lest their next tokens throw it
out again.

Preemption. When a sequence needs a block and none is free, the last running sequence in order
gives up its blocks and waits at its place in the order. A waiting interactive sequence takes
places and blocks from background in the same way, if that lets it start. A preempted sequence
keeps what was sampled and computes again what the prefix cache has lost of it. Victims come after
the sequence that they make room for, so nothing that a step has planned already is ever taken
back.

Bounds. At most max_batch_tokens - reserve sequences run at a time, where the reserve is an eighth
of max_batch_tokens, or 1. Hence
- a running interactive sequence that decodes gets a token in every step, until it is preempted, and
  so does a background one in a step without interactive tokens;
- the first unfinished sequence in order is in every step and is never preempted, whatever arrives
  later, and while it is interactive and has a prompt left, at least `reserve` tokens of the step
  are its own. So a sequence starts at the latest when those before it have had, one after another,
  a step for each `reserve` tokens that they compute (again) and one for each that they sample;
- background has no bound of its own while interactive sequences wait or run: it gets what they
  leave, the first in order first. Once they are gone, the bounds above are those of background.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain

from heedful_server.engine.block_manager import BlockManager, extend_digests
from heedful_server.engine.queues import SequenceQueues, count_samples
from heedful_server.engine.sequence import PRIORITIES, EngineRequest, Sequence, SequenceStatus
from heedful_server.errors import RequestError
from heedful_server.protocol import PRIORITY_BACKGROUND


class RequestTooLong(RequestError):  # noqa: N818 - named as its siblings in errors.py
    """A request needs more tokens than a sequence can ever hold."""

    def __init__(self, num_tokens: int, capacity_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.capacity_tokens = capacity_tokens
        super().__init__(f"{num_tokens} tokens are needed, {capacity_tokens} can be held at most")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Sizes that the scheduler works within.

    Raises:
        ValueError: a size is too small for any progress.
    """

    num_blocks: int
    block_size: int
    max_sequences: int
    max_batch_tokens: int
    max_model_len: int
    prefix_cache: bool = True
    max_background_tokens: int | None = None  # of a step with interactive tokens; None: any

    def __post_init__(self) -> None:
        if self.max_background_tokens is not None and self.max_background_tokens < 1:
            raise ValueError(f"max_background_tokens must be at least 1: {self}")
        if self.max_sequences < 1 or self.max_model_len < 1:
            raise ValueError(f"max_sequences and max_model_len must be at least 1: {self}")
        # One for a decode and one for a prompt, so that neither can keep the other out.
        if self.max_batch_tokens < 2:
            raise ValueError(f"max_batch_tokens must be at least 2: {self}")


@dataclass(slots=True, eq=False)
class Chunk:
    """num_tokens tokens of a sequence from position start on; a decode is a chunk of 1."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def logit_positions(self) -> range:
        """Positions of the chunk whose logits are wanted; valid until the plan is committed."""
        end = self.start + self.num_tokens
        return range(min(max(self.start, self.sequence.logits_start), end), end)


@dataclass(slots=True, eq=False)
class Sample:
    """A sequence's next token is sampled from the logits of the last position of a chunk."""

    sequence: Sequence
    chunk_idx: int


@dataclass(slots=True)
class StepPlan:
    """What one step computes; without chunks there is nothing to do.

    copies are KV blocks (source, destination) to copy before anything is computed. It makes no
    difference whether they are done in order or all sources are read before any is written.
    """

    chunks: list[Chunk] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    num_tokens: int = 0


class Scheduler:
    """All unfinished sequences and the plan of each step.

    capacity_tokens is the most tokens that a sequence can reach, and max_sequences how many run at
    most, which can be fewer than configured (see Bounds). prefix_cache_queries and _hits count the
    tokens of the sequences that start for the first time, and those of them found in the cache.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.max_batch_tokens = config.max_batch_tokens
        self._max_background_tokens = config.max_background_tokens or config.max_batch_tokens
        reserve = max(1, config.max_batch_tokens // 8)
        self.max_sequences = min(config.max_sequences, config.max_batch_tokens - reserve)
        self.capacity_tokens = min(config.max_model_len, config.num_blocks * config.block_size)
        self.preemptions = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self._block_size = config.block_size
        self._blocks = BlockManager(config.num_blocks, config.block_size, config.prefix_cache)
        self._queues = SequenceQueues()
        # The unfinished sequences of each unfinished request.
        self._requests: dict[str, list[Sequence]] = {}
        self._num_arrived = 0
        # No unfinished sequence has an earlier deadline.
        self._next_deadline_at_s = float("inf")
        self._uncommitted: StepPlan | None = None

    @property
    def num_running(self) -> int:
        """Samples in progress, counting all those whose common prompt is being computed."""
        return count_samples(chain(*self._queues.running))

    @property
    def num_waiting(self) -> int:
        """Samples that wait for a place or for KV blocks."""
        return count_samples(chain(*self._queues.waiting))

    @property
    def num_blocks(self) -> int:
        """KV blocks of the pool."""
        return self._blocks.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """KV blocks that no sequence holds."""
        return self._blocks.num_free

    @property
    def num_cached_blocks(self) -> int:
        """KV blocks that the prefix cache can find."""
        return self._blocks.num_cached

    def add(self, request: EngineRequest) -> list[Sequence]:
        """Queue a request and return its n sequences by index.

        Raises:
            RequestTooLong: it could not run even if it were alone.
            ValueError: an unfinished request has the same id.
        """
        if request.request_id in self._requests:
            raise ValueError(f"request {request.request_id!r} is not finished yet")
        num_tokens = len(request.prompt_token_ids) + min(1, request.max_tokens)
        if num_tokens > self.capacity_tokens:
            raise RequestTooLong(num_tokens, self.capacity_tokens)
        self._num_arrived += 1
        sequences = [self._new_sequence(request, index) for index in range(request.n)]
        sequences[0].siblings = sequences[1:]
        self._requests[request.request_id] = sequences
        self._queues.wait(sequences[0])
        if request.deadline_at_s is not None:
            self._next_deadline_at_s = min(self._next_deadline_at_s, request.deadline_at_s)
        return list(sequences)

    def cancel(self, request_id: str) -> list[Sequence]:
        """Finish a request's unfinished sequences and return them; an unknown id has none."""
        sequences = list(self._requests.get(request_id, ()))
        # Backwards, so that siblings go before the sequence that stands for them.
        for sequence in reversed(sequences):
            self.finish(sequence)
        return sequences

    def finish(self, sequence: Sequence) -> None:
        """End a sequence and free its blocks now; ending it twice does nothing."""
        if sequence.status is SequenceStatus.FINISHED:
            return
        unfinished = self._requests[sequence.request_id]
        unfinished.remove(sequence)
        if not unfinished:
            del self._requests[sequence.request_id]
        stands_in = next((other for other in unfinished if sequence in other.siblings), None)
        if stands_in is not None:
            stands_in.siblings.remove(sequence)
            sequence.status = SequenceStatus.FINISHED
        elif sequence.siblings:
            self._pass_on(sequence)
        else:
            self._queues.remove(sequence)
            self._free_blocks(sequence)

    def expired(self, now_s: float) -> list[str]:
        """Return the ids of unfinished requests whose deadline has come, for the caller to end."""
        if now_s < self._next_deadline_at_s:
            return []
        deadlines_at_s = {
            request_id: sequences[0].deadline_at_s
            for request_id, sequences in self._requests.items()
            if sequences[0].deadline_at_s is not None
        }
        self._next_deadline_at_s = min(deadlines_at_s.values(), default=float("inf"))
        return [request_id for request_id, at_s in deadlines_at_s.items() if at_s <= now_s]

    def schedule(self) -> StepPlan:
        """Plan the next step, take the blocks that it needs, and preempt whom it has no room for.

        The plan must be committed before the next one, or all its sequences be finished by then.
        """
        self._drop_abandoned_plan()
        plan = self._uncommitted = StepPlan()
        for priority in PRIORITIES:
            limit = self._token_limit(priority, plan)
            prefills = self._plan_decodes(priority, plan, limit)
            self._plan_prefills(prefills, plan, limit)
            self._start_waiting(priority, plan, limit)
        return plan

    def commit(self, plan: StepPlan, sampled: Mapping[Sequence, int]) -> None:
        """Take note that a plan was computed, and of the token that each of its samples got.

        Sequences that were finished since schedule() are skipped, and need no token.
        """
        assert plan is self._uncommitted, "this is not the plan of the last schedule()"
        self._uncommitted = None
        running, block_size = SequenceStatus.RUNNING, self._block_size
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if sequence.status is not running:
                continue
            first = chunk.start // block_size
            end = sequence.num_computed = chunk.start + chunk.num_tokens
            if sequence.logits_start < end:
                sequence.logits_start = end
            if first < end // block_size:
                self._register_blocks(sequence, first, end // block_size)
        for sample in plan.samples:
            sequence = sample.sequence
            if sequence.status is running:
                sequence.token_ids.append(sampled[sequence])

    def check_integrity(self) -> None:
        """Raise AssertionError when blocks leak or a sequence is not where it should be."""
        self._queues.check_integrity(chain(*self._requests.values()))
        self._blocks.check_integrity(
            sequence.block_table for sequence in chain(*self._queues.running)
        )

    def _new_sequence(self, request: EngineRequest, index: int) -> Sequence:
        num_prompt_tokens = len(request.prompt_token_ids)
        logits_start = request.logits_start
        return Sequence(
            request_id=request.request_id,
            index=index,
            token_ids=list(request.prompt_token_ids),
            num_prompt_tokens=num_prompt_tokens,
            max_tokens=request.max_tokens,
            token_limit=min(num_prompt_tokens + request.max_tokens, self.capacity_tokens),
            priority=request.priority,
            cache_salt=request.cache_salt,
            logits_start=num_prompt_tokens - 1 if logits_start is None else logits_start,
            deadline_at_s=request.deadline_at_s,
            order=(self._num_arrived, index),
            adapter_slot=request.adapter_slot,
            wants_hidden=request.wants_hidden,
        )

    def _pass_on(self, leader: Sequence) -> None:
        """Finish a sequence whose siblings need the prompt that it has computed so far."""
        heir, *siblings = leader.siblings
        leader.siblings = []
        heir.siblings = siblings
        heir.num_computed = leader.num_computed
        heir.logits_start = leader.logits_start
        heir.num_cached_prompt_tokens = leader.num_cached_prompt_tokens
        heir.block_table, leader.block_table = leader.block_table, []
        heir.block_digests = leader.block_digests
        self._queues.replace(leader, heir)

    def _drop_abandoned_plan(self) -> None:
        if self._uncommitted is None:
            return
        planned = {chunk.sequence for chunk in self._uncommitted.chunks}
        planned |= {sample.sequence for sample in self._uncommitted.samples}
        for sequence in planned:
            assert sequence.status is SequenceStatus.FINISHED, (
                f"{sequence.request_id!r} was planned, but neither committed nor finished"
            )
        self._uncommitted = None

    def _token_limit(self, priority: int, plan: StepPlan) -> int:
        """Tokens that a step may hold once a priority is planned; the rest is for later decodes."""
        if priority != PRIORITY_BACKGROUND:
            num_later = sum(map(len, self._queues.running[priority + 1 :]))
            return self.max_batch_tokens - min(num_later, self._max_background_tokens)
        if plan.num_tokens == 0:
            return self.max_batch_tokens
        return min(self.max_batch_tokens, plan.num_tokens + self._max_background_tokens)

    def _plan_decodes(self, priority: int, plan: StepPlan, limit: int) -> list[Sequence]:
        """Plan the sequences with one token left to compute; return those that have more."""
        running, prefills = SequenceStatus.RUNNING, []
        # A copy, because preemption and forks change the queue.
        for sequence in self._queues.running[priority].copy():
            num_left = len(sequence.token_ids) - sequence.num_computed
            if num_left > 1:
                prefills.append(sequence)
                continue
            has_room = plan.num_tokens < limit and sequence.status is running
            if num_left == 1 and has_room and self._own_slot(sequence, plan):
                self._add_chunk(sequence, 1, plan)
        return prefills

    def _plan_prefills(self, prefills: list[Sequence], plan: StepPlan, limit: int) -> None:
        for sequence in prefills:
            # A later decode may have preempted it.
            if sequence.status is not SequenceStatus.RUNNING:
                continue
            budget = limit - plan.num_tokens
            if budget <= 0:
                return
            num_left = len(sequence.token_ids) - sequence.num_computed
            self._add_chunk(sequence, min(num_left, budget), plan)

    def _start_waiting(self, priority: int, plan: StepPlan, limit: int) -> None:
        """Start waiting sequences in order, up to the first that finds no room."""
        if any(self._queues.waiting[:priority]):
            return
        queue = self._queues.waiting[priority]
        while queue and plan.num_tokens < limit:
            sequence = queue[0]
            if not self._take_blocks(sequence):
                return
            queue.popleft()
            self._queues.run(sequence)
            self._plan_prefills([sequence], plan, limit)

    def _add_chunk(self, sequence: Sequence, num_tokens: int, plan: StepPlan) -> None:
        start = sequence.num_computed
        plan.chunks.append(Chunk(sequence, start, num_tokens))
        plan.num_tokens += num_tokens
        if sequence.max_tokens == 0 or start + num_tokens < len(sequence.token_ids):
            return
        chunk_idx = len(plan.chunks) - 1
        plan.samples.append(Sample(sequence, chunk_idx))
        if sequence.siblings:
            self._fork(sequence, chunk_idx, plan)

    def _fork(self, leader: Sequence, chunk_idx: int, plan: StepPlan) -> None:
        """Let the siblings go on from the prompt that this plan completes, as far as places go."""
        num_forks = self.max_sequences - 1
        for sibling in leader.siblings[:num_forks]:
            self._blocks.share(leader.block_table)
            sibling.block_table = leader.block_table.copy()
            sibling.block_digests = leader.block_digests.copy()
            sibling.num_computed = sibling.logits_start = len(sibling.token_ids)
            sibling.num_cached_prompt_tokens = leader.num_cached_prompt_tokens
            self._queues.run(sibling)
            plan.samples.append(Sample(sibling, chunk_idx))
        for sibling in leader.siblings[num_forks:]:
            self._queues.wait(sibling)
        leader.siblings = []

    def _own_slot(self, sequence: Sequence, plan: StepPlan) -> bool:
        """Give a sequence a block of its own for its next token; False if it got preempted."""
        table = sequence.block_table
        block_idx = sequence.num_computed // self._block_size
        # Every preemption may free blocks, and may also end the sharing that asks for a copy.
        while block_idx == len(table) or self._blocks.is_shared(table[block_idx]):
            if self._blocks.num_free == 0:
                if self._preempt_last() is sequence:
                    assert any(self._queues.running), f"{sequence.request_id!r} outgrew the pool"
                    return False
            elif block_idx == len(table):
                table += self._blocks.allocate()
            else:
                own = self._blocks.replace_shared(table[block_idx])
                plan.copies.append((table[block_idx], own))
                table[block_idx] = own
        return True

    def _take_blocks(self, sequence: Sequence) -> bool:
        """Give a waiting sequence blocks for all its tokens, if there is room for it to start."""
        can_preempt = self._queues.runs_after(sequence.priority)
        places_short = min(1 + len(sequence.siblings), self.max_sequences)
        places_short -= self.max_sequences - self.num_running
        if places_short > 0 and not can_preempt:
            return False
        cached = self._cached_prefix(sequence)
        num_new = -(-len(sequence.token_ids) // self._block_size) - len(cached)
        num_wanted = num_new + self._blocks.num_unheld(cached) + self._headroom(sequence)
        blocks_short = num_wanted - self._blocks.num_free
        if blocks_short > 0 and not can_preempt:
            return False
        # Held before anything is preempted, so that these do not count as blocks set free.
        self._blocks.share(cached)
        num_victims = self._num_victims(sequence.priority, places_short, blocks_short)
        if num_victims is None:
            self._blocks.release(cached)
            return False
        for _ in range(num_victims):
            self._preempt_last()
        sequence.block_table = cached + self._blocks.allocate(num_new)
        sequence.num_computed = len(cached) * self._block_size
        if sequence.num_cached_prompt_tokens is None:
            sequence.num_cached_prompt_tokens = sequence.num_computed
            self.prefix_cache_queries += len(sequence.token_ids)
            self.prefix_cache_hits += sequence.num_computed
        return True

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        """Return the known blocks before the first position whose logits are wanted."""
        if not self._blocks.prefix_cache:
            return []
        num_blocks = sequence.logits_start // self._block_size
        self._extend_digests(sequence, num_blocks)
        return self._blocks.match(sequence.block_digests[:num_blocks])

    def _headroom(self, sequence: Sequence) -> int:
        """Blocks to leave for the next tokens of those that a new sequence must not disturb."""
        undisturbed = chain(*self._queues.running[: sequence.priority + 1])
        num_undisturbed = count_samples(undisturbed)
        # With nobody to disturb it starts in any case, even if its siblings will lack blocks.
        return num_undisturbed + len(sequence.siblings) if num_undisturbed else 0

    def _num_victims(self, priority: int, places_short: int, blocks_short: int) -> int | None:
        """Count the less important sequences to preempt to cover what is short; None if too few."""
        num_victims = 0
        released: Counter[int] = Counter()
        for victim in self._queues.running_after(priority):
            if places_short <= 0 and blocks_short <= 0:
                break
            num_victims += 1
            places_short -= 1 + len(victim.siblings)
            blocks_short -= self._blocks.num_freed(victim.block_table, released)
        return num_victims if places_short <= 0 and blocks_short <= 0 else None

    def _preempt_last(self) -> Sequence:
        sequence = self._queues.stop_last()
        self._free_blocks(sequence)
        sequence.num_computed = 0
        self.preemptions += 1
        return sequence

    def _free_blocks(self, sequence: Sequence) -> None:
        self._blocks.release(sequence.block_table)
        sequence.block_table.clear()

    def _register_blocks(self, sequence: Sequence, first: int, end: int) -> None:
        """Tell the prefix cache of the blocks first .. end of a table, now full and computed."""
        if not self._blocks.prefix_cache:
            return
        self._extend_digests(sequence, end)
        for idx in range(first, end):
            self._blocks.register(sequence.block_table[idx], sequence.block_digests[idx])

    def _extend_digests(self, sequence: Sequence, num_blocks: int) -> None:
        extend_digests(
            sequence.block_digests,
            sequence.token_ids,
            self._block_size,
            num_blocks,
            sequence.cache_salt,
        )
