"""What the interceptor knows about the call that is being handled.

Owns the context variables through which a servicer reads who calls, and the id and the deadline of
its call. It holds nothing of the request's content. gRPC runs each call in a task, so each call has
its own values.
"""

from contextvars import ContextVar
from dataclasses import dataclass

from heedful_server.identity import LOCAL_CALLER, Caller


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
