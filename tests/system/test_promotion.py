"""The real program with real adapters: swaps under load, roll-back, a kill amid a promotion."""

import asyncio
import json
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import heedful
import pytest
from heedful_store import PolicyVersion, Scope, Store, adapter_files

SCOPE = Scope("local", "default")
NUM_CLIENTS, NUM_SWAPS = 4, 100


@dataclass
class Versions:
    """Two versions of a tiny model, and one reward model, published as a trainer does."""

    home: Path
    base_id: str
    template_hash: str

    def publish(self, adapter: Path, role: str = "policy") -> PolicyVersion:
        with Store(f"sqlite:///{self.home / 'heedful.db'}") as store:
            version = store.next_version(SCOPE, role)
            path = f"policies/local/default/{version}"
            temp = self.home / f"{version}.tmp"
            shutil.copytree(adapter, temp)
            info = {
                "format": 1,
                "role": role,
                "base_id": self.base_id,
                "template_hash": self.template_hash,
                "base_model": "tiny-llama",
                "hidden_size": 64,
                "num_layers": 2,
                "run_id": "run",
                "method": "dpo",
            }
            (temp / "heedful.json").write_text(json.dumps(info))
            content_hash = adapter_files.seal(temp)
            adapter_files.publish(temp, self.home / path)
            policy = PolicyVersion(
                scope=SCOPE,
                version=version,
                content_hash=content_hash,
                base_id=self.base_id,
                template_hash=self.template_hash,
                role=role,
                path=path,
                verdict="pass",
            )
            return store.publish_policy(policy).result()

    def champions(self) -> list[str]:
        with Store(f"sqlite:///{self.home / 'heedful.db'}") as store:
            return [p.version for p in store.find_policies(SCOPE) if p.state == "champion"]


@pytest.fixture(scope="module")
def adapters(tiny_model_dir: Path, save_adapter: Callable[..., Path]) -> list[Path]:
    return [save_adapter(tiny_model_dir, seed=n, heads=3 * (n == 2)) for n in range(3)]


async def publish_all(client: heedful.AsyncClient, home: Path, adapters: list[Path]) -> Versions:
    base = (await client.list_models()).base
    versions = Versions(home, base.base_id, base.template_hash)
    for adapter, role in zip(adapters, ("policy", "policy", "reward"), strict=True):
        await asyncio.to_thread(versions.publish, adapter, role)
    return versions


@pytest.mark.timeout(180)
async def test_a_hundred_swaps_under_load_fail_no_request_and_mix_no_versions(
    launch: Callable, tiny_model_dir: Path, adapters: list[Path], tmp_path: Path
) -> None:
    with launch(tiny_model_dir, home=tmp_path) as server:
        async with heedful.AsyncClient(server.target, timeout_s=60) as client:
            await publish_all(client, tmp_path, adapters)
            await client.promote("v1")
            await client.promote("v2")
            greedy = {"temperature": 0.0, "max_tokens": 12}
            alone = {
                version: (await client.generate("hello", model=version, **greedy)).text
                for version in ("base", "v1", "v2")
            }
            assert len(set(alone.values())) == 3, alone
            stop, answers = asyncio.Event(), []

            async def ask() -> None:
                while not stop.is_set():
                    answers.append(await client.generate("hello", **greedy))

            asking = [asyncio.create_task(ask()) for _ in range(NUM_CLIENTS)]
            for swap in range(NUM_SWAPS):
                await client.promote(f"v{swap % 2 + 1}")
            stop.set()
            await asyncio.gather(*asking)
            # Row results do not depend on the batch, so an answer tells whose it is.
            for answer in answers:
                assert answer.text == alone[answer.served_by.policy_version]
            assert {a.served_by.policy_version for a in answers} == {"v1", "v2"}

            started_s = time.monotonic()
            moved = await client.roll_back(reason="test")
            assert time.monotonic() - started_s < 1.0
            assert (moved.from_version, moved.to_version) == ("v2", "v1")
            assert (await client.generate("hello", **greedy)).text == alone["v1"]

            scored = await client.score([("hello", "there")], reward=True)
            assert scored[0].reward is not None
            best = await client.generate("hello", n=2, best_of=4, max_tokens=8, temperature=1.0)
            rewards = [completion.reward for completion in best.completions]
            assert rewards == sorted(rewards, reverse=True)

            killed_pid = server.kill_engine()
            server.wait_until(
                lambda: server.engine_pid not in (None, killed_pid), "a new engine", 20
            )
            server.wait_ready()
            assert (await client.generate("hello", **greedy)).text == alone["v1"]
        assert server.terminate() == 0


@pytest.mark.timeout(120)
async def test_a_kill_between_load_and_move_leaves_one_champion(
    launch: Callable, tiny_model_dir: Path, adapters: list[Path], tmp_path: Path
) -> None:
    with launch(tiny_model_dir, home=tmp_path, failpoints="before_alias_move=2:kill") as server:
        async with heedful.AsyncClient(server.target, timeout_s=60) as client:
            versions = await publish_all(client, tmp_path, adapters)
            await client.promote("v1")
            with pytest.raises(heedful.HeedfulError):
                await client.promote("v2")
        assert server.process.wait(10) == -signal.SIGKILL
    assert versions.champions() == ["v1"]
    with launch(tiny_model_dir, home=tmp_path) as server:
        async with heedful.AsyncClient(server.target, timeout_s=60) as client:
            answer = await client.generate("hello", max_tokens=2)
            assert answer.served_by.policy_version == "v1"
            await client.promote("v2")
    assert versions.champions() == ["v2"]
