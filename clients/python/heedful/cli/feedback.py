"""`heedful feedback`: record, read and withdraw judgements, and answer open questions.

Owns those commands; `feedback_options.py` owns what their options say, `feedback_view.py` how
results look, `feedback_files.py` export and import.
"""

import dataclasses
from itertools import islice
from typing import Annotated, assert_never

import typer

from heedful.cli import feedback_options as options
from heedful.cli import voting
from heedful.cli.connection import (
    TARGET,
    TIMEOUT_S,
    TargetOption,
    TimeoutOption,
    WaitOption,
    ready_client,
)
from heedful.cli.feedback_files import export_log, import_file
from heedful.cli.feedback_view import (
    record_document,
    show_receipt,
    show_record,
    show_records,
    show_summary,
)
from heedful.cli.output import json_text, stderr, write, write_json
from heedful.feedback_types import (
    Comparison,
    Correction,
    Critique,
    FeedbackOptions,
    Judgement,
    Label,
    LabelOptions,
    Ranking,
    Rating,
    Receipt,
    Thumb,
)
from heedful.sync import Client

_MAX_PAGE = 1000


def build_feedback() -> typer.Typer:
    """Returns the group of commands."""
    group = typer.Typer(
        no_args_is_help=True,
        help="Record, read, export and import what people think of completions.",
    )
    group.command()(add)
    group.command("list")(list_log)
    for command in (get, retract, next_question, summary):
        group.command("next" if command is next_question else command.__name__)(command)
    group.command("export")(export_log)
    group.command("import")(import_file)
    return group


def add(
    completion: Annotated[
        str, typer.Argument(help="Id of the completion that is judged (not for --rank).")
    ] = "",
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    up: options.Up = None,
    reason: options.Reasons = None,
    grade: options.Grade = None,
    correction: options.CorrectionText = None,
    critique: options.CritiqueText = None,
    aspect: options.Aspects = None,
    flag: options.Flags = None,
    rank: options.Ranks = None,
    all_bad: options.AllBad = False,
    comparison: Annotated[
        str, typer.Option("--comparison", help="Id of the comparison that --rank answers.")
    ] = "",
    token: options.Token = None,
    rater: Annotated[str, typer.Option("--rater", help="Your id of who judges.")] = "",
    rater_kind: Annotated[
        options.RaterKindChoice | None, typer.Option("--rater-kind", help="In which role.")
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option("--tag", help="For summaries; may be repeated.")
    ] = None,
    no_train: Annotated[bool, typer.Option("--no-train", help="Never train on it.")] = False,
    replaces: Annotated[
        str, typer.Option("--replaces", help="Id of the judgement that this one replaces.")
    ] = "",
    feedback_id: Annotated[
        str, typer.Option("--id", help="UUIDv7 that makes repeating this safe; default: a new one.")
    ] = "",
    as_json: options.JsonFlag = False,
) -> None:
    """Record one judgement of a completion, or a ranking of several."""
    said = options.judgement(
        up=up,
        reasons=reason,
        grade=grade,
        correction=correction,
        critique=critique,
        aspects=aspect,
        flags=flag,
        ranks=rank,
        all_bad=all_bad,
    )
    is_ranking = isinstance(said, Ranking)
    if is_ranking == bool(completion) or (comparison and not is_ranking):
        raise typer.BadParameter("name one completion, or rank several with --rank")
    others = FeedbackOptions(
        token=token,
        rater_id=rater,
        rater_kind=rater_kind.value if rater_kind else None,
        tags=tag,
        train=False if no_train else None,
        supersedes=replaces,
        feedback_id=feedback_id,
    )
    with ready_client(target, timeout, wait, "feedback") as client:
        receipt = _record(client, said, completion, comparison, others)
    show_receipt(receipt, as_json)


