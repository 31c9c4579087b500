"""Validation of everything that FeedbackService is sent: messages in, values of the store out.

Owns every rule that the contract's comments state about feedback; the first broken one is reported
by the path of its field, such as `event.ranking.groups[1]`. What depends on the log (is the answer
there, was it shown) is checked behind it. Pure functions; the HTTP façade calls the same ones.
"""

from collections.abc import Iterable

from heedful_proto.v1 import feedback_pb2 as pb
from heedful_proto.v1 import inference_pb2
from heedful_store import (
    Correction,
    Critique,
    FeedbackEvent,
    FeedbackFilter,
    Judgement,
    Label,
    Ranking,
    Rating,
    Scope,
    Thumb,
    is_uuid7,
)
from heedful_store.records import RaterKind

from heedful_server.errors import InvalidRequest
from heedful_server.feedback.submission import Page, Submission
from heedful_server.rpc.rules import choice, require, require_bytes

KINDS = frozenset({"thumb", "rating", "ranking", "correction", "critique", "label"})
# Names of the flags in the log, which follow the paper, by the contract's.
FLAGS = {
    "fails_instruction": "fails_instruction",
    "inappropriate": "inappropriate_for_assistant",
    "hallucination": "hallucination",
    "satisfies_constraint": "satisfies_constraint",
    "sexual_content": "sexual_content",
    "violent_content": "violent_content",
    "encourages_harm": "encourages_harm",
    "denigrates_protected_class": "denigrates_protected_class",
    "harmful_advice": "harmful_advice",
    "expresses_opinion": "expresses_opinion",
    "expresses_moral_judgment": "expresses_moral_judgement",
}
RATER_KINDS: dict[int, RaterKind] = {
    pb.RATER_KIND_UNSPECIFIED: "end_user",
    pb.RATER_KIND_END_USER: "end_user",
    pb.RATER_KIND_EXPERT: "expert",
    pb.RATER_KIND_OPERATOR: "operator",
    pb.RATER_KIND_JUDGE: "judge",
}
_TRAINABLE: dict[int, bool] = {
    inference_pb2.TRAIN_CONSENT_UNSPECIFIED: True,
    inference_pb2.TRAIN_CONSENT_NO: False,
    inference_pb2.TRAIN_CONSENT_YES: True,
}
_MAX_EVENTS = 1000
_MAX_WORDS, _MAX_WORD_BYTES = 16, 64
_MAX_ID_BYTES = 128
_MAX_RANKED = 64
_MAX_CORRECTION_BYTES = 64 * 1024
_MAX_CRITIQUE_BYTES = 16 * 1024
_MAX_PAGE, _DEFAULT_PAGE = 1000, 100
# What google.protobuf.Timestamp allows: the years 1 to 9999.
_FIRST_S, _LAST_S = -62_135_596_800, 253_402_300_799


def submission(
    message: pb.FeedbackEvent, path: str, scope: Scope, source: str, key_id: str
) -> Submission:
    """Return the judgement of a message; raise InvalidRequest naming the field."""
    require_id(f"{path}feedback_id", message.feedback_id)
    judgement = _judgement(message, path)
    _check_target(message, judgement, path)
    if message.supersedes_id:
        require_id(f"{path}supersedes_id", message.supersedes_id)
        differs = message.supersedes_id != message.feedback_id
        require(f"{path}supersedes_id", differs, "must name another event")
    event = FeedbackEvent(
        feedback_id=message.feedback_id,
        scope=scope,
        judgement=judgement,
        rater_id=require_name(f"{path}rater_id", message.rater_id),
        rater_kind=choice(f"{path}rater_kind", message.rater_kind, RATER_KINDS),
        completion_id=message.completion_id or None,
        comparison_id=message.comparison_id or None,
        supersedes_id=message.supersedes_id or None,
        consent_train=choice(f"{path}train", message.train, _TRAINABLE),
        tags=words(f"{path}tags", message.tags),
        client_time_ms=_time_ms(message, path),
        source=source,
        key_id=key_id,
    )
    return Submission(event, path, message.completion_token, message.comparison_token)


def require_batch(count: int, field: str = "events") -> None:
    """Refuse a batch that is empty or too large."""
    require(field, 1 <= count <= _MAX_EVENTS, f"must be 1 to {_MAX_EVENTS}, not {count}")


def require_id(field: str, id: str) -> None:
    """Refuse what is no UUIDv7 in lower case."""
    require(field, is_uuid7(id), "must be a UUIDv7 in lower case")


def require_name(field: str, name: str) -> str:
    """Return an app's id of a person; refuse a long one."""
    require_bytes(field, name, _MAX_ID_BYTES)
    _require_storable(field, name)
    return name


def words(field: str, values: Iterable[str]) -> tuple[str, ...]:
    """Return a short list of short words; refuse a long list, a long word and an empty one."""
    found = tuple(values)
    require(field, len(found) <= _MAX_WORDS, f"must be at most {_MAX_WORDS}")
    for i, word in enumerate(found):
        require(f"{field}[{i}]", word != "", "must not be empty")
        require_bytes(f"{field}[{i}]", word, _MAX_WORD_BYTES)
        _require_storable(f"{field}[{i}]", word)
    return found


