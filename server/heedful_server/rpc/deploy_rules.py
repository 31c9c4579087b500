"""Validation of what ModelService is sent.

Owns the rules of versions, runs, leases and overrides. Whether they exist is seen later. Pure
functions.
"""

import re
from dataclasses import dataclass

from heedful_proto.v1 import models_pb2 as pb
from heedful_store import Control, Scope

from heedful_server.deployment.served import (
    MAX_NAME_BYTES,
    RUN_PREFIX,
    RunAdapterName,
    is_part,
    run_adapter,
)
from heedful_server.errors import InvalidRequest
from heedful_server.rpc.rules import choice, require, require_bytes

_METHODS = ("auto", "sft", "dpo", "kto", "ppo_ptx")
_MAX_REASON_BYTES = 2000
_MAX_OVERRIDES, _MAX_VALUE_BYTES = 64, 1024
_MAX_LEASE_S = 3600
_MAX_RUNS, _DEFAULT_RUNS = 100, 20
_MAX_SEQ = 2**63 - 1
_DOTTED = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+){0,7}")
_CONTROLS: dict[int, Control] = {
    pb.REFRESH_ACTION_PAUSE: "pause",
    pb.REFRESH_ACTION_RESUME: "",
    pb.REFRESH_ACTION_STOP: "stop",
}


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """An adapter to load: a published version, or one of a run."""

    version: str
    run_adapter: RunAdapterName | None
    lease_s: int


def version(text: str, field: str = "version") -> str:
    """Return the name of a version."""
    require(field, text != "", "must not be empty")
    require_bytes(field, text, MAX_NAME_BYTES)
    return text


def reason(text: str) -> str:
    """Return a reason."""
    require_bytes("reason", text, _MAX_REASON_BYTES)
    return text


def run_id(text: str) -> str:
    """Return the id of a run."""
    require("run_id", is_part(text), "is not the id of a run")
    return text


def method(text: str) -> str:
    """Return a training method."""
    require("method", text in ("", *_METHODS), f"must be one of {', '.join(_METHODS)}")
    return text or "auto"


def overrides(values: dict[str, str]) -> dict[str, str]:
    """Return overrides of the trainer's configuration, of which the server knows the form only."""
    most = _MAX_OVERRIDES
    require("overrides", len(values) <= most, f"must be at most {most}")
    for path, value in values.items():
        field = f"overrides[{path[:80]!r}]"
        require(field, _DOTTED.fullmatch(path) is not None, "is not a dotted path of settings")
        require_bytes(field, value, _MAX_VALUE_BYTES)
    return values


def limit(value: int) -> int:
    """Return how many runs to list."""
    require("limit", value <= _MAX_RUNS, f"must be 1 to {_MAX_RUNS}, not {value}")
    return value or _DEFAULT_RUNS


def position(value: int) -> int:
    """Return a position in the deployment log."""
    require("after_seq", value <= _MAX_SEQ, "is not a position in the log")
    return value


def control(action: int) -> Control:
    """Return what a run is asked to do."""
    return choice("action", action, _CONTROLS)


def load_request(message: pb.LoadAdapterRequest, scope: Scope) -> LoadRequest:
    """Return what is to be loaded, and for how long."""
    lease_s = message.lease_s
    require("lease_s", lease_s <= _MAX_LEASE_S, f"must be at most {_MAX_LEASE_S}")
    if not message.HasField("ephemeral"):
        return LoadRequest(version(message.version), None, lease_s)
    require("version", not message.version, "must be empty where ephemeral is set")
    require("lease_s", lease_s > 0, "an adapter of a run needs a lease")
    wanted = message.ephemeral
    require("ephemeral.run_id", is_part(wanted.run_id), "is not the id of a run")
    require("ephemeral.name", is_part(wanted.name), "is not the name of an adapter of a run")
    return LoadRequest("", RunAdapterName(scope, wanted.run_id, wanted.name), lease_s)


def unloaded(text: str, scope: Scope) -> RunAdapterName | None:
    """Return the adapter of a run that a name means; None where it is a version's."""
    found = run_adapter(scope, version(text))
    if found is None and text.startswith(RUN_PREFIX):
        raise InvalidRequest("version", "is not the name of an adapter of a run")
    return found
