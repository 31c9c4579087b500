"""Validation of what Compare is sent.

Owns the rules of comparisons; the prompt, the sampling parameters and whose request it is follow
the rules of Generate. Pure functions.
"""

from heedful_proto.v1 import feedback_pb2 as pb
from heedful_proto.v1 import inference_pb2
from heedful_store.records import Purpose

from heedful_server.feedback.comparing import ComparisonRequest
from heedful_server.rpc import validate
from heedful_server.rpc.rules import choice, require
from heedful_server.setting_groups import LimitSettings

_MIN_K, _MAX_K, _DEFAULT_K = 2, 9, 2
_MAX_MODELS = 16
_PURPOSES: dict[int, Purpose] = {
    pb.COMPARISON_PURPOSE_UNSPECIFIED: "learn",
    pb.COMPARISON_PURPOSE_LEARN: "learn",
    pb.COMPARISON_PURPOSE_GATE: "gate",
}


def comparison_request(message: pb.CompareRequest, limits: LimitSettings) -> ComparisonRequest:
    """Return the request that a message asks for; raises as validate.generation_request does."""
    k = message.k if message.HasField("k") else _DEFAULT_K
    require("k", _MIN_K <= k <= _MAX_K, f"must be {_MIN_K} to {_MAX_K}, not {k}")
    most = _MAX_MODELS
    require("models", len(message.models) <= most, f"must be at most {most} names")
    for i, model in enumerate(message.models):
        validate.require_model(model, f"models[{i}]")
    purpose = choice("purpose", message.purpose, _PURPOSES)
    generation = validate.generation_request(
        inference_pb2.GenerateRequest(
            prompt=message.prompt if message.HasField("prompt") else None,
            n=k,
            sampling=message.sampling,
            end_user=message.end_user,
            conversation_id=message.conversation_id,
            tags=message.tags,
            consent=message.consent,
            project=message.project,
            priority=message.priority,
        ),
        limits,
    )
    reason = "must be above 0: greedy candidates of one policy would all be the same"
    require("sampling.temperature", generation.sampling.temperature > 0, reason)
    return ComparisonRequest(generation, purpose, tuple(message.models))
