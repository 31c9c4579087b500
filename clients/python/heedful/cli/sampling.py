"""Options of the commands that generate, one for each field a person may want to set.

Owns names and help texts; values travel through the client unchanged and the server checks them.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from heedful.cli.output import ExitCode, fail


class PriorityChoice(StrEnum):
    """Choices of --priority."""

    INTERACTIVE = "interactive"
    BACKGROUND = "background"


_SAMPLING = "Sampling"
_REQUEST = "Request"

Model: TypeAlias = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Alias or policy version.", rich_help_panel=_REQUEST),
]
System: TypeAlias = Annotated[
    str | None, typer.Option("--system", help="System message.", rich_help_panel=_REQUEST)
]
Priority: TypeAlias = Annotated[
    PriorityChoice | None,
    typer.Option("--priority", help="How it is scheduled.", rich_help_panel=_REQUEST),
]
EndUser: TypeAlias = Annotated[
    str | None,
    typer.Option("--end-user", help="Your id of the end user.", rich_help_panel=_REQUEST),
]
Conversation: TypeAlias = Annotated[
    str | None,
    typer.Option("--conversation", help="Your id of the conversation.", rich_help_panel=_REQUEST),
]
Tags: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--tag", help="For summaries; may be repeated.", rich_help_panel=_REQUEST),
]
Temperature: TypeAlias = Annotated[
    float | None,
    typer.Option("--temperature", help="0 is greedy.", rich_help_panel=_SAMPLING),
]
TopP: TypeAlias = Annotated[
    float | None,
    typer.Option("--top-p", help="Probability mass to keep.", rich_help_panel=_SAMPLING),
]
TopK: TypeAlias = Annotated[
    int | None,
    typer.Option("--top-k", help="Tokens to keep; 0 keeps all.", rich_help_panel=_SAMPLING),
]
MinP: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--min-p", help="Share of the best token's probability to keep.", rich_help_panel=_SAMPLING
    ),
]
RepetitionPenalty: TypeAlias = Annotated[
    float | None,
    typer.Option("--repetition-penalty", help="Above 1: fewer repeats.", rich_help_panel=_SAMPLING),
]
PresencePenalty: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--presence-penalty", help="Off the logit of a used token.", rich_help_panel=_SAMPLING
    ),
]
FrequencyPenalty: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--frequency-penalty", help="Off the logit for each use.", rich_help_panel=_SAMPLING
    ),
]
Seed: TypeAlias = Annotated[
    int | None,
    typer.Option("--seed", help="Makes the answer repeatable.", rich_help_panel=_SAMPLING),
]
MinTokens: TypeAlias = Annotated[
    int | None,
    typer.Option("--min-tokens", help="Tokens before any stop.", rich_help_panel=_SAMPLING),
]
MaxTokens: TypeAlias = Annotated[
    int | None,
    typer.Option("--max-tokens", help="Most tokens of an answer.", rich_help_panel=_SAMPLING),
]
Stop: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--stop", help="The answer ends before this; may be repeated.", rich_help_panel=_SAMPLING
    ),
]
StopTokenIds: TypeAlias = Annotated[
    list[int] | None,
    typer.Option(
        "--stop-token-id",
        help="The answer ends at this token; may be repeated.",
        rich_help_panel=_SAMPLING,
    ),
]
IgnoreEos: TypeAlias = Annotated[
    bool,
    typer.Option("--ignore-eos", help="Go on past the end.", rich_help_panel=_SAMPLING),
]
JsonSchema: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--json-schema",
        metavar="FILE|JSON",
        help="The answer will satisfy this schema.",
        rich_help_panel=_SAMPLING,
    ),
]
Regex: TypeAlias = Annotated[
    str | None,
    typer.Option("--regex", help="The answer will match this.", rich_help_panel=_SAMPLING),
]


def schema_text(value: str | None) -> str | None:
    """Returns a schema given as JSON text or as the name of a file that holds it."""
    if value is None or value.lstrip().startswith("{"):
        return value
    path = Path(value)
    if not path.is_file():
        raise fail(f"--json-schema is neither JSON nor a file: {value}", ExitCode.USAGE)
    return path.read_text(encoding="utf-8")
