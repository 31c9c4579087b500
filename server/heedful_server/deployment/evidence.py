"""What is known about a version: whether it may be promoted, and how sure that is.

Owns the reading of the gate's report (plain JSON, in the version's card or in its run) and the
words of a promotion. It decides nothing about files. Pure functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from heedful_store import PolicyVersion, Run

Json = Mapping[str, Any]

# Stages that no person may overrule, whatever a report says of its checks.
_NOT_OVERRIDABLE = ("integrity", "safety")


def gate_report(policy: PolicyVersion, run: Run | None) -> Json:
    """Return the gate's report on a version; empty where there is none."""
    places: list[object] = [policy.card.get("gate")]
    if run is not None:
        places.append(run.evidence.get("gate"))
    for place in places:
        if isinstance(place, Mapping):
            nested = place.get("report")
            return nested if isinstance(nested, Mapping) else place
    return {}


def refusal(policy: PolicyVersion, report: Json) -> str:
    """Return why a version may not become champion, empty where it may.

    An inconclusive one may, and one that failed checks which a person may overrule.
    """
    if policy.role != "policy":
        return f"{policy.version} is a {policy.role} model, not a policy"
    if policy.tainted_at_ms is not None:
        return f"{policy.version} has learned from data that was erased; rebuild it"
    if policy.state in ("rejected", "failed"):
        return f"{policy.version} is {policy.state}"
    for stage, check in _failed_checks(report):
        if stage in _NOT_OVERRIDABLE or not check.get("overridable", True):
            name = check.get("name", stage)
            return f"{policy.version} failed the check {name!r} of {stage}, which cannot be waived"
    if policy.verdict == "fail" and not report.get("stages"):
        return f"{policy.version} failed the gate, and there is no report that says at what"
    return ""


def is_proven(policy: PolicyVersion) -> bool:
    """Say whether the gate found the version better; nobody's approval makes up for that."""
    return policy.verdict == "pass"


def summary(policy: PolicyVersion, report: Json) -> dict[str, Any]:
    """Return what a promotion rests on: verdict, and n and interval of each check that has them."""
    checks = [
        {key: check.get(key) for key in ("name", "verdict", "value", "n", "interval")}
        for _, check in _checks(report)
        if check.get("n")
    ]
    return {"verdict": policy.verdict or "not judged", "checks": checks}


def _failed_checks(report: Json) -> Iterator[tuple[str, Json]]:
    for stage, check in _checks(report):
        if check.get("verdict") == "fail":
            yield stage, check
    for result in _list(report.get("stages")):
        if result.get("verdict") == "fail" and not _list(result.get("checks")):
            yield str(result.get("name", "")), {}


def _checks(report: Json) -> Iterator[tuple[str, Json]]:
    for stage in _list(report.get("stages")):
        for check in _list(stage.get("checks")):
            yield str(stage.get("name", "")), check


def _list(value: object) -> list[Json]:
    if not isinstance(value, list | tuple):
        return []
    return [item for item in value if isinstance(item, Mapping)]
