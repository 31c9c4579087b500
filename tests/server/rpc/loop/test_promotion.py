"""Promotion and roll-back over a real port: what is refused, what moves, what stays."""

import asyncio
import os
import time
from pathlib import Path

import grpc
import grpc.aio
import pytest
from heedful_proto.v1 import models_pb2 as pb
from heedful_server.engine_client.client import EngineState
from heedful_server.errors import EngineRequestError
from heedful_store import Run, Scope, uuid7
from heedful_store.registry_schema import policies
from sqlalchemy import update

S = grpc.StatusCode
SCOPE = Scope("local", "default")


async def refused(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()


def report(name: str = "win rate", stage: str = "offline", **check: object) -> dict:
    checks = [{"name": name, "verdict": "pass", "n": 40, "interval": [0.4, 0.7], **check}]
    return {"stages": [{"name": stage, "verdict": check.get("verdict", "pass"), "checks": checks}]}


async def test_a_promoted_version_answers_and_every_answer_says_so(
    publish, promote, generate, listed, engine, server
):
    v1 = await publish()
    assert (await generate()).served_by.policy_version == "base"
    moved = await promote("v1", reason="eight votes")
    assert (moved.from_version, moved.to_version, moved.alias) == ("base", "v1", "champion")
    assert (moved.verdict, moved.action, moved.reason) == ("approved", "promote", "eight votes")
    answer = await generate()
    assert answer.served_by.policy_version == "v1"
    assert engine.submitted[-1].policy == v1.content_hash
    row = server.feedback.store.get_completion(SCOPE, answer.completions[0].completion_id)
    assert (row.policy_version, row.policy_hash) == ("v1", v1.content_hash)
    claims = server.feedback.tokens.verify(answer.completions[0].completion_token)
    assert claims.policy_version == "v1"
    versions, aliases = await listed()
    assert aliases == {"champion": "v1"}
    assert versions["v1"].state == pb.POLICY_STATE_CHAMPION
    assert versions["v1"].loaded
    assert versions["base"].state == pb.POLICY_STATE_RETIRED


async def test_base_and_older_versions_can_still_be_asked_for(publish, promote, generate):
    await publish()
    await publish()
    await promote("v1")
    await promote("v2")
    for name, version in {"": "v2", "champion": "v2", "v1": "v1", "base": "base"}.items():
        assert (await generate(name)).served_by.policy_version == version


async def test_a_version_that_nobody_loaded_is_a_failed_precondition(publish, generate):
    await publish()
    assert await refused(generate("v1")) == (
        S.FAILED_PRECONDITION,
        "v1 is not loaded; LoadAdapter loads it (field model)",
    )
    code, message = await refused(generate("v2"))
    assert code is S.NOT_FOUND
    assert "'v2' (field model)" in message
    assert "'v1'" in message
    assert (await refused(generate("challenger")))[0] is S.NOT_FOUND


async def test_only_what_the_gate_passed_is_called_proven(publish, promote, server):
    await publish(verdict="pass", card={"gate": report(value=0.6)})
    await publish(verdict="inconclusive", card={"gate": report(verdict="inconclusive", value=0.5)})
    await publish(verdict="fail", card={"gate": report(verdict="fail", value=0.3)})
    assert (await promote("v1")).verdict == "proven"
    assert (await promote("v2")).verdict == "approved"
    assert (await promote("v3")).verdict == "approved"
    log = [d for d in server.feedback.store.deployments(SCOPE) if d.action == "promote"]
    assert [entry.approved for entry in log] == [False, True, True]
    (check,) = log[1].evidence["gate"]["checks"]
    assert (check["n"], check["interval"]) == (40, [0.4, 0.7])
    assert log[1].evidence["votes"]["wins"] == 0


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"verdict": "fail"}, "no report"),
        (
            {"verdict": "fail", "card": {"gate": report("finite", "integrity", verdict="fail")}},
            "'finite' of integrity, which cannot be waived",
        ),
        (
            {"card": {"gate": report("trigger", verdict="fail", overridable=False)}},
            "'trigger' of offline, which cannot be waived",
        ),
        ({"state": "rejected"}, "v1 is rejected"),
        ({"state": "failed"}, "v1 is failed"),
        ({"tainted_at_ms": 5}, "erased"),
        ({"base_id": "other@1"}, "belongs to the base 'other@1'"),
    ],
)
async def test_what_may_not_be_promoted_is_refused_and_the_champion_stays(
    publish, promote, listed, server, fields, reason
):
    await publish(**fields)
    code, message = await refused(promote("v1"))
    assert code is S.FAILED_PRECONDITION
    assert reason in message
    assert (await listed())[1] == {"champion": "base"}
    assert [d.action for d in server.feedback.store.deployments(SCOPE)] == ["publish"]


