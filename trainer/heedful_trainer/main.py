"""The program `heedful-trainer`: its command line, signals and the life of the process.

Owns which commands there are; everything else is built from here. Exit codes: 0 after a clean end,
1 where a run that was asked for did not finish or the store cannot be opened, 2 for a command line
or a configuration that is wrong; `evaluate` also has 3 for no server and 4 for no answer in time.
"""

from __future__ import annotations

import enum
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from heedful_store import (
    DEFAULT_PROJECT,
    Failpoints,
    NotFound,
    Store,
    StoreError,
)

from heedful_trainer.config_sources import Loaded, load, settings
from heedful_trainer.errors import HeedfulTrainerError, InvalidConfig
from heedful_trainer.logging_setup import configure_logging

app = typer.Typer(
    name="heedful-trainer",
    help="Turns feedback into reward models and policies, run by run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class ExportForm(enum.StrEnum):
    """What an export writes."""

    PEFT = "peft"
    MERGED = "merged"


_EXIT_FAILED = 1
_EXIT_USAGE = 2
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file. Default: heedful.toml here, if any.", metavar="FILE"),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting, e.g. dpo.beta=0.2.", metavar="PATH=VALUE"),
]
Home = Annotated[Path | None, typer.Option("--home", help="The server's home directory.")]
StoreUrl = Annotated[str, typer.Option("--store", help="URL of the store.", metavar="URL")]
Target = Annotated[
    str | None, typer.Option("--target", help="The server's gRPC port.", metavar="HOST:PORT")
]

Against = Annotated[str, typer.Option("--against", help="The baseline: a version or alias.")]
Tasks = Annotated[
    str,
    typer.Option(
        "--tasks",
        help="Some only, by comma: votes, ratings, reward, truthfulqa, toxicity, refusals, "
        "gsm8k, llmbar, text.",
    ),
]
DataFolder = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Folder of data sets. Default: evaluation-data at home.", metavar="DIR"
    ),
]
Fetch = Annotated[
    bool, typer.Option("--fetch", help="Get missing data sets from their public sources.")
]
OwnPrompts = Annotated[
    Path | None,
    typer.Option("--prompts", help="Own prompts for the reward model, one a line.", metavar="FILE"),
]


@app.command()
def work(
    once: Annotated[bool, typer.Option("--once", help="End after one run, or if none waits.")] = (
        False
    ),
    run_id: Annotated[
        str | None, typer.Option("--run", help="Work on this run only, then end.", metavar="RUN_ID")
    ] = None,
    config_file: ConfigFile = None,
    overrides: Settings = None,
    home: Home = None,
    store_url: StoreUrl = "",
    target: Target = None,
) -> None:
    """Work on refresh runs as they are queued."""
    loaded = _load(config_file, overrides, home, store_url, target)
    _run(loaded, once=once, run_id=run_id, watching=False)


@app.command()
def watch(
    config_file: ConfigFile = None,
    overrides: Settings = None,
    home: Home = None,
    store_url: StoreUrl = "",
    target: Target = None,
) -> None:
    """Work on runs, and start them when enough new feedback has come or a champion is tainted."""
    loaded = _load(config_file, overrides, home, store_url, target)
    _run(loaded, once=False, run_id=None, watching=True)


@app.command()
def config(
    config_file: ConfigFile = None,
    overrides: Settings = None,
    home: Home = None,
    store_url: StoreUrl = "",
    target: Target = None,
) -> None:
    """Print the configuration that results, as JSON; keys and passwords are masked."""
    trainer = _load(config_file, overrides, home, store_url, target).trainer
    masked = trainer.model_copy(update={"api_key": "***" if trainer.api_key else ""})
    typer.echo(json.dumps(masked.model_dump(mode="json"), indent=2))


@app.command("settings")
def list_settings() -> None:
    """List every setting with its description."""
    for path, description in settings():
        typer.echo(f"{path}\t{description}")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def simulate(context: typer.Context) -> None:
    """Have simulated raters vote at a running server, labelled as such, or judge two policies."""
    from heedful_trainer.simulation.main import main as run_simulation

    raise typer.Exit(run_simulation(context.args))


