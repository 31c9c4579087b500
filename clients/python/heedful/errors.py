"""Errors of the client, one class for each thing a caller may want to do about it.

Owns the tree below and the one conversion from a gRPC status (with its rich details) to it; knows
nothing of retries or of what was asked. Pure, any thread.

    HeedfulError
    ├── Unavailable          loading, draining, restarting, or the connection broke: try later
    │   └── NotConnected     nothing answers at the target: nothing was sent
    ├── QueueFull            queue full or quota used up: try after `retry_after_s`
    ├── DeadlineExceeded     `timeout_s` passed before the reply was complete
    ├── Cancelled            the server ended the call as cancelled
    ├── InvalidRequest       a field is wrong: see `field` and `violations`
    ├── NotFound             unknown model, completion or feedback (or someone else's)
    ├── AlreadyExists        the same id was used with another payload
    ├── FailedPrecondition   right request, wrong state: model not loaded, completion not logged
    ├── Unauthenticated      no API key, or a wrong one
    ├── PermissionDenied     the API key lacks the scope
    ├── Unimplemented        this server does not offer it
    └── ServerFault          anything else: quote `request_id` when reporting it
"""
# ruff: noqa: N818 - the names say the condition, as those of the server do

from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field of a request: its path on the wire, and what is wrong with it."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class ErrorDetails:
    """What came with a status: field violations, delay, machine-readable reason and request id."""

    violations: tuple[FieldViolation, ...] = ()
    retry_after_s: float | None = None
    reason: str = ""
    request_id: str = ""


class HeedfulError(Exception):
    """Any failure of a call; `message` is for people, `details` is for programs."""

    def __init__(self, message: str, details: ErrorDetails | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details = details or ErrorDetails()

    @property
    def retry_after_s(self) -> float | None:
        """Seconds after which the server says that trying again makes sense; None if it did not."""
        return self.details.retry_after_s

    @property
    def reason(self) -> str:
        """The server's machine-readable reason, or an empty string."""
        return self.details.reason

    @property
    def request_id(self) -> str:
        """The server's id of the request, or an empty string where no server saw it."""
        return self.details.request_id


class Unavailable(HeedfulError):
    """The server is loading, draining or restarting, or the connection to it broke."""


class NotConnected(Unavailable):
    """Nothing answers at the target; nothing was sent."""


class QueueFull(HeedfulError):
    """The queue is full or a quota is used up."""


class DeadlineExceeded(HeedfulError):
    """The timeout of the call passed."""


class Cancelled(HeedfulError):
    """The server ended the call as cancelled."""


class InvalidRequest(HeedfulError):
    """A field of the request is wrong; `field` is the first one's path on the wire."""

    @property
    def violations(self) -> tuple[FieldViolation, ...]:
        """Every wrong field that was found."""
        return self.details.violations

    @property
    def field(self) -> str:
        """Path of the first wrong field, for example "sampling.temperature"; may be empty."""
        return self.violations[0].field if self.violations else ""


class NotFound(HeedfulError):
    """What was named does not exist, or is not the caller's to see."""


class AlreadyExists(HeedfulError):
    """The same id was used before with another payload."""


class FailedPrecondition(HeedfulError):
    """The request is right, but the state of the server does not allow it."""


class Unauthenticated(HeedfulError):
    """The call carries no API key, or one that is not known."""


class PermissionDenied(HeedfulError):
    """The API key lacks the scope for this call."""


class Unimplemented(HeedfulError):
    """This server does not offer what was asked."""


class ServerFault(HeedfulError):
    """The server failed in a way that it did not foresee."""


_BY_CODE: dict[grpc.StatusCode, type[HeedfulError]] = {
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: QueueFull,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
}


def invalid_field(field: str, description: str) -> InvalidRequest:
    """Returns the error for a field that cannot even be put on the wire."""
    violation = FieldViolation(field, description)
    return InvalidRequest(f"{field}: {description}", ErrorDetails(violations=(violation,)))


def error_from_code(code: grpc.StatusCode, message: str, field: str = "") -> HeedfulError:
    """Returns the error that one refused item of a batch stands for; `field` may be empty."""
    violations = (FieldViolation(field, message),) if field else ()
    return _BY_CODE.get(code, ServerFault)(message, ErrorDetails(violations=violations))


def error_from_rpc(error: grpc.aio.AioRpcError) -> HeedfulError:
    """Returns the error that a gRPC status and its rich details stand for."""
    details = _details_of(error)
    message = error.details() or error.code().name.lower().replace("_", " ")
    return _BY_CODE.get(error.code(), ServerFault)(message, details)


def _details_of(error: grpc.aio.AioRpcError) -> ErrorDetails:
    packed = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    status = status_pb2.Status()
    try:
        status.ParseFromString(packed if isinstance(packed, bytes) else b"")
    except DecodeError:
        # The details are an extra: a proxy that garbles them must not hide the status itself.
        status.Clear()
    return _unpack(status)


def _unpack(status: status_pb2.Status) -> ErrorDetails:
    violations: tuple[FieldViolation, ...] = ()
    retry_after_s: float | None = None
    reason = request_id = ""
    for packed in status.details:
        bad_request = error_details_pb2.BadRequest()
        retry_info = error_details_pb2.RetryInfo()
        error_info = error_details_pb2.ErrorInfo()
        request_info = error_details_pb2.RequestInfo()
        if packed.Unpack(bad_request):
            violations += tuple(
                FieldViolation(item.field, item.description)
                for item in bad_request.field_violations
            )
        elif packed.Unpack(retry_info):
            retry_after_s = retry_info.retry_delay.ToTimedelta().total_seconds()
        elif packed.Unpack(error_info):
            reason = error_info.reason
        elif packed.Unpack(request_info):
            request_id = request_info.request_id
    return ErrorDetails(violations, retry_after_s, reason, request_id)
