"""The program: imports, help, errors of the command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from heedful_server.main import app
from typer.testing import CliRunner


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HEEDFUL_")}
    return subprocess.run(
        [sys.executable, "-P", "-m", "heedful_server.main", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environ,
        timeout=60,
        check=False,
    )


def test_importing_the_program_pulls_in_no_model_code(tmp_path):
    code = (
        "import sys, heedful_server.main\n"
        "heavy = {'torch', 'transformers', 'xgrammar', 'safetensors', 'triton'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "command",
    [
        ["serve"],
        ["model", "pull"],
        ["model", "list"],
        ["model", "verify"],
        ["model", "dequantize"],
        ["config", "show"],
    ],
)
def test_every_command_explains_itself(command):
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_misspelt_setting_is_one_line_and_exit_code_2(tmp_path):
    done = run("serve", "--set", "grpc.prot=1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "did you mean 'grpc.port'" in done.stderr


def test_setting_without_a_value_is_refused(tmp_path):
    done = run("config", "show", "--set", "grpc.port", cwd=tmp_path)
    assert done.returncode == 2
    assert "PATH=VALUE" in done.stderr


def test_listening_beyond_loopback_is_refused_without_insecure(tmp_path):
    done = run("serve", "--host", "0.0.0.0", cwd=tmp_path)
    assert done.returncode == 2
    assert "--insecure" in done.stderr


def test_unknown_model_is_told_without_a_traceback(tmp_path):
    done = run("serve", "--home", str(tmp_path), "--model", "./none", cwd=tmp_path)
    assert done.returncode == 1
    assert "./none" in done.stderr
    assert "Traceback" not in done.stderr


def test_configuration_is_shown_as_it_is_in_effect(tmp_path):
    (tmp_path / "heedful.toml").write_text("[grpc]\nport = 1234\n")
    done = run("config", "show", "--set", "log.level=debug", cwd=tmp_path)
    assert done.returncode == 0
    assert "port = 1234" in done.stdout
    assert 'level = "debug"' in done.stdout


def test_models_of_an_empty_home_are_none(tmp_path):
    done = run("model", "list", "--home", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.split() == ["MODEL", "SIZE", "WEIGHTS", "SOURCE", "PATH"]
