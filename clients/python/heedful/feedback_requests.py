"""What callers say about completions to the messages on the wire.

Owns that direction only; `feedback_replies.py` owns the other. The server validates values, so only
what cannot be put on the wire at all is refused here. Pure functions, any thread.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TypeVar, assert_never, cast

from google.protobuf.message import Message as WireMessage
from heedful_proto.v1 import feedback_pb2 as pb

from heedful.errors import invalid_field
from heedful.feedback_types import (
    Candidate,
    CompareOptions,
    Comparison,
    Correction,
    Critique,
    Demonstration,
    Event,
    FeedbackFilter,
    FeedbackOptions,
    ImportItem,
    Judged,
    Judgement,
    Label,
    LabelOptions,
    Placed,
    Ranking,
    Rating,
    Receipt,
    Thumb,
)
from heedful.requests import (
    PRIORITIES,
    TRAIN_CONSENTS,
    assign,
    assign_each,
    choose,
    consent_to_wire,
    extend,
    prompt_to_wire,
    refuse_unknown,
    sampling_to_wire,
)
from heedful.types import Completion, Prompt

W = TypeVar("W", bound=WireMessage)

MAX_BATCH = 1000
# Servers read requests of 4 MiB unless told otherwise; half of that leaves room for one long item.
MAX_BATCH_BYTES = 2 * 1024 * 1024
LABEL_FLAGS = tuple(field.name for field in dataclasses.fields(Label))

_RATER_KINDS = {
    None: pb.RATER_KIND_UNSPECIFIED,
    "end_user": pb.RATER_KIND_END_USER,
    "expert": pb.RATER_KIND_EXPERT,
    "operator": pb.RATER_KIND_OPERATOR,
    "judge": pb.RATER_KIND_JUDGE,
}
_PURPOSES = {
    None: pb.COMPARISON_PURPOSE_UNSPECIFIED,
    "learn": pb.COMPARISON_PURPOSE_LEARN,
    "gate": pb.COMPARISON_PURPOSE_GATE,
}
_EVENT_TEXTS = (
    "feedback_id",
    "completion_id",
    "completion_token",
    "comparison_id",
    "comparison_token",
    "supersedes_id",
    "rater_id",
)
_FILTER_SCALARS = (
    "completion_id",
    "comparison_id",
    "rater_id",
    "policy_version",
    "tag",
    "current_only",
)


def event_about(judged: Judged, judgement: Judgement, options: FeedbackOptions) -> Event:
    """Returns the event that says `judgement` about one completion.

    Raises:
        TypeError: an option is unknown, or `judged` is something else.
    """
    completion_id, token = name_and_token(judged)
    return _event(
        Event(judgement, completion_id, options.get("token") or token), options, "completion_id"
    )


def event_of_ranking(
    shown: Comparison | Sequence[Judged],
    order: Sequence[Placed | Sequence[Placed]] | None,
    all_bad: bool,
    options: FeedbackOptions,
) -> Event:
    """Returns the event that ranks a comparison or completions; without an order see `rank`.

    Raises:
        TypeError: an option is unknown, or something in the order is no completion.
        InvalidRequest: there is no order, or a position in it is not one of those shown.
    """
    ids = [name_and_token(item)[0] for item in _candidates(shown)]
    if order is not None:
        groups = tuple(_group(item, ids) for item in order)
    elif all_bad:
        groups = (tuple(ids),)
    elif isinstance(shown, Comparison):
        raise invalid_field("event.ranking.groups", "a comparison needs an order, best first")
    else:
        groups = tuple((name,) for name in ids)
    ranking = Ranking(groups, all_bad)
    if not isinstance(shown, Comparison):
        return _event(Event(ranking), options, "")
    token = options.get("token") or shown.comparison_token
    event = Event(ranking, comparison_id=shown.comparison_id, comparison_token=token)
    return _event(event, options, "comparison_id")


def label_and_options(given: LabelOptions) -> tuple[Label, FeedbackOptions]:
    """Returns the flags and the other options of a call to `label`.

    Raises:
        TypeError: an option is unknown.
    """
    refuse_unknown(given, LabelOptions.__optional_keys__)
    flags = {name: value for name, value in given.items() if name in LABEL_FLAGS}
    others = {name: value for name, value in given.items() if name not in LABEL_FLAGS}
    return Label(**cast("dict[str, bool | None]", flags)), cast(FeedbackOptions, others)


def name_and_token(judged: Judged) -> tuple[str, str]:
    """Returns id and token of a completion; the token is empty where only the id is known."""
    if isinstance(judged, str):
        return judged, ""
    if not isinstance(judged, Completion | Candidate):
        raise TypeError(
            f"feedback is about a completion, a candidate or an id, not {type(judged).__name__}"
        )
    return judged.completion_id, judged.completion_token


def reference(feedback: str | Receipt, token: str | None) -> tuple[str, str]:
    """Returns id and token of an earlier judgement."""
    if isinstance(feedback, str):
        return feedback, token or ""
    return feedback.feedback_id, token or feedback.token


def event_to_wire(event: Event, path: str = "event") -> pb.FeedbackEvent:
    """Returns an event on the wire; `path` is where it sits, for errors."""
    wire = pb.FeedbackEvent()
    for name in _EVENT_TEXTS:
        assign(wire, name, getattr(event, name), f"{path}.{name}")
    if event.judgement is not None:
        _set_judgement(wire, event.judgement, path)
    wire.rater_kind = choose(event.rater_kind, _RATER_KINDS, f"{path}.rater_kind")
    wire.train = choose(event.train, TRAIN_CONSENTS, f"{path}.train")
    extend(wire, "tags", event.tags, f"{path}.tags")
    if event.client_time is not None:
        wire.client_time.FromDatetime(event.client_time)
    return wire


def compare_request(
    prompt: Prompt, k: int, options: CompareOptions, project: str
) -> pb.CompareRequest:
    """Returns the request for `k` blind candidates; errors as for `generate_request`."""
    refuse_unknown(options, CompareOptions.__optional_keys__)
    request = pb.CompareRequest(project=project, prompt=prompt_to_wire(prompt))
    assign(request, "k", k, "k")
    assign_each(request, options, ("end_user", "conversation_id"), "")
    extend(request, "models", options.get("models") or (), "models")
    extend(request, "tags", options.get("tags") or (), "tags")
    request.sampling.CopyFrom(sampling_to_wire(options))
    request.purpose = choose(options.get("purpose"), _PURPOSES, "purpose")
    request.priority = choose(options.get("priority"), PRIORITIES, "priority")
    request.consent.CopyFrom(consent_to_wire(options.get("consent")))
    return request


def filter_to_wire(criteria: FeedbackFilter) -> pb.FeedbackFilter:
    """Returns which judgements to list."""
    refuse_unknown(criteria, FeedbackFilter.__optional_keys__)
    wire = pb.FeedbackFilter()
    assign_each(wire, criteria, _FILTER_SCALARS, "filter.")
    extend(wire, "kinds", criteria.get("kinds") or (), "filter.kinds")
    return wire


def import_item_to_wire(item: ImportItem, path: str) -> pb.ImportItem:
    """Returns one record of existing data on the wire; `path` is where it sits, for errors."""
    wire = pb.ImportItem(prompt=prompt_to_wire(item.prompt))
    assign(wire, "import_id", item.import_id, f"{path}.import_id")
    assign(wire, "rater_id", item.rater_id, f"{path}.rater_id")
    extend(wire, "completions", item.completions, f"{path}.completions")
    extend(wire, "tags", item.tags, f"{path}.tags")
    match item.judgement:
        case Thumb():
            _set_thumb(wire.thumb, item.judgement, f"{path}.thumb")
        case Demonstration():
            wire.demonstration.SetInParent()
        case groups:
            wire.ranking.SetInParent()
            for group in groups:
                extend(wire.ranking.groups.add(), "positions", group, f"{path}.ranking.groups")
    return wire


def batches(messages: Iterable[W]) -> Iterator[list[W]]:
    """Yields messages in groups that one request may carry; a message is never left out."""
    batch: list[W] = []
    num_bytes = 0
    for message in messages:
        size = message.ByteSize()
        if batch and (len(batch) == MAX_BATCH or num_bytes + size > MAX_BATCH_BYTES):
            yield batch
            batch, num_bytes = [], 0
        batch.append(message)
        num_bytes += size
    if batch:
        yield batch


def _event(event: Event, options: FeedbackOptions, target: str) -> Event:
    refuse_unknown(options, FeedbackOptions.__optional_keys__)
    if target and not getattr(event, target):
        raise invalid_field(f"event.{target}", "is empty: what is judged has no id")
    supersedes = options.get("supersedes")
    return dataclasses.replace(
        event,
        feedback_id=options.get("feedback_id") or "",
        supersedes_id=reference(supersedes, None)[0] if supersedes else "",
        rater_id=options.get("rater_id") or "",
        rater_kind=options.get("rater_kind"),
        tags=tuple(options.get("tags") or ()),
        train=options.get("train"),
        client_time=options.get("client_time") or datetime.now(UTC),
    )


def _candidates(shown: Comparison | Sequence[Judged]) -> Sequence[Judged]:
    if isinstance(shown, Comparison):
        return shown.candidates
    if isinstance(shown, str):
        raise TypeError("rank takes a comparison or a sequence of completions, not a str")
    return shown


def _group(placed: Placed | Sequence[Placed], ids: Sequence[str]) -> tuple[str, ...]:
    if isinstance(placed, int | str | Completion | Candidate):
        return (_placed_id(placed, ids),)
    return tuple(_placed_id(item, ids) for item in placed)


def _placed_id(placed: Placed, ids: Sequence[str]) -> str:
    if not isinstance(placed, int):
        return name_and_token(placed)[0]
    if not 0 <= placed < len(ids):
        raise invalid_field("event.ranking.groups", f"position {placed} of {len(ids)} completions")
    return ids[placed]


def _set_judgement(wire: pb.FeedbackEvent, judgement: Judgement, path: str) -> None:
    match judgement:
        case Thumb():
            _set_thumb(wire.thumb, judgement, f"{path}.thumb")
        case Rating(value):
            wire.rating.SetInParent()
            assign(wire.rating, "value", value, f"{path}.rating.value")
        case Ranking(groups, all_bad):
            wire.ranking.all_bad = all_bad
            wire.ranking.SetInParent()
            for group in groups:
                wire_group = wire.ranking.groups.add()
                extend(wire_group, "completion_ids", group, f"{path}.ranking.groups")
        case Correction(text):
            wire.correction.SetInParent()
            assign(wire.correction, "text", text, f"{path}.correction.text")
        case Critique(text, aspects):
            wire.critique.SetInParent()
            assign(wire.critique, "text", text, f"{path}.critique.text")
            extend(wire.critique, "aspects", aspects, f"{path}.critique.aspects")
        case Label():
            wire.label.SetInParent()
            assign_each(wire.label, dataclasses.asdict(judgement), LABEL_FLAGS, f"{path}.label.")
        case _:
            assert_never(judgement)


def _set_thumb(wire: pb.Thumb, thumb: Thumb, path: str) -> None:
    wire.SetInParent()
    assign(wire, "up", thumb.up, f"{path}.up")
    extend(wire, "reasons", thumb.reasons, f"{path}.reasons")
