"""A report as plain text for people.

Owns its wording and layout, nothing else. Pure, any thread.
"""

from __future__ import annotations

from heedful_trainer.gate.types import Check, GateReport, StageResult

_MARKS = {"pass": "pass", "fail": "FAIL", "inconclusive": "open", "skipped": "skip"}
_VERDICTS = {
    "pass": "proven better, within every limit",
    "fail": "refused",
    "inconclusive": "not proven better, and nothing against it",
    "skipped": "not judged",
}
_ACTIONS = {
    "promote": "It is promoted.",
    "ask": "A person decides; promoted like this it counts as approved, not as proven.",
    "keep": "The champion stays.",
    "reject": "The champion stays.",
}
_STAGES = {
    "integrity": "Integrity",
    "offline": "Offline",
    "canary": "Canary",
    "promotion": "Promotion",
}


def explain(report: GateReport) -> str:
    """Return what the gate found and what follows from it."""
    rebuild = ", a rebuild: not worse is enough" if report.kind == "rebuild" else ""
    lines = [
        f"Verdict: {report.verdict} ({_VERDICTS[report.verdict]})",
        f"Profile {report.profile}, mode {report.mode}{rebuild}. {_action(report)}",
    ]
    for stage in report.stages:
        lines += ["", *_stage(stage)]
    if report.verdict == "fail" and not report.overridable:
        lines += ["", "A failed check of integrity or safety cannot be overridden."]
    return "\n".join(lines)


def _action(report: GateReport) -> str:
    if report.verdict == "pass" and report.action == "ask":
        return "A person decides; it would count as proven."
    return _ACTIONS[report.action]


def _stage(stage: StageResult) -> list[str]:
    head = f"{_STAGES[stage.name]}: {stage.verdict}"
    lines = [f"{head}. {stage.detail}" if stage.detail else head]
    return lines + [_check(check) for check in stage.checks]


def _check(check: Check) -> str:
    parts = [f"  {_MARKS[check.verdict]:4}  {check.name:26}"]
    if check.value is not None:
        parts.append(f"{check.value:.3g}")
        if check.interval is not None:
            parts.append(f"[{check.interval[0]:.3g}, {check.interval[1]:.3g}]")
        if check.limit is not None:
            parts.append(f"limit {check.limit:.3g}")
    if check.n:
        parts.append(f"n {check.n}")
    text = "  ".join(parts)
    return f"{text}  {check.detail}" if check.detail else text
