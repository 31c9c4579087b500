"""What answers a request, and what has arrived of its completions: plain values.

Owns the two records that generation, the log of completions and the conversion to messages share.
"""

from dataclasses import dataclass, field

from heedful_server.protocol import Delta, Finish


@dataclass(frozen=True, slots=True)
class Served:
    """What answers a request."""

    policy_version: str
    base_model: str
    quantization: str
    seed: int
    request_id: str
    policy_hash: str = ""


@dataclass(slots=True)
class Part:
    """What arrived of one completion; the log lists run parallel to token_ids.

    Where `finish` is set, `rateable` says whether the completion was logged; `reward` is set where
    the best of several were kept.
    """

    index: int
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    kept_mass: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    finish: Finish | None = None
    rateable: bool = False
    reward: float | None = None

    def add(self, delta: Delta) -> None:
        """Append what a delta of the same completion brings."""
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.sampling_logprobs += delta.sampling_logprobs
        self.kept_mass += delta.kept_mass
        self.top += delta.top
        self.finish = delta.finish or self.finish
