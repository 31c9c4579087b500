"""Puts the parts of deployment together.

Owns their wiring and nothing else. Called once at start, on the event loop's thread.
"""

from __future__ import annotations

from dataclasses import dataclass

from heedful_store import Store

from heedful_server.config import ServerConfig
from heedful_server.deployment.directory import PolicyDirectory
from heedful_server.deployment.door import PolicyDoor
from heedful_server.deployment.keeper import Keeper, KeeperSettings
from heedful_server.deployment.leases import Leases
from heedful_server.deployment.metrics import LoopMetrics
from heedful_server.deployment.observing import Observations
from heedful_server.deployment.probation import ProbationLimits
from heedful_server.deployment.promotion import Promotions
from heedful_server.deployment.residency import Residency
from heedful_server.engine_client.client import EngineClient


@dataclass(frozen=True, slots=True)
class DeploymentParts:
    """What the rest of the server uses of deployment."""

    directory: PolicyDirectory
    residency: Residency
    leases: Leases
    observations: Observations
    promotions: Promotions
    door: PolicyDoor
    keeper: Keeper


def make_deployment(
    config: ServerConfig,
    store: Store,
    engine: EngineClient,
    metrics: LoopMetrics,
    base_id: str,
    template_hash: str,
) -> DeploymentParts:
    """Wire the parts for one server; base_id and template_hash are those of its answers."""
    settings = config.deployment
    home = config.home_dir
    directory = PolicyDirectory(store, home, base_id, template_hash)
    residency = Residency(
        engine, base_id, template_hash, settings.max_adapters, settings.load_timeout_s
    )
    leases = Leases(home, base_id, template_hash)
    observations = Observations()
    promotions = Promotions(
        store, directory, residency, observations, is_shadow=settings.mode == "shadow"
    )
    limits = ProbationLimits(
        settings.min_generations, settings.max_error_increase, settings.max_slowdown
    )
    keeper = Keeper(
        store,
        engine,
        directory,
        residency,
        leases,
        promotions,
        observations,
        metrics,
        KeeperSettings(
            settings.probation_s,
            limits,
            settings.taint_deadline_s,
            canary=settings.canary and settings.mode != "shadow",
        ),
    )
    door = PolicyDoor(directory, residency, leases)
    return DeploymentParts(directory, residency, leases, observations, promotions, door, keeper)
