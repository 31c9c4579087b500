"""What a caller submits, validated and free of protobuf.

Owns the values that the validators of both doors make of messages and that the application layer
works on. They hold no behaviour. `path` is where the event stands in the request, with a dot at
its end, so that a refusal can name the field.
"""

from dataclasses import dataclass

from heedful_store import FeedbackEvent, FeedbackFilter, Thumb

from heedful_server.rpc.requests import Prompt


@dataclass(frozen=True, slots=True)
class Submission:
    """One judgement with the tokens that came with it."""

    event: FeedbackEvent
    path: str
    completion_token: str = ""
    comparison_token: str = ""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A text written by a person, to be imitated."""


@dataclass(frozen=True, slots=True)
class Order:
    """An order of positions, best group first."""

    groups: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class ImportedItem:
    """One record of existing data."""

    import_id: str
    path: str
    prompt: Prompt
    texts: tuple[str, ...]
    judgement: Order | Thumb | Demonstration
    rater_id: str
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """Which events to list."""

    criteria: FeedbackFilter
    after_seq: int
    size: int
