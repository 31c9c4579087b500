"""The program: help, settings, and errors that name what is wrong."""

from pathlib import Path

from heedful_trainer.main import app
from typer.testing import CliRunner

RUNNER = CliRunner()


def test_settings_are_listed_with_their_meaning() -> None:
    result = RUNNER.invoke(app, ["settings"])
    assert result.exit_code == 0
    assert "dpo.beta\tWeight of the reference." in result.output


def test_the_resulting_configuration_is_shown_without_its_key(tmp_path: Path) -> None:
    arguments = ["config", "--set", "api_key=secret", "--set", "dpo.beta=0.7"]
    result = RUNNER.invoke(app, [*arguments, "--home", str(tmp_path), "--target", "h:1"])
    assert result.exit_code == 0
    assert '"beta": 0.7' in result.output
    assert '"target": "h:1"' in result.output
    assert "secret" not in result.output


def test_a_wrong_command_line_is_a_usage_error(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["work", "--once", "--set", "dpo.betta=1", "--home", str(tmp_path)])
    assert result.exit_code == 2
    assert "did you mean 'dpo.beta'" in result.output
    assert RUNNER.invoke(app, ["work", "--set", "dpo.beta"]).exit_code == 2
    assert not list(tmp_path.iterdir())
