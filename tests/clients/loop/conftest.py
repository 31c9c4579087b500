"""ModelService in memory, on the small server of the client's tests.

Keeps the promises that a client relies on: a run moves through its plan, a second unfinished run is
refused, positions of the deployment log grow, aliases move. It is the other side of the wire, not a
stand-in for any part of the client.
"""

import asyncio
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import heedful
import pytest
from google.protobuf.struct_pb2 import Struct
from heedful.cli.app import build_app
from heedful_proto.v1 import feedback_pb2_grpc, models_pb2_grpc
from heedful_proto.v1 import models_pb2 as pb
from typer.testing import CliRunner

STATES = {
    "candidate": pb.POLICY_STATE_CANDIDATE,
    "challenger": pb.POLICY_STATE_CHALLENGER,
    "champion": pb.POLICY_STATE_CHAMPION,
    "retired": pb.POLICY_STATE_RETIRED,
    "rejected": pb.POLICY_STATE_REJECTED,
}
REPORT = {
    "verdict": "inconclusive",
    "text": "Nothing speaks against it; too few votes to prove it better.",
    "stages": [
        {
            "name": "integrity",
            "verdict": "pass",
            "checks": [{"name": "golden prompts end", "verdict": "pass", "value": 1.0, "n": 8}],
        },
        {
            "name": "offline",
            "verdict": "inconclusive",
            "checks": [
                {
                    "name": "win rate",
                    "verdict": "inconclusive",
                    "value": 0.58,
                    "limit": 0.5,
                    "n": 40,
                    "interval": [0.43, 0.72],
                    "detail": "the interval holds 50 %",
                    "overridable": True,
                }
            ],
        },
        {"name": "canary", "verdict": "skipped", "checks": []},
    ],
}


