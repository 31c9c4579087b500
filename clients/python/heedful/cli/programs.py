"""`heedful serve`, `model` and `keys`: start the program `heedful-server` with the same arguments.

Owns finding that program. The client never imports the server: it becomes it.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import typer

from heedful.cli.output import ExitCode, fail

PROGRAM = "heedful-server"
_NEEDED = ("pydantic", "tokenizers", "torch", "uvicorn")
PASS_THROUGH = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}


def serve(context: typer.Context) -> None:
    """Serve a model: runs 'heedful-server serve' with the same arguments (see its --help)."""
    become("serve", context.args)


def model(context: typer.Context) -> None:
    """Pull or list models: runs 'heedful-server model' with the same arguments (pull, list)."""
    become("model", context.args)


def keys(context: typer.Context) -> None:
    """Create, list or revoke API keys: runs 'heedful-server keys' with the same arguments."""
    become("keys", context.args)


def become(command: str, arguments: list[str]) -> None:
    """Replaces this process by `heedful-server COMMAND ARGUMENTS`; returns never."""
    program = find_program()
    if program is None:
        raise fail(
            f"'heedful {command}' needs the server, which is not installed here",
            ExitCode.FAILED,
            "Install it with: pip install 'heedful[serve]'",
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(program, [str(program), command, *arguments])


def find_program() -> Path | None:
    """Returns the server's program: beside this one where its packages are here, else on PATH."""
    beside = [Path(sys.argv[0]).absolute().parent, Path(sys.executable).parent]
    packages_here = all(importlib.util.find_spec(name) is not None for name in _NEEDED)
    if packages_here:
        for folder in beside:
            if os.access(folder / PROGRAM, os.X_OK):
                return folder / PROGRAM
    found = shutil.which(PROGRAM)
    if found is None or (not packages_here and Path(found).parent in beside):
        return None
    return Path(found)
