"""`heedful refresh`: starting, watching, detaching, and the verdict in plain words."""

import json
import os
import signal
import subprocess
import sys

import pytest
from heedful.cli import refresh_view as view
from heedful.model_types import Refresh
from heedful_proto.v1 import models_pb2 as pb

MAIN = "from heedful.cli import main; main()"
PLAN = [
    {"status": "running", "stage": "reward", "stage_progress": 0.5, "figures": {"loss": 0.7}},
    {"stage": "policy", "stage_progress": 0.25, "figures": {"loss": 0.6, "kl": 1.25}},
    {"stage": "gate", "stage_progress": 0.5, "figures": {}},
]
INCONCLUSIVE = {
    "stage": "done",
    "status": "finished",
    "verdict": "inconclusive",
    "candidate_version": "v1",
}


@pytest.fixture
def planned(loop):
    loop.plan = [dict(step) for step in [*PLAN, INCONCLUSIVE]]
    return loop


@pytest.fixture
def with_trainer(server, tmp_path):
    """Runs `heedful` beside a `heedful-trainer` that does what a test says."""
    (tmp_path / "heedful").write_text(MAIN)
    program = tmp_path / "heedful-trainer"

    def start(body: str, *arguments: str) -> "subprocess.Popen[str]":
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        return subprocess.Popen(
            [sys.executable, tmp_path / "heedful", "refresh", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "HEEDFUL_TARGET": server.target,
                "HEEDFUL_HOME": str(tmp_path / "home"),
            },
        )

    return start


def test_a_refresh_from_start_to_verdict(run, planned):
    done = run("refresh", "--method", "dpo", "--set", "dpo.beta=0.2", "--no-trainer")
    assert done.exit_code == 0
    request = planned.of(pb.StartRefreshRequest)[0]
    assert (request.method, dict(request.overrides)) == ("dpo", {"dpo.beta": "0.2"})
    assert "not proven better" in done.stdout
    for line in ("reward model · loss 0.7", "policy · loss 0.6 · kl 1.25", "gate"):
        assert line in done.stderr
    assert "heedful models promote v1" in done.stderr


def test_json_is_one_line_a_change(run, planned):
    done = run("refresh", "--json", "--no-trainer")
    documents = [json.loads(line) for line in done.stdout.splitlines()]
    assert [item["stage"] for item in documents][-1] == "done"
    assert documents[-1]["candidate_version"] == "v1"


def test_a_failed_run_ends_with_1_and_its_reason(run, loop):
    loop.plan = [{"status": "failed", "stage": "snapshot", "error": "8 pairs needed, 2 found"}]
    done = run("refresh", "--no-trainer")
    assert done.exit_code == 1
    assert "8 pairs needed, 2 found" in done.stdout


def test_a_second_run_is_refused_with_the_first_ones_name(run, planned):
    assert run("refresh", "--no-trainer", "--no-follow").exit_code == 0
    done = run("refresh", "--no-trainer")
    assert done.exit_code == 1
    assert "heedful refresh watch run-1" in done.stderr


@pytest.mark.parametrize("given", ["dpo.beta", "=1"])
def test_a_setting_needs_a_value(run, loop, given):
    assert run("refresh", "--set", given).exit_code == 2
    assert loop.requests == []


def test_control_watch_and_list_take_the_newest_run(run, planned):
    run("refresh", "--no-trainer", "--no-follow")
    assert run("refresh", "pause").stdout == "Run run-1 is paused.\n"
    assert json.loads(run("refresh", "resume", "run-1", "--json").stdout)["status"] == "running"
    assert "v1 is safe to try" in run("refresh", "watch").stdout
    listed = run("refresh", "list").stdout.splitlines()
    assert listed[1].split()[:5] == ["run-1", "finished", "auto", "v1:", "inconclusive"]
    assert json.loads(run("refresh", "list", "--json").stdout)[0]["verdict"] == "inconclusive"


def test_stop_ends_a_run(run, planned):
    run("refresh", "--no-trainer", "--no-follow")
    assert run("refresh", "stop").stdout == "The refresh was stopped.\n"


def test_without_any_run_it_says_how_to_start_one(run):
    done = run("refresh", "watch")
    assert done.exit_code == 1
    assert "Start one: heedful refresh" in done.stderr


def test_a_trainer_is_started_for_a_run_that_nobody_takes(with_trainer, planned, tmp_path):
    marker = tmp_path / "taken"
    planned.may_begin = marker.exists
    process = with_trainer(f'echo "$*" > {marker}', "--mode", "approve", "--home", "/h")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "v1 is safe to try" in stdout
    arguments = marker.read_text().split()
    assert arguments[:4] == ["work", "--once", "--run", "run-1"]
    assert arguments[-2:] == ["--home", "/h"] or "--home" in arguments


def test_no_trainer_is_started_where_one_takes_the_run(with_trainer, planned, tmp_path):
    marker = tmp_path / "started"
    process = with_trainer(f"touch {marker}")
    stdout, _ = process.communicate(timeout=60)
    assert "v1 is safe to try" in stdout
    assert not marker.exists()


def test_a_trainer_that_dies_ends_the_wait_with_its_last_words(with_trainer, planned):
    planned.may_begin = lambda: False
    process = with_trainer("echo no memory; exit 3")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "heedful-trainer ended with code 3" in stderr
    assert "no memory" in stderr


def test_ctrl_c_detaches_and_leaves_the_trainer_at_work(
    with_trainer, planned, tmp_path, eventually
):
    marker, ended = tmp_path / "taken", tmp_path / "ended"
    planned.may_begin = lambda: False
    process = with_trainer(f"touch {marker}; sleep 2; touch {ended}")
    assert process.stderr is not None
    while "queued" not in (line := process.stderr.readline()):
        assert line
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "heedful refresh watch run-1" in stderr
    assert "Traceback" not in stderr
    assert not ended.exists()
    assert eventually(ended.exists)


def test_an_import_that_fails_starts_nothing(run, loop, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "x"}\n')
    done = run("refresh", "--import", str(file))
    assert done.exit_code == 1
    assert "Nothing was started" in done.stderr
    assert loop.of(pb.StartRefreshRequest) == []


def refresh(status: str, **fields: object) -> Refresh:
    return Refresh("r", status, str(fields.pop("stage", "done")), **fields)


@pytest.mark.parametrize(
    ("run_", "said", "advised"),
    [
        (refresh("finished", verdict="pass", candidate_version="v3"), "v3 passed", "promote v3"),
        (refresh("finished", verdict="fail", candidate_version="v3"), "v3 failed", "explain v3"),
        (refresh("finished", error="all ties"), "No new version came of it. all ties", "summary"),
        (refresh("finished", evidence={"gate": {"text": "As good."}}), "As good.", "summary"),
        (refresh("stopped", stage="policy"), "checkpoint is kept", "summary"),
        (refresh("running", stage="policy"), "is running", "refresh watch r"),
        (refresh("queued", stage="snapshot"), "waits for a trainer", "refresh watch r"),
    ],
)
def test_a_verdict_in_plain_words_and_the_next_command(run_, said, advised):
    assert said in view.in_words(run_)
    assert any(advised in command for command in view.next_commands(run_))


def test_a_terminal_shows_bars(loop, open_terminal):
    loop.plan = [dict(step) for step in [*PLAN, INCONCLUSIVE]]
    loop.step_s = 0.2
    terminal = open_terminal("refresh", "--no-trainer", TERM="xterm", COLUMNS="120")
    terminal.expect("reward model")
    terminal.expect("loss 0.6")
    terminal.expect("safe to try")
    assert terminal.process.wait(10) == 0
