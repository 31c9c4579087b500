"""Requests as the server works with them: validated, free of protobuf.

Owns the values that validate.py makes of messages and that generation.py works on; the HTTP façade
uses the same ones. They hold no behaviour. A field means what the contract's comment says it does.
"""

from dataclasses import dataclass
from typing import Literal

from heedful_server.protocol import PRIORITY_INTERACTIVE, Constraint, SamplingParams

Consent = Literal["server", "none", "metadata", "full"]
TrainConsent = Literal["server", "no", "yes"]


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Plain text, tokenized as it is."""

    text: str


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation as (role, content) pairs, rendered by the model's template."""

    messages: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class TokensPrompt:
    """Token ids, used as they are."""

    token_ids: tuple[int, ...]


Prompt = TextPrompt | ChatPrompt | TokensPrompt


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose request it is and what may be done with it; kept with the completion."""

    project: str = "default"
    end_user: str = ""
    conversation_id: str = ""
    tags: tuple[str, ...] = ()
    log_consent: Consent = "server"
    train_consent: TrainConsent = "server"
    rollout: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request for n completions.

    Where max_tokens_set or seed_set is false, the value in `sampling` counts for nothing: what
    takes its place is known once the prompt is tokenized.
    """

    prompt: Prompt
    sampling: SamplingParams
    n: int = 1
    max_tokens_set: bool = False
    seed_set: bool = False
    logprobs: bool = False
    constraint: Constraint | None = None
    priority: int = PRIORITY_INTERACTIVE
    origin: Origin = Origin()
    model: str = ""
    best_of: int = 0

    @property
    def num_samples(self) -> int:
        """How many completions are sampled; more than n where the best are kept."""
        return max(self.n, self.best_of)


@dataclass(frozen=True, slots=True)
class ScoringItem:
    """A prompt and a completion of it; a completion given as text is closed by the end token."""

    prompt: Prompt
    completion: TextPrompt | TokensPrompt


@dataclass(frozen=True, slots=True)
class ScoringRequest:
    """A request for the log-probs of given completions, and for their rewards where it says so."""

    items: tuple[ScoringItem, ...]
    priority: int = PRIORITY_INTERACTIVE
    model: str = ""
    project: str = ""
    reward: bool = False
