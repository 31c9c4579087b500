"""PPO-ptx at a real server with a tiny model: whole refreshes, and a server that dies amid one."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import heedful
import pytest
import torch
from heedful_store import Failpoints, Run, Scope, Store, adapter_files, uuid7
from heedful_trainer.backbone import Backbone, BackboneOptions, load_backbone
from heedful_trainer.config import Method, TrainerConfig
from heedful_trainer.config_sources import Place, with_overrides
from heedful_trainer.dataset import snapshot
from heedful_trainer.dataset.text import TextEncoder
from heedful_trainer.lora import read_weights
from heedful_trainer.methods.hooks import NoHooks
from heedful_trainer.methods.policy import parts
from heedful_trainer.methods.scores import PolicyScorer
from heedful_trainer.methods.sft import SftObjective
from heedful_trainer.packing import Row
from heedful_trainer.rollouts.drawing import RolloutDrawer
from heedful_trainer.rollouts.records import Plan, Rollout
from heedful_trainer.rollouts.server import ServerSettings, ServerSource
from heedful_trainer.rollouts.store import RolloutStore
from heedful_trainer.runs.worker import Worker
from heedful_trainer.simulation.driver import Asking, simulate_votes
from heedful_trainer.simulation.prompts import draw_prompts
from heedful_trainer.simulation.raters import SimulatedRater
from heedful_trainer.token_logprob import token_logprobs

START_TIMEOUT_S = 90.0


class Server:
    """The program, which can be killed and started again at the same port."""

    def __init__(self, model_dir: Path, directory: Path) -> None:
        self.home, self._log, self._model = directory / "home", directory / "log", model_dir
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.target = f"127.0.0.1:{free.getsockname()[1]}"
        self.process: subprocess.Popen[bytes]

    def start(self) -> None:
        command = [sys.executable, "-P", "-m", "heedful_server.main", "serve"]
        command += ["--model", str(self._model), "--home", str(self.home), "--threads", "1"]
        command += ["--port", self.target.rpartition(":")[2], "--http-port", "0"]
        # Float weights: with 8-bit activations serving and training would agree only roughly.
        command += ["--set", "engine.kv_cache_bytes=16777216", "--quantize", "float32"]
        environ = {key: v for key, v in os.environ.items() if not key.startswith("HEEDFUL_")}
        with self._log.open("ab") as output:
            self.process = subprocess.Popen(command, stderr=output, env=environ)

    def wait(self) -> None:
        with heedful.Client(self.target) as client:
            client.wait_ready(START_TIMEOUT_S)

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        self.process.wait(40)


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tiny_model_dir, tmp_path_factory.mktemp("server"))
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.end()


def quick(**more: Any) -> TrainerConfig:
    small = {
        "base.dtype": "float32",
        "lora.rank": 4,
        "reward.heads": 3,
        "reward.epochs": 1,
        "gate.enabled": "false",
        "run.threads": 1,
        "run.keep_checkpoints": "true",
        "yielding.scheduling": "none",
        "ppo.iterations": 4,
        "ppo.batch_episodes": 8,
        "ppo.minibatches": 2,
        "ppo.max_answer_tokens": 6,
        "ppo.policy_learning_rate": 5e-3,
        "ppo.kl.max_nats": 1e6,
        "ppo.stopping.evaluate_every": 2,
        "ppo.stopping.prompts": 4,
        "ppo.ptx.texts": 16,
        "ppo.ptx.max_tokens": 8,
    }
    return with_overrides(TrainerConfig(), {**small, **more})


def vote(server: Server, project: str, count: int) -> None:
    async def voting() -> None:
        async with heedful.AsyncClient(server.target, project=project, timeout_s=60) as client:
            await simulate_votes(
                client,
                draw_prompts("votes", count, 0),
                [SimulatedRater("coin", 0), SimulatedRater("coin", 1)],
                Asking(max_tokens=6),
            )

    asyncio.run(voting())


def show(server: Server, project: str, count: int) -> None:
    """Demonstrations, as an import brings them."""
    items = [
        heedful.ImportItem(
            f"shown-{i}", f"Name animal {chr(97 + i)}.", ("a cat",), heedful.Demonstration()
        )
        for i in range(count)
    ]
    with heedful.Client(server.target, project=project, timeout_s=60) as client:
        receipts = client.import_feedback(items, source="test")
    assert not [receipt for receipt in receipts if isinstance(receipt, Exception)]


def refresh(
    server: Server, project: str, config: TrainerConfig, method: Method = "ppo_ptx"
) -> tuple[Run, Place]:
    url = f"sqlite:///{server.home / 'heedful.db'}"
    place = Place(server.home, url, "personal")
    with Store(url) as store:
        run = Run(run_id=uuid7(), scope=Scope("local", project), method=method)
        store.create_run(run).result()
        worker = Worker(
            store, place, config.model_copy(update={"target": server.target}), Failpoints()
        )
        done = worker.work(once=True)
        assert done is not None
        return done, place


@pytest.mark.timeout(240)
def test_a_refresh_by_ppo_ptx_from_votes_to_a_version(server: Server) -> None:
    vote(server, "whole", 36)
    done, place = refresh(server, "whole", quick())
    assert (done.status, done.failure, done.method) == ("finished", None, "ppo_ptx")
    training = done.evidence["policy"]["training"]
    assert training["ended"] == "iterations"
    assert training["episodes"] == 32
    assert training["best_iteration"] in (2, 4)
    assert [look["iteration"] for look in training["looks"]] == [0.0, 2.0, 4.0]
    assert set(training["overoptimisation"]) == {"reward_single", "reward_mean", "reward_min"}
    first, last = training["history"][0], training["history"][-1]
    # What serves and what trains are the same weights in two programs.
    assert first["mismatch_nats"] < 1e-4
    assert abs(first["sampled_kl_nats"]) < 1e-3
    assert last["ptx_norm"] > 0
    with Store(place.store_url) as store:
        version = store.get_policy(done.scope, "v1")
    manifest = adapter_files.verify(place.home / version.path, version.content_hash)
    assert (manifest.info.method, manifest.info.role) == ("ppo_ptx", "policy")
    run_dir = place.home / "runs" / done.run_id
    assert (run_dir / "report" / "ppo_overoptimisation.svg").read_text().startswith("<svg")
    assert len(json.loads((run_dir / "report" / "ppo.json").read_text())["history"]) == 4
    # People's prompts, and the policies on the way, are gone.
    assert not (run_dir / "rollouts").exists()
    assert not list((run_dir / "adapters").glob("ppo-*"))
    # What the reference wrote is kept for the base's next run.
    (texts,) = (place.home / "ptx").glob("*.jsonl")
    assert len(texts.read_text().splitlines()) == 16


@pytest.mark.timeout(240)
def test_the_preset_instructgpt_goes_from_demonstrations_to_a_version(
    server: Server, tmp_path: Path
) -> None:
    vote(server, "preset", 36)
    show(server, "preset", 24)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Sing."}\n{"messages": [{"role": "user", "content": "Hm?"}]}\n')
    changed = {"ppo.start.learning_rate": 5e-3, "ppo.prompts": str(prompts)}
    config = quick(preset="instructgpt", **changed)
    done, place = refresh(server, "preset", config)
    assert (done.status, done.failure, done.method) == ("finished", None, "ppo_ptx")
    assert done.config["preset"] == "instructgpt"
    assert done.config["ppo.ema.decay"] == 0.992
    training = done.evidence["policy"]["training"]
    first = training["history"][0]
    # What answers, what is learned and what the KL is measured from are the same at first.
    assert first["kl_nats"] == 0
    assert abs(first["sampled_kl_nats"]) < 1e-3
    assert first["mismatch_nats"] < 1e-4
    # The policy learns from the first iteration on, with the paper's γ as it stands.
    assert all(row["ptx_coefficient"] == 27.8 for row in training["history"])
    assert {row["beta"] for row in training["history"]} == {0.02}
    assert done.evidence["snapshot"]["train"]["demonstrations"] > 8
    assert not list((place.home / "runs" / done.run_id / "adapters").glob("ppo-*"))


@pytest.mark.timeout(240)
def test_sft_takes_the_epoch_whose_answers_the_reward_model_likes_best(server: Server) -> None:
    vote(server, "sft", 36)
    show(server, "sft", 24)
    changed = {"sft.choose_by": "reward", "sft.epochs": 4, "sft.residual_dropout": 0.2}
    # By this seed it is the second of the four, so that it is not the last one by chance.
    changed |= {"sft.optimiser.learning_rate": 2e-2, "sft.optimiser.min_steps": 0, "run.seed": 3}
    config = quick(**changed)
    done, place = refresh(server, "sft", config, "sft")
    assert (done.status, done.failure, done.method) == ("finished", None, "sft")
    looks = [row for row in done.evidence["policy"]["training"]["history"] if "reward" in row]
    assert len(looks) == 4
    best = max(looks, key=lambda row: row["reward"])
    assert best["loss"] == -best["reward"]
    assert len({row["reward"] for row in looks}) > 1
    # What was published is that epoch: it has its language-model loss on the validation part.
    run_dir = place.home / "runs" / done.run_id
    base_dir = Path(json.loads((run_dir / "base.json").read_text())["directory"])
    backbone = load_backbone(base_dir, BackboneOptions("float32", 4, 32.0, 0.5, 1 << 26))
    backbone.adapter.load(read_weights(run_dir / "adapters" / "policy"))
    with Store(place.store_url) as store, heedful.Client(server.target) as client:
        base = client.list_models().base
        assert base is not None
        found = snapshot.take(
            store.judged_feedback(done.scope, "personal"),
            base=snapshot.BaseIdentity(base.base_id, base.template_hash),
            profile="personal",
            settings=config.dataset,
            encoder=TextEncoder(base_dir),
        )
    groups = parts(found.examples)
    objective = SftObjective(PolicyScorer(backbone, 258), {}, [], groups["validation"])
    assert objective.evaluate()["lm_loss"] == pytest.approx(best["lm_loss"], rel=1e-4)
    others = [row["lm_loss"] for row in looks if row is not best]
    assert best["lm_loss"] not in [pytest.approx(value, rel=1e-4) for value in others]


@pytest.mark.timeout(240)
def test_a_server_that_dies_amid_the_rollouts_is_waited_for(
    server: Server, tiny_model_dir: Path, tmp_path: Path
) -> None:
    run_id = uuid7()
    with Store(f"sqlite:///{server.home / 'heedful.db'}") as rows:
        rows.create_run(Run(run_id=run_id, scope=Scope("local"), method="ppo_ptx")).result()
    backbone = adapter(server, tiny_model_dir, run_id, "ppo-000002")
    source = ServerSource(
        lambda: heedful.AsyncClient(server.target, timeout_s=30),
        run_id,
        ServerSettings(concurrency=2, timeout_s=30.0, patience_s=90.0),
    )
    prompts = tuple((i + 1, 7, 9) for i in range(24))
    plan = Plan("train-000003", "ppo-000002", prompts, 2, 60, 5)
    store = RolloutStore(tmp_path / "rollouts", Failpoints())
    with RolloutDrawer(source, store, 4) as drawer:
        drawer.begin(plan)
        until_s = time.monotonic() + 60
        while not list((tmp_path / "rollouts").glob("*/part-*")) and time.monotonic() < until_s:
            time.sleep(0.01)
        server.end(signal.SIGKILL)
        assert len(list((tmp_path / "rollouts").glob("*/part-*"))) < 6
        server.start()
        rollouts = drawer.take(plan, NoHooks())
    assert [rollout.prompt for rollout in rollouts] == [p for p in prompts for _ in range(2)]
    # Before and after: of the adapter (as near as the served weights are), not of the base.
    for rollout in (rollouts[0], rollouts[-1]):
        assert distance(backbone, rollout, True) < 0.3 * distance(backbone, rollout, False)


def distance(backbone: Backbone, rollout: Rollout, with_adapter: bool) -> float:
    batch = backbone.batch([Row(rollout.prompt, (rollout.answer,))])
    hidden = backbone.hidden(batch, with_adapter=with_adapter)[batch.packed.source_N]
    logprobs = token_logprobs(hidden, backbone.head_VH, batch.packed.target_N)
    return float((logprobs.detach() - torch.tensor(rollout.logprobs)).abs().mean())


def adapter(server: Server, model_dir: Path, run_id: str, name: str) -> Backbone:
    """Seal an adapter where the server finds those of a run, and return the backbone with it."""
    backbone = load_backbone(model_dir, BackboneOptions("float32", 4, 8.0, 0.5, 1 << 26))
    backbone.adapter.reset(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.adapter.parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    with heedful.Client(server.target) as client:
        base = client.list_models().base
    assert base is not None
    directory = server.home / "runs" / run_id / "adapters" / name
    directory.mkdir(parents=True)
    backbone.adapter.save(directory, "tiny")
    info = {
        "format": adapter_files.FORMAT,
        "role": "policy",
        "base_id": base.base_id,
        "template_hash": base.template_hash,
        "base_model": "tiny",
        "hidden_size": 64,
        "num_layers": 2,
        "run_id": run_id,
        "method": "ppo_ptx",
    }
    (directory / adapter_files.INFO).write_text(json.dumps(info))
    (directory / "README.md").unlink(missing_ok=True)
    adapter_files.seal(directory)
    return backbone
