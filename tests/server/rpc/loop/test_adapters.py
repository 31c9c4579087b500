"""LoadAdapter and UnloadAdapter: versions kept on request, adapters of runs on a lease."""

import asyncio

import grpc
import grpc.aio
import pytest
from heedful_proto.v1 import inference_pb2
from heedful_proto.v1 import models_pb2 as pb
from heedful_server.engine_client.client import EngineState
from heedful_server.errors import PermissionDenied
from heedful_server.identity import DEPLOY, TRAIN, Caller
from heedful_server.rpc.call import current_caller
from heedful_store import Run, Scope, uuid7

S = grpc.StatusCode
SCOPE = Scope("local", "default")


@pytest.fixture
def load(models_stub):
    async def run(version: str = "", **fields: object) -> pb.Model:
        request = pb.LoadAdapterRequest(version=version, **fields)
        return (await models_stub.LoadAdapter(request)).model

    return run


@pytest.fixture
def unload(models_stub):
    async def run(version: str) -> None:
        await models_stub.UnloadAdapter(pb.UnloadAdapterRequest(version=version))

    return run


@pytest.fixture
def write_run_adapter(config, write_adapter, run_row):
    """Write an adapter of the run; a second time, other files under the same name."""

    def write(name: str = "policy", role: str = "policy", **info: object) -> str:
        return write_adapter(config.home_dir / "runs" / run_row.run_id / "adapters" / name, role)

    return write


def ephemeral(run: Run, name: str = "policy") -> pb.EphemeralAdapter:
    return pb.EphemeralAdapter(run_id=run.run_id, name=name)


async def code_of(call) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


async def settle(engine, *ids: str) -> None:
    async with asyncio.timeout(2):
        while set(engine.adapters) != set(ids):
            await asyncio.sleep(0.01)


async def test_a_version_can_be_kept_loaded_and_let_go(publish, load, unload, generate, engine):
    v1 = await publish()
    model = await load("v1")
    assert (model.version, model.loaded, model.content_hash) == ("v1", True, v1.content_hash)
    assert (await generate("v1")).served_by.policy_version == "v1"
    await unload("v1")
    assert not engine.adapters
    assert await code_of(generate("v1")) is S.FAILED_PRECONDITION
    assert await code_of(unload("v1")) is S.FAILED_PRECONDITION
    assert await code_of(load("v9")) is S.NOT_FOUND
    assert (await load("base")).version == "base"


async def test_a_champion_stays_loaded_when_its_lease_ends(publish, promote, load, unload, engine):
    v1 = await publish()
    await promote("v1")
    await load("v1")
    await unload("v1")
    assert set(engine.adapters) == {v1.content_hash}


async def test_a_lease_of_a_version_lapses(publish, load, server, engine, generate):
    now_s = [1000.0]
    server.deployment.leases._clock = lambda: now_s[0]
    v1 = await publish()
    await load("v1", lease_s=10)
    now_s[0] += 9
    await load("v1", lease_s=10)
    now_s[0] += 9
    await server.deployment.keeper.turn()
    await settle(engine, v1.content_hash)
    now_s[0] += 1
    await server.deployment.keeper.turn()
    await settle(engine)
    assert await code_of(generate("v1")) is S.FAILED_PRECONDITION


async def test_an_adapter_of_a_run_answers_rollouts_and_follows_its_files(
    load, generate, engine, run_row, write_run_adapter
):
    first = write_run_adapter()
    model = await load(ephemeral=ephemeral(run_row), lease_s=60)
    name = f"run:{run_row.run_id}/policy"
    assert (model.version, model.content_hash, model.role) == (name, first, "policy")
    rollout = {"purpose": inference_pb2.PURPOSE_ROLLOUT}
    answer = await generate(name, **rollout)
    assert answer.served_by.policy_version == name
    assert engine.submitted[-1].policy == first
    second = write_run_adapter()
    assert (await load(ephemeral=ephemeral(run_row), lease_s=60)).content_hash == second
    await generate(name, **rollout)
    assert engine.submitted[-1].policy == second
    await settle(engine, second)


async def test_a_request_ends_with_the_files_that_it_began_with(
    load, generate, engine, run_row, write_run_adapter
):
    first = write_run_adapter()
    await load(ephemeral=ephemeral(run_row), lease_s=60)
    engine.step_s = 0.005
    running = asyncio.create_task(generate(f"run:{run_row.run_id}/policy", max_tokens=50))
    while not engine.submitted:
        await asyncio.sleep(0.005)
    second = write_run_adapter()
    await load(ephemeral=ephemeral(run_row), lease_s=60)
    assert len((await running).completions[0].token_ids) == 50
    assert engine.submitted[0].policy == first
    await settle(engine, second)


async def test_a_lapsed_adapter_of_a_run_is_gone(
    load, generate, server, engine, run_row, write_run_adapter
):
    now_s = [1000.0]
    server.deployment.leases._clock = lambda: now_s[0]
    write_run_adapter()
    await load(ephemeral=ephemeral(run_row), lease_s=5)
    now_s[0] += 5
    await server.deployment.keeper.turn()
    await settle(engine)
    assert await code_of(generate(f"run:{run_row.run_id}/policy")) is S.FAILED_PRECONDITION