def list_log(
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    completion: options.Completion = None,
    comparison: options.Comparison = None,
    rater: options.Rater = None,
    version: options.Version = None,
    tag: options.Tag = None,
    kind: options.Kinds = None,
    current: options.Current = False,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=0, help="At most so many; 0 for all.")
    ] = 100,
    as_json: options.JsonFlag = False,
) -> None:
    """List judgements in the order of the log."""
    chosen = options.criteria(completion, comparison, rater, version, tag, kind, current)
    with ready_client(target, timeout, wait, "feedback") as client:
        found = client.list_feedback(page_size=min(limit, _MAX_PAGE) or _MAX_PAGE, **chosen)
        records = list(islice(found, limit or None))
    if as_json:
        write(json_text([record_document(record) for record in records]) + "\n")
        return
    show_records(records)
    if limit and len(records) == limit:
        stderr().print(f"the first {limit}; --limit 0 shows all", style="dim")


def get(
    feedback_id: Annotated[str, typer.Argument(help="Id of the judgement.")],
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    token: options.Token = None,
    as_json: options.JsonFlag = False,
) -> None:
    """Show a judgement and what became of it."""
    with ready_client(target, timeout, wait, "feedback") as client:
        record = client.feedback(feedback_id, token=token)
    if as_json:
        write(json_text(record_document(record)) + "\n")
    else:
        show_record(record)


def retract(
    feedback_id: Annotated[str, typer.Argument(help="Id of the judgement.")],
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    token: options.Token = None,
    as_json: options.JsonFlag = False,
) -> None:
    """Take a judgement back; the log keeps that there was one."""
    with ready_client(target, timeout, wait, "feedback") as client:
        receipt = client.retract(feedback_id, token=token)
    show_receipt(receipt, as_json)


def next_question(
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    end_user: Annotated[
        str | None, typer.Option("--end-user", help="Only questions put to this end user.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Go on until none is open or one is skipped.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the question as JSON and ask nothing.")
    ] = False,
) -> None:
    """Answer an open comparison: two or more blind answers, one key or line a vote."""
    with ready_client(target, timeout, wait, "feedback") as client:
        question = client.next_question(end_user=end_user)
        if as_json:
            write_json(question)
            return
        while question.comparison is not None:
            voted = _answer(client, question.comparison, question.open_count)
            if not (every and voted):
                return
            question = client.next_question(end_user=end_user)
    stderr().print("no question is open", style="dim")


def summary(
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    as_json: options.JsonFlag = False,
) -> None:
    """Show approval by version, tag and week, reasons, worst prompts and agreement."""
    with ready_client(target, timeout, wait, "feedback") as client:
        found = client.summarize_feedback()
    if as_json:
        write_json(found)
    else:
        show_summary(found)


def _record(
    client: Client, said: Judgement, completion: str, comparison: str, others: FeedbackOptions
) -> Receipt:
    match said:
        case Thumb(up, reasons):
            return client.rate(completion, up, reasons, **others)
        case Rating(value):
            return client.grade(completion, value, **others)
        case Correction(text):
            return client.correct(completion, text, **others)
        case Critique(text, aspects):
            return client.critique(completion, text, aspects, **others)
        case Label():
            flags = LabelOptions(**dataclasses.asdict(said))  # type: ignore[typeddict-item]
            return client.label(completion, **{**others, **flags})
        case Ranking(groups, all_bad):
            shown = Comparison(comparison, ()) if comparison else ()
            return client.rank(shown, groups, all_bad=all_bad, **others)
        case _:
            assert_never(said)


def _answer(client: Client, comparison: Comparison, open_count: int) -> bool:
    stderr().print(f"{open_count} open", style="dim")
    for message in comparison.prompt_messages:
        write(f"{message.role}: {message.content}\n")
    if not comparison.prompt_messages:
        write(f"{comparison.prompt_text}\n")
    voting.show(comparison)
    vote = voting.ask(len(comparison.candidates))
    if vote is None:
        return False
    voting.record(client, comparison, vote)
    return True
