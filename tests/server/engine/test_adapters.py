"""Adapters inside the engine: whatever happens around a request, it keeps its policy."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from heedful_kernels import cpu
from heedful_server.engine.loading import LoadedEngine, load_engine
from heedful_server.protocol import (
    PRIORITY_BACKGROUND,
    AdapterLoaded,
    AdapterUnloaded,
    Constraint,
    Delta,
    EngineConfig,
    Failed,
    LoadAdapter,
    SamplingParams,
    Score,
    Scored,
    ScoreItem,
    Submit,
)

NATIVE = pytest.mark.skipif(cpu.find_library() is None, reason="the native kernels are not built")
PATHS = [pytest.param("int4", marks=NATIVE, id="native"), pytest.param("float32", id="torch")]


def prompt(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 250, (count,), generator=generator).tolist()


@dataclass
class Driver:
    """An engine in this process, and everything that it has reported."""

    loaded: LoadedEngine
    tokens: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    logprobs: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    finished: set[tuple[str, int]] = field(default_factory=set)
    failed: dict[str, Failed] = field(default_factory=dict)
    scored: dict[str, Scored] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)
    adapters: list[AdapterLoaded | AdapterUnloaded] = field(default_factory=list)

    def take(self) -> None:
        for report in self.loaded.engine.take_reports():
            match report:
                case Delta():
                    key = (report.request_id, report.index)
                    self.tokens.setdefault(key, []).extend(report.token_ids)
                    self.logprobs.setdefault(key, []).extend(report.logprobs)
                    if report.finish is not None:
                        self.finished.add(key)
                        self.cached[report.request_id] = report.finish.cached_prompt_tokens
                case Failed():
                    self.failed[report.request_id] = report
                case Scored():
                    self.scored[report.request_id] = report
                case _:
                    self.adapters.append(report)

    def run(self, steps: int = 10_000) -> None:
        engine = self.loaded.engine
        while engine.has_work and steps > 0:
            engine.step()
            self.take()
            steps -= 1
        self.take()
        if not engine.has_requests:
            engine.check_integrity()

    def load(self, adapter_id: str, directory: Path, role: str = "policy") -> None:
        job = self.loaded.engine.load_adapter(
            LoadAdapter(f"load {adapter_id}", adapter_id, str(directory), role)
        )
        if job is not None:
            result = self.loaded.adapter_loader.load(job).result()
            self.loaded.engine.finish_load(adapter_id, result)
        self.take()

    def submit(self, request_id: str, ids: list[int], policy: str = "base", **changes) -> None:
        fields = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
        sampling = {name: changes.pop(name) for name in ("max_tokens", "seed") if name in changes}
        if "seed" in sampling:
            sampling["temperature"] = 1.0
        params = SamplingParams(**(fields | sampling))
        self.loaded.engine.submit(
            Submit(request_id, ids, changes.pop("n", 1), params, policy=policy, **changes)
        )

    def answer(self, ids: list[int], policy: str = "base", **changes) -> list[int]:
        request_id = f"alone-{len(self.tokens)}-{len(self.failed)}"
        self.submit(request_id, ids, policy, **changes)
        self.run()
        return self.tokens[request_id, 0]


@pytest.fixture
def make_driver(tiny_model_dir: Path) -> Callable[..., Driver]:
    def make(quantize: str, **changes) -> Driver:
        config = EngineConfig(
            str(tiny_model_dir),
            quantize,
            **({"device": "cpu", "num_threads": 2, "max_batch_tokens": 48} | changes),
        )
        return Driver(load_engine(config, lambda stage, share: None))

    return make


@pytest.fixture(scope="module")
def adapter_dirs(tiny_model_dir: Path, save_adapter: Callable[..., Path]) -> dict[str, Path]:
    return {name: save_adapter(tiny_model_dir, seed=i, heads=3) for i, name in enumerate("xyz")}


@pytest.mark.parametrize("quantize", PATHS)
def test_versions_in_one_batch_answer_as_each_does_alone(
    quantize: str, make_driver, adapter_dirs: dict[str, Path]
) -> None:
    """With chunked prompts, preemption, n samples and a full house, to the bit where promised."""
    driver = make_driver(quantize, kv_cache_bytes=0, max_sequences=8)
    for name, directory in adapter_dirs.items():
        driver.load(name, directory)
    policies = ["base", "x", "y", "z"]
    prompts = [prompt(5 + 17 * i, seed=i) for i in range(8)]
    for i, ids in enumerate(prompts):
        driver.submit(f"r{i}", ids, policies[i % 4], n=1 + i % 3)
    driver.run()
    assert not driver.failed
    for i, ids in enumerate(prompts):
        expected = driver.answer(ids, policies[i % 4])
        for index in range(1 + i % 3):
            assert driver.tokens[f"r{i}", index] == expected
    same = [driver.answer(prompts[0], policy) for policy in policies]
    assert len(set(map(tuple, same))) == 4, "the policies do not differ"


@NATIVE
def test_a_preempted_sequence_goes_on_with_its_own_adapter(
    make_driver, adapter_dirs: dict[str, Path]
) -> None:
    # Room for about two of the sequences, so that they throw each other out.
    probe = make_driver("int4", kv_cache_bytes=1 << 22).loaded.info
    block_bytes = probe.kv_cache_bytes // probe.num_blocks
    driver = make_driver("int4", kv_cache_bytes=12 * block_bytes, prefix_cache=False)
    driver.load("x", adapter_dirs["x"])
    driver.load("y", adapter_dirs["y"])
    prompts = [prompt(30, seed=i) for i in range(4)]
    for i, ids in enumerate(prompts):
        driver.submit(f"r{i}", ids, "xy"[i % 2], max_tokens=60)
    driver.run()
    assert driver.loaded.engine.stats(0.0, 0).preemptions > 0
    for i, ids in enumerate(prompts):
        assert driver.tokens[f"r{i}", 0] == driver.answer(ids, "xy"[i % 2], max_tokens=60)


def test_the_prefix_cache_is_shared_by_equal_policies_only(
    make_driver, adapter_dirs: dict[str, Path]
) -> None:
    driver = make_driver("float32")
    driver.load("x", adapter_dirs["x"])
    driver.load("y", adapter_dirs["y"])
    ids = prompt(40, seed=0)
    answers = {}
    for request_id, policy, cached in (
        ("1", "base", 0),
        ("2", "x", 0),
        ("3", "y", 0),
        ("4", "x", 32),
        ("5", "base", 32),
    ):
        driver.submit(request_id, ids, policy)
        driver.run()
        assert driver.cached[request_id] == cached
        answer = driver.tokens[request_id, 0]
        assert answers.setdefault(policy, answer) == answer
    assert len(set(map(tuple, answers.values()))) == 3


def test_an_id_that_comes_back_with_other_contents_is_another_adapter(
    make_driver, adapter_dirs: dict[str, Path]
) -> None:
    """Ids are content hashes, so this is what a damaged registry would do; slots are reused."""
    driver = make_driver("float32", max_adapters=1, prefix_cache=False)
    ids = prompt(20, seed=0)
    answers = []
    for name in "xyx":
        driver.load(name, adapter_dirs[name])
        answers.append(driver.answer(ids, name))
        driver.loaded.engine.unload_adapter(name)
        driver.take()
    assert answers[0] == answers[2] != answers[1]


def test_unloading_waits_for_the_last_request_and_takes_no_new_one(
    make_driver, adapter_dirs: dict[str, Path]
) -> None:
    driver = make_driver("float32", max_adapters=1, max_sequences=2)
    driver.load("x", adapter_dirs["x"])
    # The third one waits in the queue, and has the adapter all the same.
    for i in range(3):
        driver.submit(f"r{i}", prompt(10, seed=i), "x")
    driver.run(steps=3)
    driver.loaded.engine.unload_adapter("x")
    driver.submit("late", prompt(4, seed=9), "x")
    driver.load("y", adapter_dirs["y"])
    assert driver.failed["late"].kind == "not_loaded"
    assert driver.failed["load y"].kind == "resource"
    assert driver.loaded.engine.stats(0.0, 0).adapter_requests == {"x": 3}
    while len(driver.finished) < 3:
        assert not [r for r in driver.adapters if isinstance(r, AdapterUnloaded)]
        driver.run(steps=1)
    assert driver.adapters[-1] == AdapterUnloaded("x")
    assert driver.loaded.engine.stats(0.0, 0).num_adapters == 0
    driver.load("y", adapter_dirs["y"])
    assert driver.answer(prompt(5, seed=0), "y")


def test_every_way_to_end_lets_the_adapter_go(make_driver, adapter_dirs: dict[str, Path]) -> None:
    driver = make_driver("float32", max_model_len=64)
    driver.load("x", adapter_dirs["x"], "policy")
    driver.load("r", adapter_dirs["y"], "reward")
    engine = driver.loaded.engine
    ids = prompt(8, seed=0)
    items = [ScoreItem(ids, ids[:3])]
    driver.submit("cancelled", ids, "x")
    driver.submit("expired", ids, "x", deadline_s=-1.0)
    driver.submit("too long", prompt(80, seed=1), "x")
    driver.submit("refused", ids, "x", constraint=Constraint("regex", "a"))
    driver.submit("unknown", ids, "nobody")
    engine.score(Score("long score", [ScoreItem(prompt(80, 1), [1])], policy="x", reward="r"))
    engine.score(Score("no reward model", items, policy="x", reward="x"))
    engine.score(Score("no policy", items, policy="nobody", reward="r"))
    engine.score(Score("dropped", items, policy="x", reward="r"))
    engine.score(Score("late", items, policy="x", reward="r", deadline_s=-1.0))
    engine.score(Score("nothing", [ScoreItem(ids, [])], policy="x"))
    engine.cancel("cancelled", "cancelled")
    engine.cancel("refused", "cancelled")
    engine.cancel("dropped", "cancelled")
    driver.run()
    kinds = {name: failed.kind for name, failed in driver.failed.items()}
    assert kinds == {
        "too long": "resource",
        "unknown": "not_loaded",
        "long score": "resource",
        "no reward model": "invalid",
        "no policy": "not_loaded",
        "late": "deadline",
    }
    assert driver.scored["nothing"].logprobs == [[]]
    assert engine.stats(0.0, 0).adapter_requests == {"x": 0, "r": 0}


@pytest.mark.parametrize("quantize", PATHS)
def test_a_step_that_fails_lets_the_adapter_go(
    quantize: str, make_driver, adapter_dirs, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make_driver(quantize)
    driver.load("x", adapter_dirs["x"])
    engine = driver.loaded.engine

    def broken(batch, cache):
        raise RuntimeError("no such luck")

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner.decoder, "forward", broken)
        driver.submit("r", prompt(5, seed=0), "x")
        engine.score(Score("s", [ScoreItem([1, 2], [3])], policy="x"))
        driver.run()
    assert {f.kind for f in driver.failed.values()} == {"internal"}
    assert engine.stats(0.0, 0).adapter_requests == {"x": 0}
    assert len(driver.answer(prompt(5, seed=0), "x")) == 12


@pytest.mark.parametrize("quantize", PATHS)
def test_score_gives_logprobs_rewards_or_both(
    quantize: str, make_driver, adapter_dirs: dict[str, Path]
) -> None:
    driver = make_driver(quantize)
    driver.load("x", adapter_dirs["x"])
    driver.load("r", adapter_dirs["y"], "reward")
    engine = driver.loaded.engine
    items = [
        ScoreItem(prompt(20 + i, seed=i), prompt(count, seed=90 + i))
        for i, count in enumerate((7, 1, 60, 0))
    ]
    engine.score(Score("both", items, policy="x", reward="r"))
    driver.submit("company", prompt(30, seed=3), "x")
    driver.run()
    both = driver.scored["both"]
    assert [len(row) for row in both.logprobs] == [7, 1, 60, 0]
    assert [len(row) for row in both.rewards] == [3, 3, 3, 3]
    engine.score(Score("rewards", items, reward="r", logprobs=False))
    engine.score(Score("logprobs", items, policy="x"))
    driver.run()
    assert driver.scored["rewards"].logprobs == []
    assert driver.scored["logprobs"].rewards == []
    for again in (driver.scored["rewards"].rewards, driver.scored["logprobs"].logprobs):
        first = both.rewards if again is driver.scored["rewards"].rewards else both.logprobs
        for row, expected in zip(again, first, strict=True):
            # The second time the prefix cache has most of it.
            assert row == (expected if quantize == "int4" else pytest.approx(expected, abs=1e-4))
    # One by one, out of the cache.
    alone = make_driver(quantize, prefix_cache=False)
    alone.load("r", adapter_dirs["y"], "reward")
    for i, item in enumerate(items):
        alone.loaded.engine.score(Score(f"{i}", [item], reward="r", logprobs=False))
        alone.run()
        (row,) = alone.scored[f"{i}"].rewards
        assert row == (both.rewards[i] if quantize == "int4" else pytest.approx(both.rewards[i]))


@pytest.mark.parametrize("quantize", PATHS)
def test_a_reward_is_the_mean_over_the_tokens_of_a_completion_however_it_is_cut(
    quantize: str, make_driver, adapter_dirs: dict[str, Path]
) -> None:
    ids, completion = prompt(20, seed=1), prompt(9, seed=2)
    whole = ScoreItem(ids, completion)
    tokens = [ScoreItem(ids + completion[:i], [token]) for i, token in enumerate(completion)]
    last_of_prompt = [ScoreItem(ids, []), ScoreItem(ids[:-1], ids[-1:])]
    found = []
    for max_batch_tokens in (512, 4):
        driver = make_driver(quantize, max_batch_tokens=max_batch_tokens)
        driver.load("r", adapter_dirs["y"], "reward")
        items = [whole, *tokens, *last_of_prompt]
        driver.loaded.engine.score(Score("s", items, reward="r", logprobs=False))
        driver.run()
        found.append(driver.scored["s"].rewards)
        reward, *of_tokens = found[-1][:-2]
        means = [sum(values) / len(values) for values in zip(*of_tokens, strict=True)]
        assert reward == pytest.approx(means, abs=1e-4)
        assert found[-1][-2] == pytest.approx(found[-1][-1], abs=1e-4)
    same = found[0] if quantize == "int4" else [pytest.approx(row, abs=1e-4) for row in found[0]]
    assert found[1] == same


def test_sampled_logprobs_are_those_that_score_gives_under_the_same_adapter(
    make_driver, adapter_dirs: dict[str, Path]
) -> None:
    driver = make_driver("float32")
    driver.load("x", adapter_dirs["x"])
    ids = prompt(12, seed=0)
    driver.submit("r", ids, "x", n=3, seed=5)
    driver.run()
    samples = [driver.tokens["r", index] for index in range(3)]
    assert len(set(map(tuple, samples))) == 3
    items = [ScoreItem(ids, tokens) for tokens in samples]
    for policy in ("x", "base"):
        driver.loaded.engine.score(Score(policy, items, policy=policy))
        driver.run()
    for index in range(3):
        sampled = driver.logprobs["r", index]
        assert driver.scored["x"].logprobs[index] == pytest.approx(sampled, abs=1e-4)
        assert driver.scored["base"].logprobs[index] != pytest.approx(sampled, abs=0.1)


def test_more_items_than_places_are_scored_all_the_same(
    make_driver, adapter_dirs: dict[str, Path]
) -> None:
    probe = make_driver("float32", kv_cache_bytes=1 << 22).loaded.info
    block_bytes = probe.kv_cache_bytes // probe.num_blocks
    driver = make_driver("float32", kv_cache_bytes=6 * block_bytes, max_sequences=2)
    driver.load("r", adapter_dirs["y"], "reward")
    items = [ScoreItem(prompt(40, seed=i), prompt(20, seed=50 + i)) for i in range(9)]
    driver.loaded.engine.score(Score("s", items, reward="r", priority=PRIORITY_BACKGROUND))
    driver.run(steps=500)
    assert [len(row) for row in driver.scored["s"].logprobs] == [20] * 9
    assert [len(row) for row in driver.scored["s"].rewards] == [3] * 9


def test_unusable_files_name_themselves_and_free_the_slot(
    make_driver, adapter_dirs: dict[str, Path], tmp_path: Path
) -> None:
    driver = make_driver("float32", max_adapters=1, max_adapter_rank=2)
    driver.load("missing", tmp_path)
    assert driver.failed["load missing"].kind == "invalid"
    assert "adapter_config.json" in driver.failed["load missing"].message
    driver.load("x", adapter_dirs["x"])
    assert "r is 4; this server takes ranks up to 2" in driver.failed["load x"].message
    assert driver.failed["load x"].field == "adapter"
    stats = driver.loaded.engine.stats(0.0, 0)
    assert (stats.num_adapters, stats.adapter_loads) == (0, {"invalid": 2})
