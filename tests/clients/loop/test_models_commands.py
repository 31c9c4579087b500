"""`heedful models`: what is shown, what is sent, how it ends."""

import json
import subprocess
import sys

import grpc
import pytest

MAIN = "from heedful.cli import main; main()"


@pytest.fixture
def versions(loop):
    loop.add("v1", "rejected", verdict="fail", method="kto", run_id="run-1")
    loop.add("v2", "challenger", verdict="inconclusive", method="dpo", run_id="run-2")
    loop.aliases["challenger"] = "v2"


@pytest.mark.usefixtures("versions")
def test_the_list_shows_alias_state_verdict_and_age(run):
    lines = run("models", "list").stdout.splitlines()
    assert lines[0].split()[:4] == ["version", "alias", "state", "role"]
    assert lines[1].split()[:6] == [
        "v2",
        "challenger",
        "challenger",
        "policy",
        "dpo",
        "inconclusive",
    ]
    assert "2 h" in lines[1]
    assert lines[3].split()[:3] == ["base", "champion", "champion"]


@pytest.mark.usefixtures("versions")
def test_the_list_as_json(run):
    document = json.loads(run("models", "list", "--json").stdout)
    assert document["aliases"] == {"champion": "base", "challenger": "v2"}
    assert document["versions"][1]["verdict"] == "fail"


@pytest.mark.usefixtures("versions")
def test_show_prints_the_card(run):
    assert run("models", "show", "challenger").stdout.startswith("# v2\n\nLearned from")
    assert json.loads(run("models", "show", "v1", "--json").stdout)["model"]["method"] == "kto"


def test_an_unknown_version_is_one_line(run):
    done = run("models", "show", "v9")
    assert done.exit_code == 1
    assert "no model v9" in done.stderr


@pytest.mark.usefixtures("versions")
def test_promote_takes_an_alias_and_says_how_to_take_it_back(run, loop):
    done = run("models", "promote", "challenger", "--reason", "shorter")
    assert done.stdout == "v2 is champion now instead of base (approved)\n"
    assert "heedful models rollback" in done.stderr
    assert loop.log[0].reason == "shorter"


@pytest.mark.usefixtures("versions")
def test_what_the_gate_forbids_is_not_promoted(run, loop):
    done = run("models", "promote", "v1")
    assert done.exit_code == 1
    assert "safety" in done.stderr
    assert loop.log == []


@pytest.mark.usefixtures("versions")
def test_rollback_and_the_history_of_it(run):
    run("models", "promote", "v2")
    assert run("models", "rollback").stdout == "base is champion again; v2 is rolled back\n"
    lines = run("models", "history").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2"]
    entries = [json.loads(line) for line in run("models", "history", "--json").stdout.splitlines()]
    assert [entry["action"] for entry in entries] == ["promote", "roll_back"]


def test_diff_asks_both_versions_the_same_and_logs_nothing(run, script):
    done = run("models", "diff", "base", "v2", "one", "two", "--system", "be kind")
    assert done.exit_code == 0
    assert "> one\n" in done.stdout
    requests = script.requests
    assert [request.model for request in requests] == ["base", "v2"] * 2
    assert {request.sampling.seed for request in requests} == {0}
    assert len({request.sampling.SerializeToString() for request in requests}) == 1
    assert {request.consent.log for request in requests} == {1}
    assert [m.role for m in requests[0].prompt.chat.messages] == ["system", "user"]
    assert "2 prompts, 2 answered alike" in done.stderr


def test_diff_reads_prompts_from_files(run, script, tmp_path):
    plain, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    plain.write_text("first\n\nsecond\n")
    lines.write_text('{"prompt": "third"}\n{"messages": [{"role": "user", "content": "fourth"}]}\n')
    document = json.loads(run("models", "diff", "a", "b", "--prompts", str(plain), "--json").stdout)
    assert [item["prompt"] for item in document] == ["first", "second"]
    assert document[0]["same"] is True
    assert document[0]["answers"][1] == {
        "version": "base",
        "text": "first",
        "tokens": 5,
        "finish_reason": "stop",
    }
    run("models", "diff", "a", "b", "--prompts", str(lines))
    assert script.requests[-1].prompt.chat.messages[0].content == "fourth"


def test_a_bad_prompt_file_names_its_line(run, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "x"}\n{"question": "y"}\n')
    done = run("models", "diff", "a", "b", "--prompts", str(file))
    assert done.exit_code == 1
    assert "prompts.jsonl, line 2: has neither" in done.stderr


def test_diff_needs_prompts(run):
    assert run("models", "diff", "a", "b").exit_code == 2


def test_a_version_that_cannot_be_loaded_ends_with_1(run, loop, script, refusal):
    loop.add("v2", "rejected")
    script.refusals = [refusal(grpc.StatusCode.FAILED_PRECONDITION, "v2 is not loaded")] * 2
    done = run("models", "diff", "base", "v2", "x")
    assert (done.exit_code, "v2 is not loaded" in done.stderr) == (1, True)


def test_a_version_that_nobody_is_served_with_is_loaded_for_a_look(run, loop, script, refusal):
    loop.add("v2", "rejected")
    script.refusals = [refusal(grpc.StatusCode.FAILED_PRECONDITION, "v2 is not loaded")]
    assert run("models", "diff", "v2", "base", "x").exit_code == 0
    assert [request.model for request in script.requests] == ["v2", "base"]


def test_export_runs_the_trainers_program(tmp_path):
    (tmp_path / "heedful").write_text(MAIN)
    program = tmp_path / "heedful-trainer"
    program.write_text('#!/bin/sh\necho "trainer got: $*" >&2\nexit ${EXIT:-0}\n')
    program.chmod(0o755)
    arguments = ("models", "export", "v2", "--format", "merged", "--output", "out")

    def export(**environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, tmp_path / "heedful", *arguments],
            capture_output=True,
            text=True,
            env={"PATH": "/bin", **environment},
        )

    done = export(HEEDFUL_PROJECT="app")
    assert "trainer got: export v2 --format merged --output out --project app\n" in done.stderr
    assert done.stdout == "out\n"
    assert "AutoModelForCausalLM" in done.stderr
    assert export(EXIT="5").returncode == 5
