"""Validation of sampling parameters and constraints.

Owns the ranges and counts that the contract states for SamplingParams and Constraint, and the
defaults of unset fields. Field paths start at the request. Pure functions.
"""

import json

from heedful_proto.v1 import inference_pb2 as pb

from heedful_server.errors import InvalidRequest
from heedful_server.protocol import Constraint, SamplingParams
from heedful_server.rpc.rules import number, require, require_bytes

_MAX_STOPS = 16
_MAX_STOP_BYTES = 256
_MAX_STOP_TOKENS = 64
_MAX_LOGIT_BIAS = 1024
_MAX_TOP_LOGPROBS = 20
_MAX_SCHEMA_BYTES = 64 * 1024
_MAX_REGEX_BYTES = 4 * 1024


def sampling_params(message: pb.SamplingParams) -> SamplingParams:
    """Return validated parameters; an unset max_tokens or seed is 0 and resolved later."""
    return SamplingParams(
        seed=message.seed,
        temperature=_temperature(message),
        top_p=_top_p(message),
        top_k=message.top_k,
        min_p=number("sampling.min_p", message.min_p, 0, 1),
        repetition_penalty=_repetition_penalty(message),
        presence_penalty=number("sampling.presence_penalty", message.presence_penalty, -2, 2),
        frequency_penalty=number("sampling.frequency_penalty", message.frequency_penalty, -2, 2),
        logit_bias=_logit_bias(message),
        min_tokens=message.min_tokens,
        max_tokens=_max_tokens(message),
        stop=_stop(message),
        stop_token_ids=_stop_token_ids(message),
        top_logprobs=_top_logprobs(message),
        ignore_eos=message.ignore_eos,
    )


def _temperature(message: pb.SamplingParams) -> float:
    value = message.temperature if message.HasField("temperature") else 1.0
    return number("sampling.temperature", value, 0, 100)


def _top_p(message: pb.SamplingParams) -> float:
    value = message.top_p if message.HasField("top_p") else 1.0
    return number("sampling.top_p", value, 0, 1, above_low=True)


def _repetition_penalty(message: pb.SamplingParams) -> float:
    value = message.repetition_penalty if message.HasField("repetition_penalty") else 1.0
    return number("sampling.repetition_penalty", value, 0, 10, above_low=True)


def _max_tokens(message: pb.SamplingParams) -> int:
    if not message.HasField("max_tokens"):
        return 0
    require("sampling.max_tokens", message.max_tokens >= 1, "must be at least 1")
    return message.max_tokens


def _logit_bias(message: pb.SamplingParams) -> tuple[tuple[int, float], ...]:
    path = "sampling.logit_bias"
    entries = message.logit_bias
    require(path, len(entries) <= _MAX_LOGIT_BIAS, f"must be at most {_MAX_LOGIT_BIAS} entries")
    seen: set[int] = set()
    for i, entry in enumerate(entries):
        number(f"{path}[{i}].bias", entry.bias, -100, 100)
        reason = f"{entry.token_id} occurs more than once"
        require(f"{path}[{i}].token_id", entry.token_id not in seen, reason)
        seen.add(entry.token_id)
    return tuple((entry.token_id, entry.bias) for entry in entries)


def _stop(message: pb.SamplingParams) -> tuple[str, ...]:
    path = "sampling.stop"
    stops = message.stop
    require(path, len(stops) <= _MAX_STOPS, f"must be at most {_MAX_STOPS} strings")
    for i, stop in enumerate(stops):
        require(f"{path}[{i}]", stop != "", "must not be empty")
        require_bytes(f"{path}[{i}]", stop, _MAX_STOP_BYTES)
    return tuple(stops)


def _stop_token_ids(message: pb.SamplingParams) -> tuple[int, ...]:
    ids = message.stop_token_ids
    reason = f"must be at most {_MAX_STOP_TOKENS} ids"
    require("sampling.stop_token_ids", len(ids) <= _MAX_STOP_TOKENS, reason)
    return tuple(ids)


def _top_logprobs(message: pb.SamplingParams) -> int:
    reason = f"must be at most {_MAX_TOP_LOGPROBS}"
    require("sampling.top_logprobs", message.top_logprobs <= _MAX_TOP_LOGPROBS, reason)
    return message.top_logprobs


def constraint(message: pb.Constraint) -> Constraint:
    """Return a constraint whose form is set and, for a schema, is JSON."""
    match message.WhichOneof("form"):
        case "json_schema":
            require_bytes("constraint.json_schema", message.json_schema, _MAX_SCHEMA_BYTES)
            _require_schema("constraint.json_schema", message.json_schema)
            return Constraint("json_schema", message.json_schema)
        case "regex":
            require("constraint.regex", message.regex != "", "must not be empty")
            require_bytes("constraint.regex", message.regex, _MAX_REGEX_BYTES)
            return Constraint("regex", message.regex)
        case _:
            raise InvalidRequest("constraint", "one of json_schema and regex must be set")


def _require_schema(field: str, text: str) -> None:
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise InvalidRequest(field, f"is not JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest(field, "is nested too deeply") from None
    require(field, isinstance(schema, dict | bool), "must be a JSON object, true or false")
