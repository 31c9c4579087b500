"""Requests as the scheduler takes them, and sequences, their running state.

Owns the ids, positions and KV block table of each sequence; knows nothing of text, sampling,
tensors or torch. Plain data, changed only by the scheduler, in the engine child's main thread.
"""

from dataclasses import dataclass, field
from enum import Enum

from heedful_server.protocol import PRIORITY_BACKGROUND, PRIORITY_INTERACTIVE

PRIORITIES = (PRIORITY_INTERACTIVE, PRIORITY_BACKGROUND)


class SequenceStatus(Enum):
    """Where a sequence stands; only a running one holds KV blocks."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """What is asked of the scheduler: n samples of one prompt, or the logits of given tokens.

    A request with max_tokens 0 samples nothing: its tokens are computed for the logits from
    logits_start on, and it is complete when its last token is computed.

    Args:
        request_id: unique among unfinished requests.
        prompt_token_ids: at least one token id.
        n: samples of the prompt, which is computed once for all of them.
        max_tokens: most tokens that are sampled for each.
        priority: PRIORITY_INTERACTIVE or PRIORITY_BACKGROUND.
        cache_salt: KV blocks are shared only between requests of equal salt, so it must tell apart
            tenants and the contents of policies.
        logits_start: first position whose logits are wanted; None means the prompt's last.
        deadline_at_s: time of the monotonic clock after which the request is no longer wanted.
        adapter_slot: slot of the policy's adapter, or -1; means nothing to the scheduler.
        wants_hidden: whether final hidden states are wanted from logits_start on, not logits.

    Raises:
        ValueError: an argument is out of its range.
    """

    request_id: str
    prompt_token_ids: list[int]
    max_tokens: int
    n: int = 1
    priority: int = PRIORITY_INTERACTIVE
    cache_salt: bytes = b""
    logits_start: int | None = None
    deadline_at_s: float | None = None
    adapter_slot: int = -1
    wants_hidden: bool = False

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise ValueError("prompt_token_ids is empty")
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must not be negative")
        if self.n < 1 or (self.n > 1 and self.max_tokens == 0):
            raise ValueError(f"n is {self.n} with max_tokens {self.max_tokens}")
        if self.priority not in PRIORITIES:
            raise ValueError(f"priority is {self.priority}; it must be one of {PRIORITIES}")
        if self.wants_hidden and self.max_tokens > 0:
            raise ValueError("a hidden state is wanted of a request that samples")
        if self.logits_start is None:
            return
        if not 0 <= self.logits_start < len(self.prompt_token_ids):
            raise ValueError(f"logits_start is {self.logits_start}, outside of the prompt")


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of a request, or the tokens that a request wants scored; compared by identity.

    token_ids only ever grows: a preempted sequence keeps what was sampled and computes it again.
    """

    request_id: str
    index: int
    token_ids: list[int]
    num_prompt_tokens: int
    max_tokens: int
    token_limit: int
    """Most tokens, prompt included, that the sequence may reach."""
    priority: int
    cache_salt: bytes
    logits_start: int
    """First position whose logits have not been computed yet but are wanted."""
    deadline_at_s: float | None
    order: tuple[int, int]
    """Arrival of the request, then index: unique, and first come is first served."""
    adapter_slot: int
    wants_hidden: bool
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed: int = 0
    """Leading tokens whose KV is in the blocks of block_table."""
    num_cached_prompt_tokens: int | None = None
    """Prompt tokens that the prefix cache had at the first start; None before it."""
    block_table: list[int] = field(default_factory=list)
    block_digests: list[bytes] = field(default_factory=list)
    """Content digests of the leading full blocks, as far as they were needed yet."""
    siblings: list["Sequence"] = field(default_factory=list)
    """The request's other samples, kept here by one of them until it has computed their prompt."""

    @property
    def num_sampled(self) -> int:
        """How many tokens have been sampled."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def scores(self) -> bool:
        """Whether the sequence is here for the logits of given tokens and samples none."""
        return self.max_tokens == 0

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do, so that the engine has to finish the sequence now."""
        if self.scores:
            return self.num_computed >= len(self.token_ids)
        return len(self.token_ids) >= self.token_limit
