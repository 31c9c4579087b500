"""A new version becomes challenger by itself, and makes room for a newer one."""

import asyncio

import pytest
from heedful_proto.v1 import models_pb2 as pb
from heedful_store import Scope

SCOPE = Scope("local", "default")


@pytest.fixture
def config(config):
    deployment = config.deployment.model_copy(update={"canary": True})
    return config.model_copy(update={"deployment": deployment})


async def test_the_newest_judged_candidate_challenges(publish, promote, roll_back, listed, server):
    turn = server.deployment.keeper.turn
    await publish(verdict="fail")
    await publish(verdict="")
    await publish("reward")
    await turn()
    assert (await listed())[1] == {"champion": "base"}
    await publish(verdict="inconclusive")
    await turn()
    versions, aliases = await listed()
    assert aliases == {"champion": "base", "challenger": "v3"}
    assert versions["v3"].state == pb.POLICY_STATE_CHALLENGER
    await asyncio.sleep(0.002)
    await publish(verdict="pass")
    await turn()
    versions, aliases = await listed()
    assert aliases["challenger"] == "v4"
    assert versions["v3"].state == pb.POLICY_STATE_CANDIDATE
    await promote("v4")
    await turn()
    # What the promotion passed over does not rise again.
    assert (await listed())[1] == {"champion": "v4"}
    await roll_back()
    await turn()
    assert (await listed())[1] == {"champion": "base"}


async def test_a_challenger_is_loaded_and_answers_to_its_name(publish, generate, server, engine):
    policy = await publish(verdict="pass")
    await server.deployment.keeper.turn()
    assert (await generate("challenger")).served_by.policy_version == "v1"
    assert (await generate()).served_by.policy_version == "base"
    assert set(engine.adapters) == {policy.content_hash}
