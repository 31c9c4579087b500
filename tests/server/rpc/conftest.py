"""A whole server over a toy engine: real ports, real tokenizer, real streams, no weights.

The toy engine has EngineClient's shape and makes real EngineStreams. Its "model" continues a
prompt by repeating it, so that every answer is known; it knows end tokens, stop strings,
deadlines, cancellation and death. It has adapter slots too: an adapter's directory must exist, and
its policy says what the base says. Nothing of ours is replaced but the child process.
"""

import asyncio
import functools
import json
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest
import tokenizers
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from heedful_proto.v1 import (
    feedback_pb2,
    feedback_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    models_pb2_grpc,
)
from heedful_server.config import ServerConfig, load_config
from heedful_server.engine_client.adapters import AdapterInfo
from heedful_server.engine_client.client import EngineState
from heedful_server.engine_client.stream import EngineStream
from heedful_server.errors import EngineRequestError, EngineUnavailable
from heedful_server.protocol import (
    BASE_POLICY,
    AdapterRole,
    Delta,
    EngineConfig,
    EngineInfo,
    EngineStats,
    Finish,
    FinishReason,
    Score,
    Scored,
    Submit,
)
from heedful_server.serving import ServedModel, Server, load_text
from heedful_server.text.detokenizer import StreamDetokenizer
from heedful_server.text.tokenizer import Tokenizer
from heedful_store import migrate, uuid7
from tokenizers import decoders, models, pre_tokenizers

