"""The slash commands of `heedful chat` that say something about the last answer.

Owns what they mean and how a text is edited; an edited answer takes the place of the last one in
the conversation. Messages go to standard error.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from heedful.cli.session import Said, Session
from heedful.feedback_types import Candidate
from heedful.sync import Client
from heedful.types import Completion

COMMANDS = ("/up", "/down", "/edit", "/critique", "/undo")
HELP = (
    "/up [REASON]   the last answer is good\n"
    "/down [REASON] the last answer is bad\n"
    "/edit [TEXT]   what it should have been; without TEXT opens $EDITOR\n"
    "/critique TEXT what is wrong or right about it\n"
    "/undo          take back what was said last"
)


def judge(client: Client, session: Session, name: str, argument: str, console: Console) -> None:
    """Carries out one of `COMMANDS` on the last answer.

    Raises:
        HeedfulError: it was not recorded.
    """
    if name == "/undo":
        _undo(client, session, console)
        return
    last = session.last
    if last is None:
        console.print("there is no answer yet", style="dim")
    elif isinstance(last, Completion) and not last.rateable:
        console.print("this answer was not logged, so it cannot be rated", style="dim")
    elif name == "/edit":
        _edit(client, session, last, argument, console)
    elif name == "/critique":
        _critique(client, session, last, argument, console)
    else:
        reasons = tuple(part.strip() for part in argument.split(",") if part.strip())
        session.said.append(Said(client.rate(last, name == "/up", reasons)))
        _confirm("thumb up" if name == "/up" else "thumb down", console)


def edited(text: str) -> str:
    """Returns `text` as a person changed it: in $EDITOR, else by typing a line.

    Raises:
        OSError: the editor cannot be started.
    """
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not sys.stdin.isatty():
        return sys.stdin.readline().strip()
    if not editor:
        return input("it should have been: ").strip()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answer.txt"
        file.write_text(text, encoding="utf-8")
        subprocess.run([*shlex.split(editor), str(file)], check=False)
        return file.read_text(encoding="utf-8").strip()


def _edit(
    client: Client,
    session: Session,
    last: Completion | Candidate,
    argument: str,
    console: Console,
) -> None:
    before = session.turns[-1].content
    try:
        text = argument or edited(before)
    except (OSError, EOFError, KeyboardInterrupt) as error:
        console.print(f"not edited {error}".strip(), style="dim", markup=False)
        return
    if not text or text == before.strip():
        console.print("nothing was changed", style="dim")
        return
    session.edit(client.correct(last, text), text)
    _confirm("correction", console)


def _critique(
    client: Client,
    session: Session,
    last: Completion | Candidate,
    argument: str,
    console: Console,
) -> None:
    if not argument:
        console.print("/critique takes what you want to say", style="dim")
        return
    session.said.append(Said(client.critique(last, argument)))
    _confirm("critique", console)


def _undo(client: Client, session: Session, console: Console) -> None:
    if not session.said:
        console.print("nothing to take back", style="dim")
        return
    client.retract(session.said[-1].receipt)
    session.take_back()
    console.print("taken back", style="dim")


def _confirm(what: str, console: Console) -> None:
    console.print(f"{what} recorded; /undo takes it back", style="dim")
