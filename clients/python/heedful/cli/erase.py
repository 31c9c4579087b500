"""`heedful erase`: remove what an end user wrote and got, after asking.

Owns the question and nothing else; the server owns what an erasure means.
"""

import sys
from typing import Annotated

import typer

from heedful.cli.connection import (
    TARGET,
    TIMEOUT_S,
    TargetOption,
    TimeoutOption,
    WaitOption,
    ready_client,
)
from heedful.cli.output import ExitCode, fail, stderr, write, write_json


def erase(
    end_user: Annotated[str, typer.Option("--end-user", help="Your id of the end user.")],
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    every_project: Annotated[
        bool, typer.Option("--every-project", help="In every project of the tenant.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Remove an end user's prompts, completions and texts for ever."""
    if not yes:
        _confirm(end_user, every_project)
    with ready_client(target, timeout, wait, "feedback") as client:
        erased = client.erase_user(end_user, every_project=every_project)
    if as_json:
        write_json(erased)
        return
    write(f"{erased.completions} completions and {erased.feedback_events} judgements erased\n")
    if erased.tainted_versions:
        write(f"these versions had learned from them: {', '.join(erased.tainted_versions)}\n")


def _confirm(end_user: str, every_project: bool) -> None:
    if not sys.stdin.isatty():
        raise fail("erasing needs --yes where nobody can be asked", ExitCode.USAGE)
    where = "every project" if every_project else "this project"
    stderr().print(
        f"This removes all that {end_user} wrote and got in {where}, and cannot be undone.",
        markup=False,
    )
    if input("Type the end user's id to go on: ").strip() != end_user:
        raise fail("nothing was erased", ExitCode.FAILED)
