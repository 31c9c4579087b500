"""Every command of `heedful`: what it prints where, what it sends, and how it ends."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
from heedful.cli.app import build_app
from heedful.cli.status import read_figures
from typer.testing import CliRunner

MAIN = "from heedful.cli import main; main()"
PASSED_ON = ("serve", "train", "evaluate", "model", "keys", "migrate-base")
METRICS_PAGE = """# HELP heedful_num_requests_running Sequences in the batch
# TYPE heedful_num_requests_running gauge
heedful_num_requests_running{model="base"} 3.0
heedful_num_requests_waiting 1.0
heedful_generation_tokens_total{model="a"} 5.0
heedful_generation_tokens_total{model="b"} 7.0
heedful_time_to_first_token_seconds_bucket{le="0.001"} 0.0
"""


def command_names() -> list[str]:
    return [
        command.name or command.callback.__name__ for command in build_app().registered_commands
    ]


@pytest.fixture
def heedful(server, tmp_path):
    """Runs a command in this process against the small server."""
    environment = {
        "HEEDFUL_TARGET": server.target,
        "HEEDFUL_METRICS_URL": "http://127.0.0.1:9/metrics",
        "COLUMNS": "200",
    }

    def run(*arguments: str, stdin: str | None = None):
        result = CliRunner().invoke(build_app(), arguments, input=stdin, env=environment)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def start_process(server):
    """Starts a command in a process of its own against the small server."""
    environment = {**os.environ, "HEEDFUL_TARGET": server.target, "PYTHONUNBUFFERED": "1"}
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **extra: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", MAIN, *arguments],
            env={**environment, **extra},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_list_of_commands():
    assert set(command_names()) == {
        "serve",
        "train",
        "evaluate",
        "model",
        "keys",
        "migrate-base",
        "up",
        "demo",
        "erase",
        "chat",
        "generate",
        "status",
        "score",
        "tokenize",
        "detokenize",
        "bench",
        "version",
    }


@pytest.mark.parametrize("name", [name for name in command_names() if name not in PASSED_ON])
def test_every_command_explains_itself_and_its_options(heedful, name):
    result = heedful(name, "--help")
    assert result.exit_code == 0
    assert f"heedful {name}" in result.stdout or "Usage" in result.stdout
    commands = build_app().registered_commands
    command = next(c for c in commands if name in (c.name, c.callback.__name__))
    first_line = command.callback.__doc__.splitlines()[0]
    assert first_line.rstrip(".") in result.stdout


def test_the_program_explains_commands_exit_codes_and_environment(heedful):
    text = " ".join(heedful("--help").stdout.split())
    assert all(name in text for name in command_names())
    assert "Exit codes: 0 done" in text
    assert "HEEDFUL_API_KEY" in text


def test_generate_prints_the_answer_only(heedful):
    result = heedful("generate", "hello world")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "hello world\n", "")


def test_generate_reads_standard_input(heedful, script):
    result = heedful("generate", "-", "--text", stdin="from a pipe")
    assert result.stdout == "from a pipe\n"
    assert script.requests[0].prompt.text == "from a pipe"


def test_generate_says_why_an_answer_was_cut(heedful):
    result = heedful("generate", "hello", "--max-tokens", "3")
    assert (result.stdout, result.stderr) == ("hel\n", "[ended: length]\n")


def test_generate_several(heedful):
    result = heedful("generate", "abc", "-n", "2")
    assert result.stdout == "abc\nbca\n"
    assert "1 of 2" in result.stderr


def test_generate_json_holds_everything(heedful):
    result = heedful("generate", "ab", "--json", "--logprobs", "--n", "2")
    document = json.loads(result.stdout)
    first, second = document["completions"]
    assert (first["text"], second["text"]) == ("ab", "ba")
    assert first["token_ids"] == [97, 98]
    assert first["finish_reason"] == "stop"
    assert first["completion_token"] == "token-0"
    assert first["logprobs"][0]["logprob"] == -0.5
    assert document["served_by"]["policy_version"] == "base"
    assert document["usage"]["completion_tokens"] == 4


def test_generate_options_reach_the_wire(heedful, script, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "string"}')
    heedful(
        *("generate", "x", "--system", "be kind", "--model", "v2", "--temperature", "0.5"),
        *("--top-p", "0.5", "--top-k", "4", "--min-p", "0.25", "--repetition-penalty", "1.5"),
        *("--presence-penalty", "0.5", "--frequency-penalty", "0.25", "--seed", "3"),
        *("--min-tokens", "1", "--max-tokens", "9", "--stop", "a", "--stop", "b"),
        *("--stop-token-id", "7", "--top-logprobs", "2", "--priority", "background"),
        *("--end-user", "u", "--conversation", "c", "--tag", "t1", "--tag", "t2"),
        *("--json-schema", str(schema)),
    )
    request = script.requests[0]
    sampling = request.sampling
    assert [message.role for message in request.prompt.chat.messages] == ["system", "user"]
    assert (request.model, request.end_user, request.conversation_id) == ("v2", "u", "c")
    assert list(request.tags) == ["t1", "t2"]
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.5, 4)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.25, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, 0.25)
    assert (sampling.seed, sampling.min_tokens, sampling.max_tokens) == (3, 1, 9)
    assert (list(sampling.stop), list(sampling.stop_token_ids)) == (["a", "b"], [7])
    assert sampling.top_logprobs == 2
    assert request.constraint.json_schema == '{"type": "string"}'


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "x", "--text", "--system", "s"),
        ("generate", "x", "--json-schema", "/no/such/file"),
        ("generate", "x", "--temperature", "hot"),
        ("generate",),
        ("bench", "--requests", "1", "--duration", "1"),
        ("nonsense",),
    ],
)
def test_wrong_usage_ends_with_2(heedful, script, arguments):
    result = heedful(*arguments)
    assert result.exit_code == 2
    assert result.stderr
    assert script.requests == []


def test_a_refused_request_is_one_line_that_names_the_field(heedful, script, refusal):
    code = grpc.StatusCode.INVALID_ARGUMENT
    script.refusals = [refusal(code, "must be\nat least 0", field="sampling.temperature")]
    result = heedful("generate", "x", "--temperature=-1")
    assert result.exit_code == 1
    assert result.stderr == ("heedful: sampling.temperature: must be at least 0 (request req-1)\n")


def test_markup_in_an_error_is_shown_as_it_is(heedful, script, refusal):
    script.refusals = [refusal(grpc.StatusCode.NOT_FOUND, "no model [bold]x[/bold]")]
    assert "no model [bold]x[/bold]" in heedful("generate", "x").stderr


def test_no_server_ends_with_3_and_a_hint(heedful, server):
    server.stop()
    result = heedful("generate", "x", "--wait", "0")
    assert result.exit_code == 3
    assert result.stderr == (
        f"heedful: no server answers at {server.target}\n"
        f"Is a server running at {server.target}? Start one with: heedful serve\n"
    )


def test_a_server_that_stays_unready_ends_with_3(heedful, server):
    server.set_ready(False)
    result = heedful("generate", "x", "--wait", "0.3")
    assert result.exit_code == 3
    assert "not ready" in result.stderr


def test_commands_wait_for_a_server_that_loads(heedful, server):
    server.set_ready(False)
    threading.Timer(0.4, server.set_ready, (True,)).start()
    result = heedful("generate", "hello")
    assert (result.exit_code, result.stdout) == (0, "hello\n")


def test_a_passed_timeout_ends_with_4(heedful, script):
    script.delay_s = 5
    result = heedful("generate", "x", "--timeout", "0.3")
    assert result.exit_code == 4
    assert "heedful: " in result.stderr


def test_ctrl_c_ends_with_130_and_reaches_the_server(start_process, script, eventually):
    script.delay_s = 0.05
    process = start_process("generate", "x" * 1000)
    assert process.stdout.read(2) == "xx"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert "Traceback" not in process.stderr.read()
    assert eventually(script.cancelled.is_set)


def test_a_closed_pipe_ends_quietly(start_process, script):
    script.delay_s = 0.01
    process = start_process("generate", "x" * 1000)
    process.stdout.read(2)
    process.stdout.close()
    process.wait(10)
    assert process.stderr.read() == ""


def test_status_of_a_ready_server(heedful):
    result = heedful("status")
    assert result.exit_code == 0
    assert "Echo-1 q4_1, champion, loaded, context 2048 tokens" in result.stdout
    assert "champion" in result.stdout


def test_status_as_json_with_the_engines_figures(heedful):
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(METRICS_PAGE.encode())

        def log_message(self, *arguments):
            return

    with http.server.HTTPServer(("127.0.0.1", 0), Page) as page:
        threading.Thread(target=page.handle_request).start()
        url = f"http://127.0.0.1:{page.server_port}/metrics"
        result = heedful("status", "--json", "--metrics-url", url)
    document = json.loads(result.stdout)
    assert document["ready"] is True
    assert document["health"]["inference"] == "serving"
    assert document["models"]["versions"][0]["created"] == "1970-01-02T00:00:00+00:00"
    assert document["engine"]["heedful_num_requests_running"] == 3
    assert document["engine"]["heedful_generation_tokens_total"] == 12


def test_figures_are_summed_over_labels_and_others_left_out():
    assert read_figures(METRICS_PAGE) == {
        "heedful_num_requests_running": 3.0,
        "heedful_num_requests_waiting": 1.0,
        "heedful_generation_tokens_total": 12.0,
    }


def test_status_of_a_loading_server_ends_with_1(heedful, server):
    server.set_ready(False)
    result = heedful("status", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["ready"] is False
    assert document["health"]["inference"] == "not serving"


def test_status_without_a_server_ends_with_1(heedful, server):
    server.stop()
    result = heedful("status", "--json")
    assert result.exit_code == 1
    assert "no server answers" in json.loads(result.stdout)["problem"]


def test_score(heedful):
    result = heedful("score", "prompt", "abc", "--reward")
    lines = dict(line.rsplit(maxsplit=1) for line in result.stdout.splitlines())
    assert lines["tokens"] == "3"
    assert lines["total log-prob"] == "-1.5000"
    assert lines["perplexity"] == "1.6487"
    assert lines["reward"] == "1.5000"


def test_score_as_json_of_plain_text(heedful, script):
    result = heedful("score", "prompt", "-", "--text", "--json", stdin="ab")
    assert json.loads(result.stdout)["token_ids"] == [97, 98]
    assert script.scores[0].items[0].prompt.text == "prompt"


def test_tokenize_and_detokenize(heedful):
    assert heedful("tokenize", "a\n").stdout == "97\t'a'\n10\t'\\n'\n"
    assert json.loads(heedful("tokenize", "-", "--json", stdin="b").stdout)["token_ids"] == [98]
    assert "user:b" in heedful("tokenize", "b", "--chat", "--json").stdout
    assert heedful("detokenize", "104", "105").stdout == "hi\n"


def test_version(heedful):
    assert heedful("version").stdout == heedful("--version").stdout
    assert heedful("version").stdout.startswith("heedful ")


def test_bench_prints_a_table_and_writes_json(heedful, tmp_path):
    file = tmp_path / "bench.json"
    result = heedful(
        *("bench", "-c", "2", "--requests", "4", "--output-tokens", "8", "--json", str(file))
    )
    assert result.exit_code == 0
    assert "first token, ms" in result.stdout
    document = json.loads(file.read_text())
    assert document["num_ok"] == 4
    assert document["config"]["concurrency"] == 2
    assert document["device"]["cores"] == str(os.cpu_count())


def test_bench_to_standard_output_is_json_only(heedful):
    result = heedful("bench", "--requests", "1", "--output-tokens", "4", "--json", "-")
    assert json.loads(result.stdout)["output_tokens"] == 4


def test_bench_ends_with_1_where_requests_failed(heedful, script, refusal):
    script.refusals = [refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")]
    result = heedful("bench", "--requests", "3", "--warmup", "0", "--text", "hi")
    assert result.exit_code == 1
    assert "1 x RESOURCE_EXHAUSTED" in result.stderr


@pytest.fixture
def bin_folder(tmp_path):
    """A folder with `heedful` and a `heedful-server` that shows its arguments."""
    (tmp_path / "heedful").write_text(MAIN)
    program = tmp_path / "heedful-server"
    program.write_text('#!/bin/sh\necho "server got: $*"\nexit 7\n')
    program.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "--model", "x y", "--grpc-port", "1"),
        ("serve", "--help"),
        ("model", "pull", "--force"),
        ("model", "list"),
        ("keys", "create", "--scope", "generate"),
        ("migrate-base", "--to", "tiny"),
    ],
)
def test_serve_model_and_keys_become_the_servers_program(bin_folder, arguments):
    done = subprocess.run(
        [sys.executable, bin_folder / "heedful", *arguments], capture_output=True, text=True
    )
    assert done.stdout == f"server got: {' '.join(arguments)}\n"
    assert done.returncode == 7


def test_serve_without_the_extra_says_what_to_install(bin_folder):
    # None in sys.modules is what Python itself puts there for "not importable".
    without_torch = bin_folder / "without_torch"
    without_torch.write_text(f"import sys; sys.modules['torch'] = None; {MAIN}")
    done = subprocess.run(
        [sys.executable, without_torch, "serve"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": str(bin_folder)},
    )
    assert done.returncode == 1
    assert "pip install 'heedful[serve]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_of_another_environment_is_found_on_the_path(bin_folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (bin_folder / "heedful-server").rename(elsewhere / "heedful-server")
    without_torch = bin_folder / "without_torch"
    without_torch.write_text(f"import sys; sys.modules['torch'] = None; {MAIN}")
    done = subprocess.run(
        [sys.executable, without_torch, "serve"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{elsewhere}:/bin"},
    )
    assert done.stdout == "server got: serve\n"


def test_the_key_of_the_environment_is_sent_and_never_shown(start_process, script):
    process = start_process("generate", "x", HEEDFUL_API_KEY="hunter2")
    stdout, stderr = process.communicate(timeout=20)
    assert stdout == "x\n"
    assert script.metadata[0]["authorization"] == "Bearer hunter2"
    assert "hunter2" not in stdout + stderr


def test_a_missing_certificate_file_is_wrong_usage(start_process):
    process = start_process("generate", "x", HEEDFUL_TLS_CA="/no/such.pem")
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "HEEDFUL_TLS_CA" in stderr


def test_answers_stream_instead_of_coming_at_once(start_process, script):
    script.delay_s = 0.3
    process = start_process("generate", "abcdef")
    assert process.stdout.read(2) == "ab"
    first_s = time.monotonic()
    assert process.stdout.read() == "cdef\n"
    assert time.monotonic() - first_s > 0.3


def test_modules_of_the_command_line_do_not_import_each_others_commands():
    folder = Path(sys.modules["heedful.cli.app"].__file__).parent
    commands = {"generate", "chat", "status", "text", "bench", "programs"}
    for name in commands:
        source = (folder / f"{name}.py").read_text()
        others = [other for other in commands - {name} if f"heedful.cli.{other} import" in source]
        assert not others, name
