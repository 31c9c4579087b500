"""The commands of the loop against the server itself, over a toy engine: no servicer of ours.

The engine repeats its prompt; registry, deployment, runs and votes are the real ones.
"""

import asyncio
import functools
import importlib.util
import json
import logging
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
import structlog
from heedful.cli.app import build_app
from heedful_server.config import load_config
from heedful_server.serving import Server, load_text
from heedful_store import PolicyVersion, Scope, adapter_files
from typer.testing import CliRunner

SCOPE = Scope("local", "default")


@pytest.fixture(scope="module")
def toys() -> ModuleType:
    """The toy engine of the server's own tests."""
    path = Path(__file__).parents[2] / "server" / "rpc" / "conftest.py"
    spec = importlib.util.spec_from_file_location("heedful_tests_toy_engine", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Running:
    """A server on an event loop in a thread of its own."""

    def __init__(self, home: Path, model_dir: Path, toys: ModuleType) -> None:
        self.home = home
        overrides = {
            "home": str(home),
            "grpc.port": "0",
            "http.port": "0",
            "feedback.disk_watermark_bytes": "0",
            "feedback.reserve_bytes": "0",
        }
        config = load_config(None, {}, list(overrides.items()))
        self.model = load_text("tiny", model_dir)
        engine = functools.partial(toys.ToyEngine, tokenizer=self.model.tokenizer)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.server = self._run(self._start(config, engine))

    @property
    def store(self):
        return self.server.feedback.store

    async def _start(self, config, engine) -> Server:
        server = Server(config, self.model, engine)
        await server.start()
        info = await server.engine.wait_ready()
        # The toy was made for a tokenizer of bytes; this one has more special tokens.
        server.engine.info = msgspec.structs.replace(
            info, vocab_size=self.model.tokenizer.vocab_size
        )
        return server

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def publish(self, verdict: str, **card: object) -> str:
        """Publishes a version and makes it challenger, as a trainer does."""
        path = Path("policies") / "local" / "default" / f"new-{verdict}"
        (self.home / path).mkdir(parents=True)
        content_hash = write_adapter(self.home / path, self.model, verdict)
        policy = PolicyVersion(
            scope=SCOPE,
            version="",
            content_hash=content_hash,
            base_id=self.model.base_id,
            template_hash=self.model.template.identity,
            path=str(path),
            verdict=verdict,
            method="dpo",
            card=card,
        )
        version = self.store.publish_policy(policy).result().version
        self.store.move_alias(
            SCOPE, self.model.base_id, "challenger", version, action="canary", actor="test"
        ).result()
        return version

    def close(self) -> None:
        self._run(self.server.stop(0.0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def write_adapter(directory: Path, model, method: str) -> str:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    weights = struct.pack("<Q", len(header)) + header + bytes(4)
    (directory / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
    (directory / "adapter_model.safetensors").write_bytes(weights)
    info = {
        "format": 1,
        "role": "policy",
        "base_id": model.base_id,
        "template_hash": model.template.identity,
        "base_model": "tiny",
        "hidden_size": 3,
        "num_layers": 1,
        "run_id": "run",
        "method": method,
    }
    (directory / "heedful.json").write_text(json.dumps(info))
    return adapter_files.seal(directory)


@pytest.fixture
def running(tmp_path: Path, tiny_model_dir: Path, toys: ModuleType) -> Iterator[Running]:
    # It shares standard output with the commands here, where its log would stand between answers.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    running = Running(tmp_path, tiny_model_dir, toys)
    yield running
    running.close()
    structlog.reset_defaults()


@pytest.fixture
def run(running: Running):
    environment = {
        "HEEDFUL_TARGET": running.server.grpc_address,
        "HEEDFUL_HOME": str(running.home),
        "HEEDFUL_METRICS_URL": "http://127.0.0.1:9/metrics",
        "COLUMNS": "160",
    }

    def run(*arguments: str, stdin: str | None = None):
        result = CliRunner().invoke(build_app(), arguments, input=stdin, env=environment)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def test_a_version_from_challenger_to_champion_and_back(run, running, report):
    version = running.publish("inconclusive", gate=report)
    assert version in run("models", "list").stdout
    assert "win rate" in run("gate", "explain").stdout
    assert run("models", "show", version).stdout.startswith("# v1")

    diff = run("models", "diff", "champion", version, "hi", "--max-tokens", "4", "--json")
    assert diff.exit_code == 0, diff.stderr
    versions = [answer["version"] for answer in json.loads(diff.stdout)[0]["answers"]]
    assert versions == ["base", "v1"]

    votes = run("gate", "vote", "2", "--max-tokens", "4", stdin="one\na\ntwo\nt\n")
    assert votes.exit_code == 0, votes.stderr
    assert "2 votes: " in votes.stdout
    assert "Blind votes so far: " in run("gate", "explain").stdout

    listed = json.loads(run("models", "list", "--json").stdout)["versions"][0]
    assert sum(listed["blind_votes"].values()) == 2

    promoted = run("models", "promote", "challenger", "--reason", "I like it")
    assert promoted.stdout == "v1 is champion now instead of base (approved)\n", promoted.stderr
    answer = json.loads(run("generate", "hi", "--max-tokens", "2", "--json").stdout)
    assert answer["served_by"]["policy_version"] == "v1"
    assert "v1 · " in run("chat", "--max-tokens", "2", stdin="hi\n").stderr

    assert run("models", "rollback").stdout == "base is champion again; v1 is rolled back\n"
    actions = [
        json.loads(line)["action"]
        for line in run("models", "history", "--json").stdout.splitlines()
    ]
    assert actions[0] == "publish"
    assert actions[-2:] == ["promote", "roll_back"]


def test_a_run_that_a_trainer_works_on(run, running):
    assert run("refresh", "--no-trainer", "--no-follow", "--set", "dpo.beta=0.2").exit_code == 0
    refused = run("refresh", "--no-trainer")
    assert (refused.exit_code, "has not ended yet" in refused.stderr) == (1, True)
    assert "queued" in run("status").stdout

    store = running.store
    leased = store.lease_run("trainer", 60_000).result()
    assert leased.config == {"dpo.beta": "0.2"}

    def work() -> None:
        for fraction in (0.25, 0.75):
            progress = {"fraction": fraction, "figures": {"loss": 1 - fraction}}
            store.update_run(leased.run_id, "trainer", stage="policy", progress=progress).result()
        store.update_run(
            leased.run_id,
            "trainer",
            stage="gate",
            status="finished",
            evidence={"gate": {"text": "All votes were ties."}},
            finished_at_ms=1,
        ).result()

    timer = threading.Timer(0.5, work)
    timer.start()
    watched = run("refresh", "watch")
    timer.join()
    assert watched.stdout == "No new version came of it. All votes were ties.\n"
    assert run("refresh", "list").stdout.splitlines()[1].split()[1] == "finished"


def test_pausing_and_stopping_reach_the_run(run, running):
    run("refresh", "--no-trainer", "--no-follow")
    running.store.lease_run("trainer", 60_000).result()
    assert "pauses at its next step" in run("refresh", "pause").stdout
    assert running.store.find_runs(SCOPE)[0].control == "pause"
    assert "stops at its next step" in run("refresh", "stop").stdout
    assert running.store.find_runs(SCOPE)[0].control == "stop"


def test_projects_do_not_see_each_others_versions(run, running, monkeypatch):
    running.publish("pass")
    monkeypatch.setenv("HEEDFUL_PROJECT", "demo-brief")
    assert "v1" not in run("models", "list").stdout
    assert run("models", "show", "v1").exit_code == 1


SHOWN = '{"prompt": "Name a colour.", "completion": "Red."}\n'
RANKED = (
    '{"prompt": "Greet me.", "completions": ["Hi!", "Go away.", "Hm."], "ranking": [0, 2, 1]}\n'
)
ASKED = '{"prompt": "Sing."}\n{"messages": [{"role": "user", "content": "Count to 3."}]}\n'


@pytest.fixture
def three(tmp_path):
    """Writes the three files of InstructGPT and returns how they are given."""

    def write(shown: str = SHOWN, ranked: str = RANKED, asked: str = ASKED) -> list[str]:
        given = []
        for option, text in (
            ("demonstrations", shown),
            ("comparisons", ranked),
            ("prompts", asked),
        ):
            (tmp_path / f"{option}.jsonl").write_text(text)
            given += [f"--{option}", str(tmp_path / f"{option}.jsonl")]
        return given

    return write


def logged(run) -> list[dict]:
    return [json.loads(line) for line in run("feedback", "export").stdout.splitlines()]


def test_the_three_steps_of_instructgpt_from_files(run, running, three, tmp_path):
    start = ["refresh", "--no-trainer", "--no-follow", "--preset", "instructgpt"]
    done = run(*start, *three(), "--set", "ppo.iterations=2")
    assert done.exit_code == 0, done.stderr
    assert "demonstrations.jsonl: 1 records stored, 0 there before" in done.stderr
    assert "comparisons.jsonl: 1 records stored, 0 there before" in done.stderr
    assert running.store.lease_run("trainer", 60_000).result().config == {
        "preset": "instructgpt",
        "ppo.prompts": str(tmp_path / "prompts.jsonl"),
        "ppo.iterations": "2",
    }
    assert len(logged(run)) == 2
    run("refresh", "stop")
    running.store.update_run(
        running.store.find_runs(SCOPE)[0].run_id, "trainer", status="stopped"
    ).result()
    again = run(*start, *three())
    assert "demonstrations.jsonl: 0 records stored, 1 there before" in again.stderr
    assert len(logged(run)) == 2


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"shown": SHOWN + '{"prompt": "x"}\n'}, "demonstrations.jsonl: line 2: has no completion"),
        ({"shown": RANKED}, "demonstrations.jsonl: line 1: has no completion"),
        ({"ranked": SHOWN}, "comparisons.jsonl: line 1: holds demonstrations, not pairs or rank"),
        (
            {"ranked": RANKED + RANKED.replace("[0, 2, 1]", "[0, 0, 1]")},
            "comparisons.jsonl: line 2: ranking must name each of the 3 completions once",
        ),
        ({"ranked": "\n"}, "comparisons.jsonl: holds no record"),
        ({"asked": ASKED + '{"prompt": " "}\n'}, "prompts.jsonl: line 3: prompt: the prompt is em"),
        ({"asked": '{"question": "x"}'}, "prompts.jsonl: line 1: has neither prompt nor messages"),
        ({"asked": "[1"}, "prompts.jsonl: line 1: is not JSON"),
    ],
)
def test_one_bad_line_keeps_all_three_files_from_being_imported(run, running, three, bad, said):
    done = run("refresh", "--no-trainer", "--preset", "instructgpt", *three(**bad))
    assert done.exit_code == 1
    assert said in done.stderr
    assert "Nothing was imported. Nothing was started." in done.stderr
    assert logged(run) == []
    assert running.store.find_runs(SCOPE) == []


def test_every_bad_line_of_every_file_is_named(run, three):
    done = run(
        "refresh",
        "--method",
        "ppo_ptx",
        *three("{}\n{}\n", "{}\n", "{}\n"),
    )
    places = ("demonstrations.jsonl: line 2", "comparisons.jsonl: line 1", "prompts.jsonl: line 1")
    assert all(place in done.stderr for place in places)
    assert "4 lines are not as they must be" in done.stderr


@pytest.mark.parametrize("more", [[], ["--preset", "instructgpt", "--method", "sft"]])
def test_prompts_are_for_ppo(run, running, three, more):
    done = run("refresh", "--no-trainer", *three()[-2:], *more)
    assert done.exit_code == 2
    assert "ppo_ptx" in done.stderr
    assert running.store.find_runs(SCOPE) == []
