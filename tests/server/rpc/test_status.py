"""The table from exceptions to statuses, and what the interceptor does with it."""

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from heedful_proto.v1 import inference_pb2 as pb
from heedful_server import errors
from heedful_server.rpc.status import to_rpc_error

S = grpc.StatusCode


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (errors.InvalidRequest("n", "too many"), S.INVALID_ARGUMENT, "INVALID_REQUEST"),
        (errors.NotFound("x"), S.NOT_FOUND, "NOT_FOUND"),
        (errors.AlreadyExists("x"), S.ALREADY_EXISTS, "ALREADY_EXISTS"),
        (errors.ModelNotLoaded("x"), S.FAILED_PRECONDITION, "MODEL_NOT_LOADED"),
        (errors.QueueFull("x", 2.5), S.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
        (errors.DeadlineExceeded("x"), S.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
        (errors.ClientTooSlow("x"), S.CANCELLED, "CLIENT_TOO_SLOW"),
        (errors.Unauthenticated("x"), S.UNAUTHENTICATED, "UNAUTHENTICATED"),
        (errors.PermissionDenied("x"), S.PERMISSION_DENIED, "PERMISSION_DENIED"),
        (errors.EngineUnavailable("x"), S.UNAVAILABLE, "ENGINE_UNAVAILABLE"),
        (errors.StoreUnavailable("x"), S.UNAVAILABLE, "STORE_UNAVAILABLE"),
        (errors.Draining("x"), S.UNAVAILABLE, "DRAINING"),
        (errors.EngineRequestError("invalid", "x", "n"), S.INVALID_ARGUMENT, "INVALID_REQUEST"),
        (errors.EngineRequestError("resource", "x"), S.RESOURCE_EXHAUSTED, "OUT_OF_RESOURCES"),
        (errors.EngineRequestError("not_loaded", "x"), S.FAILED_PRECONDITION, "MODEL_NOT_LOADED"),
        (errors.EngineRequestError("deadline", "x"), S.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
        (errors.EngineRequestError("internal", "x"), S.INTERNAL, "INTERNAL"),
        (errors.ModelUnusable("x"), S.INTERNAL, "INTERNAL"),
        (KeyError("x"), S.INTERNAL, "INTERNAL"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_every_error_has_its_status_and_reason(error, code, reason):
    found = to_rpc_error(error, "r-1")
    assert (found.code, found.reason) == (code, reason)
    status = status_pb2.Status.FromString(found.details)
    assert status.code == code.value[0]
    assert status.message == found.message
    info, request = error_details_pb2.ErrorInfo(), error_details_pb2.RequestInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == (reason, "heedful")
    assert status.details[1].Unpack(request)
    assert request.request_id == "r-1"


def test_every_request_error_is_in_the_table():
    leaves = [errors.RequestError, errors.ServiceUnavailable]
    for parent in leaves:
        for kind in parent.__subclasses__():
            # What the engine child raises reaches this process as EngineRequestError, by its kind.
            if kind is errors.EngineRequestError or kind.__module__ != errors.__name__:
                continue
            error = kind.__new__(kind)
            error.field = error.reason = ""
            error.retry_after_s = 1.0
            assert to_rpc_error(error, "r").code is not S.INTERNAL, kind


def test_bad_request_names_the_field():
    found = to_rpc_error(errors.InvalidRequest("sampling.stop[3]", "must not be empty"), "r")
    bad_request = error_details_pb2.BadRequest()
    status = status_pb2.Status.FromString(found.details)
    assert status.details[2].Unpack(bad_request)
    (violation,) = bad_request.field_violations
    assert violation.field == "sampling.stop[3]"
    assert violation.description == "must not be empty"


def test_retry_info_holds_the_delay():
    found = to_rpc_error(errors.QueueFull("x", 2.5), "r")
    retry = error_details_pb2.RetryInfo()
    assert status_pb2.Status.FromString(found.details).details[2].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 2500


def test_internal_errors_leak_no_message():
    for error in (ValueError("secret"), errors.EngineRequestError("internal", "secret")):
        found = to_rpc_error(error, "r-1")
        assert b"secret" not in found.details
        assert "secret" not in found.message
        assert "r-1" in found.message


def test_longest_message_fits_the_trailing_headers():
    found = to_rpc_error(errors.InvalidRequest("prompt.chat", "\U0001f600" * 10_000), "r" * 128)
    # Headers may hold 8 KiB; what is not ASCII takes three characters a byte, details are base64.
    assert len(found.message.encode()) * 3 + len(found.details) * 4 / 3 < 6 * 1024


async def test_unexpected_error_is_internal_on_the_wire(stub, engine, monkeypatch):
    def broken(_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(engine, "submit", broken)
    call = stub.Generate(
        pb.GenerateRequest(prompt=pb.Prompt(text="x")), metadata=[("x-request-id", "r-77")]
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is S.INTERNAL
    assert "r-77" in caught.value.details()
    assert "secret" not in repr(rpc_status.from_call(caught.value))
    assert ("x-request-id", "r-77") in tuple(caught.value.trailing_metadata())


async def test_longest_message_arrives(stub, engine, violation, monkeypatch):
    def refuse(_: object) -> None:
        raise errors.EngineRequestError("invalid", "\U0001f600" * 10_000, "constraint.regex")

    monkeypatch.setattr(engine, "submit", refuse)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(pb.GenerateRequest(prompt=pb.Prompt(text="x")))
    field, description = violation(caught.value)
    assert field == "constraint.regex"
    assert description.startswith("\U0001f600" * 100)


async def test_message_beyond_the_limit_is_refused_by_grpc(stub, engine):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(pb.GenerateRequest(prompt=pb.Prompt(text="x" * (5 * 1024 * 1024))))
    assert caught.value.code() is S.RESOURCE_EXHAUSTED
    assert not engine.submitted


async def test_bytes_that_are_no_message_are_refused(channel):
    for method in ("Generate", "Tokenize"):
        call = channel.unary_unary(f"/heedful.v1.InferenceService/{method}")
        with pytest.raises(grpc.aio.AioRpcError):
            await call(b"\xff\xff\xff")
    # A string field with bytes that are not UTF-8.
    call = channel.unary_unary("/heedful.v1.InferenceService/Tokenize")
    with pytest.raises(grpc.aio.AioRpcError):
        await call(b"\x12\x02\xff\xfe")
