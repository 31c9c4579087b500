"""The card of a version: where it comes from, what it learned from, what the gate found.

Owns the words. Pure functions of what the registry holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

from heedful_store import PolicyVersion, Run

from heedful_server.deployment.evidence import Json

_MOST_ROWS = 64


def model_card(policy: PolicyVersion, run: Run | None, report: Json) -> str:
    """Return the card as Markdown."""
    lines = [f"# {policy.version}", "", *_origin(policy)]
    if policy.tainted_at_ms is not None:
        lines += ["", f"**Learned from data that was erased on {_day(policy.tainted_at_ms)}.**"]
    if run is not None:
        lines += ["", "## Run", "", *_run(run)]
    counts = {name: value for name, value in policy.card.items() if name != "gate"}
    if counts:
        lines += ["", "## Data", "", *_table(counts)]
    lines += ["", "## Gate", "", *_gate(policy, report)]
    return "\n".join([*lines, ""])


def base_card(name: str) -> str:
    """Return the card of the base."""
    return f"# base\n\n{name} as it came: no feedback is in it.\n"


def _origin(policy: PolicyVersion) -> Iterator[str]:
    yield f"- role: {policy.role}, {policy.state}"
    yield f"- base: {policy.base_id}"
    yield f"- started from: {policy.parent_version or 'the base'}"
    yield f"- method: {policy.method or 'not said'}"
    yield f"- published: {_day(policy.created_at_ms)}"
    yield f"- content: {policy.content_hash}"


def _run(run: Run) -> Iterator[str]:
    yield f"- run: {run.run_id} ({run.kind}), {run.status}"
    if run.dataset_id:
        yield f"- dataset: {run.dataset_id}, log positions {run.from_log_seq} to {run.to_log_seq}"
    if run.code_version:
        yield f"- code: {run.code_version}"
    for name, value in sorted(run.seeds.items()):
        yield f"- seed {name}: {value}"


def _gate(policy: PolicyVersion, report: Json) -> Iterator[str]:
    yield f"Verdict: {policy.verdict or 'not judged'}"
    stages = report.get("stages")
    if not isinstance(stages, Sequence):
        return
    yield from ("", "| stage | check | verdict | value | n | detail |", "|---|---|---|---|---|---|")
    for stage in stages:
        for check in stage.get("checks", ()):
            keys = ("name", "verdict", "value", "n", "detail")
            cells = [_cell(stage.get("name")), *(_cell(check.get(key)) for key in keys)]
            yield f"| {' | '.join(cells)} |"


def _table(values: Mapping[str, object]) -> Iterator[str]:
    yield from ("| what | value |", "|---|---|")
    for name, value in list(_leaves(values))[:_MOST_ROWS]:
        yield f"| {_cell(name)} | {_cell(value)} |"


def _leaves(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in sorted(values.items()):
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _cell(value: object) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    # What people wrote may stand in here, and must not break out of its cell.
    return " ".join(text.replace("|", "\\|").split())


def _day(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
