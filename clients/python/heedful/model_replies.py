"""Replies of ModelService on the wire to the types that callers see.

Owns that direction only; requests are small enough for `model_calls.py` to build. Pure functions,
any thread.
"""

from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct
from heedful_proto.v1 import models_pb2 as pb

from heedful.model_types import (
    BaseModel,
    Deployment,
    Load,
    ModelCard,
    Models,
    ModelVersion,
    Refresh,
)
from heedful.replies import time_from_wire


def models_from_wire(response: pb.ListModelsResponse) -> Models:
    """Returns versions, aliases and base."""
    return Models(
        versions=tuple(model_from_wire(model) for model in response.models),
        aliases={alias.name: alias.version for alias in response.aliases},
        base=_base_from_wire(response.base) if response.HasField("base") else None,
    )


def model_from_wire(wire: pb.Model) -> ModelVersion:
    """Returns one version."""
    state = pb.PolicyState.Name(wire.state).removeprefix("POLICY_STATE_").lower()
    return ModelVersion(
        version=wire.version,
        base_model=wire.base_model,
        state=state,
        loaded=wire.loaded,
        quantization=wire.quantization,
        context_tokens=wire.context_tokens,
        content_hash=wire.content_hash,
        parent_version=wire.parent_version,
        run_id=wire.run_id,
        created=time_from_wire(wire, "create_time"),
        role=wire.role,
        verdict=wire.verdict,
        method=wire.method,
    )


def card_from_wire(response: pb.GetModelResponse) -> ModelCard:
    """Returns a version with its card and evidence."""
    return ModelCard(
        model_from_wire(response.model), response.card, _values_from_wire(response.evidence)
    )


def deployment_from_wire(wire: pb.Deployment) -> Deployment:
    """Returns one entry of the deployment log."""
    return Deployment(
        seq=wire.seq,
        action=wire.action,
        alias=wire.alias,
        from_version=wire.from_version,
        to_version=wire.to_version,
        verdict=wire.verdict,
        reason=wire.reason,
        actor=wire.actor,
        time=time_from_wire(wire, "time"),
    )


def refresh_from_wire(wire: pb.Refresh) -> Refresh:
    """Returns a run."""
    return Refresh(
        run_id=wire.run_id,
        status=wire.status,
        stage=wire.stage,
        kind=wire.kind,
        method=wire.method,
        stage_progress=wire.stage_progress,
        figures=dict(sorted(wire.figures.items())),
        candidate_version=wire.candidate_version,
        verdict=wire.verdict,
        error=wire.error,
        started=time_from_wire(wire, "start_time"),
        ended=time_from_wire(wire, "end_time"),
        evidence=_values_from_wire(wire.evidence),
    )


def load_from_wire(response: pb.GetLoadResponse) -> Load:
    """Returns how busy the engine is."""
    return Load(response.num_interactive, response.num_background)


def _values_from_wire(wire: Struct) -> dict[str, Any]:
    return {name: _whole_numbers(value) for name, value in MessageToDict(wire).items()}


def _whole_numbers(value: Any) -> Any:
    # A Struct knows doubles only; counts are written and shown as whole numbers.
    if isinstance(value, dict):
        return {name: _whole_numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def _base_from_wire(wire: pb.BaseModel) -> BaseModel:
    return BaseModel(
        name=wire.name,
        base_id=wire.base_id,
        template_hash=wire.template_hash,
        path=wire.path,
        quantize=wire.quantize,
        quantization=wire.quantization,
        kernel_path=wire.kernel_path,
        context_tokens=wire.context_tokens,
        vocab_size=wire.vocab_size,
    )
