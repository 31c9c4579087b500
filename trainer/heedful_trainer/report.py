"""The report of a run as a page of Markdown: what it learned from, how well, and what follows.

Owns the words, made from the run's evidence alone. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from heedful_store import Run

Json = Mapping[str, Any]

_UNUSED = ("critique", "label")


def report_of(run: Run) -> str:
    """Return the page."""
    lines = [f"# Refresh {run.run_id}", "", *_head(run)]
    for title, stage, body in (
        ("Data", "snapshot", _data),
        ("Reward model", "reward", _reward),
        ("Policy", "policy", _policy),
        ("Gate", "gate", _gate),
    ):
        evidence = run.evidence.get(stage)
        if evidence is not None:
            lines += ["", f"## {title}", "", *body(evidence)]
    return "\n".join([*lines, ""])


def _head(run: Run) -> Iterator[str]:
    yield f"- project: {run.scope.tenant}/{run.scope.project}, {run.kind}, method {run.method}"
    yield f"- dataset: {run.dataset_id}, log up to position {run.to_log_seq}"
    yield f"- starts from: {run.start_version or 'the base'}"
    yield f"- code: {run.code_version or 'unknown'}, seeds: {dict(run.seeds)}"


def _data(evidence: Json) -> Iterator[str]:
    parts = ", ".join(f"{name} {count}" for name, count in evidence["parts"].items())
    yield f"{evidence['events']} events were read; parts by {evidence['split_by']}: {parts}."
    yield ""
    yield from _table("kind", evidence["kinds"])
    if evidence["excluded"]:
        yield ""
        yield from _table("left out because", evidence["excluded"])
    if unused := [kind for kind in _UNUSED if evidence["kinds"].get(kind)]:
        yield ""
        yield f"Kept, but no method learns from: {', '.join(unused)}."


def _reward(evidence: Json) -> Iterator[str]:
    if "skipped" in evidence:
        yield f"Skipped: {evidence['skipped']}."
        return
    report = evidence["report"]
    accuracy, calibration = report["accuracy"], report["calibration"]
    low, high = accuracy["interval"]
    yield (
        f"- accuracy on held-out pairs: {_number(accuracy['value'])} "
        f"({_number(low)} to {_number(high)}, n = {accuracy['n']}); "
        f"by length alone: {_number(report['length_only_accuracy'])}"
    )
    without = report["accuracy_without_corrections"]
    yield f"- without corrections: {_number(without['value'])} (n = {without['n']})"
    correlation = _number(report["length_correlation"])
    yield f"- rank correlation with length, within a prompt: {correlation}"
    yield (
        f"- calibration error, debiased: {_number(calibration.get('debiased_ece_before'))} before "
        f"and {_number(calibration.get('debiased_ece_after'))} after the temperature "
        f"{_number(report['temperature'])} (n = {calibration['n']})"
    )
    yield f"- correlation between the errors of heads: {_number(report['head_error_correlation'])}"
    for name, part in {**report["by_source"], **report["by_length"]}.items():
        yield f"- accuracy, {name}: {_number(part['value'])} (n = {part['n']})"


def _policy(evidence: Json) -> Iterator[str]:
    report, training = evidence["report"], evidence["training"]
    low, high = report["accuracy_interval"]
    yield (
        f"- {evidence['method']}, {training['steps']} steps in {training['seconds']:.0f} s "
        f"({_number(training['tokens_per_second'])} tokens/s), ended by {training['ended']}"
    )
    yield (
        f"- accuracy of log π − log π_ref on held-out pairs: {_number(report['accuracy'])} "
        f"({_number(low)} to {_number(high)}, n = {report['pairs']}); "
        f"by length alone: {_number(report['length_only_accuracy'])}"
    )
    yield f"- correlation of that margin with length: {_number(report['length_correlation'])}"
    yield f"- divergence from the reference: {_number(report['kl_nats'])} nats for an answer"
    if training["history"]:
        last = training["history"][-1]
        yield (
            f"- loss for each token of liked answers: {_number(last.get('lm_loss'))}, "
            f"of the reference {_number(last.get('lm_loss_reference'))}"
        )


def _gate(evidence: Json) -> Iterator[str]:
    yield f"Verdict: {evidence['verdict']}"
    if "stages" not in evidence:
        yield ""
        yield str(evidence.get("detail", ""))
        return
    yield from ("", "| stage | check | verdict | value | n | detail |", "|---|---|---|---|---|---|")
    for stage in evidence["stages"]:
        for check in stage["checks"]:
            cells = [stage["name"], check["name"], check["verdict"], _number(check["value"])]
            cells += [check["n"], check["detail"]]
            yield f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _table(head: str, counts: Json) -> Iterator[str]:
    yield from (f"| {head} | events |", "|---|---|")
    for name, count in sorted(counts.items()):
        yield f"| {_cell(name)} | {count} |"


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3g}"


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").split())
