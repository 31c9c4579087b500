"""ModelService through the client: values, what is repeated and what is not, streams that break."""

import asyncio

import grpc
import heedful
import pytest
from heedful import Client, RunAdapter
from heedful_proto.v1 import models_pb2 as pb

PLAN = [
    {"status": "running", "stage": "reward", "stage_progress": 0.5, "figures": {"loss": 0.7}},
    {"stage": "policy", "stage_progress": 0.25, "figures": {"loss": 0.6}},
    {"stage": "policy", "stage_progress": 0.75, "figures": {"loss": 0.5}},
    {"stage": "gate", "stage_progress": 0.5},
    {"stage": "done", "status": "finished", "verdict": "pass", "candidate_version": "v1"},
]


async def test_versions_aliases_and_base(client, loop):
    loop.add("v1", "challenger", verdict="pass", method="dpo", run_id="r", parent_version="base")
    loop.aliases["challenger"] = "v1"
    models = await client.list_models()
    assert [item.version for item in models.versions] == ["v1", "base"]
    newest = models.find("challenger")
    assert (newest.state, newest.verdict, newest.method) == ("challenger", "pass", "dpo")
    assert models.find("nobody") is None
    assert models.base.base_id == "echo"


async def test_a_card_keeps_whole_numbers_whole(client, loop):
    loop.add("v1")
    loop.evidence["v1"] = {"gate": {"n": 40, "value": 0.58, "rows": [1, 2.5]}}
    card = await client.get_model("v1")
    assert card.text.startswith("# v1")
    assert repr(card.evidence["gate"]["n"]) == "40"
    assert card.evidence["gate"] == {"n": 40, "value": 0.58, "rows": [1, 2.5]}
    with pytest.raises(heedful.NotFound):
        await client.get_model("v9")


async def test_promote_and_roll_back_say_what_moved(client, loop):
    loop.add("v1", verdict="pass")
    done = await client.promote("v1", reason="better")
    assert (done.action, done.from_version, done.to_version) == ("promote", "base", "v1")
    assert (done.verdict, done.reason) == ("proven", "better")
    back = await client.roll_back()
    assert (back.action, back.to_version, back.seq) == ("roll_back", "base", 2)


async def test_an_unsafe_version_is_a_failed_precondition(client, loop):
    loop.add("v1", verdict="fail")
    with pytest.raises(heedful.FailedPrecondition, match="safety"):
        await client.promote("v1")


@pytest.mark.parametrize("call", ["promote", "roll_back", "start_refresh"])
async def test_what_moves_something_is_not_repeated_where_its_answer_is_lost(client, loop, call):
    loop.add("v1")
    loop.lose_answers = 1
    arguments = ("v1",) if call == "promote" else ()
    with pytest.raises(heedful.Unavailable):
        await getattr(client, call)(*arguments)
    assert len(loop.requests) == 1


async def test_reads_and_loads_are_repeated(client, loop, script, refusal):
    loop.add("v1")
    lost = refusal(grpc.StatusCode.UNAVAILABLE, "lost")
    for call, arguments in (
        (client.list_models, ()),
        (client.get_model, ("v1",)),
        (client.list_refreshes, ()),
        (client.load_adapter, ("v1",)),
        (client.unload_adapter, ("v1",)),
        (client.get_load, ()),
    ):
        script.refusals = [lost]
        await call(*arguments)


async def test_a_run_is_started_with_overrides_and_a_second_one_refused(client, loop):
    refresh = await client.start_refresh("dpo", overrides={"dpo.beta": "0.2"})
    assert (refresh.run_id, refresh.status, refresh.is_over) == ("run-1", "queued", False)
    request = loop.of(pb.StartRefreshRequest)[0]
    assert (request.method, dict(request.overrides)) == ("dpo", {"dpo.beta": "0.2"})
    with pytest.raises(heedful.AlreadyExists):
        await client.start_refresh()
    assert [item.run_id for item in await client.list_refreshes()] == ["run-1"]


