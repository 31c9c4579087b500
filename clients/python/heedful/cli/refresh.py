"""`heedful refresh`: turn feedback into a new version, watch it happen, pause or stop it.

Owns those commands and the order of a refresh: import, start, a trainer where none takes the run,
progress, verdict. `refresh_files.py` owns the files, `following.py` one run, `refresh_view.py` how
it looks.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from heedful.cli import following
from heedful.cli import refresh_view as view
from heedful.cli.connection import (
    TARGET,
    TIMEOUT_S,
    TargetOption,
    TimeoutOption,
    WaitOption,
    ready_client,
)
from heedful.cli.options import JsonFlag
from heedful.cli.output import ExitCode, fail, json_text, write
from heedful.cli.refresh_files import (
    COMPARISONS,
    DEMONSTRATIONS,
    Imported,
    import_all,
    require_whole,
)
from heedful.model_types import Refresh, RefreshAction
from heedful.sync import Client


class ModeChoice(StrEnum):
    """Choices of --mode."""

    AUTO = "auto"
    APPROVE = "approve"
    SHADOW = "shadow"


class PresetChoice(StrEnum):
    """Choices of --preset."""

    NONE = "none"
    INSTRUCTGPT = "instructgpt"


def _file(name: str, text: str) -> Any:
    return typer.Option(name, metavar="FILE", help=text, exists=True, dir_okay=False)


RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="Id of the run; default: the newest one.")
]
JsonLines = Annotated[bool, typer.Option("--json", help="Print JSON Lines, one for each change.")]


def build_refresh() -> typer.Typer:
    """Returns the group of commands; without one of them it starts a refresh."""
    group = typer.Typer(
        invoke_without_command=True,
        help="Learn from feedback: train a new version, judge it and publish it.",
    )
    group.callback()(start)
    group.command("list")(list_runs)
    for command in (watch, pause, resume, stop):
        group.command()(command)
    return group


def start(
    context: typer.Context,
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    method: Annotated[
        following.MethodChoice,
        typer.Option("--method", help="How to train; auto lets the data decide."),
    ] = following.MethodChoice.AUTO,
    preset: Annotated[
        PresetChoice | None,
        typer.Option("--preset", help="A paper's own settings; --set and --method win over it."),
    ] = None,
    import_: Annotated[
        Path | None, _file("--import", "First import preference data of any format.")
    ] = None,
    demonstrations: Annotated[
        Path | None,
        _file("--demonstrations", "First import demonstrations, answers that people wrote."),
    ] = None,
    comparisons: Annotated[
        Path | None, _file("--comparisons", "First import comparisons, pairs or rankings.")
    ] = None,
    prompts: Annotated[
        Path | None,
        _file("--prompts", "JSON Lines of more prompts for PPO; the trainer reads this path."),
    ] = None,
    mode: Annotated[
        ModeChoice | None,
        typer.Option("--mode", help="Who promotes: the gate (auto), you (approve), nobody."),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the trainer, repeatable."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Show progress until it is over.")
    ] = True,
    trainer: Annotated[
        bool, typer.Option("--trainer/--no-trainer", help="Start a trainer if none takes the run.")
    ] = True,
    home: Annotated[
        Path | None, typer.Option("--home", metavar="DIR", help="Home directory, for the trainer.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="heedful.toml, for the trainer.")
    ] = None,
    as_json: JsonLines = False,
) -> None:
    """Learn from the feedback of the project: train a new version, judge it and publish it.

    Files are read to their ends first; a bad line in one of them keeps all from being imported.

    Ctrl-C stops watching, not the run; 'heedful refresh watch' comes back to it.
    """
    if context.invoked_subcommand is not None:
        return
    overrides = settings(setting or (), mode, preset, prompts)
    _require_ppo(prompts, method, overrides)
    imported = _imported(import_, demonstrations, comparisons)
    require_whole(imported, prompts)
    with ready_client(target, timeout, wait) as client:
        import_all(client, imported)
        run = following.begin(client, method, overrides)
        worker = None
        if trainer:
            worker = following.attend(client, run, home, config)
        if not follow:
            _leave(client.get_refresh(run.run_id), as_json)
            return
        _end(following.watch_run(client, run.run_id, as_json, worker), as_json)


def list_runs(
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, max=100, help="At most so many.")
    ] = 20,
    as_json: JsonFlag = False,
) -> None:
    """List the runs of the project, newest first."""
    with ready_client(target, timeout, wait, "feedback") as client:
        runs = client.list_refreshes(limit=limit)
    if as_json:
        write(json_text([view.document(run) for run in runs]) + "\n")
    else:
        view.show_runs(runs)


def watch(
    run: RunArgument = "",
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    as_json: JsonLines = False,
) -> None:
    """Show the progress of a run until it is over; ends with code 1 where it failed."""
    with ready_client(target, timeout, wait, "feedback") as client:
        _end(following.watch_run(client, _newest(client, run), as_json), as_json)


def pause(
    run: RunArgument = "",
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a run save its work and wait."""
    _control("pause", run, target, timeout, wait, as_json)