CONTEXT_TOKENS = 256
EOS = "<eos>"
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.content == 'refuse' %}{{ raise_exception('no such thing here') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """A byte tokenizer (token id = byte, and one end token) and a small chat template."""
    directory = tmp_path_factory.mktemp("byte-model")
    tokenizer = tokenizers.Tokenizer(models.BPE(_spelling_of_bytes(), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": 256}))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": EOS, "chat_template": TEMPLATE})
    )
    return load_text("byte-model", directory)


def _spelling_of_bytes() -> dict[str, int]:
    """Byte-level tokenizers spell printable bytes as themselves and the others from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {chr(byte): byte for byte in printable}
    return spelling | {chr(256 + i): byte for i, byte in enumerate(others)}


class ToyEngine:
    """EngineClient's shape around a model that repeats its prompt."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_state: Callable[[EngineState], None],
        on_stats: Callable[[EngineStats], None],
        hang_timeout_s: float,
        tokenizer: Tokenizer,
    ) -> None:
        self._tokenizer = tokenizer
        self._on_state = on_state
        self._on_stats = on_stats
        self.config = config
        self.state = EngineState.STOPPED
        self.info: EngineInfo | None = None
        self.loading = ("weights", 0.25)
        self.failure = ""
        self.num_restarts = 0
        self.pid = 1
        self.heartbeat_age_s = 0.0
        self.step_s = 0.0
        self.frozen = False
        self.submitted: list[Submit] = []
        self.scored: list[Score] = []
        self.cancelled: list[str] = []
        self._stats = EngineStats()
        self._streams: dict[str, EngineStream] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._runs: dict[str, list[_Run]] = {}
        self.adapters: dict[str, AdapterInfo] = {}
        self.load_s = 0.0
        self.loaded_ids: list[str] = []
        self.unloaded_ids: list[str] = []
        self.rewards: dict[str, float] = {}

    async def start(self) -> None:
        self.become(EngineState.LOADING)
        asyncio.get_running_loop().call_soon(self.become, EngineState.READY)

    async def wait_ready(self) -> EngineInfo:
        if self.failure:
            raise EngineUnavailable(self.failure)
        while self.info is None:
            await asyncio.sleep(0)
        return self.info

    def become(self, state: EngineState) -> None:
        self.state = state
        if state is EngineState.READY:
            self.info = EngineInfo(
                base_model="byte-model",
                architecture="toy",
                quantization="none",
                kernel_path="toy",
                device="cpu",
                vocab_size=257,
                context_tokens=CONTEXT_TOKENS,
                num_blocks=8,
                block_size=16,
                weight_bytes=0,
                kv_cache_bytes=0,
                hidden_size=32,
                num_layers=2,
            )
        self._on_state(state)

    @property
    def num_running(self) -> int:
        return len(self._tasks)

    def submit(self, submit: Submit) -> EngineStream:
        if self.state is not EngineState.READY:
            raise EngineUnavailable("the toy does not serve")
        self.submitted.append(submit)
        request_id = submit.request_id

        def cancel(reason: FinishReason) -> None:
            self.cancelled.append(request_id)
            task = self._tasks.pop(request_id, None)
            if task is not None:
                task.cancel()
                for run in self._runs.pop(request_id):
                    if not run.finished:
                        stream.push(run.end(reason))

        def forget() -> None:
            self._streams.pop(request_id, None)

        stream = EngineStream(request_id, submit.n, cancel, forget)
        self._streams[request_id] = stream
        if submit.policy != BASE_POLICY and submit.policy not in self.adapters:
            stream.fail(EngineRequestError("not_loaded", "no such adapter is loaded", "policy"))
            return stream
        if submit.constraint is not None and submit.constraint.text == "unfollowable":
            error = EngineRequestError("invalid", "cannot be followed", "constraint.regex")
            stream.fail(error)
            return stream
        self._runs[request_id] = [_Run(submit, i, self._tokenizer) for i in range(submit.n)]
        task = asyncio.get_running_loop().create_task(self._generate(submit, stream))
        self._tasks[request_id] = task
        return stream

    async def _generate(self, submit: Submit, stream: EngineStream) -> None:
        deadline_s = submit.deadline_s
        deadline_at_s = None if deadline_s is None else time.monotonic() + deadline_s
        runs = self._runs[submit.request_id]
        while not all(run.finished for run in runs):
            await asyncio.sleep(self.step_s)
            while self.frozen and (deadline_at_s is None or time.monotonic() < deadline_at_s):
                await asyncio.sleep(0.005)
            expired = deadline_at_s is not None and time.monotonic() >= deadline_at_s
            for run in runs:
                if not run.finished:
                    stream.push(run.end("deadline") if expired else run.step())
            self._count_step(len(runs))
        del self._tasks[submit.request_id]
        del self._runs[submit.request_id]

    def _count_step(self, num_tokens: int) -> None:
        self._stats = EngineStats(
            num_running=len(self._tasks),
            num_blocks=8,
            num_free_blocks=6,
            generation_tokens=self._stats.generation_tokens + num_tokens,
            steps=self._stats.steps + 1,
            step_s=0.001,
            step_tokens=num_tokens,
        )
        self._on_stats(self._stats)

    async def score(self, score: Score) -> Scored:
        """Every token scores -0.5; three heads agree on the share of "e" unless told otherwise."""
        self.scored.append(score)
        for adapter_id in (score.policy, score.reward):
            if adapter_id not in ("", BASE_POLICY) and adapter_id not in self.adapters:
                raise EngineRequestError("not_loaded", "no such adapter is loaded", "policy")
        if score.reward and self.adapters[score.reward].role != "reward":
            raise EngineRequestError("invalid", "the adapter is no reward model", "reward")
        while self.frozen:
            await asyncio.sleep(0.005)
        logprobs = [[-0.5] * len(item.completion_token_ids) for item in score.items]
        rewards = [[self._reward(item.completion_token_ids)] * 3 for item in score.items]
        return Scored(
            score.request_id, logprobs if score.logprobs else [], rewards if score.reward else []
        )

    def _reward(self, completion_token_ids: list[int]) -> float:
        text = self._tokenizer.decode(completion_token_ids, skip_special_tokens=True)
        share = completion_token_ids.count(ord("e")) / max(1, len(completion_token_ids))
        return self.rewards.get(text, share)

    async def load_adapter(self, adapter_id: str, path: str, role: AdapterRole) -> AdapterInfo:
        if self.state is not EngineState.READY:
            raise EngineUnavailable("the toy does not serve")
        await asyncio.sleep(self.load_s)
        if adapter_id not in self.adapters:
            if not Path(path).is_dir():
                raise EngineRequestError("invalid", f"{path}: no such directory", "adapter")
            if len(self.adapters) >= self.config.max_adapters:
                message = f"all {self.config.max_adapters} adapter slots are taken"
                raise EngineRequestError("resource", message, "adapter")
            heads = 3 if role == "reward" else 0
            self.adapters[adapter_id] = AdapterInfo(adapter_id, path, role, 1000, 8, heads)
            self.loaded_ids.append(adapter_id)
        return self.adapters[adapter_id]

    async def unload_adapter(self, adapter_id: str) -> None:
        if self.adapters.pop(adapter_id, None) is not None:
            self.unloaded_ids.append(adapter_id)
        while any(run[0].policy == adapter_id for run in self._runs.values()):
            await asyncio.sleep(0.001)

    def die(self) -> None:
        """Lose every request, as a killed child does, and come back."""
        self.become(EngineState.RESTARTING)
        for task in self._tasks.values():
            task.cancel()
        for stream in self._streams.values():
            stream.fail(EngineUnavailable("the engine died; it is being restarted"))
        self._tasks.clear()
        self._streams.clear()
        self._runs.clear()
        self.adapters.clear()

    async def stop(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        self.become(EngineState.STOPPED)


class _Run:
    """One completion: the prompt's tokens again and again, starting at the sample's index."""

    def __init__(self, submit: Submit, index: int, tokenizer: Tokenizer) -> None:
        self._submit = submit
        self._index = index
        self._tokens = 0
        self.policy = submit.policy
        self._detokenizer = StreamDetokenizer(tokenizer, submit.sampling.stop)
        self.finished = False

    def step(self) -> Delta:
        prompt = self._submit.prompt_token_ids
        token_id = prompt[(self._tokens + self._index) % len(prompt)]
        self._tokens += 1
        if token_id == 256 and not self._submit.sampling.ignore_eos:
            return self._delta(self._detokenizer.finish(), [token_id], self._finish("stop"))
        delta = self._detokenizer.push(token_id)
        if delta.stop is not None:
            return self._delta(delta.text, [token_id], self._finish("stop", delta.stop))
        if self._tokens >= self._submit.sampling.max_tokens:
            text = delta.text + self._detokenizer.finish()
            return self._delta(text, [token_id], self._finish("length"))
        return self._delta(delta.text, [token_id], None)

    def end(self, reason: FinishReason) -> Delta:
        return self._delta(self._detokenizer.finish(), [], self._finish(reason))

    def _finish(self, reason: FinishReason, stop: str = "") -> Finish:
        self.finished = True
        num_prompt_tokens = len(self._submit.prompt_token_ids)
        return Finish(reason, num_prompt_tokens, 0, self._tokens, 0.001, 0.002, 0.003, stop)

    def _delta(self, text: str, token_ids: list[int], finish: Finish | None) -> Delta:
        top = [(97, -0.25), (98, -1.5)] if self._submit.sampling.top_logprobs else []
        return Delta(
            request_id=self._submit.request_id,
            index=self._index,
            text=text,
            token_ids=token_ids,
            logprobs=[-0.25] * len(token_ids),
            sampling_logprobs=[-0.125] * len(token_ids),
            kept_mass=[1.0] * len(token_ids),
            top=[top] * len(token_ids) if top else [],
            finish=finish,
        )


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store's file with the schema and nothing else, to copy: migrating takes longer."""
    path = tmp_path_factory.mktemp("migrated") / "heedful.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture
def config(tmp_path: Path, migrated_file: Path) -> ServerConfig:
    """A home of its own, free ports, short waits; a full disk is no matter here."""
    shutil.copy(migrated_file, tmp_path / "heedful.db")
    overrides = [
        ("home", str(tmp_path)),
        ("grpc.port", "0"),
        ("http.port", "0"),
        ("grpc.write_timeout_s", "0.5"),
        ("feedback.disk_watermark_bytes", "0"),
        ("feedback.reserve_bytes", "0"),
    ]
    return load_config(None, {}, overrides)


@pytest.fixture(scope="session")
def make_engine(model: ServedModel) -> Callable[..., ToyEngine]:
    """What a Server takes to make its engine."""
    return functools.partial(ToyEngine, tokenizer=model.tokenizer)


@pytest.fixture
async def server(
    config: ServerConfig, model: ServedModel, make_engine: Callable[..., ToyEngine]
) -> AsyncIterator[Server]:
    """A running server whose engine is ready."""
    server = Server(config, model, make_engine)
    await server.start()
    await server.engine.wait_ready()
    yield server
    await server.stop(0.0)


@pytest.fixture
def engine(server: Server) -> ToyEngine:
    """The toy behind the server."""
    return server.engine


@pytest.fixture
async def channel(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    """A client's connection."""
    async with grpc.aio.insecure_channel(server.grpc_address) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> inference_pb2_grpc.InferenceServiceStub:
    """InferenceService on the wire."""
    return inference_pb2_grpc.InferenceServiceStub(channel)


@pytest.fixture
def feedback_stub(channel: grpc.aio.Channel) -> feedback_pb2_grpc.FeedbackServiceStub:
    """FeedbackService on the wire."""
    return feedback_pb2_grpc.FeedbackServiceStub(channel)


@pytest.fixture
def generate(
    stub: inference_pb2_grpc.InferenceServiceStub,
) -> Callable[..., Awaitable[inference_pb2.GenerateResponse]]:
    """Generate a few tokens; keyword arguments are fields of the request."""

    async def call(
        text: str = "hello", max_tokens: int = 4, **fields: object
    ) -> inference_pb2.GenerateResponse:
        sampling = inference_pb2.SamplingParams(max_tokens=max_tokens)
        fields = {"prompt": inference_pb2.Prompt(text=text), "sampling": sampling} | fields
        return await stub.Generate(inference_pb2.GenerateRequest(**fields))

    return call


@pytest.fixture
def submit(
    feedback_stub: feedback_pb2_grpc.FeedbackServiceStub,
) -> Callable[..., Awaitable[feedback_pb2.Receipt]]:
    """Submit an event and return its receipt."""

    async def call(event: feedback_pb2.FeedbackEvent) -> feedback_pb2.Receipt:
        request = feedback_pb2.SubmitFeedbackRequest(event=event)
        return (await feedback_stub.SubmitFeedback(request)).receipt

    return call


@pytest.fixture
def said() -> Callable[..., feedback_pb2.FeedbackEvent]:
    """Make an event about a completion, a thumb up unless a keyword says otherwise."""

    def make(completion: inference_pb2.Completion, **fields: object) -> feedback_pb2.FeedbackEvent:
        kinds = {"thumb", "rating", "ranking", "correction", "critique", "label"}
        fields = {
            "feedback_id": uuid7(),
            "completion_id": completion.completion_id,
            "completion_token": completion.completion_token,
        } | fields
        if not kinds & fields.keys():
            fields["thumb"] = feedback_pb2.Thumb(up=True)
        return feedback_pb2.FeedbackEvent(**fields)

    return make


@pytest.fixture
def models_stub(channel: grpc.aio.Channel) -> models_pb2_grpc.ModelServiceStub:
    """ModelService on the wire."""
    return models_pb2_grpc.ModelServiceStub(channel)


@pytest.fixture
def violation() -> Callable[[grpc.aio.AioRpcError], tuple[str, str]]:
    """Return (field, description) of the bad field that an INVALID_ARGUMENT names."""

    def unpack(error: grpc.aio.AioRpcError) -> tuple[str, str]:
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error
        bad_request = error_details_pb2.BadRequest()
        for detail in rpc_status.from_call(error).details:
            if detail.Unpack(bad_request):
                (found,) = bad_request.field_violations
                return found.field, found.description
        raise AssertionError("no BadRequest among the details")

    return unpack
