"""How the commands reach a server: shared options, environment, and the wait for one that loads.

Owns the options that every calling command takes. Secrets come from the environment only, where
other users of the machine cannot read them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from heedful.cli.output import ExitCode, errors_as_lines, fail, stderr
from heedful.client import DEFAULT_TARGET, DEFAULT_TIMEOUT_S
from heedful.errors import Unavailable
from heedful.sync import Client
from heedful.transport import TLS
from heedful.types import ServingStatus

DEFAULT_WAIT_S = 60.0
DEFAULT_CONNECT_S = 2.0
ENVIRONMENT_HELP = (
    "Environment: HEEDFUL_TARGET is the default of --target, HEEDFUL_API_KEY the key to send, "
    "HEEDFUL_PROJECT the project, HEEDFUL_TLS_CA a PEM file (or 'system') that turns on TLS."
)

TargetOption = Annotated[
    str,
    typer.Option(
        "--target",
        "-t",
        envvar="HEEDFUL_TARGET",
        metavar="HOST:PORT",
        help="gRPC address of the server.",
    ),
]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=0.001, help="Limit for one call.")
]
WaitOption = Annotated[
    float | None,
    typer.Option(
        "--wait",
        metavar="SECONDS",
        min=0,
        help="Wait so long for a server that starts or loads. "
        f"Default: {DEFAULT_WAIT_S:.0f} while it loads, {DEFAULT_CONNECT_S:.0f} for it to answer.",
        show_default=False,
    ),
]
Service: TypeAlias = Literal["inference", "feedback"]
"""What a command needs; feedback is taken while completions cannot be served yet."""

TARGET = DEFAULT_TARGET
TIMEOUT_S = DEFAULT_TIMEOUT_S


def open_client(target: str, timeout_s: float, name: str = "") -> Client:
    """Opens a client with what the environment says about key, TLS and (without `name`) project."""
    return Client(
        target,
        api_key=api_key(),
        tls=tls(),
        project=name or project(),
        timeout_s=timeout_s,
    )


def project() -> str:
    """Returns the project of the environment."""
    return os.environ.get("HEEDFUL_PROJECT") or "default"


def api_key() -> str | None:
    """Returns the key of the environment, None where there is none."""
    return os.environ.get("HEEDFUL_API_KEY") or None


def tls() -> TLS | None:
    """Returns how to encrypt, as the environment says; None for plain text."""
    ca = os.environ.get("HEEDFUL_TLS_CA")
    if not ca:
        return None
    if ca == "system":
        return TLS()
    path = Path(ca)
    if not path.is_file():
        raise fail(f"HEEDFUL_TLS_CA names no file: {ca}", ExitCode.USAGE)
    return TLS.from_files(ca=path)


@contextmanager
def ready_client(
    target: str,
    timeout_s: float,
    wait_s: float | None,
    service: Service = "inference",
    project_name: str = "",
) -> Iterator[Client]:
    """Opens a client to a ready server; the client's errors end the command with one line."""
    with errors_as_lines(target), open_client(target, timeout_s, project_name) as client:
        wait_ready(client, wait_s, service)
        yield client


def wait_ready(client: Client, wait_s: float | None, service: Service = "inference") -> None:
    """Waits for the server, saying so while it lasts; None means the defaults of `--wait`.

    Raises:
        Unavailable: it was not ready in time.
    """
    try:
        health = client.health()
        status = health.feedback if service == "feedback" else health.inference
        if status is ServingStatus.SERVING:
            return
    except Unavailable:
        if wait_s == 0:
            raise
    with stderr().status(f"waiting for {client.target}"):
        client.wait_ready(
            DEFAULT_WAIT_S if wait_s is None else wait_s,
            connect_timeout_s=DEFAULT_CONNECT_S if wait_s is None else wait_s,
            service=service,
        )