@dataclass
class Loop(models_pb2_grpc.ModelServiceServicer):
    """Versions, aliases, deployments and runs; `plan` is what a run goes through."""

    script: object
    refuse: object
    refusal: type
    models: dict[str, pb.Model] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=lambda: {"champion": "base"})
    evidence: dict[str, dict] = field(default_factory=dict)
    log: list[pb.Deployment] = field(default_factory=list)
    runs: dict[str, pb.Refresh] = field(default_factory=dict)
    plan: list[dict] = field(default_factory=list)
    may_begin: Callable[[], bool] = lambda: True
    requests: list[object] = field(default_factory=list)
    leases: dict[str, int] = field(default_factory=dict)
    break_watch_after: int | None = None
    lose_answers: int = 0
    step_s: float = 0.02

    def of(self, kind: type) -> list:
        return [request for request in self.requests if isinstance(request, kind)]

    def add(self, version: str, state: str = "candidate", **fields: object) -> pb.Model:
        model = pb.Model(
            version=version,
            base_model="Echo-1",
            state=STATES[state],
            loaded=True,
            quantization="q4_1",
            context_tokens=2048,
            role="base" if version == "base" else "policy",
            **fields,
        )
        model.create_time.FromSeconds(int(time.time()) - 7200)
        self.models[version] = model
        return model

    async def _begin(self, request, context) -> None:
        self.script.attempts += 1
        self.requests.append(request)
        if self.script.refusals:
            await self.refuse(context, self.script.refusals.pop(0))

    async def _abort(self, context, code: grpc.StatusCode, message: str, field: str = "") -> None:
        await self.refuse(context, self.refusal(code, message, field=field))

    async def _find(self, name: str, context) -> pb.Model:
        version = self.aliases.get(name, name)
        if version not in self.models:
            await self._abort(context, grpc.StatusCode.NOT_FOUND, f"no model {name}", "model")
        return self.models[version]

    async def ListModels(self, request, context):  # noqa: N802
        await self._begin(request, context)
        response = pb.ListModelsResponse(models=reversed(self.models.values()))
        for name, version in self.aliases.items():
            response.aliases.add(name=name, version=version)
        response.base.name, response.base.base_id = "Echo-1", "echo"
        return response

    async def GetModel(self, request, context):  # noqa: N802
        await self._begin(request, context)
        model = await self._find(request.model, context)
        evidence = Struct()
        evidence.update(self.evidence.get(model.version, {}))
        card = f"# {model.version}\n\nLearned from 20 comparisons.\n"
        return pb.GetModelResponse(model=model, card=card, evidence=evidence)

    def _move(self, to: str, action: str, verdict: str, reason: str) -> pb.Deployment:
        entry = pb.Deployment(
            seq=len(self.log) + 1,
            alias="champion",
            from_version=self.aliases["champion"],
            to_version=to,
            verdict=verdict,
            reason=reason,
            actor="local",
            action=action,
        )
        entry.time.GetCurrentTime()
        self.log.append(entry)
        left = "rejected" if action == "roll_back" else "retired"
        self.models[entry.from_version].state = STATES[left]
        self.models[to].state = STATES["champion"]
        self.aliases["champion"] = to
        if self.aliases.get("challenger") == to:
            del self.aliases["challenger"]
        return entry

    async def _answer(self, context, response):
        if self.lose_answers:
            self.lose_answers -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "connection lost")
        return response

    async def Promote(self, request, context):  # noqa: N802
        await self._begin(request, context)
        model = await self._find(request.version, context)
        if model.verdict == "fail":
            message = f"{model.version} failed the gate's safety checks"
            await self._abort(context, grpc.StatusCode.FAILED_PRECONDITION, message)
        verdict = "proven" if model.verdict == "pass" else "approved"
        entry = self._move(model.version, "promote", verdict, request.reason)
        return await self._answer(context, pb.PromoteResponse(deployment=entry))

    async def RollBack(self, request, context):  # noqa: N802
        await self._begin(request, context)
        entry = self._move("base", "roll_back", "rolled back", request.reason)
        return await self._answer(context, pb.RollBackResponse(deployment=entry))

    async def WatchDeployments(self, request, context):  # noqa: N802
        await self._begin(request, context)
        sent = request.after_seq
        while True:
            for entry in self.log[sent:]:
                sent = entry.seq
                yield pb.WatchDeploymentsResponse(deployment=entry)
            if request.until_now:
                return
            if self.break_watch_after is not None and sent >= self.break_watch_after:
                self.break_watch_after = None
                await context.abort(grpc.StatusCode.UNAVAILABLE, "connection lost")
            await asyncio.sleep(self.step_s)

    async def StartRefresh(self, request, context):  # noqa: N802
        await self._begin(request, context)
        if any(run.status in ("queued", "running", "paused") for run in self.runs.values()):
            await self._abort(context, grpc.StatusCode.ALREADY_EXISTS, "a run has not ended yet")
        run = pb.Refresh(
            run_id=f"run-{len(self.runs) + 1}",
            status="queued",
            stage="snapshot",
            method=request.method,
            kind="refresh",
        )
        run.start_time.GetCurrentTime()
        self.runs[run.run_id] = run
        return await self._answer(context, pb.StartRefreshResponse(refresh=run))

    async def _run(self, run_id: str, context) -> pb.Refresh:
        if run_id not in self.runs:
            await self._abort(context, grpc.StatusCode.NOT_FOUND, "no such run", "run_id")
        return self.runs[run_id]

    async def GetRefresh(self, request, context):  # noqa: N802
        await self._begin(request, context)
        run = await self._run(request.run_id, context)
        if run.status == "queued" and self.plan and self.may_begin():
            run.status = "running"
        return pb.GetRefreshResponse(refresh=run)

    async def WatchRefresh(self, request, context):  # noqa: N802
        await self._begin(request, context)
        run = await self._run(request.run_id, context)
        sent = 0
        while True:
            yield pb.WatchRefreshResponse(refresh=run)
            sent += 1
            if run.status in ("failed", "stopped", "finished"):
                return
            if self.break_watch_after is not None and sent >= self.break_watch_after:
                self.break_watch_after = None
                await context.abort(grpc.StatusCode.UNAVAILABLE, "connection lost")
            await asyncio.sleep(self.step_s)
            if self.plan and self.may_begin():
                self._step(run, dict(self.plan.pop(0)))

    def _step(self, run: pb.Refresh, change: dict) -> None:
        run.figures.update(change.pop("figures", {}))
        evidence = change.pop("evidence", None)
        if evidence is not None:
            run.evidence.update(evidence)
        for name, value in change.items():
            setattr(run, name, value)
        if run.status == "finished" and run.candidate_version:
            self.add(run.candidate_version, "challenger", run_id=run.run_id, verdict=run.verdict)
            self.aliases["challenger"] = run.candidate_version

    async def ListRefreshes(self, request, context):  # noqa: N802
        await self._begin(request, context)
        newest = list(reversed(self.runs.values()))
        return pb.ListRefreshesResponse(refreshes=newest[: request.limit or 20])

    async def ControlRefresh(self, request, context):  # noqa: N802
        await self._begin(request, context)
        run = await self._run(request.run_id, context)
        status = {
            pb.REFRESH_ACTION_PAUSE: "paused",
            pb.REFRESH_ACTION_RESUME: "running",
            pb.REFRESH_ACTION_STOP: "stopped",
        }
        run.status = status[request.action]
        return pb.ControlRefreshResponse(refresh=run)

    async def LoadAdapter(self, request, context):  # noqa: N802
        await self._begin(request, context)
        if request.HasField("ephemeral"):
            name = f"run:{request.ephemeral.run_id}/{request.ephemeral.name}"
            self.leases[name] = request.lease_s
            return pb.LoadAdapterResponse(model=pb.Model(version=name, loaded=True))
        model = await self._find(request.version, context)
        model.loaded = True
        return pb.LoadAdapterResponse(model=model)

    async def UnloadAdapter(self, request, context):  # noqa: N802
        await self._begin(request, context)
        self.leases.pop(request.version, None)
        if request.version in self.models:
            self.models[request.version].loaded = False
        return pb.UnloadAdapterResponse()

    async def GetLoad(self, request, context):  # noqa: N802
        await self._begin(request, context)
        return pb.GetLoadResponse(num_interactive=3, num_background=1)


