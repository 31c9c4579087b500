"""Finding and starting the programs of the other packages: `heedful-server` and `heedful-trainer`.

Owns where they are and the commands that become them. The client never imports server or trainer.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from heedful.cli.output import ExitCode, fail

PASS_THROUGH = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}


@dataclass(frozen=True, slots=True)
class Program:
    """A program of ours, the packages that it cannot run without, and the extra that has them."""

    name: str
    needed: tuple[str, ...]
    extra: str
    what: str


SERVER = Program(
    "heedful-server", ("pydantic", "tokenizers", "torch", "uvicorn"), "serve", "server"
)
TRAINER = Program("heedful-trainer", ("pydantic", "peft", "torch"), "train", "trainer")


def serve(context: typer.Context) -> None:
    """Serve a model: runs 'heedful-server serve' with the same arguments (see its --help)."""
    become(SERVER, "serve", context.args)


def model(context: typer.Context) -> None:
    """Pull or list models: runs 'heedful-server model' with the same arguments (pull, list)."""
    become(SERVER, "model", context.args)


def keys(context: typer.Context) -> None:
    """Create, list or revoke API keys: runs 'heedful-server keys' with the same arguments."""
    become(SERVER, "keys", context.args)


def migrate_base(context: typer.Context) -> None:
    """Carry feedback to a new base model: runs 'heedful-server migrate-base' (--to MODEL)."""
    become(SERVER, "migrate-base", context.args)


def train(context: typer.Context) -> None:
    """Work on refresh runs: runs 'heedful-trainer' with the same arguments (work, watch)."""
    become(TRAINER, "train", context.args, as_command=False)


def become(
    program: Program,
    command: str,
    arguments: list[str],
    *,
    as_command: bool = True,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Replaces this process by the program with `arguments`; returns never.

    Args:
        program: what to run.
        command: what the person typed after `heedful`.
        arguments: what follows it.
        as_command: whether the program has a command of the same name.
        environment: the whole of what it gets, None for ours.
    """
    path = needed_program(program, f"heedful {command}")
    sys.stdout.flush()
    sys.stderr.flush()
    given = [str(path), *([command] if as_command else []), *arguments]
    os.execve(path, given, os.environ if environment is None else environment)


def needed_program(program: Program, command: str) -> Path:
    """Returns where a program is; where it is not installed, `command` ends and says what to do."""
    path = find_program(program)
    if path is None:
        raise fail(
            f"'{command}' needs the {program.what}, which is not installed here",
            ExitCode.FAILED,
            f"Install it with: pip install 'heedful[{program.extra}]'",
        )
    return path


def run_program(
    path: Path, arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> None:
    """Runs a program in our terminal, on standard error; where it fails, we end with its code.

    `environment` is the whole of what it gets, None for ours.
    """
    sys.stdout.flush()
    done = subprocess.run(
        [str(path), *arguments], stdout=sys.stderr.fileno(), env=environment, check=False
    )
    if done.returncode:
        raise typer.Exit(done.returncode if done.returncode > 0 else int(ExitCode.FAILED))


def find_program(program: Program) -> Path | None:
    """Returns a program: beside this one where its packages are here, else on PATH."""
    beside = [Path(sys.argv[0]).absolute().parent, Path(sys.executable).parent]
    packages_here = all(importlib.util.find_spec(name) is not None for name in program.needed)
    if packages_here:
        for folder in beside:
            if os.access(folder / program.name, os.X_OK):
                return folder / program.name
    found = shutil.which(program.name)
    if found is None or (not packages_here and Path(found).parent in beside):
        return None
    return Path(found)