async def test_an_adapter_of_a_run_is_loaded_again_after_the_engine_died(
    load, engine, run_row, write_run_adapter
):
    first = write_run_adapter()
    await load(ephemeral=ephemeral(run_row), lease_s=60)
    engine.die()
    engine.become(EngineState.READY)
    await settle(engine, first)


async def test_an_adapter_of_a_run_can_be_let_go(load, unload, engine, run_row, write_run_adapter):
    write_run_adapter()
    await load(ephemeral=ephemeral(run_row), lease_s=60)
    await unload(f"run:{run_row.run_id}/policy")
    assert not engine.adapters


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "version"),
        ({"version": "v1", "lease_s": 3601}, "lease_s"),
        ({"version": "x" * 201}, "version"),
        ({"ephemeral": {"run_id": "r", "name": "a"}}, "lease_s"),
        ({"ephemeral": {"run_id": "r", "name": "a"}, "version": "v1", "lease_s": 1}, "version"),
        ({"ephemeral": {"run_id": "../r", "name": "a"}, "lease_s": 1}, "ephemeral.run_id"),
        ({"ephemeral": {"run_id": "..", "name": "a"}, "lease_s": 1}, "ephemeral.run_id"),
        ({"ephemeral": {"run_id": "", "name": "a"}, "lease_s": 1}, "ephemeral.run_id"),
        ({"ephemeral": {"run_id": "r", "name": "a/b"}, "lease_s": 1}, "ephemeral.name"),
        ({"ephemeral": {"run_id": "r", "name": "/etc"}, "lease_s": 1}, "ephemeral.name"),
        ({"ephemeral": {"run_id": "r", "name": "a\0"}, "lease_s": 1}, "ephemeral.name"),
    ],
)
async def test_a_bad_request_is_refused_by_field(models_stub, violation, fields, field):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await models_stub.LoadAdapter(pb.LoadAdapterRequest(**fields))
    assert violation(caught.value)[0] == field


async def test_a_link_out_of_the_runs_is_not_followed(
    load, config, run_row, write_adapter, tmp_path
):
    outside = tmp_path / "outside"
    write_adapter(outside)
    adapters = config.home_dir / "runs" / run_row.run_id / "adapters"
    adapters.mkdir(parents=True)
    (adapters / "policy").symlink_to(outside)
    wanted = ephemeral(run_row)
    assert await code_of(load(ephemeral=wanted, lease_s=5)) is S.NOT_FOUND


async def test_runs_of_others_and_missing_adapters_look_the_same(load, server, run_row):
    foreign = Run(run_id=uuid7(), scope=Scope("acme", "default"))
    await server.feedback.store.create_run(foreign)
    for run in (foreign, Run(run_id=uuid7(), scope=SCOPE), run_row):
        assert await code_of(load(ephemeral=ephemeral(run), lease_s=5)) is S.NOT_FOUND


async def test_foreign_and_damaged_adapters_of_a_run_are_refused_by_name(
    load, config, run_row, write_adapter
):
    adapters = config.home_dir / "runs" / run_row.run_id / "adapters"
    write_adapter(adapters / "foreign", base_id="other@1")
    write_adapter(adapters / "damaged")
    (adapters / "damaged" / "adapter_config.json").write_text("{}")
    for name, what in (("foreign", "other@1"), ("damaged", "adapter_config.json")):
        with pytest.raises(grpc.aio.AioRpcError, match=what) as caught:
            await load(ephemeral=ephemeral(run_row, name), lease_s=5)
        assert caught.value.code() is S.FAILED_PRECONDITION


async def test_the_least_recently_used_makes_room_and_what_is_needed_stays(
    publish, promote, load, generate, engine, server
):
    server.deployment.residency.max_adapters = 3
    for _ in range(5):
        await publish()
    ids = {p.version: p.content_hash for p in server.feedback.store.find_policies(SCOPE)}
    await promote("v1")
    await load("v2", lease_s=60)
    await load("v3", lease_s=60)
    # Champion and leases hold all three slots.
    assert await code_of(load("v4", lease_s=60)) is S.RESOURCE_EXHAUSTED
    assert set(engine.adapters) == {ids["v1"], ids["v2"], ids["v3"]}
    server.deployment.leases.drop(SCOPE, "v2")
    server.deployment.keeper.pin()
    await generate("v3")
    await load("v5", lease_s=60)
    assert set(engine.adapters) == {ids["v1"], ids["v3"], ids["v5"]}
    assert (await generate()).served_by.policy_version == "v1"


async def test_both_scopes_are_asked_for_by_what_is_loaded(
    server, config, model, channel, publish, run_row, write_run_adapter
):
    """A key that deploys may not touch runs, and one that trains may not keep versions."""
    write_run_adapter()
    await publish()
    service = server.models
    version = pb.LoadAdapterRequest(version="v1")
    of_run = pb.LoadAdapterRequest(ephemeral=ephemeral(run_row), lease_s=5)
    for scope, allowed, denied in ((DEPLOY, version, of_run), (TRAIN, of_run, version)):
        current_caller.set(Caller("local", "key", frozenset({scope})))
        await service.LoadAdapter(allowed, None)
        with pytest.raises(PermissionDenied, match="needs the scope"):
            await service.LoadAdapter(denied, None)
