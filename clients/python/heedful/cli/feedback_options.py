"""Options of `heedful feedback`, and how those that judge become one judgement.

Owns names, help texts and that conversion; values travel through the client unchanged and the
server checks them.
"""

import dataclasses
import sys
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, TypeAlias

import typer

from heedful.feedback_types import (
    Correction,
    Critique,
    FeedbackFilter,
    FeedbackKind,
    Judgement,
    Label,
    Ranking,
    Rating,
    Thumb,
)

FLAGS = tuple(field.name for field in dataclasses.fields(Label))


class KindChoice(StrEnum):
    """Choices of --kind."""

    THUMB = "thumb"
    RATING = "rating"
    RANKING = "ranking"
    CORRECTION = "correction"
    CRITIQUE = "critique"
    LABEL = "label"


class RaterKindChoice(StrEnum):
    """Choices of --rater-kind."""

    END_USER = "end_user"
    EXPERT = "expert"
    OPERATOR = "operator"
    JUDGE = "judge"


_JUDGEMENT = "Judgement (one of them)"
_FILTER = "Which"

JsonFlag: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Token: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--token",
        envvar="HEEDFUL_TOKEN",
        help="Token that came with the completion or comparison; not needed with the scope "
        "feedback:any. Others on the machine see it here, but not in HEEDFUL_TOKEN.",
    ),
]
Up: TypeAlias = Annotated[
    bool | None, typer.Option("--up/--down", help="A thumb.", rich_help_panel=_JUDGEMENT)
]
Reasons: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--reason", help="Why, for a thumb; may be repeated."),
]
Grade: TypeAlias = Annotated[
    int | None,
    typer.Option("--grade", help="1 (worst) to 7 (best).", rich_help_panel=_JUDGEMENT),
]
CorrectionText: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--correction",
        metavar="TEXT",
        help="What it should have been; '-' reads standard input.",
        rich_help_panel=_JUDGEMENT,
    ),
]
CritiqueText: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--critique",
        metavar="TEXT",
        help="What is wrong or right; '-' reads standard input.",
        rich_help_panel=_JUDGEMENT,
    ),
]
Aspects: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--aspect", help="What a critique is about; may be repeated."),
]
Flags: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--flag",
        metavar="NAME[=yes|no]",
        help=f"A metadata flag; may be repeated. Names: {', '.join(FLAGS)}.",
        rich_help_panel=_JUDGEMENT,
    ),
]
Ranks: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--rank",
        metavar="ID[=ID]",
        help="The next best completion, or several that are tied; repeat it, best first.",
        rich_help_panel=_JUDGEMENT,
    ),
]
AllBad: TypeAlias = Annotated[
    bool, typer.Option("--all-bad", help="None of those ranked is acceptable.")
]
Completion: TypeAlias = Annotated[
    str | None, typer.Option("--completion", help="On this completion.", rich_help_panel=_FILTER)
]
Comparison: TypeAlias = Annotated[
    str | None, typer.Option("--comparison", help="On this comparison.", rich_help_panel=_FILTER)
]
Rater: TypeAlias = Annotated[
    str | None, typer.Option("--rater", help="By this person.", rich_help_panel=_FILTER)
]
Version: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--version", help="On completions of this policy version.", rich_help_panel=_FILTER
    ),
]
Tag: TypeAlias = Annotated[
    str | None, typer.Option("--tag", help="With this tag.", rich_help_panel=_FILTER)
]
Kinds: TypeAlias = Annotated[
    list[KindChoice] | None,
    typer.Option("--kind", help="Of this kind; may be repeated.", rich_help_panel=_FILTER),
]
Current: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--current", help="Leave out what was replaced or taken back.", rich_help_panel=_FILTER
    ),
]


def criteria(
    completion: str | None,
    comparison: str | None,
    rater: str | None,
    version: str | None,
    tag: str | None,
    kinds: Sequence[KindChoice] | None,
    current: bool,
) -> FeedbackFilter:
    """Returns the filter that the options of `list` and `export` say."""
    names: list[FeedbackKind] = [kind.value for kind in kinds or ()]
    return FeedbackFilter(
        completion_id=completion,
        comparison_id=comparison,
        rater_id=rater,
        policy_version=version,
        tag=tag,
        kinds=names,
        current_only=current,
    )


def judgement(
    *,
    up: bool | None,
    reasons: Sequence[str] | None,
    grade: int | None,
    correction: str | None,
    critique: str | None,
    aspects: Sequence[str] | None,
    flags: Sequence[str] | None,
    ranks: Sequence[str] | None,
    all_bad: bool,
) -> Judgement:
    """Returns the one judgement that the options say.

    Raises:
        typer.BadParameter: they say none, or several.
    """
    said: list[Judgement] = []
    if up is not None:
        said.append(Thumb(up, tuple(reasons or ())))
    if grade is not None:
        said.append(Rating(grade))
    if correction is not None:
        said.append(Correction(_text(correction)))
    if critique is not None:
        said.append(Critique(_text(critique), tuple(aspects or ())))
    if flags:
        said.append(Label(**dict(_flag(text) for text in flags)))
    if ranks:
        said.append(Ranking(tuple(tuple(item.split("=")) for item in ranks), all_bad))
    if len(said) != 1:
        raise typer.BadParameter(
            "say one of --up, --down, --grade, --correction, --critique, --flag, --rank"
        )
    return said[0]


def _text(given: str) -> str:
    return sys.stdin.read() if given == "-" else given


def _flag(text: str) -> tuple[str, bool]:
    name, _, value = text.partition("=")
    known = name.replace("-", "_")
    if known not in FLAGS or value not in ("", "yes", "no"):
        raise typer.BadParameter(f"--flag takes NAME, NAME=yes or NAME=no, not {text}")
    return known, value != "no"
