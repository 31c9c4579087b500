"""What goes into and comes out of the client: plain frozen dataclasses, no protobuf.

Owns the vocabulary that callers see; knows neither gRPC nor how values travel. Pure, any thread.
Log-probs are natural logarithms; ids of tokens are those of the served model's tokenizer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, TypeAlias, TypedDict


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text to be continued as it is, without the chat template."""

    text: str


Prompt: TypeAlias = str | Text | Sequence[Message | Mapping[str, str]] | Sequence[int]
"""A str is one user message, Text plain text, messages a conversation, and ints are token ids."""


@dataclass(frozen=True, slots=True)
class Consent:
    """What may be done with a request; None leaves it to the server, which it can only narrow."""

    log: Literal["none", "metadata", "full"] | None = None
    train: bool | None = None


class SamplingOptions(TypedDict, total=False):
    """How tokens are sampled; None or absent means the server's default."""

    temperature: float | None
    """Divides the logits; 0 is greedy; default 1."""
    top_p: float | None
    """Keeps the smallest set of tokens with this probability mass; default 1."""
    top_k: int | None
    """Keeps the k most probable tokens; default 0, which keeps all."""
    min_p: float | None
    """Drops tokens less probable than this share of the most probable one; default 0."""
    repetition_penalty: float | None
    """Makes tokens that occurred less probable; default 1."""
    presence_penalty: float | None
    """Subtracted from the logit of every token already in the completion; default 0."""
    frequency_penalty: float | None
    """Subtracted for each time a token occurred in the completion; default 0."""
    logit_bias: Mapping[int, float] | None
    """Added to the logits, by token id."""
    seed: int | None
    """Makes sampling repeatable; default: drawn by the server and returned."""
    min_tokens: int | None
    """Tokens before a stop may happen; default 0."""
    max_tokens: int | None
    """Most tokens of a completion; default 512 or what is left of the context."""
    stop: str | Sequence[str] | None
    """The completion ends before the first of these."""
    stop_token_ids: Sequence[int] | None
    """The completion ends at one of these tokens."""
    logprobs: bool | None
    """Returns log-probs of the sampled tokens."""
    top_logprobs: int | None
    """Returns that many alternatives for each token, at most 20."""
    ignore_eos: bool | None
    """Goes on past the end-of-sequence token (for benchmarks)."""


class GenerateOptions(SamplingOptions, total=False):
    """Options of `generate` and `stream`; None or absent means the server's default."""

    model: str | None
    """Alias or policy version; default "champion"."""
    n: int | None
    """How many completions of the prompt, 1 to 16; default 1."""
    best_of: int | None
    """Samples this many and keeps the n best by the reward model."""
    json_schema: str | Mapping[str, Any] | None
    """The completion will satisfy this JSON schema."""
    regex: str | None
    """The whole completion will match this regular expression."""
    priority: Literal["interactive", "background"] | None
    """How the request is scheduled; default "interactive"."""
    end_user: str | None
    """The app's id of its end user; ratings are tied to it."""
    conversation_id: str | None
    """The app's id of the conversation."""
    tags: Sequence[str] | None
    """For summaries by tag."""
    consent: Consent | None
    """What may be done with the request."""
    purpose: Literal["serve", "rollout"] | None
    """What the completions are for; default "serve"."""
    timeout_s: float | None
    """Seconds for the call with its retries; default: the client's; `math.inf`: no limit."""


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens processed for one completion or one request."""

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One alternative at one position; `logprob` is under the raw logits."""

    token_id: int
    logprob: float
    token: str


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A sampled token: log-prob under the raw logits and under what was sampled from."""

    token_id: int
    logprob: float
    sampling_logprob: float
    kept_mass: float
    token: str
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ServedBy:
    """What answered; `seed` repeats the sampling."""

    policy_version: str
    base_model: str
    quantization: str
    seed: int
    request_id: str


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion; `finish_reason` is None while it is incomplete.

    `completion_token` lets just its receiver rate it and is therefore not shown by `repr`.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    index: int = 0
    completion_id: str = ""
    completion_token: str = field(default="", repr=False)
    rateable: bool = False
    finish_reason: FinishReason | None = None
    stop: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    usage: Usage = Usage()
    reward: float | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """The completions of one request, by index, and what answered."""

    completions: tuple[Completion, ...]
    served_by: ServedBy
    usage: Usage

    @property
    def text(self) -> str:
        """Text of the first completion."""
        return self.completions[0].text


@dataclass(frozen=True, slots=True)
class Delta:
    """More of completion `index`; `finish_reason` and `usage` come with its last delta."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop: str = ""
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """Log-probs of a given completion's tokens under the raw logits, their sum, and the reward."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    total_logprob: float
    policy_version: str
    reward: float | None = None


@dataclass(frozen=True, slots=True)
class Tokenization:
    """Token ids of a text; `rendered` is what the chat template made of a conversation."""

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    rendered: str
    context_tokens: int


class ServingStatus(StrEnum):
    """Whether a service takes calls."""

    SERVING = "serving"
    NOT_SERVING = "not serving"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Health:
    """Status of each service; `ready` means that completions are served."""

    inference: ServingStatus
    feedback: ServingStatus
    models: ServingStatus

    @property
    def ready(self) -> bool:
        """True where the inference service takes calls."""
        return self.inference is ServingStatus.SERVING