@app.command()
def evaluate(
    version: Annotated[str, typer.Argument(help="Version or alias.")] = "champion",
    against: Against = "base",
    tasks: Tasks = "",
    data: DataFolder = None,
    fetch: Fetch = False,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Most items a figure.")] = 100,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of items and samples.")] = 0,
    out: Annotated[Path, typer.Option("--out", help="For both files.", metavar="DIR")] = (
        Path("evaluation")
    ),
    prompts: OwnPrompts = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers too.")] = False,
    project: Annotated[
        str, typer.Option("--project", envvar="HEEDFUL_PROJECT", help="Its project.")
    ] = DEFAULT_PROJECT,
    config_file: ConfigFile = None,
    overrides: Settings = None,
    home: Home = None,
    target: Target = None,
) -> None:
    """Evaluate a version against a baseline as the InstructGPT paper does; writes HTML and JSON."""
    loaded = _load(config_file, overrides, home, "", target)
    # Imported here: torch takes seconds, and a wrong command line should not.
    from heedful_trainer.evaluation.command import Wanted, run_command

    warnings.simplefilter("ignore")
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    folder = data or loaded.place.home / "evaluation-data"
    wanted = Wanted(
        *(version, against, names, folder, fetch, limit, seed, out, prompts, project, as_json)
    )
    raise typer.Exit(run_command(wanted, loaded.trainer))


@app.command()
def export(
    version: Annotated[str, typer.Argument(help="Version or alias.")],
    output: Annotated[Path, typer.Option("--output", help="New directory.", metavar="DIR")],
    form: Annotated[
        ExportForm, typer.Option("--format", help="Adapter files, or whole weights.")
    ] = ExportForm.PEFT,
    project: Annotated[str, typer.Option("--project", help="Its project.")] = DEFAULT_PROJECT,
    tenant: Annotated[
        str, typer.Option("--tenant", help="Its tenant; default: the only one with that project.")
    ] = "",
    config_file: ConfigFile = None,
    overrides: Settings = None,
    home: Home = None,
    store_url: StoreUrl = "",
    target: Target = None,
) -> None:
    """Write a version as files that PEFT or transformers load."""
    loaded = _load(config_file, overrides, home, store_url, target)
    # Imported here: torch takes seconds, and a wrong command line should not.
    from heedful_trainer.exporting import export_version, find_scope, find_version
    from heedful_trainer.runs.connecting import client

    warnings.simplefilter("ignore")
    try:
        with Store(loaded.place.store_url) as store:
            policy = find_version(store, find_scope(store, tenant, project), version)
            export_version(
                policy,
                output,
                form.value,
                loaded.trainer,
                loaded.place,
                store,
                lambda: client(loaded.trainer, project),
            )
    except (HeedfulTrainerError, StoreError) as error:
        typer.echo(f"heedful-trainer: {error}", err=True)
        raise typer.Exit(_EXIT_FAILED) from None


def _load(
    file: Path | None,
    overrides: list[str] | None,
    home: Path | None,
    store_url: str,
    target: str | None,
) -> Loaded:
    pairs = [("target", target)] if target is not None else []
    try:
        for item in overrides or ():
            path, separator, value = item.partition("=")
            if not separator:
                raise InvalidConfig(f"--set {item!r}: expected PATH=VALUE")
            pairs.append((path.removeprefix("trainer."), value))
        return load(file, os.environ, pairs, home=home, store_url=store_url)
    except InvalidConfig as error:
        typer.echo(f"heedful-trainer: {error}", err=True)
        raise typer.Exit(_EXIT_USAGE) from None


def _run(loaded: Loaded, *, once: bool, run_id: str | None, watching: bool) -> None:
    # Imported here: torch takes seconds, and a wrong command line should not.
    from heedful_trainer.runs.triggers import Triggers
    from heedful_trainer.runs.worker import Worker, find_run
    from heedful_trainer.runs.yielding import lower_priority

    configure_logging(loaded.trainer.log_level)
    # Libraries warn about the future of their own calls; people who run a trainer cannot act on it.
    warnings.simplefilter("ignore")
    lower_priority(loaded.trainer.yielding.scheduling)
    try:
        with Store(loaded.place.store_url) as store:
            worker = Worker(store, loaded.place, loaded.trainer, Failpoints.from_environment())
            _on_signals(worker.end)
            if run_id is not None:
                done = worker.work_on(find_run(store, run_id).scope, run_id)
                if done.status != "finished":
                    raise typer.Exit(_EXIT_FAILED)
                return
            triggers = Triggers(store, loaded.trainer.watch, loaded.place.profile)
            worker.work(once=once, triggers=triggers if watching else None)
    except (NotFound, StoreError) as error:
        typer.echo(f"heedful-trainer: {error}", err=True)
        raise typer.Exit(_EXIT_FAILED) from None


def _on_signals(end: Callable[[], None]) -> None:
    def handle(number: int, _: object) -> None:
        end()
        # The run in hand goes on from its last checkpoint when it is leased again.
        raise SystemExit(128 + number)

    for number in _STOP_SIGNALS:
        signal.signal(number, handle)


def main() -> None:
    """Run the command line."""
    sys.exit(app())
