"""Who runs and who waits, in order of priority, then arrival, then index.

Owns the queues and the status of the sequences in them; knows nothing of blocks, tokens or steps.
A sequence stands in its queue for its siblings too. Used by the scheduler alone, in the engine
child's main thread.
"""

from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise

from heedful_server.engine.sequence import PRIORITIES, Sequence, SequenceStatus


class SequenceQueues:
    """The running and the waiting sequences; index 0 of each tuple is the first priority."""

    def __init__(self) -> None:
        self.running: tuple[list[Sequence], ...] = tuple([] for _ in PRIORITIES)
        self.waiting: tuple[deque[Sequence], ...] = tuple(deque() for _ in PRIORITIES)

    def wait(self, sequence: Sequence) -> None:
        """Put a sequence that is in no queue among the waiting ones, at its place in the order."""
        sequence.status = SequenceStatus.WAITING
        insort(self.waiting[sequence.priority], sequence, key=_order)

    def run(self, sequence: Sequence) -> None:
        """Put a sequence that is in no queue among the running ones, at its place in the order."""
        sequence.status = SequenceStatus.RUNNING
        insort(self.running[sequence.priority], sequence, key=_order)

    def stop_last(self) -> Sequence:
        """Make the last running sequence in order wait, and return it."""
        queue = next(queue for queue in reversed(self.running) if queue)
        sequence = queue.pop()
        self.wait(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take a finished sequence out of its queue; one that another stands for is in none."""
        self._queue_of(sequence).remove(sequence)
        sequence.status = SequenceStatus.FINISHED

    def replace(self, leader: Sequence, heir: Sequence) -> None:
        """Put a sibling where the sequence stands that stood for it, and finish the latter."""
        queue = self._queue_of(leader)
        queue[queue.index(leader)] = heir
        heir.status = leader.status
        leader.status = SequenceStatus.FINISHED

    def runs_after(self, priority: int) -> bool:
        """Whether a less important sequence runs."""
        return any(self.running[priority + 1 :])

    def running_after(self, priority: int) -> Iterator[Sequence]:
        """Iterate over the less important running sequences, the last in order first."""
        return chain.from_iterable(map(reversed, reversed(self.running[priority + 1 :])))

    def check_integrity(self, unfinished: Iterable[Sequence]) -> None:
        """Raise AssertionError unless the unfinished are where status, priority and order say."""
        missing = set(unfinished)
        for queues, status in (
            (self.running, SequenceStatus.RUNNING),
            (self.waiting, SequenceStatus.WAITING),
        ):
            for priority, queue in enumerate(queues):
                if any(a.order >= b.order for a, b in pairwise(queue)):
                    raise AssertionError(
                        f"{status.value} sequences of {priority=} are out of order"
                    )
                for sequence in queue:
                    if sequence.status is not status or sequence.priority != priority:
                        raise AssertionError(f"{sequence.request_id!r} is in the wrong queue")
                    if not missing.issuperset({sequence, *sequence.siblings}):
                        raise AssertionError(f"{sequence.request_id!r} is queued twice or finished")
                    missing -= {sequence, *sequence.siblings}
        if missing:
            raise AssertionError(f"{len(missing)} unfinished sequences are in no queue")

    def _queue_of(self, sequence: Sequence) -> list[Sequence] | deque[Sequence]:
        running = sequence.status is SequenceStatus.RUNNING
        return (self.running if running else self.waiting)[sequence.priority]


def count_samples(sequences: Iterable[Sequence]) -> int:
    """Count sequences and the siblings that they stand for."""
    return sum(1 + len(sequence.siblings) for sequence in sequences)


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