@pytest.fixture
def loop(server, script, refuse, refusal) -> Loop:
    loop = Loop(script, refuse, refusal)
    loop.add("base", "champion")
    server.stop()
    server.model_service = loop
    server.start()
    return loop


@pytest.fixture
def memory(server, loop, script, refuse, refusal):
    """FeedbackService in memory, as the tests of feedback have it."""
    path = Path(__file__).parent.parent / "feedback" / "conftest.py"
    spec = importlib.util.spec_from_file_location("heedful_tests_feedback_service", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    script.unique_ids = True
    memory = module.Memory(script, refuse, refusal)
    server.stop()
    server.more_services.append(
        lambda grpc_server: feedback_pb2_grpc.add_FeedbackServiceServicer_to_server(
            memory, grpc_server
        )
    )
    server.start()
    return memory


@pytest.fixture
def report() -> dict:
    return REPORT


@pytest.fixture
async def client(server, loop):
    async with heedful.AsyncClient(server.target, timeout_s=10) as client:
        yield client


@pytest.fixture
def run(server, loop, tmp_path):
    """Runs a command in this process against the small server."""
    environment = {
        "HEEDFUL_TARGET": server.target,
        "HEEDFUL_HOME": str(tmp_path / "home"),
        "HEEDFUL_METRICS_URL": "http://127.0.0.1:9/metrics",
        "COLUMNS": "160",
    }

    def run(*arguments: str, stdin: str | None = None):
        result = CliRunner().invoke(build_app(), arguments, input=stdin, env=environment)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run