async def test_the_report_of_the_run_counts_where_the_card_has_none(
    publish, promote, server, run_row
):
    store = server.feedback.store
    evidence = {"gate": {"report": report("endings", "integrity", verdict="fail")}}
    await store.update_run(run_row.run_id, "worker", evidence=evidence)
    await publish(run_id=run_row.run_id)
    assert "cannot be waived" in (await refused(promote("v1")))[1]


async def test_a_reward_model_is_no_champion_and_generates_nothing(publish, promote, generate):
    await publish("reward")
    assert "reward model, not a policy" in (await refused(promote("r1")))[1]
    assert (await refused(generate("r1")))[0] is S.INVALID_ARGUMENT


@pytest.mark.parametrize("name", ["MANIFEST.json", "adapter_model.safetensors", "heedful.json"])
async def test_damaged_files_are_refused_by_name_and_the_champion_stays(
    publish, promote, generate, config, name
):
    policy = await publish()
    path: Path = config.home_dir / policy.path / name
    os.truncate(path, path.stat().st_size - 1)
    code, message = await refused(promote("v1"))
    assert code is S.FAILED_PRECONDITION
    assert name in message
    assert (await generate()).served_by.policy_version == "base"


async def test_what_the_engine_refuses_is_not_promoted(
    publish, promote, listed, engine, monkeypatch
):
    async def refuse(*_: object) -> None:
        raise EngineRequestError("invalid", "layer 3: rank 9 does not fit", "adapter")

    await publish()
    monkeypatch.setattr(engine, "load_adapter", refuse)
    code, message = await refused(promote("v1"))
    assert code is S.FAILED_PRECONDITION
    assert "rank 9 does not fit" in message
    assert (await listed())[1] == {"champion": "base"}


async def test_a_roll_back_goes_back_at_once_and_rejects(
    publish, promote, roll_back, generate, listed, engine
):
    await publish()
    await publish()
    await promote("v1")
    await promote("v2")
    num_loads = len(engine.loaded_ids)
    moved = await roll_back(reason="too chatty")
    assert (moved.from_version, moved.to_version) == ("v2", "v1")
    assert (moved.action, moved.verdict, moved.reason) == ("roll_back", "rolled back", "too chatty")
    assert len(engine.loaded_ids) == num_loads
    assert (await generate()).served_by.policy_version == "v1"
    versions, _ = await listed()
    assert versions["v2"].state == pb.POLICY_STATE_REJECTED
    assert "v2 is rejected" in (await refused(promote("v2")))[1]
    assert (await roll_back()).to_version == "base"
    code, message = await refused(roll_back())
    assert code is S.FAILED_PRECONDITION
    assert "nothing to go back to" in message


async def test_a_roll_back_passes_over_a_version_whose_files_are_damaged(
    publish, promote, roll_back, server, engine, config
):
    for number in (1, 2, 3):
        await publish()
        await promote(f"v{number}")
    v2 = server.feedback.store.get_policy(SCOPE, "v2")
    await engine.unload_adapter(v2.content_hash)
    (config.home_dir / v2.path / "adapter_config.json").unlink()
    assert (await roll_back()).to_version == "v1"
    assert server.feedback.store.get_policy(SCOPE, "v2").state == "failed"


async def test_a_roll_back_does_not_wait_for_a_dead_engine(publish, promote, roll_back, engine):
    await publish()
    await publish()
    await promote("v1")
    await promote("v2")
    engine.die()
    async with asyncio.timeout(1):
        assert (await roll_back()).to_version == "v1"
    engine.become(EngineState.READY)


async def test_adapters_are_loaded_again_after_the_engine_died(
    publish, promote, generate, engine, server
):
    v1 = await publish()
    await promote("v1")
    engine.die()
    assert not engine.adapters
    engine.become(EngineState.READY)
    assert (await generate()).served_by.policy_version == "v1"
    assert set(engine.adapters) == {v1.content_hash}


