"""What a server here would be configured as: asked of its own program, never guessed.

Owns that question and the few answers that other programs need. Imports nothing of the server.
"""

import subprocess
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from heedful.cli.output import ExitCode, fail

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where a server will listen and keep its things."""

    target: str
    home: Path


def read(program: Path, config: Path | None, settings: Sequence[str]) -> ServerSettings:
    """Returns what `heedful-server` makes of its file, its environment and `settings`.

    A configuration that is wrong ends the command with the server's own words.
    """
    arguments = [str(program), "config", "show", *arguments_of(config, settings)]
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    if done.returncode:
        raise fail(done.stderr.strip().removeprefix("heedful-server: "), ExitCode.USAGE)
    tree = tomllib.loads(done.stdout)
    grpc = tree.get("grpc", {})
    host, port = str(grpc.get("host", "127.0.0.1")), int(grpc.get("port", 50051))
    if port == 0:
        raise fail("grpc.port must not be 0 here: others could not find the server", ExitCode.USAGE)
    home = Path(str(tree.get("home", "~/.heedful"))).expanduser()
    return ServerSettings(f"{_WILDCARDS.get(host, host)}:{port}", home)


def arguments_of(config: Path | None, settings: Sequence[str]) -> list[str]:
    """Returns the arguments of `heedful-server` for a file and `PATH=VALUE` settings."""
    arguments = ["--config", str(config)] if config else []
    for setting in settings:
        arguments += ["--set", setting]
    return arguments
