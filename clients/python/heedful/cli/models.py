"""`heedful models`: list, show, promote, roll back and export policy versions.

Owns those commands; `models_diff.py` owns the comparison of two versions and `models_view.py` how
all of it looks. Export is done by the trainer's program, on the machine that has the files.
"""

from pathlib import Path
from typing import Annotated

import typer

from heedful.cli import models_view as view
from heedful.cli.connection import (
    TARGET,
    TIMEOUT_S,
    TargetOption,
    TimeoutOption,
    WaitOption,
    project,
    ready_client,
)
from heedful.cli.models_diff import diff
from heedful.cli.options import JsonFlag
from heedful.cli.output import json_text, stderr, write, write_json
from heedful.cli.programs import TRAINER, needed_program, run_program
from heedful.errors import HeedfulError
from heedful.model_types import Models
from heedful.sync import Client

Reason = Annotated[str, typer.Option("--reason", help="Why; kept in the deployment log.")]


def build_models() -> typer.Typer:
    """Returns the group of commands."""
    group = typer.Typer(
        no_args_is_help=True, help="Compare, promote, roll back and export policy versions."
    )
    group.command("list")(list_versions)
    for command in (show, diff, promote, rollback, history, export):
        group.command()(command)
    return group


def list_versions(
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    as_json: JsonFlag = False,
) -> None:
    """List the versions of the project: alias, state, verdict, method, age and votes.

    'blind' counts votes on blind pairs: won, lost, neither.
    """
    with ready_client(target, timeout, wait, "feedback") as client:
        models = client.list_models()
        thumbs, blind = _thumbs(client), _blind_votes(client, models)
    if as_json:
        write(json_text(view.models_document(models, thumbs, blind)) + "\n")
    else:
        view.show_models(models, thumbs, blind)


def show(
    model: Annotated[str, typer.Argument(help="Version or alias.")] = "champion",
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show the card of a version: where it comes from, what it learned, what the gate found."""
    with ready_client(target, timeout, wait, "feedback") as client:
        card = client.get_model(model)
    if as_json:
        write_json(card)
    else:
        view.show_card(card)


def promote(
    version: Annotated[str, typer.Argument(help="Version or alias, for example v3.")],
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    reason: Reason = "",
    as_json: JsonFlag = False,
) -> None:
    """Make a version the champion, which answers by default.

    The old champion stays loaded, and `heedful models rollback` brings it back at once.
    """
    with ready_client(target, timeout, wait, "feedback") as client:
        # The server takes versions; an alias is a convenience of this command.
        aliases = {} if version == "base" else client.list_models().aliases
        done = client.promote(aliases.get(version, version), reason=reason)
    view.show_deployment(done, as_json)


def rollback(
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    reason: Reason = "",
    as_json: JsonFlag = False,
) -> None:
    """Make the champion before this one champion again; the one that is left counts as rejected."""
    with ready_client(target, timeout, wait, "feedback") as client:
        done = client.roll_back(reason=reason)
    view.show_deployment(done, as_json)


def history(
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON Lines.")] = False,
) -> None:
    """Show the deployment log: what was published, promoted and rolled back, by whom and why."""
    with ready_client(target, timeout, wait, "feedback") as client:
        for entry in client.deployments(follow=follow):
            view.show_history(entry, as_json)


def export(
    version: Annotated[str, typer.Argument(help="Version or alias.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="New directory to write.")
    ],
    format_: Annotated[
        view.ExportFormat,
        typer.Option("--format", help="An adapter for PEFT, or whole weights for transformers."),
    ] = view.ExportFormat.PEFT,
    home: Annotated[
        Path | None, typer.Option("--home", metavar="DIR", help="The server's home directory.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="The server's heedful.toml.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a version as files that PEFT or transformers load.

    Needs no running server, but the server's home directory and the trainer's program.
    """
    program = needed_program(TRAINER, "heedful models export")
    arguments = ["export", version, "--format", format_.value, "--output", str(output)]
    arguments += ["--project", project()]
    arguments += ["--home", str(home)] if home else []
    arguments += ["--config", str(config)] if config else []
    run_program(program, arguments)
    if as_json:
        write_json(view.Exported(version, format_.value, str(output.absolute())))
        return
    write(f"{output}\n")
    stderr().print(view.loading_hint(format_, output), style="dim", markup=False)


def _thumbs(client: Client) -> dict[str, tuple[int, int]]:
    """Returns thumbs up and down by version; nothing where the feedback may not be read."""
    try:
        summary = client.summarize_feedback()
    except HeedfulError:
        return {}
    return {item.key: (item.up, item.down) for item in summary.by_version}


def _blind_votes(client: Client, models: Models) -> dict[str, tuple[int, int, int]]:
    """Returns won, lost and neither for the versions that an alias points at."""
    found = {}
    for version in set(models.aliases.values()) - {"base"}:
        try:
            votes = client.get_model(version).evidence.get("canary") or {}
        except HeedfulError:
            continue
        counts = (votes.get("wins", 0), votes.get("losses", 0), votes.get("ties", 0))
        if any(counts):
            found[version] = counts
    return found