def resume(
    run: RunArgument = "",
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Let a paused run go on."""
    _control("resume", run, target, timeout, wait, as_json)


def stop(
    run: RunArgument = "",
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    as_json: JsonFlag = False,
) -> None:
    """End a run for good; its last checkpoint is kept."""
    _control("stop", run, target, timeout, wait, as_json)


def settings(
    given: list[str] | tuple[()],
    mode: ModeChoice | None,
    preset: PresetChoice | None = None,
    prompts: Path | None = None,
) -> dict[str, str]:
    """Returns the trainer's settings by dotted path.

    Raises:
        typer.BadParameter: one has no value.
    """
    found: dict[str, str] = {}
    if preset is not None:
        found["preset"] = preset.value
    if prompts is not None:
        # The trainer works in another directory, but on the same files.
        found["ppo.prompts"] = str(prompts.resolve())
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise typer.BadParameter(f"--set takes KEY=VALUE, not {text}")
        found[key.strip()] = value.strip()
    if mode is not None:
        found["gate.mode"] = mode.value
    return found


def _require_ppo(
    prompts: Path | None, method: following.MethodChoice, overrides: dict[str, str]
) -> None:
    if prompts is None:
        return
    by_preset = "ppo_ptx" if overrides.get("preset") == "instructgpt" else "auto"
    chosen = method.value if method.value != "auto" else overrides.get("method", by_preset)
    if chosen != "ppo_ptx":
        raise typer.BadParameter(
            "only ppo_ptx asks prompts: add --method ppo_ptx or --preset instructgpt",
            param_hint="--prompts",
        )


def _imported(
    anything: Path | None, demonstrations: Path | None, comparisons: Path | None
) -> list[Imported]:
    found = [] if anything is None else [Imported(anything)]
    found += [] if demonstrations is None else [Imported(demonstrations, DEMONSTRATIONS)]
    return found + ([] if comparisons is None else [Imported(comparisons, COMPARISONS)])


def _leave(run: Refresh, as_json: bool) -> None:
    if as_json:
        write(json_text(view.document(run), indent=None) + "\n")
    else:
        view.show_end(run)


def _end(run: Refresh, as_json: bool) -> None:
    if not as_json:
        view.show_end(run)
    if run.status == "failed":
        raise typer.Exit(int(ExitCode.FAILED))


def _newest(client: Client, run: str) -> str:
    if run:
        return run
    runs = client.list_refreshes(limit=1)
    if not runs:
        raise fail("there has been no refresh yet", ExitCode.FAILED, "Start one: heedful refresh")
    return runs[0].run_id


def _control(
    action: RefreshAction,
    run: str,
    target: str,
    timeout_s: float,
    wait_s: float | None,
    as_json: bool,
) -> None:
    with ready_client(target, timeout_s, wait_s, "feedback") as client:
        refresh = client.control_refresh(_newest(client, run), action)
    if as_json:
        write(json_text(view.document(refresh)) + "\n")
    else:
        write(f"{view.after_control(action, refresh)}\n")
