"""`heedful gate`: why a version may or may not be promoted, and blind votes that help to decide.

Owns those commands; `gate_view.py` owns how evidence looks, `blind_pairs.py` the votes.
"""

from collections.abc import Iterable
from typing import Annotated

import typer

from heedful.cli import blind_pairs, gate_view, prompts, sampling
from heedful.cli.connection import (
    TARGET,
    TIMEOUT_S,
    TargetOption,
    TimeoutOption,
    WaitOption,
    ready_client,
)
from heedful.cli.options import JsonFlag
from heedful.cli.output import ExitCode, fail, json_text, stderr, write
from heedful.sync import Client

DEFAULT_VOTES = 8
DEFAULT_TEMPERATURE = 0.7
DEFAULT_MAX_TOKENS = 200


def build_gate() -> typer.Typer:
    """Returns the group of commands."""
    group = typer.Typer(
        no_args_is_help=True, help="See why a version may be promoted or not, and help to decide."
    )
    group.command()(explain)
    group.command()(vote)
    return group


def explain(
    version: Annotated[str, typer.Argument(help="Version or alias.")] = "challenger",
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Show checks that passed as fully as the others.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show what the gate found about a version: each check with value, limit, n and interval."""
    with ready_client(target, timeout, wait, "feedback") as client:
        card = client.get_model(version)
    report = gate_view.report_of(card)
    if as_json:
        write(json_text(report) + "\n")
    elif report is None:
        write(f"{card.model.version} was never judged by the gate\n")
        if told := gate_view.votes(card):
            write(f"{told}\n")
    else:
        gate_view.explain(card, report, everything=everything)


def vote(
    count: Annotated[
        int, typer.Argument(metavar="[N]", min=1, help="How many pairs.")
    ] = DEFAULT_VOTES,
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    file: prompts.File = None,
    from_log: prompts.FromLog = None,
    temperature: sampling.Temperature = DEFAULT_TEMPERATURE,
    max_tokens: sampling.MaxTokens = DEFAULT_MAX_TOKENS,
    as_json: JsonFlag = False,
) -> None:
    """Vote on blind pairs of champion and challenger, one key a pair.

    Without --prompts or --from-log it asks for a prompt before each pair. Which version wrote which
    answer is said at the end, so that one pair does not give away the next.
    """
    with ready_client(target, timeout, wait) as client:
        challenger = _challenger(client)
        asked: Iterable[prompts.Asked] = prompts.collect(client, (), file, from_log)[:count]
        if file is None and from_log is None:
            asked = blind_pairs.typed_prompts(count)
        how = blind_pairs.options(None, temperature, max_tokens)
        tally = blind_pairs.vote(client, asked, how)
    blind_pairs.show_tally(tally, as_json)
    if tally.votes and not as_json:
        stderr().print(f"  heedful models promote {challenger}", style="bold", markup=False)


def _challenger(client: Client) -> str:
    models = client.list_models()
    if "challenger" not in models.aliases:
        hint = "A refresh makes one: heedful refresh"
        raise fail("there is no challenger to vote on", ExitCode.FAILED, hint)
    return models.aliases["challenger"]
