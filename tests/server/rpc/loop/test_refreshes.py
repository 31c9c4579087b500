"""Refresh runs over a real port: started, listed, followed, controlled."""

import asyncio

import grpc
import grpc.aio
import pytest
from heedful_proto.v1 import inference_pb2
from heedful_proto.v1 import models_pb2 as pb
from heedful_store import Scope, uuid7
from heedful_store.registry_schema import policies
from sqlalchemy import update

S = grpc.StatusCode
SCOPE = Scope("local", "default")


@pytest.fixture
def start(models_stub):
    async def run(**fields: object) -> pb.Refresh:
        return (await models_stub.StartRefresh(pb.StartRefreshRequest(**fields))).refresh

    return run


async def code_of(call) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


async def test_a_run_is_queued_and_read_back(start, models_stub, server):
    run = await start(method="dpo", overrides={"dpo.beta": "0.2"})
    assert (run.status, run.stage, run.method, run.kind) == (
        "queued",
        "snapshot",
        "dpo",
        "refresh",
    )
    row = server.feedback.store.get_run(SCOPE, run.run_id)
    assert row.config == {"dpo.beta": "0.2"}
    found = await models_stub.GetRefresh(pb.GetRefreshRequest(run_id=run.run_id))
    assert found.refresh == run
    listed = await models_stub.ListRefreshes(pb.ListRefreshesRequest())
    assert list(listed.refreshes) == [run]


async def test_a_second_run_waits_for_the_first_to_end(start, server):
    await start()
    assert await code_of(start()) is S.ALREADY_EXISTS


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"method": "magic"}, "method"),
        ({"overrides": {"Dpo.beta": "1"}}, "overrides['Dpo.beta']"),
        ({"overrides": {"dpo..beta": "1"}}, "overrides['dpo..beta']"),
        ({"overrides": {"": "1"}}, "overrides['']"),
        ({"overrides": {"dpo.beta": "x" * 1025}}, "overrides['dpo.beta']"),
        ({"overrides": {f"a{n}": "" for n in range(65)}}, "overrides"),
    ],
)
async def test_a_bad_start_is_refused_by_field(start, violation, fields, field):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await start(**fields)
    assert violation(caught.value)[0] == field


async def test_a_tainted_champion_is_rebuilt(start, publish, promote, server):
    await publish()
    await promote("v1")
    mark = update(policies).values(tainted_at_ms=1)
    await server.feedback.store.write(lambda c: c.execute(mark).rowcount)
    await server.deployment.directory.refresh()
    assert (await start()).kind == "rebuild"


async def test_a_run_is_followed_until_it_ends(start, models_stub, server):
    store = server.feedback.store
    run = await start()
    seen: list[pb.Refresh] = []

    async def follow() -> None:
        request = pb.WatchRefreshRequest(run_id=run.run_id)
        async for message in models_stub.WatchRefresh(request):
            seen.append(message.refresh)

    following = asyncio.create_task(follow())
    await store.lease_run("worker", 60_000)
    steps = [
        {"stage": "reward", "progress": {"fraction": 0.5, "figures": {"loss": 0.25, "n": "x"}}},
        {"evidence": {"reward": {"ece": float("nan"), "n": 3}}},
        {"stage": "done", "status": "finished", "verdict": "pass", "policy_version": "v1"},
    ]
    for changes in steps:
        count = len(seen)
        await store.update_run(run.run_id, "worker", **changes)
        # A renewed lease is no news.
        if changes.get("status") != "finished":
            await store.renew_run(run.run_id, "worker", 60_000)
        async with asyncio.timeout(2):
            while len(seen) == count:
                await asyncio.sleep(0.01)
    await following
    assert seen[0].status in ("queued", "running")
    assert seen[-1].status == "finished"
    assert (seen[-1].verdict, seen[-1].candidate_version) == ("pass", "v1")
    assert seen[-1].end_time.seconds > 0
    assert dict(seen[-1].figures) == {"loss": 0.25}
    assert seen[-1].stage_progress == 0.5
    assert seen[-1].evidence["reward"]["n"] == 3
    assert seen[-1].evidence["reward"]["ece"] is None
    assert len(seen) <= 5


async def test_a_shutdown_ends_the_streams(start, models_stub, server):
    run = await start()
    refreshes = models_stub.WatchRefresh(pb.WatchRefreshRequest(run_id=run.run_id))
    deployments = models_stub.WatchDeployments(pb.WatchDeploymentsRequest())
    await refreshes.read()
    waiting = asyncio.create_task(deployments.read())
    await asyncio.sleep(0.05)
    server.begin_draining()
    async with asyncio.timeout(2):
        assert await code_of(refreshes.read()) is S.UNAVAILABLE
        assert await code_of(waiting) is S.UNAVAILABLE


async def test_a_run_is_paused_resumed_and_stopped(start, models_stub, server):
    run = await start()

    async def control(action: int) -> pb.Refresh:
        request = pb.ControlRefreshRequest(run_id=run.run_id, action=action)
        return (await models_stub.ControlRefresh(request)).refresh

    assert (await control(pb.REFRESH_ACTION_PAUSE)).status == "paused"
    assert (await control(pb.REFRESH_ACTION_RESUME)).status == "queued"
    await server.feedback.store.lease_run("worker", 60_000)
    assert (await control(pb.REFRESH_ACTION_STOP)).status == "running"
    renewed = await server.feedback.store.renew_run(run.run_id, "worker", 60_000)
    assert renewed.control == "stop"
    await server.feedback.store.update_run(run.run_id, "worker", status="stopped")
    assert await code_of(control(pb.REFRESH_ACTION_RESUME)) is S.INVALID_ARGUMENT
    assert await code_of(control(7)) is S.INVALID_ARGUMENT


async def test_unknown_and_bad_runs(models_stub, violation):
    assert await code_of(models_stub.GetRefresh(pb.GetRefreshRequest(run_id=uuid7()))) is (
        S.NOT_FOUND
    )
    unknown = models_stub.WatchRefresh(pb.WatchRefreshRequest(run_id=uuid7()))
    assert await code_of(unknown.read()) is S.NOT_FOUND
    for call in (
        models_stub.GetRefresh(pb.GetRefreshRequest(run_id="../x")),
        models_stub.ListRefreshes(pb.ListRefreshesRequest(limit=101)),
        models_stub.WatchDeployments(pb.WatchDeploymentsRequest(after_seq=2**63)).read(),
    ):
        assert await code_of(call) is S.INVALID_ARGUMENT


async def test_the_load_is_told_by_priority(models_stub, engine, generate):
    engine.frozen = True
    waiting = [
        asyncio.create_task(generate(n=2)),
        asyncio.create_task(generate(n=3, priority=inference_pb2.PRIORITY_BACKGROUND)),
    ]
    while len(engine.submitted) < 2:
        await asyncio.sleep(0.005)
    load = await models_stub.GetLoad(pb.GetLoadRequest())
    assert (load.num_interactive, load.num_background) == (2, 3)
    engine.frozen = False
    await asyncio.gather(*waiting)
    load = await models_stub.GetLoad(pb.GetLoadRequest())
    assert (load.num_interactive, load.num_background) == (0, 0)
