"""The last stage: reward model and policy become versions, and what passed may be promoted.

Owns the states that follow from the gate's verdict, the card, and the report's page. Promotion is
asked of the server, which checks again. Training thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import heedful
import structlog
from heedful_store import PolicyState

from heedful_trainer.publish import Publication, publish_adapter
from heedful_trainer.report import report_of
from heedful_trainer.runs.context import RunContext, write_whole


def publish_versions(context: RunContext) -> Mapping[str, Any]:
    """Publish what the run made and return the versions' names."""
    evidence = context.run.evidence
    verdict = str(evidence["gate"]["verdict"])
    card = {
        "data": evidence["snapshot"],
        "reward": evidence["reward"].get("report", evidence["reward"]),
        "policy": evidence["policy"]["report"],
    }
    found: dict[str, Any] = {}
    if (context.adapter_dir("reward")).is_dir() and "content_hash" in evidence["reward"]:
        reward = Publication("reward", "candidate", "reward", "", card)
        found["reward_version"] = _publish(context, "reward", reward)
    state: PolicyState = "rejected" if verdict == "fail" else "candidate"
    policy = Publication(
        "policy", state, context.run.method, verdict, {**card, "gate": evidence["gate"]}
    )
    version = found["policy_version"] = _publish(context, "policy", policy)
    context.lease.update(policy_version=version)
    write_whole(context.directory / "report" / "report.md", report_of(context.run).encode())
    action = evidence["gate"].get("action", "ask")
    if action == "promote" and context.config.gate.mode == "auto":
        found["promotion"] = _promote(context, version)
    return found


def _publish(context: RunContext, name: str, publication: Publication) -> str:
    return publish_adapter(
        context.store, context.place.home, context.run, context.adapter_dir(name), publication
    ).version


def _promote(context: RunContext, version: str) -> str:
    """Ask the server for the promotion; a refusal is evidence, not a failure of the run."""
    base_id = context.base.identity.base_id
    if context.store.aliases(context.run.scope, base_id).get("champion") == version:
        return "promoted"
    try:
        with context.connect() as client:
            client.promote(version, reason=f"the gate passed it (run {context.run.run_id})")
    except heedful.HeedfulError as error:
        structlog.get_logger().warning("promotion_refused", version=version, reason=str(error))
        return f"refused: {error}"
    return "promoted"
