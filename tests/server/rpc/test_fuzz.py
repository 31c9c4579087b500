"""Random messages through a real port: every answer is one of the contract's, and the server lives.

Messages are drawn from the descriptors, so that a new field is covered the day it is added. Half
of the draws start from a sound request and spoil a few fields, since wholly random ones rarely
get past the first rule.
"""

import asyncio
import math
import re
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import TypeVar

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from heedful_proto.v1 import inference_pb2 as pb
from heedful_proto.v1.inference_pb2_grpc import InferenceServiceStub
from heedful_server.config import load_config
from heedful_server.serving import Server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

T = TypeVar("T")

UINT32 = st.sampled_from([0, 1, 2, 16, 17, 255, 256, 257, 2**31 - 1, 2**31, 2**32 - 1])
UINT64 = st.sampled_from([0, 1, 2**53, 2**63, 2**64 - 1])
FLOATS = st.sampled_from(
    [0.0, -0.0, 1e-45, -1e-30, 0.5, 1.0, 1.5, -1.0, 2.0, 101.0, 3e38, math.nan, math.inf, -math.inf]
)
ODD_TEXTS = st.sampled_from(
    [
        *("", "a", "\0", "\ufeff", "\u202e", "\U0001f600", "é" * 129, "x" * 300),
        *("<eos>", "base", "default", "user", "{{ 7 * 7 }}"),
        *("{}", "[", "true", '{"type": "object"}', "[" * 5000, "("),
    ]
)
TEXTS = ODD_TEXTS | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ALLOWED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
SOUND = {
    pb.GenerateRequest: pb.GenerateRequest(
        prompt=pb.Prompt(text="ab"), sampling=pb.SamplingParams(max_tokens=4)
    ),
    pb.ScoreRequest: pb.ScoreRequest(items=[pb.ScoreItem(prompt=pb.Prompt(text="a"), text="b")]),
    pb.TokenizeRequest: pb.TokenizeRequest(text="ab"),
    pb.DetokenizeRequest: pb.DetokenizeRequest(token_ids=[97]),
}


NAMES = {
    "model": st.sampled_from(["", "base", "champion", "base", "other"]),
    "project": st.sampled_from(["", "default", "default", "other"]),
    "role": st.sampled_from(["user", "assistant", "system", "user", "tool"]),
}


def scalar(field: FieldDescriptor) -> st.SearchStrategy[object]:
    if field.name in NAMES:
        return NAMES[field.name]
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_UINT32:
            return UINT32
        case FieldDescriptor.CPPTYPE_UINT64:
            return UINT64
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return FLOATS
        case FieldDescriptor.CPPTYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.CPPTYPE_ENUM:
            return st.sampled_from([-1, 0, 1, 2, 3, 77])
        case FieldDescriptor.CPPTYPE_STRING:
            return TEXTS
    raise AssertionError(f"no strategy for {field.full_name}")


def fill(draw: st.DrawFn, message: Message, field: FieldDescriptor) -> None:
    """Set one field of a message at random."""
    if field.is_repeated:
        count = draw(st.sampled_from([1, 2, 3, 17, 65]))
        for _ in range(min(count, 3)):
            if field.message_type is not None:
                spoil(draw, getattr(message, field.name).add(), field.message_type)
            else:
                getattr(message, field.name).append(draw(scalar(field)))
        values = getattr(message, field.name)
        values.extend([values[0]] * max(0, count - 3))
    elif field.message_type is not None:
        spoil(draw, getattr(message, field.name), field.message_type)
    else:
        setattr(message, field.name, draw(scalar(field)))


def spoil(draw: st.DrawFn, message: Message, descriptor: Descriptor) -> None:
    fields = draw(st.lists(st.sampled_from(list(descriptor.fields)), max_size=4))
    for field in fields:
        fill(draw, message, field)


@st.composite
def messages(draw: st.DrawFn, kind: type[Message]) -> Message:
    message = kind()
    if draw(st.booleans()):
        message.CopyFrom(SOUND[kind])
    spoil(draw, message, kind.DESCRIPTOR)
    return message


def names_a_field(path: str, descriptor: Descriptor) -> bool:
    """Whether every part of a path is a field of the message before it."""
    for part in path.split("."):
        name = re.sub(r"\[\d+\]$", "", part)
        if descriptor is None or name not in descriptor.fields_by_name:
            return False
        descriptor = descriptor.fields_by_name[name].message_type
    return True


class Harness:
    """A server on a loop of its own, since Hypothesis runs synchronous tests."""

    def __init__(self, model: object, make_engine: Callable[..., object]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        ports = [("grpc.port", "0"), ("http.enabled", "false"), ("engine.max_queue", "8")]
        config = load_config(None, {}, ports)
        self._server: Server = self.run(self._start(config, model, make_engine))

    async def _start(self, config, model, make_engine) -> Server:
        server = Server(config, model, make_engine)
        await server.start()
        self.channel = grpc.aio.insecure_channel(server.grpc_address)
        self.stub = InferenceServiceStub(self.channel)
        return server

    def run(self, work: Coroutine[object, object, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def close(self) -> None:
        async def stop() -> None:
            await self.channel.close()
            await self._server.stop(0)

        self.run(stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def in_flight(self) -> float | None:
        return self._server.metrics.registry.get_sample_value("heedful_sequences_in_flight")


@pytest.fixture(scope="module")
def harness(model, make_engine) -> Iterator[Harness]:
    harness = Harness(model, make_engine)
    yield harness
    harness.close()


def check(harness: Harness, method: str, message: Message) -> Message | None:
    """Call the server and return its answer, None where it refused as the contract says."""

    async def call() -> Message | grpc.aio.AioRpcError:
        try:
            return await getattr(harness.stub, method)(message, timeout=20)
        except grpc.aio.AioRpcError as error:
            return error

    error = harness.run(call())
    if not isinstance(error, grpc.aio.AioRpcError):
        return error
    assert error.code() in ALLOWED, error
    if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
        return None
    bad_request = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad_request) for detail in rpc_status.from_call(error).details)
    (violation,) = bad_request.field_violations
    assert names_a_field(violation.field, message.DESCRIPTOR), violation.field
    assert violation.description
    return None


fuzz = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@fuzz
@given(message=messages(pb.GenerateRequest))
def test_generate(harness: Harness, message: pb.GenerateRequest) -> None:
    check(harness, "Generate", message)


@fuzz
@given(message=messages(pb.ScoreRequest))
def test_score(harness: Harness, message: pb.ScoreRequest) -> None:
    check(harness, "Score", message)


@fuzz
@given(message=messages(pb.TokenizeRequest))
def test_tokenize(harness: Harness, message: pb.TokenizeRequest) -> None:
    check(harness, "Tokenize", message)


@fuzz
@given(message=messages(pb.DetokenizeRequest))
def test_detokenize(harness: Harness, message: pb.DetokenizeRequest) -> None:
    check(harness, "Detokenize", message)


def test_server_answers_after_all_that_and_holds_nothing(harness: Harness) -> None:
    assert check(harness, "Generate", SOUND[pb.GenerateRequest]).completions[0].text == "abab"
    assert harness.in_flight() == 0
