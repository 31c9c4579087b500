"""What the engine keeps of a request between its submission and its last delta.

Owns the per-completion state that is neither scheduling (sequence.py) nor tensors (runner.py):
the detokenizer, the grammar matcher, the times. Knows nothing of sockets. Runs in the engine
child's main thread.
"""

from dataclasses import dataclass, field

from heedful_server.engine.constraint import GrammarMatcher
from heedful_server.engine.sequence import Sequence
from heedful_server.protocol import Finish, FinishReason, Submit
from heedful_server.text.detokenizer import StreamDetokenizer


@dataclass(slots=True, eq=False)
class Sample:
    """One of a request's n completions."""

    index: int
    detokenizer: StreamDetokenizer
    matcher: GrammarMatcher | None = None
    sequence: Sequence | None = None
    token_ids: list[int] = field(default_factory=list)
    first_token_at_s: float = 0.0
    finished: bool = False


@dataclass(slots=True, eq=False)
class GenerateRequest:
    """A submitted request, its samples and its times (seconds of the child's monotonic clock)."""

    submit: Submit
    samples: list[Sample]
    submitted_at_s: float
    deadline_at_s: float | None
    adapter_slot: int
    first_scheduled_at_s: float = 0.0
    cached_prompt_tokens: int = 0

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        return all(sample.finished for sample in self.samples)

    def finish(self, sample: Sample, reason: FinishReason, stop: str, now_s: float) -> Finish:
        """Mark a sample as ended and return what it cost."""
        sample.finished = True
        started_s = self.first_scheduled_at_s or now_s
        first_token_s = sample.first_token_at_s or now_s
        return Finish(
            reason=reason,
            stop=stop,
            prompt_tokens=len(self.submit.prompt_token_ids),
            cached_prompt_tokens=self.cached_prompt_tokens,
            completion_tokens=len(sample.token_ids),
            queue_s=started_s - self.submitted_at_s,
            prefill_s=max(0.0, first_token_s - started_s),
            decode_s=max(0.0, now_s - first_token_s),
        )
