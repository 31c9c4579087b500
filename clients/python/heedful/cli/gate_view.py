"""How the gate's evidence looks: a table of checks for each stage, and sentences.

Owns those forms. It takes the report as plain JSON, so that a field which a newer trainer adds is
left out rather than an error. Knows neither server nor trainer.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table

from heedful.cli.output import printable, write
from heedful.model_types import ModelCard

Json: TypeAlias = Mapping[str, Any]

_TITLES = {
    "integrity": "1 · integrity: is it whole, and does it end its answers",
    "offline": "2 · offline: on prompts and raters it never learned from",
    "canary": "3 · canary: blind votes between it and the champion",
    "promotion": "4 · promotion: who may decide",
}
_STYLES = {"pass": "green", "fail": "bold red", "inconclusive": "yellow", "skipped": "dim"}
_ACTIONS = {
    "promote": "It may be promoted without asking.",
    "ask": "A person may promote it; that is recorded as approved, not as proven.",
    "keep": "It stays where it is.",
    "reject": "It is rejected.",
}


def report_of(card: ModelCard) -> Json | None:
    """Returns the gate's report among a version's evidence, None where it was never judged."""
    evidence = card.evidence
    for place in (evidence, evidence.get("gate"), evidence.get("report")):
        if isinstance(place, Mapping):
            if isinstance(place.get("stages"), list):
                return place
            inner = place.get("report")
            if isinstance(inner, Mapping) and isinstance(inner.get("stages"), list):
                return inner
    return None


def explain(card: ModelCard, report: Json, *, everything: bool) -> None:
    """Shows what the gate found, stage by stage, and what follows from it.

    Checks that passed are only named, unless everything is asked for.
    """
    write(printable(summary(card, report)) + "\n")
    if told := votes(card):
        write(printable(told) + "\n")
    console = Console(highlight=False, markup=False)
    for stage in _mappings(report.get("stages")):
        name = str(stage.get("name", ""))
        verdict = str(stage.get("verdict", ""))
        console.print()
        console.print(f"{_TITLES.get(name, name)}: {verdict}", style=_STYLES.get(verdict))
        if detail := str(stage.get("detail") or ""):
            console.print(printable(detail))
        checks = _mappings(stage.get("checks"))
        passed = [] if everything else [c for c in checks if c.get("verdict") == "pass"]
        if shown := [check for check in checks if check not in passed]:
            console.print(_table(shown))
        if passed:
            names = ", ".join(printable(str(check.get("name", ""))) for check in passed)
            console.print(f"passed: {names}", style="dim")


def votes(card: ModelCard) -> str:
    """Returns how blind votes went so far as a sentence; empty where nobody voted."""
    found = card.evidence.get("canary")
    if not isinstance(found, Mapping) or not isinstance(found.get("wins"), int):
        return ""
    wins, losses, ties = (int(found.get(name) or 0) for name in ("wins", "losses", "ties"))
    if not wins + losses + ties:
        return ""
    text = (
        f"Blind votes so far: {wins} for it, {losses} for {found.get('other')}, {ties} for neither"
    )
    if interval := _interval(found.get("interval")):
        text += f"; share {_number(found.get('win_rate'))}, 95 % interval {interval}"
    return f"{text}. These are counts, not a proof."


def summary(card: ModelCard, report: Json) -> str:
    """Returns in a few sentences what the gate found and what may be done now."""
    version, verdict = card.model.version, str(report.get("verdict", ""))
    failed = _named(report, "fail")
    open_ = _named(report, "inconclusive")
    match verdict:
        case "pass":
            text = f"{version} passed the gate."
        case "fail":
            text = f"{version} failed the gate: {', '.join(failed) or 'see below'}."
        case "inconclusive":
            what = ", ".join(open_) or "too little to go by"
            text = f"The gate could not tell about {version}: {what}."
        case _:
            text = f"The gate on {version}: {verdict or 'not asked'}."
    if report.get("text"):
        text += f" {report['text']}"
    elif (action := str(report.get("action", ""))) in _ACTIONS:
        text += f" {_ACTIONS[action]}"
    if verdict == "fail" and report.get("overridable") is False:
        text += " A failed check of integrity or safety cannot be overridden."
    return text


def _named(report: Json, verdict: str) -> list[str]:
    return [
        str(check.get("name", ""))
        for stage in _mappings(report.get("stages"))
        for check in _mappings(stage.get("checks"))
        if check.get("verdict") == verdict
    ]


def _table(checks: Sequence[Json]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("check", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for heading in ("value", "limit", "n", "interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for check in checks:
        verdict = str(check.get("verdict", ""))
        table.add_row(
            printable(str(check.get("name", ""))),
            verdict,
            _number(check.get("value")),
            _number(check.get("limit")),
            str(check.get("n") or ""),
            _interval(check.get("interval")),
            printable(str(check.get("detail") or "")),
            style=_STYLES.get(verdict) if verdict != "pass" else None,
        )
    return table


def _mappings(value: object) -> list[Json]:
    items = value if isinstance(value, list) else []
    return [item for item in items if isinstance(item, Mapping)]


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""


def _interval(value: object) -> str:
    if isinstance(value, list) and len(value) == 2:
        return f"{_number(value[0])} to {_number(value[1])}"
    return ""