async def test_a_request_waits_for_its_champion_and_never_gets_another_policy(
    publish, promote, generate, engine
):
    v1 = await publish()
    await promote("v1")
    engine.load_s = 0.3
    engine.die()
    engine.become(EngineState.READY)
    answers = await asyncio.gather(*(generate() for _ in range(8)))
    assert {answer.served_by.policy_version for answer in answers} == {"v1"}
    assert engine.loaded_ids == [v1.content_hash] * 2


async def test_a_champion_that_cannot_be_loaded_is_refused_with_the_reason(
    publish, promote, generate, engine, config
):
    v1 = await publish()
    await promote("v1")
    (config.home_dir / v1.path / "adapter_config.json").unlink()
    engine.die()
    engine.become(EngineState.READY)
    code, message = await refused(generate())
    assert code is S.FAILED_PRECONDITION
    assert "adapter_config.json: is missing" in message


async def test_requests_keep_their_version_over_a_hundred_swaps(
    publish, promote, generate, engine, server
):
    """Closed-loop clients while two versions take turns: no failure, and no mixture."""
    ids = {"base": "base"}
    for _ in range(2):
        policy = await publish()
        ids[policy.version] = policy.content_hash
    engine.step_s = 0.001
    stop, answers = asyncio.Event(), []

    async def client() -> None:
        while not stop.is_set():
            answers.append(await generate(max_tokens=8))

    clients = [asyncio.create_task(client()) for _ in range(4)]
    for swap in range(100):
        await promote(f"v{swap % 2 + 1}")
    stop.set()
    await asyncio.gather(*clients)
    by_request = {s.request_id: s.policy for s in engine.submitted}
    for answer in answers:
        version = answer.served_by.policy_version
        assert by_request[answer.completions[0].completion_id] == ids[version]
    assert {answer.served_by.policy_version for answer in answers} >= {"v1", "v2"}
    log = server.feedback.store.deployments(SCOPE, limit=1000)
    assert sum(entry.action == "promote" for entry in log) == 100


async def test_promotions_that_race_take_turns(publish, promote, server):
    for _ in range(4):
        await publish()
    await asyncio.gather(*(promote(f"v{n}") for n in (1, 2, 3, 4)))
    log = [d for d in server.feedback.store.deployments(SCOPE) if d.action == "promote"]
    assert [entry.from_version for entry in log] == ["base", *(e.to_version for e in log[:-1])]
    states = sorted(p.state for p in server.feedback.store.find_policies(SCOPE))
    assert states == ["champion", "retired", "retired", "retired"]


async def test_another_process_promotes_and_this_one_follows(publish, server, generate):
    policy = await publish()
    store, base_id = server.feedback.store, policy.base_id
    await store.move_alias(SCOPE, base_id, "champion", "v1", action="promote", actor="other")
    async with asyncio.timeout(2):
        while (await generate()).served_by.policy_version != "v1":
            await asyncio.sleep(0.02)


async def test_promoting_the_champion_or_nothing_is_refused(publish, promote, violation):
    await publish()
    await promote("v1")
    assert (await refused(promote("v1")))[0] is S.FAILED_PRECONDITION
    assert (await refused(promote("v7")))[0] is S.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await promote("")
    assert violation(caught.value)[0] == "version"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await promote("v1", reason="x" * 2001)
    assert violation(caught.value)[0] == "reason"
    assert (await promote("base")).to_version == "base"


