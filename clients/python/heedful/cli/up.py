"""`heedful up`: server and trainer on one machine, in one terminal.

Owns the options and how lines look; `supervisor.py` owns the processes. Both are started as
programs: nothing of them is imported.
"""

import asyncio
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from heedful.cli import server_settings
from heedful.cli.connection import api_key, tls
from heedful.cli.output import ExitCode, fail, json_text, printable, write
from heedful.cli.programs import SERVER, TRAINER, needed_program
from heedful.cli.supervisor import Command, Supervisor
from heedful.cli.trainer_process import environment, places
from heedful.client import AsyncClient

_STYLES = {"server": "cyan", "trainer": "magenta", "heedful": "bold"}
_NAME_WIDTH = 7
_OMITTED = ("event", "level", "timestamp")


def up(
    model: Annotated[
        str | None, typer.Option("--model", help="Pulled model, Hugging Face id or directory.")
    ] = None,
    quantize: Annotated[str | None, typer.Option("--quantize", help="Form of the weights.")] = None,
    host: Annotated[str | None, typer.Option("--host", help="Address of both ports.")] = None,
    port: Annotated[int | None, typer.Option("--port", min=1, help="gRPC port.")] = None,
    http_port: Annotated[int | None, typer.Option("--http-port", min=0, help="HTTP port.")] = None,
    home: Annotated[
        Path | None, typer.Option("--home", metavar="DIR", help="Home directory of both.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="Their heedful.toml.", exists=True),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Any setting of the server, repeatable."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON Lines: program and line.")
    ] = False,
) -> None:
    """Run server and trainer together: serve, and learn whenever there is enough feedback.

    The trainer is started again if it crashes. Ctrl-C lets both finish what they do, a second one
    hurries them. Ends with the server's exit code.
    """
    server = needed_program(SERVER, "heedful up")
    trainer = needed_program(TRAINER, "heedful up")
    flags = {
        "model.name_or_path": model,
        "model.quantize": quantize,
        "grpc.host": host,
        "http.host": host,
        "grpc.port": port,
        "http.port": http_port,
        "home": home,
    }
    settings = [*(setting or ()), *(f"{k}={v}" for k, v in flags.items() if v is not None)]
    found = server_settings.read(server, config, settings)
    serving = [str(server), "serve", *server_settings.arguments_of(config, settings)]
    watching = [str(trainer), "watch", "--target", found.target, *places(found.home, config)]
    code = asyncio.run(_run(serving, watching, found.target, emitter(as_json)))
    if code:
        raise typer.Exit(code)


def emitter(as_json: bool) -> Callable[[str, str], None]:
    """Returns what writes a program's line: as JSON, or after the program's name."""
    if as_json:
        return lambda name, line: write(
            json_text({"program": name, "line": line}, indent=None) + "\n"
        )
    console = Console(highlight=False, soft_wrap=True)

    def emit(name: str, line: str) -> None:
        head = Text(f"{name:<{_NAME_WIDTH}} │ ", style=_STYLES.get(name, ""))
        console.print(head.append(printable(readable(line)), style="default"))

    return emit


def readable(line: str) -> str:
    """Returns a line of a JSON log for people, any other line as it is."""
    try:
        entry = json.loads(line)
    except ValueError:
        return line
    if not isinstance(entry, dict) or "event" not in entry:
        return line
    level = str(entry.get("level", "info"))
    text = str(entry["event"]) if level == "info" else f"{level}: {entry['event']}"
    fields = (f"{name}={value}" for name, value in entry.items() if name not in _OMITTED)
    return "  ".join([text, *fields])


async def _run(
    serving: list[str], watching: list[str], target: str, emit: Callable[[str, str], None]
) -> int:
    async def until_ready() -> None:
        async with AsyncClient(target, api_key=api_key(), tls=tls()) as client:
            await client.wait_ready(math.inf)

    supervisor = Supervisor(
        Command("server", serving, os.environ),
        Command("trainer", watching, environment()),
        until_ready,
        emit,
    )
    try:
        return await supervisor.run()
    except OSError as error:
        raise fail(f"cannot start: {error}", ExitCode.FAILED) from None
