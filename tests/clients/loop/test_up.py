"""`heedful up`: two programs side by side, restarted, drained, with the right exit code."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from heedful.cli import up as up_command
from heedful.cli.supervisor import Command, Supervisor

MAIN = "from heedful.cli import main; main()"
SERVING = "trap 'echo drained; exit 0' TERM; echo serving; while :; do sleep 0.05; done"


def command(name: str, body: str) -> Command:
    return Command(name, ["/bin/sh", "-c", body], {"PATH": "/bin:/usr/bin"})


class Log:
    """The lines of all programs, in order."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def __call__(self, name: str, line: str) -> None:
        self.lines.append((name, line))

    def of(self, name: str) -> list[str]:
        return [line for who, line in self.lines if who == name]

    async def until(self, name: str, line: str, count: int = 1) -> None:
        async with asyncio.timeout(10):
            while self.of(name).count(line) < count:
                await asyncio.sleep(0.01)


async def at_once() -> None:
    return


def start(server: str, trainer: str, log: Log, until_ready=at_once) -> "asyncio.Task[int]":
    supervisor = Supervisor(
        command("server", server), command("trainer", trainer), until_ready, log, first_pause_s=0.01
    )
    return asyncio.create_task(supervisor.run())


async def test_a_signal_drains_both_and_ends_with_0():
    log = Log()
    running = start(SERVING, SERVING, log)
    await log.until("trainer", "serving")
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0
    assert log.of("server") == log.of("trainer") == ["serving", "drained"]


async def test_a_trainer_that_crashes_is_started_again_and_the_server_goes_on():
    log = Log()
    running = start(SERVING, "echo trying; exit 1", log)
    await log.until("trainer", "trying", count=3)
    os.kill(os.getpid(), signal.SIGINT)
    assert await running == 0
    pauses = [line.rpartition("again in ")[2] for line in log.of("heedful")]
    assert pauses[:3] == ["0.01 s", "0.02 s", "0.04 s"]
    assert log.of("server") == ["serving", "drained"]


@pytest.mark.parametrize(("ending", "code"), [("exit 7", 7), ("kill -9 $$", 1)])
async def test_the_end_of_the_server_is_the_end_of_all(ending, code):
    log = Log()
    running = start(f"sleep 0.3; {ending}", SERVING, log)
    assert await running == code
    assert log.of("trainer") == ["serving", "drained"]


async def test_a_misconfigured_trainer_ends_all_with_2():
    log = Log()
    assert await start(SERVING, "echo unknown key; exit 2", log) == 2
    assert log.of("server") == ["serving", "drained"]
    assert log.of("trainer") == ["unknown key"]


async def test_the_trainer_waits_for_the_server():
    log = Log()
    ready = asyncio.Event()

    async def until_ready() -> None:
        await ready.wait()

    running = start(SERVING, SERVING, log, until_ready)
    await log.until("server", "serving")
    await asyncio.sleep(0.1)
    assert log.of("trainer") == []
    ready.set()
    await log.until("trainer", "serving")
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0


async def test_a_server_that_cannot_start_waits_for_nobody():
    async def never() -> None:
        await asyncio.sleep(60)

    assert await start("exit 1", SERVING, Log(), never) == 1


async def test_a_third_signal_kills():
    log = Log()
    running = start("trap '' TERM; echo deaf; while :; do sleep 0.05; done", SERVING, log)
    await log.until("trainer", "serving")
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.1)
    assert await running == 1


@pytest.fixture
def programs(tmp_path, server) -> Path:
    """A folder with `heedful` and programs that say what they were given."""
    (tmp_path / "heedful").write_text(MAIN)
    shown = f"home = \"{tmp_path}\"\n[grpc]\nhost = '0.0.0.0'\nport = {server.port}"
    configured = f'if [ "$1" = config ]; then echo "$*" >&2; cat {tmp_path}/shown; exit; fi'
    (tmp_path / "shown").write_text(shown)
    for name, first in (("heedful-server", configured), ("heedful-trainer", "")):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\n{first}\necho "got $*"\n{SERVING}\n')
        program.chmod(0o755)
    return tmp_path


def up(programs: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, programs / "heedful", "up", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def test_both_programs_get_what_they_need(programs, server):
    process = up(programs, "--json", "--model", "tiny", "--set", "engine.threads=1")
    assert process.stdout is not None
    lines = [json.loads(process.stdout.readline()) for _ in range(4)]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 0
    got = {item["program"]: item["line"] for item in lines if item["line"].startswith("got")}
    assert got["server"] == "got serve --set engine.threads=1 --set model.name_or_path=tiny"
    assert got["trainer"] == f"got watch --target 127.0.0.1:{server.port} --home {programs}"


def test_lines_carry_the_name_of_their_program(programs):
    process = up(programs)
    assert process.stdout is not None
    assert process.stdout.readline() == "server  │ got serve\n"
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=20)
    assert "heedful │ stopping; again to hurry\n" in stdout
    assert "Traceback" not in stderr


def test_a_wrong_configuration_ends_with_the_servers_words(programs):
    broken = programs / "heedful-server"
    broken.write_text("#!/bin/sh\necho 'heedful-server: unknown setting grcp.port' >&2; exit 2\n")
    process = up(programs)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 2
    assert stderr == "heedful: unknown setting grcp.port\n"


def test_without_the_trainer_it_says_what_to_install(programs, tmp_path):
    (programs / "heedful-trainer").unlink()
    without = programs / "without"
    without.write_text(f"import sys; sys.modules['peft'] = None; {MAIN}")
    done = subprocess.run(
        [sys.executable, without, "up"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": str(programs)},
    )
    assert done.returncode == 1
    assert "pip install 'heedful[train]'" in done.stderr


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ('{"event": "ready", "level": "info", "timestamp": "t", "port": 1}', "ready  port=1"),
        ('{"event": "no disk", "level": "error"}', "error: no disk"),
        ("plain text", "plain text"),
        ('{"no": "event"}', '{"no": "event"}'),
        ("17", "17"),
    ],
)
def test_lines_of_a_json_log_are_made_readable(line, shown):
    assert up_command.readable(line) == shown
