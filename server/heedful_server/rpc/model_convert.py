"""What ModelService answers, as messages of the contract.

Owns the shape of responses. The other direction is deploy_rules.py. Pure functions.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp
from heedful_proto.v1 import models_pb2 as pb
from heedful_store import BASE_VERSION, Deployment, PolicyVersion, Run

from heedful_server.deployment.metrics import figures_of
from heedful_server.protocol import EngineInfo

_STATES: "dict[str, pb.PolicyState.ValueType]" = {
    "candidate": pb.POLICY_STATE_CANDIDATE,
    "challenger": pb.POLICY_STATE_CHALLENGER,
    "champion": pb.POLICY_STATE_CHAMPION,
    "retired": pb.POLICY_STATE_RETIRED,
    "rejected": pb.POLICY_STATE_REJECTED,
    "failed": pb.POLICY_STATE_REJECTED,
}


def base_version(name: str, info: EngineInfo | None, loaded: bool, is_champion: bool) -> pb.Model:
    """Return the base as a version; what only the engine knows is empty until it loaded."""
    state = pb.POLICY_STATE_CHAMPION if is_champion else pb.POLICY_STATE_RETIRED
    model = pb.Model(version=BASE_VERSION, base_model=name, state=state, loaded=loaded, role="base")
    _add_engine(model, info)
    return model


def version(policy: PolicyVersion, name: str, info: EngineInfo | None, loaded: bool) -> pb.Model:
    """Return a version; a tainted one shows that before anything else."""
    tainted = policy.tainted_at_ms is not None
    model = pb.Model(
        version=policy.version,
        base_model=name,
        content_hash=policy.content_hash,
        state=pb.POLICY_STATE_TAINTED if tainted else _STATES[policy.state],
        create_time=timestamp(policy.created_at_ms),
        parent_version=policy.parent_version or BASE_VERSION,
        run_id=policy.run_id or "",
        loaded=loaded,
        role=policy.role,
        verdict=policy.verdict,
        method=policy.method,
    )
    _add_engine(model, info)
    return model


def deployment(entry: Deployment) -> pb.Deployment:
    """Return an entry of the log."""
    return pb.Deployment(
        seq=entry.deployment_id,
        alias=entry.alias,
        from_version=entry.from_version or "",
        to_version=entry.to_version,
        verdict=entry.verdict,
        reason=entry.reason,
        actor=entry.actor,
        time=timestamp(entry.at_ms),
        action=entry.action,
    )


def refresh(run: Run) -> pb.Refresh:
    """Return a run and where it stands."""
    fraction = run.progress.get("fraction", 0.0)
    message = pb.Refresh(
        run_id=run.run_id,
        stage=run.stage,
        stage_progress=float(fraction) if isinstance(fraction, int | float) else 0.0,
        figures=figures_of(run),
        candidate_version=run.policy_version or "",
        verdict=run.verdict,
        error=run.failure or "",
        start_time=timestamp(run.created_at_ms),
        method=run.method,
        status=run.status,
        evidence=struct(run.evidence),
        kind=run.kind,
    )
    if run.finished_at_ms is not None:
        message.end_time.CopyFrom(timestamp(run.finished_at_ms))
    return message


def struct(values: Mapping[str, Any]) -> Struct:
    """Return JSON values as a Struct; what a Struct cannot hold becomes null or text."""
    message = Struct()
    message.update(_plain(values))
    return message


def timestamp(time_ms: int) -> Timestamp:
    """Return milliseconds since 1970 as a timestamp."""
    stamp = Timestamp()
    stamp.FromMilliseconds(time_ms)
    return stamp


def _add_engine(model: pb.Model, info: EngineInfo | None) -> None:
    if info is not None:
        model.quantization = info.quantization
        model.context_tokens = info.context_tokens


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
