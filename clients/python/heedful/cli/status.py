"""`heedful status`: is the server up, who answers, what is being learned, and how busy is it.

Owns the picture it draws from its sources: health, ModelService and the feedback's backlog over
gRPC, and the engine's figures from the HTTP port's metrics page, which may be closed to us.
"""

import contextlib
import dataclasses
import urllib.request
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from heedful.cli.connection import TARGET, TargetOption, WaitOption, open_client, wait_ready
from heedful.cli.models_view import age
from heedful.cli.output import ExitCode, describe, write_json
from heedful.errors import HeedfulError, Unavailable
from heedful.model_types import Models, Refresh
from heedful.sync import Client
from heedful.types import Health

CALL_TIMEOUT_S = 5.0
METRICS_TIMEOUT_S = 2.0
HTTP_PORT = 8080
FIGURES = (
    "heedful_num_requests_running",
    "heedful_num_requests_waiting",
    "heedful_kv_cache_usage_ratio",
    "heedful_prompt_tokens_total",
    "heedful_generation_tokens_total",
    "heedful_prefix_cache_queries_total",
    "heedful_prefix_cache_hits_total",
    "heedful_num_preemptions_total",
    "heedful_engine_restarts_total",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Learning:
    """How the loop stands; None where it may not be read here."""

    backlog: int | None = None
    """Judgements that no run has used."""
    refresh: Refresh | None = None
    """The newest run."""


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """What could be learned; `problem` says why the rest could not."""

    target: str
    ready: bool
    health: Health | None = None
    models: Models | None = None
    learning: Learning = Learning()
    engine: dict[str, float] = dataclasses.field(default_factory=dict)
    problem: str = ""


def status(
    target: TargetOption = TARGET,
    wait: WaitOption = 0.0,
    metrics_url: Annotated[
        str | None,
        typer.Option(
            "--metrics-url",
            envvar="HEEDFUL_METRICS_URL",
            help=f"Metrics page; default: /metrics on port {HTTP_PORT} of the target's host.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show health, versions and load of the server; ends with code 1 when it is not ready."""
    url = metrics_url or f"http://{target.rpartition(':')[0]}:{HTTP_PORT}/metrics"
    with open_client(target, CALL_TIMEOUT_S) as client:
        found = _look(client, wait or 0.0, url)
    if as_json:
        write_json(found)
    else:
        _draw(found)
    if not found.ready:
        raise typer.Exit(int(ExitCode.FAILED))


def read_figures(page: str) -> dict[str, float]:
    """Returns the engine's figures from a Prometheus text page, summed over labels."""
    figures: dict[str, float] = {}
    for line in page.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in FIGURES:
            figures[name] = figures.get(name, 0.0) + float(line.rpartition(" ")[2])
    return figures


def _look(client: Client, wait_s: float, url: str) -> Status:
    try:
        wait_ready(client, wait_s)
    except Unavailable as error:
        problem = describe(error)
    else:
        problem = ""
    try:
        health = client.health()
        models = client.list_models() if health.ready else None
    except HeedfulError as error:
        return Status(client.target, ready=False, problem=problem or describe(error))
    learning = _learning(client) if health.ready else Learning()
    return Status(
        client.target, health.ready, health, models, learning, _fetch_figures(url), problem
    )


def _learning(client: Client) -> Learning:
    backlog: int | None = None
    runs: tuple[Refresh, ...] = ()
    # Both need scopes that whoever asks for the health may lack.
    with contextlib.suppress(HeedfulError):
        backlog = client.summarize_feedback().backlog
    with contextlib.suppress(HeedfulError):
        runs = client.list_refreshes(limit=1)
    return Learning(backlog, runs[0] if runs else None)


def _fetch_figures(url: str) -> dict[str, float]:
    try:
        with urllib.request.urlopen(url, timeout=METRICS_TIMEOUT_S) as page:
            return read_figures(page.read().decode())
    except (OSError, ValueError):
        # The metrics port is often closed to clients; the rest of the picture stands without it.
        return {}


def _draw(found: Status) -> None:
    table = Table(show_header=False, box=None)
    table.add_row("server", found.target)
    table.add_row("ready", "[green]yes[/]" if found.ready else "[red]no[/]")
    if found.problem:
        table.add_row("problem", found.problem)
    if found.health is not None:
        for service, state in dataclasses.asdict(found.health).items():
            table.add_row(f"{service} service", str(state))
    if found.models is not None:
        _add_loop(table, found.models, found.learning)
    for version in found.models.versions if found.models else ():
        loaded = "loaded" if version.loaded else "not loaded"
        table.add_row(
            f"version {version.version}",
            f"{version.base_model} {version.quantization}, {version.state}, {loaded}, "
            f"context {version.context_tokens} tokens",
        )
    for name, value in found.engine.items():
        table.add_row(name.removeprefix("heedful_").replace("_", " "), f"{value:g}")
    Console(highlight=False).print(table)


def _add_loop(table: Table, models: Models, learning: Learning) -> None:
    for alias, name in models.aliases.items():
        version = models.find(name)
        old = age(version.created) if version is not None and version.role != "base" else ""
        verdict = version.verdict if version is not None else ""
        details = ", ".join(filter(None, (f"{old} old" if old else "", verdict)))
        table.add_row(alias, f"{name} ({details})" if details else name)
    if learning.backlog is not None:
        table.add_row("backlog", f"{learning.backlog} judgements not trained on yet")
    run = learning.refresh
    if run is not None:
        done = f"{run.stage} {run.stage_progress:.0%}" if not run.is_over else age(run.ended)
        table.add_row("refresh", f"{run.run_id} {run.status}, {done}".rstrip(", "))
