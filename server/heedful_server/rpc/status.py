"""The one table from exceptions to gRPC status codes and rich error details.

Owns what a failed call looks like on the wire: `google.rpc.Status` with BadRequest, RetryInfo,
ErrorInfo and RequestInfo. It raises nothing and logs nothing. Pure functions. Whatever is not in
the table is INTERNAL, and its message stays in the server's log.
"""

from typing import NamedTuple

import grpc
from google.protobuf.any_pb2 import Any as AnyProto
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from heedful_store import errors as store_errors

from heedful_server import errors
from heedful_server.protocol import FailureKind

ERROR_DOMAIN = "heedful"
DETAILS_KEY = "grpc-status-details-bin"
# Status and details travel in the trailing headers, which peers limit to 8 KiB in all; there a byte
# takes up to three characters, and the message occurs twice more among the details.
_MAX_MESSAGE_BYTES = 600
# A queue empties within a second; somebody has to make room on a full disk.
_STORE_BUSY_RETRY_S = 0.5
_STORE_FULL_RETRY_S = 30.0

_TABLE: dict[type[BaseException], tuple[grpc.StatusCode, str]] = {
    errors.InvalidRequest: (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    errors.NotFound: (grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    errors.AlreadyExists: (grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS"),
    errors.ModelNotLoaded: (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_NOT_LOADED"),
    errors.PreconditionFailed: (grpc.StatusCode.FAILED_PRECONDITION, "PRECONDITION_FAILED"),
    errors.NotRateable: (grpc.StatusCode.FAILED_PRECONDITION, "NOT_RATEABLE"),
    errors.QueueFull: (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    errors.QuotaExceeded: (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED"),
    errors.DeadlineExceeded: (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    errors.ClientTooSlow: (grpc.StatusCode.CANCELLED, "CLIENT_TOO_SLOW"),
    errors.Unauthenticated: (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    errors.PermissionDenied: (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"),
    errors.EngineUnavailable: (grpc.StatusCode.UNAVAILABLE, "ENGINE_UNAVAILABLE"),
    errors.StoreUnavailable: (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE"),
    errors.Draining: (grpc.StatusCode.UNAVAILABLE, "DRAINING"),
    store_errors.NotFound: (grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    store_errors.AlreadyExists: (grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS"),
    store_errors.Invalid: (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    store_errors.AdapterDamaged: (grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_DAMAGED"),
    store_errors.ForeignAdapter: (grpc.StatusCode.FAILED_PRECONDITION, "FOREIGN_ADAPTER"),
    store_errors.AliasMoved: (grpc.StatusCode.ABORTED, "ALIAS_MOVED"),
    store_errors.StoreBusy: (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_BUSY"),
    store_errors.StoreFull: (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL"),
    # Locked, unreachable, dead or closed: whether a retry helps is the server's health to say.
    store_errors.Unready: (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE"),
}
_ENGINE_TABLE: dict[FailureKind, tuple[grpc.StatusCode, str]] = {
    "invalid": (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    "resource": (grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_RESOURCES"),
    "not_loaded": (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_NOT_LOADED"),
    "deadline": (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    "internal": (grpc.StatusCode.INTERNAL, "INTERNAL"),
}


class RpcError(NamedTuple):
    """How a failed call ends: code, short reason in capitals, message and serialized details."""

    code: grpc.StatusCode
    reason: str
    message: str
    details: bytes


def to_rpc_error(error: BaseException, request_id: str) -> RpcError:
    """Return how a call that raised `error` ends."""
    code, reason = _look_up(error)
    if code is grpc.StatusCode.INTERNAL:
        message = f"internal error; the server's log names request {request_id}"
    else:
        message = _clip(str(error))
    status = status_pb2.Status(code=code.value[0], message=message)
    info = error_details_pb2.ErrorInfo(reason=reason, domain=ERROR_DOMAIN)
    status.details.append(_pack(info))
    status.details.append(_pack(error_details_pb2.RequestInfo(request_id=request_id)))
    for detail in _details(error):
        status.details.append(_pack(detail))
    return RpcError(code, reason, message, status.SerializeToString())


def _look_up(error: BaseException) -> tuple[grpc.StatusCode, str]:
    if isinstance(error, errors.EngineRequestError):
        return _ENGINE_TABLE[error.kind]
    known = (_TABLE[kind] for kind in type(error).__mro__ if kind in _TABLE)
    return next(known, (grpc.StatusCode.INTERNAL, "INTERNAL"))


def _details(error: BaseException) -> list[Message]:
    match error:
        case errors.InvalidRequest() | store_errors.Invalid():
            return [_bad_request(error.field, error.reason)]
        case errors.EngineRequestError(kind="invalid"):
            return [_bad_request(error.field, str(error))]
        case errors.QueueFull():
            return [_retry_info(error.retry_after_s)]
        case store_errors.StoreBusy():
            return [_retry_info(_STORE_BUSY_RETRY_S)]
        case store_errors.StoreFull():
            return [_retry_info(_STORE_FULL_RETRY_S)]
        case _:
            return []


def _retry_info(delay_s: float) -> Message:
    delay = Duration()
    delay.FromMilliseconds(round(delay_s * 1000))
    info: Message = error_details_pb2.RetryInfo(retry_delay=delay)
    return info


def _bad_request(field: str, reason: str) -> Message:
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=_clip(reason))
    bad_request: Message = error_details_pb2.BadRequest(field_violations=[violation])
    return bad_request


def _clip(text: str) -> str:
    return text.encode()[:_MAX_MESSAGE_BYTES].decode(errors="ignore")


def _pack(message: Message) -> AnyProto:
    packed = AnyProto()
    packed.Pack(message)
    return packed
