"""How judgements look: one line in a table, all of it on a page, or as JSON without secrets.

Owns those forms; knows neither the server nor the commands.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table

from heedful.cli.output import json_text, printable, write
from heedful.feedback_types import (
    Approval,
    Correction,
    Critique,
    Event,
    ExportedFeedback,
    FeedbackRecord,
    FeedbackSummary,
    Judgement,
    Label,
    LoggedCompletion,
    Ranking,
    Rating,
    Receipt,
    Thumb,
)

Document: TypeAlias = dict[str, Any]

_SHOWN_CHARACTERS = 48
_SHOWN_OF_ID = 8
_TOKENS = ("token", "completion_token", "comparison_token")


def receipt_document(receipt: Receipt) -> Document:
    """Returns a receipt for JSON, without its token."""
    return _without_tokens(dataclasses.asdict(receipt))


def record_document(record: FeedbackRecord) -> Document:
    """Returns a judgement for JSON; `kind` says which fields `judgement` has."""
    document = dataclasses.asdict(record)
    document["event"] = {"kind": record.event.kind, **_without_tokens(document["event"])}
    document["receipt"] = receipt_document(record.receipt)
    return document


def exported_document(exported: ExportedFeedback, with_completions: bool) -> Document:
    """Returns one event of an export for JSON."""
    document = record_document(exported.record)
    if with_completions:
        document["completions"] = [_logged_document(item) for item in exported.completions]
    return document


def said(event: Event) -> str:
    """Returns in a few words what was said; nothing where it was erased."""
    return _in_words(event.judgement) if event.judgement is not None else ""


def show_receipt(receipt: Receipt, as_json: bool) -> None:
    """Shows that a judgement is durable."""
    if as_json:
        write(json_text(receipt_document(receipt)) + "\n")
    else:
        write(f"{receipt.feedback_id}  {receipt.status}, position {receipt.seq}\n")


def show_records(records: Sequence[FeedbackRecord]) -> None:
    """Shows judgements as a table, in the order of the log."""
    table = Table(box=None, pad_edge=False)
    for heading in ("seq", "id", "said", "about", "by", "version", "fate"):
        table.add_column(heading, no_wrap=heading in ("seq", "id"), overflow="fold")
    for record in records:
        event, fate = record.event, record.fate
        cells = (
            str(record.receipt.seq),
            event.feedback_id or record.receipt.feedback_id,
            f"takes back {record.retracts_id}" if record.retracts_id else said(event),
            event.completion_id or event.comparison_id,
            event.rater_id,
            record.policy_version,
            f"{fate.kind}: {fate.reason}" if fate.reason else str(fate.kind),
        )
        table.add_row(*map(printable, cells))
    # Texts of raters are shown, so nothing in them may pass for markup.
    Console(highlight=False, markup=False).print(table)


def show_record(record: FeedbackRecord) -> None:
    """Shows one judgement and what became of it."""
    event, fate, receipt = record.event, record.fate, record.receipt
    rows = {
        "id": event.feedback_id or receipt.feedback_id,
        "said": _in_words(event.judgement, None) if event.judgement else "",
        "takes back": record.retracts_id,
        "replaces": event.supersedes_id,
        "completion": event.completion_id,
        "comparison": event.comparison_id,
        "version": record.policy_version,
        "by": " ".join(
            filter(None, (event.rater_id, event.rater_kind and f"({event.rater_kind})"))
        ),
        "tags": ", ".join(event.tags),
        "recorded": receipt.server_time.isoformat(" ", "seconds") if receipt.server_time else "",
        "position": str(receipt.seq),
        "current": "yes" if record.current else "no",
        "fate": str(fate.kind),
        "because": fate.reason,
        "datasets": ", ".join(fate.dataset_ids),
        "trained": ", ".join(fate.trained_versions),
        "promoted": fate.promoted.isoformat(" ", "seconds") if fate.promoted else "",
    }
    for name, value in rows.items():
        if value:
            write(f"{name:<12}{value}\n")


def show_summary(summary: FeedbackSummary) -> None:
    """Shows the log for people."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in summary.events_by_kind.items())
    write(f"judgements  {kinds or 'none yet'}\n")
    write(f"backlog     {summary.backlog} not trained on yet\n")
    if summary.rater_agreement is not None:
        share = f"{summary.rater_agreement:.0%} of {summary.rater_agreement_pairs} pairs"
        write(f"agreement   {share}\n")
    for title, approvals in (
        ("version", summary.by_version),
        ("tag", summary.by_tag),
        ("week", summary.by_week),
    ):
        _show_approvals(title, approvals)
    _show_counts("reasons of thumbs down", [(r.reason, str(r.count)) for r in summary.top_reasons])
    worst = [(item.prompt, f"{item.down} down, {item.up} up") for item in summary.worst_prompts]
    _show_counts("worst prompts", worst)


def _show_approvals(title: str, approvals: Sequence[Approval]) -> None:
    if not approvals:
        return
    table = Table(box=None, pad_edge=False, title_justify="left")
    for heading in (title, "up", "down", "approval", "95 % interval"):
        table.add_column(heading, justify="left" if heading == title else "right")
    for item in approvals:
        interval = f"{item.low:.0%} to {item.high:.0%}"
        table.add_row(
            printable(item.key), str(item.up), str(item.down), f"{item.share:.0%}", interval
        )
    write("\n")
    Console(highlight=False, markup=False).print(table)


def _show_counts(title: str, rows: Sequence[tuple[str, str]]) -> None:
    if rows:
        write(f"\n{title}\n")
    for name, count in rows:
        write(f"  {count:<14}{_short(name, 60)}\n")


def _in_words(judgement: Judgement, limit: int | None = _SHOWN_CHARACTERS) -> str:
    match judgement:
        case Thumb(up, reasons):
            return ": ".join(filter(None, ("up" if up else "down", ", ".join(reasons))))
        case Rating(value):
            return f"grade {value} of 7"
        case Ranking(groups, all_bad):
            # The ends of ids differ most; whole ones would fill the table.
            shown = slice(None) if limit is None else slice(-_SHOWN_OF_ID, None)
            order = " > ".join(" = ".join(name[shown] for name in group) for group in groups)
            return f"none is good: {order}" if all_bad else order
        case Correction(text):
            return f"should be: {_short(text, limit)}"
        case Critique(text, aspects):
            about = f" ({', '.join(aspects)})" if aspects else ""
            return f"critique{about}: {_short(text, limit)}"
        case Label():
            flags = dataclasses.asdict(judgement).items()
            judged = (
                f"{name}={'yes' if flag else 'no'}" for name, flag in flags if flag is not None
            )
            return ", ".join(judged)


def _short(text: str, limit: int | None) -> str:
    if limit is None:
        return text
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _logged_document(logged: LoggedCompletion) -> Document:
    document = dataclasses.asdict(logged)
    document["completion"] = _without_tokens(document["completion"])
    return document


def _without_tokens(document: Document) -> Document:
    return {name: value for name, value in document.items() if name not in _TOKENS}