async def test_controls_reach_the_run(client, loop):
    run = await client.start_refresh()
    for action, status in (("pause", "paused"), ("resume", "running"), ("stop", "stopped")):
        assert (await client.control_refresh(run.run_id, action)).status == status
    with pytest.raises(heedful.InvalidRequest, match="action"):
        await client.control_refresh(run.run_id, "explode")


async def test_a_watched_run_goes_on_over_a_lost_connection_without_repeating_itself(client, loop):
    loop.plan = [dict(step) for step in PLAN]
    run = await client.start_refresh()
    loop.break_watch_after = 3
    seen = [refresh async for refresh in client.watch_refresh(run.run_id)]
    progress = [(item.stage, item.stage_progress) for item in seen]
    assert len(progress) == len(set(progress)) == 1 + len(PLAN)
    assert len(loop.of(pb.WatchRefreshRequest)) == 2
    assert seen[-1].is_over
    assert (seen[-1].verdict, seen[-1].candidate_version) == ("pass", "v1")


async def test_a_watched_run_survives_a_restart_of_the_server(client, loop, server):
    loop.plan = [dict(step) for step in PLAN]
    loop.step_s = 0.1
    run = await client.start_refresh()
    stages = []
    async for refresh in client.watch_refresh(run.run_id):
        stages.append(refresh.stage)
        if refresh.stage == "reward":
            server.stop()
            server.start()
    assert stages[-1] == "done"


async def test_an_unknown_run_is_not_waited_for(client, loop):
    with pytest.raises(heedful.NotFound):
        await anext(client.watch_refresh("nobody"))


async def test_watching_ends_with_its_timeout(client, loop):
    run = await client.start_refresh()
    with pytest.raises(heedful.DeadlineExceeded):
        async for _ in client.watch_refresh(run.run_id, timeout_s=0.3):
            pass


async def test_deployments_until_now(client, loop):
    loop.add("v1")
    await client.promote("v1")
    await client.roll_back()
    assert [item.seq async for item in client.deployments()] == [1, 2]
    assert [item.action async for item in client.deployments(after=1)] == ["roll_back"]


async def test_followed_deployments_come_once_each(client, loop):
    loop.add("v1")
    await client.promote("v1")
    loop.break_watch_after = 1
    following = client.deployments(follow=True)
    first = await anext(following)
    second = asyncio.ensure_future(anext(following))
    await asyncio.sleep(0.1)
    await client.roll_back()
    assert [first.seq, (await second).seq] == [1, 2]
    await following.aclose()


async def test_an_adapter_of_a_run_is_leased_and_freed(client, loop):
    adapter = RunAdapter("run-1", "candidate")
    loaded = await client.load_adapter(adapter, lease_s=60)
    assert loaded.version == adapter.model == "run:run-1/candidate"
    assert loop.leases == {adapter.model: 60}
    await client.unload_adapter(adapter)
    assert loop.leases == {}
    with pytest.raises(heedful.InvalidRequest, match="lease_s"):
        await client.load_adapter(adapter, lease_s=-1)


async def test_load(client):
    assert await client.get_load() == heedful.Load(3, 1)


async def test_a_rollout_is_repeated_and_an_answer_for_a_user_is_not(client, script, refusal):
    script.refusals = [refusal(grpc.StatusCode.UNAVAILABLE, "lost")]
    rollout = await client.generate("x", purpose="rollout", priority="background", best_of=2)
    assert rollout.text == "x"
    assert script.requests[0].best_of == 2
    script.refusals = [refusal(grpc.StatusCode.UNAVAILABLE, "lost")]
    with pytest.raises(heedful.Unavailable):
        await client.generate("x")


def test_the_synchronous_client_watches_and_can_stop_early(server, loop):
    loop.plan = [dict(step) for step in PLAN]
    with Client(server.target, timeout_s=10) as client:
        run = client.start_refresh()
        for refresh in client.watch_refresh(run.run_id):
            if refresh.stage == "policy":
                break
        assert client.get_refresh(run.run_id).run_id == "run-1"
        assert [item.stage for item in client.watch_refresh(run.run_id)][-1] == "done"