async def test_a_tainted_champion_shows_and_is_taken_back_after_the_deadline(
    publish, promote, listed, server, generate
):
    await publish()
    await publish()
    await promote("v1")
    await promote("v2")
    store = server.feedback.store

    async def taint(at_ms: int) -> None:
        mark = update(policies).where(policies.c.version == "v2").values(tainted_at_ms=at_ms)
        await store.write(lambda c: c.execute(mark).rowcount)

    await taint(time.time_ns() // 1_000_000)
    versions, aliases = await listed()
    assert versions["v2"].state == pb.POLICY_STATE_TAINTED
    assert aliases["champion"] == "v2"
    await server.deployment.keeper.turn()
    assert (await generate()).served_by.policy_version == "v2"
    week_ms = 7 * 86_400_000
    server.deployment.keeper._wall_clock_ms = lambda: time.time_ns() // 1_000_000 + week_ms
    await server.deployment.keeper.turn()
    assert (await generate()).served_by.policy_version == "v1"
    last = store.deployments(SCOPE, limit=100)[-1]
    assert (last.action, last.actor) == ("roll_back", "tainted")
    assert "erased" in last.reason


async def test_a_new_champion_that_fails_is_taken_back_with_the_evidence(
    publish, promote, server, generate, listed
):
    await publish()
    for _ in range(25):
        await generate()
    await promote("v1")
    await server.deployment.keeper.turn()
    record = server.deployment.observations.of(SCOPE, "v1")
    for _ in range(25):
        record.failed()
    await server.deployment.keeper.turn()
    assert (await listed())[1] == {"champion": "base"}
    last = server.feedback.store.deployments(SCOPE, limit=100)[-1]
    assert (last.action, last.verdict, last.actor) == ("roll_back", "rolled back", "probation")
    assert "25 of 25 generations failed" in last.reason
    assert last.evidence["before"]["generations"] == 25
    assert last.evidence["after"]["errors"] == 25
    assert (
        server.metrics.registry.get_sample_value(
            "heedful_automatic_roll_backs_total", {"cause": "probation"}
        )
        == 1
    )


async def test_a_shadow_server_promotes_nothing(publish, server, promote):
    await publish()
    server.deployment.promotions._is_shadow = True
    assert "shadow" in (await refused(promote("v1")))[1]


async def test_the_log_can_be_followed(publish, promote, models_stub):
    await publish()
    await promote("v1")
    now = pb.WatchDeploymentsRequest(until_now=True)
    seen = [m.deployment async for m in models_stub.WatchDeployments(now)]
    assert [(d.seq, d.action, d.to_version) for d in seen] == [
        (1, "publish", "v1"),
        (2, "promote", "v1"),
    ]
    stream = models_stub.WatchDeployments(pb.WatchDeploymentsRequest(after_seq=2))
    waiting = asyncio.create_task(stream.read())
    await asyncio.sleep(0.05)
    await promote("base")
    async with asyncio.timeout(2):
        assert (await waiting).deployment.to_version == "base"
    stream.cancel()


async def test_a_version_has_a_card_and_evidence(publish, promote, models_stub, server, run_row):
    store = server.feedback.store
    await store.update_run(run_row.run_id, "worker", evidence={"reward": {"accuracy": 0.75}})
    gate = report(value=0.6, detail="better | surely")
    await publish(verdict="pass", run_id=run_row.run_id, card={"pairs": 120, "gate": gate})
    found = await models_stub.GetModel(pb.GetModelRequest(model="v1"))
    assert (found.model.verdict, found.model.method, found.model.role) == ("pass", "dpo", "policy")
    assert "# v1" in found.card
    assert "| pairs | 120 |" in found.card
    assert r"better \| surely" in found.card
    assert found.evidence["reward"]["accuracy"] == 0.75
    assert found.evidence["gate"]["stages"][0]["name"] == "offline"
    assert found.evidence["canary"]["note"] == "counts of the votes so far; not a proof"
    champion = await models_stub.GetModel(pb.GetModelRequest())
    assert champion.model.version == "base"
    code, _ = await refused(models_stub.GetModel(pb.GetModelRequest(model="v9")))
    assert code is S.NOT_FOUND


async def test_metrics_tell_of_the_loop(publish, promote, server, run_row):
    store = server.feedback.store
    await store.update_run(
        run_row.run_id, "worker", stage="reward", progress={"figures": {"loss": 0.5}}
    )
    await publish()
    await promote("v1")
    server.deployment.keeper._figures_at_s = 0.0
    await server.deployment.keeper.turn()

    def sample(name: str, **labels: str) -> float | None:
        return server.metrics.registry.get_sample_value(name, labels)

    project = {"tenant": "local", "project": "default"}
    assert sample("heedful_deployments_total", action="promote") == 1
    assert sample("heedful_policy_age_seconds", version="v1", **project) >= 0
    assert sample("heedful_champion_tainted", **project) == 0
    assert sample("heedful_refresh_stage", stage="reward", status="running", **project) == 1
    assert sample("heedful_refresh_figure", figure="loss", **project) == 0.5


async def test_projects_see_only_their_own(publish, server, listed, generate):
    other = Scope("acme", "default")
    await publish(scope=other)
    await server.feedback.store.create_run(Run(run_id=uuid7(), scope=other))
    versions, _ = await listed()
    assert set(versions) == {"base"}
    assert (await refused(generate("v1")))[0] is S.NOT_FOUND