def text(field: str, value: str, most_bytes: int) -> str:
    """Return a text that people wrote; refuse an empty, a blank and a long one."""
    require_bytes(field, value, most_bytes)
    require(field, value.strip() != "", "must not be empty")
    _require_storable(field, value)
    return value


def page(message: pb.ListFeedbackRequest, scope: Scope) -> Page:
    """Return which page of the log a message asks for; raise InvalidRequest."""
    size = message.page_size or _DEFAULT_PAGE
    require("page_size", size <= _MAX_PAGE, f"must be 1 to {_MAX_PAGE}, not {size}")
    token = message.page_token
    is_ours = token == "" or (token.isascii() and token.isdigit() and len(token) < 19)
    require("page_token", is_ours, "is not one that this service gave")
    return Page(criteria(message.filter, scope), int(token or 0), size)


def cursor(field: str, value: int) -> int:
    """Return a place in the log; refuse one beyond what a database can count."""
    require(field, value < 1 << 63, "is not a place in the log")
    return value


def criteria(message: pb.FeedbackFilter, scope: Scope) -> FeedbackFilter:
    """Return a filter for the store; raise InvalidRequest."""
    for i, kind in enumerate(message.kinds):
        require(f"filter.kinds[{i}]", kind in KINDS, f"must be one of {', '.join(sorted(KINDS))}")
    current = message.current_only
    return FeedbackFilter(
        scope=scope,
        kinds=tuple(message.kinds),
        rater_id=message.rater_id or None,
        completion_id=message.completion_id or None,
        comparison_id=message.comparison_id or None,
        policy_version=message.policy_version or None,
        tag=message.tag or None,
        current_only=current,
        states=("stored",) if current else ("stored", "pending", "dead", "erased"),
    )


def _judgement(message: pb.FeedbackEvent, path: str) -> Judgement:
    match message.WhichOneof("kind"):
        case "thumb":
            return Thumb(message.thumb.up, words(f"{path}thumb.reasons", message.thumb.reasons))
        case "rating":
            value = message.rating.value
            require(f"{path}rating.value", 1 <= value <= 7, f"must be 1 to 7, not {value}")
            return Rating(value)
        case "ranking":
            return _ranking(message, path)
        case "correction":
            field = f"{path}correction.text"
            return Correction(text(field, message.correction.text, _MAX_CORRECTION_BYTES))
        case "critique":
            critique = message.critique
            return Critique(
                text(f"{path}critique.text", critique.text, _MAX_CRITIQUE_BYTES),
                words(f"{path}critique.aspects", critique.aspects),
            )
        case "label":
            flags = {FLAGS[f.name]: value for f, value in message.label.ListFields()}
            require(f"{path}label", bool(flags), "must have at least one flag")
            return Label(flags)
        case _:
            raise InvalidRequest(f"{path}kind", "one kind of judgement must be set")


def _ranking(message: pb.FeedbackEvent, path: str) -> Ranking:
    field = f"{path}ranking.groups"
    groups = tuple(tuple(group.completion_ids) for group in message.ranking.groups)
    all_bad = message.ranking.all_bad
    if not groups and all_bad and message.comparison_id:
        # "None is acceptable" needs no order: the comparison says which ones were shown.
        return Ranking((), all_bad=True)
    require(field, sum(map(len, groups)) <= _MAX_RANKED, f"must name at most {_MAX_RANKED}")
    seen: set[str] = set()
    for i, group in enumerate(groups):
        require(f"{field}[{i}]", bool(group), "must not be empty")
        for j, name in enumerate(group):
            require_id(f"{field}[{i}].completion_ids[{j}]", name)
            require(f"{field}[{i}]", name not in seen, f"names {name} a second time")
            seen.add(name)
    require(field, len(seen) >= 2, "must name at least two completions")
    return Ranking(groups, all_bad)


def _check_target(message: pb.FeedbackEvent, judgement: Judgement, path: str) -> None:
    if isinstance(judgement, Ranking):
        nothing = message.completion_id == "" and message.completion_token == ""
        require(f"{path}completion_id", nothing, "must not be set: a ranking names several")
        if message.comparison_id:
            require_id(f"{path}comparison_id", message.comparison_id)
        else:
            is_empty = message.comparison_token == ""
            require(f"{path}comparison_id", is_empty, "must be set with a comparison token")
        return
    require_id(f"{path}completion_id", message.completion_id)
    nothing = message.comparison_id == "" and message.comparison_token == ""
    require(f"{path}comparison_id", nothing, "must not be set: only a ranking answers one")


def _time_ms(message: pb.FeedbackEvent, path: str) -> int | None:
    if not message.HasField("client_time"):
        return None
    time = message.client_time
    holds = _FIRST_S <= time.seconds <= _LAST_S and 0 <= time.nanos < 1_000_000_000
    require(f"{path}client_time", holds, "must lie in the years 1 to 9999")
    return time.seconds * 1000 + time.nanos // 1_000_000


def _require_storable(field: str, value: str) -> None:
    # PostgreSQL has no place for it in a text.
    require(field, "\0" not in value, "must not hold the character NUL")
