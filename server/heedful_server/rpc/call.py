"""What the interceptor knows about the call that is being handled.

Owns the context variables through which a servicer reads who calls, and the id and the deadline of
its call. It holds nothing of the request's content. gRPC runs each call in a task, so each call has
its own values.
"""

import time
from contextvars import ContextVar
from dataclasses import dataclass

from heedful_server.errors import DeadlineExceeded
from heedful_server.identity import LOCAL_CALLER, Caller

# The engine gives up before the caller does, so that a partial answer can still arrive.
_DEADLINE_MARGIN_SHARE = 0.1
_MAX_DEADLINE_MARGIN_S = 0.5


@dataclass(frozen=True, slots=True)
class Call:
    """One call; times are seconds of this process's monotonic clock."""

    method: str
    request_id: str
    received_at_s: float
    deadline_at_s: float | None


current_call: ContextVar[Call] = ContextVar("current_call")
current_caller: ContextVar[Caller] = ContextVar("current_caller", default=LOCAL_CALLER)


def caller() -> Caller:
    """Return who makes the call that is being handled; the operator where there are no keys."""
    return current_caller.get()


def engine_deadline_s(call: Call) -> float | None:
    """Return the seconds that the engine has, None without a deadline; raise DeadlineExceeded."""
    if call.deadline_at_s is None:
        return None
    left_s = call.deadline_at_s - time.monotonic()
    if left_s <= 0:
        raise DeadlineExceeded("the deadline passed before the request reached the engine")
    return left_s - min(_DEADLINE_MARGIN_SHARE * left_s, _MAX_DEADLINE_MARGIN_S)
