"""Validation of what ImportFeedback is sent.

Owns the rules of one record of existing data; each item of a batch is refused by itself. Pure
functions.
"""

from heedful_proto.v1 import feedback_pb2 as pb
from heedful_store import Thumb

from heedful_server.errors import InvalidRequest
from heedful_server.feedback.submission import Demonstration, ImportedItem, Order
from heedful_server.rpc import feedback_rules as rules
from heedful_server.rpc.rules import require, require_bytes
from heedful_server.rpc.validate import prompt
from heedful_server.setting_groups import LimitSettings

_MAX_ID_BYTES = 256
_MAX_COMPLETIONS = 64


def require_source(source: str) -> str:
    """Return the name of a source; refuse a long one."""
    return rules.require_name("source", source)


def item(message: pb.ImportItem, path: str, limits: LimitSettings) -> ImportedItem:
    """Return the record of a message; raise InvalidRequest naming the field."""
    require(f"{path}import_id", message.import_id != "", "must not be empty")
    require_bytes(f"{path}import_id", message.import_id, _MAX_ID_BYTES)
    count = len(message.completions)
    reason = f"must be 1 to {_MAX_COMPLETIONS}, not {count}"
    require(f"{path}completions", 1 <= count <= _MAX_COMPLETIONS, reason)
    return ImportedItem(
        import_id=message.import_id,
        path=path,
        prompt=prompt(message.prompt, f"{path}prompt", limits),
        texts=tuple(
            rules.text(f"{path}completions[{i}]", text, limits.max_prompt_bytes)
            for i, text in enumerate(message.completions)
        ),
        judgement=_judgement(message, path, count),
        rater_id=rules.require_name(f"{path}rater_id", message.rater_id),
        tags=rules.words(f"{path}tags", message.tags),
    )


def _judgement(message: pb.ImportItem, path: str, count: int) -> Order | Thumb | Demonstration:
    form = message.WhichOneof("judgement")
    if form in ("thumb", "demonstration"):
        require(f"{path}completions", count == 1, f"a {form} is about one completion")
    match form:
        case "ranking":
            return _order(message.ranking, f"{path}ranking.groups", count)
        case "thumb":
            reasons = rules.words(f"{path}thumb.reasons", message.thumb.reasons)
            return Thumb(message.thumb.up, reasons)
        case "demonstration":
            return Demonstration()
        case _:
            raise InvalidRequest(
                f"{path}judgement", "one of ranking, thumb and demonstration must be set"
            )


def _order(message: pb.ImportRanking, field: str, count: int) -> Order:
    groups = tuple(tuple(group.positions) for group in message.groups)
    seen: set[int] = set()
    for i, group in enumerate(groups):
        require(f"{field}[{i}]", bool(group), "must not be empty")
        for position in group:
            require(f"{field}[{i}]", position < count, f"there is no completion {position}")
            require(f"{field}[{i}]", position not in seen, f"names {position} a second time")
            seen.add(position)
    require(field, len(seen) == count, "must name every completion")
    require(field, count >= 2, "must name at least two completions")
    return Order(groups)
