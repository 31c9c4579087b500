"""What the server and its engine child can answer instead of a result.

Owns the exception tree below. It knows no status codes: rpc/status.py maps the classes to gRPC, and
HTTP routes to theirs. Raised in both processes, hence free of grpc and torch.

HeedfulServerError
├── RequestError             about one request; the server itself is fine
│   ├── InvalidRequest       a field breaks a rule (.field, .reason)
│   ├── NotFound             no such model or row, or somebody else's: the two look alike
│   ├── AlreadyExists        the id was used before with another payload
│   ├── ModelNotLoaded       the version exists but does not serve
│   ├── PreconditionFailed   the state of the server or of the thing does not allow it
│   │   └── NotRateable      the answer was not logged
│   ├── QueueFull            too much in flight (.retry_after_s)
│   │   └── QuotaExceeded    more than the tenant may ask for
│   ├── DeadlineExceeded     the caller's deadline passed before there was an answer
│   ├── ClientTooSlow        the caller did not read its stream
│   ├── Unauthenticated      no valid credentials
│   ├── PermissionDenied     credentials without the scope
│   └── EngineRequestError   the engine refused or failed this request (.kind, .field)
├── ServiceUnavailable       try again later
│   ├── EngineUnavailable    the engine loads, restarts or has died
│   ├── StoreUnavailable     nothing can be recorded now
│   └── Draining             the server is shutting down
└── StartupError             the server or the engine cannot start
    ├── InvalidConfig        the configuration breaks a rule
    └── ModelUnusable        the model cannot be served on this machine
"""
# ruff: noqa: N818 - the names say the condition, as the design and the status mapping do

from heedful_server.protocol import FailureKind


class HeedfulServerError(Exception):
    """Base of every error that the server raises on purpose; str() is safe to show to a caller."""


class RequestError(HeedfulServerError):
    """One request cannot be answered."""


class InvalidRequest(RequestError):
    """A field of the request breaks a rule; the field is a path such as `sampling.stop[3]`."""

    def __init__(self, field: str, reason: str) -> None:
        self.field = field
        self.reason = reason
        super().__init__(f"{field}: {reason}")


class NotFound(RequestError):
    """There is no such thing, or it belongs to somebody else."""


class AlreadyExists(RequestError):
    """The id was used before with another payload."""


class ModelNotLoaded(RequestError):
    """The policy version exists but is not loaded."""


class PreconditionFailed(RequestError):
    """What is asked for is not possible in the present state."""


class NotRateable(PreconditionFailed):
    """The answer was not logged, so nothing can be said about it."""


class QueueFull(RequestError):
    """Too many sequences are in flight; a retry after retry_after_s seconds may fit."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class QuotaExceeded(QueueFull):
    """The tenant asks for more than its quota; a retry after retry_after_s seconds fits."""


class DeadlineExceeded(RequestError):
    """The deadline of the call passed before there was an answer."""


class ClientTooSlow(RequestError):
    """The caller left a message of its stream unread for too long."""


class Unauthenticated(RequestError):
    """The call carries no valid credentials."""


class PermissionDenied(RequestError):
    """The credentials lack the scope that the call needs."""


class EngineRequestError(RequestError):
    """The engine refused or failed this request; the engine goes on."""

    def __init__(self, kind: FailureKind, message: str, field: str = "") -> None:
        self.kind = kind
        self.field = field
        super().__init__(message)


class ServiceUnavailable(HeedfulServerError):
    """The server cannot answer now; the same request may be retried."""


class EngineUnavailable(ServiceUnavailable):
    """The engine does not serve: it loads, restarts or has died."""


class StoreUnavailable(ServiceUnavailable):
    """The store cannot record now."""


class Draining(ServiceUnavailable):
    """The server is shutting down and takes no new work."""


class StartupError(HeedfulServerError):
    """The server or the engine cannot start."""


class InvalidConfig(StartupError):
    """The configuration breaks a rule."""


class ModelUnusable(StartupError):
    """The model cannot be served: its files, its architecture or the memory do not allow it."""
