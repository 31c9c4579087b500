"""Metrics of the loop on the server's side: what is deployed, what a refresh does, what votes say.

Owns their names and labels, and the queries behind them. What costs a query is read by the keeper
now and then and shown as it was then. `read` runs in a worker thread, the rest on the event loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from heedful_store import BASE_VERSION, Run, Scope, Store, now_ms
from heedful_store.registry_schema import deployments, runs
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select

from heedful_server.deployment.directory import PolicyDirectory
from heedful_server.deployment.votes import Votes, count_votes

_PROJECT = ["tenant", "project"]


@dataclass(frozen=True, slots=True)
class ProjectFigures:
    """One project, as it was when it was last looked at."""

    champion: str
    champion_since_ms: int | None  # when it was published; None for the base
    is_tainted: bool
    over_first: Votes | None  # champion against the first version
    run: Run | None  # the newest one


@dataclass(frozen=True, slots=True)
class LoopFigures:
    """All projects."""

    projects: dict[Scope, ProjectFigures] = field(default_factory=dict)
    deployments: dict[str, int] = field(default_factory=dict)  # by action
    verdicts: dict[str, int] = field(default_factory=dict)  # of the gate


def read(store: Store, directory: PolicyDirectory) -> LoopFigures:
    """Read what the metrics show."""
    with store.read() as connection:
        by_action = select(deployments.c.action, func.count()).group_by(deployments.c.action)
        actions: dict[str, int] = {row[0]: row[1] for row in connection.execute(by_action)}
        by_verdict = select(runs.c.verdict, func.count()).where(runs.c.verdict != "")
        found = connection.execute(by_verdict.group_by(runs.c.verdict))
        verdicts: dict[str, int] = {row[0]: row[1] for row in found}
        with_runs = connection.execute(select(runs.c.tenant, runs.c.project).distinct())
        scopes = {Scope(*row) for row in with_runs} | set(directory.scopes())
    projects = {scope: _project(store, directory, scope) for scope in scopes}
    return LoopFigures(projects, actions, verdicts)


def _project(store: Store, directory: PolicyDirectory, scope: Scope) -> ProjectFigures:
    champion = directory.champion(scope)
    policy = directory.policy(scope, champion)
    newest = store.find_runs(scope, 1)
    votes = None
    if policy is not None:
        votes = count_votes(store, scope, champion, BASE_VERSION, ("gate", "learn"))
    return ProjectFigures(
        champion=champion,
        champion_since_ms=None if policy is None else policy.created_at_ms,
        is_tainted=policy is not None and policy.tainted_at_ms is not None,
        over_first=votes,
        run=newest[0] if newest else None,
    )


class LoopMetrics(Collector):
    """The loop's figures, turned into metrics at each scrape."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.figures = LoopFigures()
        self.versions: dict[str, str] = {}  # of the adapters that are loaded, by id
        self.automatic_roll_backs = Counter(
            "heedful_automatic_roll_backs",
            "Champions that the server itself took back, by cause: probation, tainted.",
            ("cause",),
            registry=registry,
        )
        self.load_failures = Counter(
            "heedful_adapter_load_failures",
            "Adapters that a project needs and that could not be loaded.",
            registry=registry,
        )
        self.leases = Gauge(
            "heedful_adapter_leases",
            "Adapters that were loaded on request and are kept for it.",
            registry=registry,
        )
        registry.register(self)

    def describe(self) -> Iterator[Metric]:
        """Name the metrics without values, as registering asks for."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """Yield the loop's metrics."""
        figures = self.figures
        moves = CounterMetricFamily(
            "heedful_deployments", "Entries of the deployment log, by action.", labels=["action"]
        )
        for action, count in figures.deployments.items():
            moves.add_metric([action], count)
        verdicts = CounterMetricFamily(
            "heedful_gate_verdicts", "Refresh runs by the gate's verdict.", labels=["verdict"]
        )
        for verdict, count in figures.verdicts.items():
            verdicts.add_metric([verdict], count)
        yield from (moves, verdicts, self._ages(), self._tainted())
        yield from self._votes()
        yield from self._refreshes()
        yield self._residents()

    def _ages(self) -> Metric:
        family = GaugeMetricFamily(
            "heedful_policy_age_seconds",
            "Time since the champion was published; no series while the base answers.",
            labels=[*_PROJECT, "version"],
        )
        for scope, project in self.figures.projects.items():
            if project.champion_since_ms is not None:
                age_s = (now_ms() - project.champion_since_ms) / 1000
                family.add_metric([scope.tenant, scope.project, project.champion], age_s)
        return family

    def _tainted(self) -> Metric:
        family = GaugeMetricFamily(
            "heedful_champion_tainted",
            "Whether the champion has learned from data that was erased since.",
            labels=_PROJECT,
        )
        for scope, project in self.figures.projects.items():
            family.add_metric([scope.tenant, scope.project], project.is_tainted)
        return family

    def _votes(self) -> Iterator[Metric]:
        rate = GaugeMetricFamily(
            "heedful_win_rate_over_first",
            "Share of blind votes that prefer the champion to the first version, ties half.",
            labels=_PROJECT,
        )
        votes = GaugeMetricFamily(
            "heedful_win_rate_over_first_votes", "Votes behind that share.", labels=_PROJECT
        )
        for scope, project in self.figures.projects.items():
            found = project.over_first
            if found is not None and found.win_rate is not None:
                rate.add_metric([scope.tenant, scope.project], found.win_rate)
                votes.add_metric([scope.tenant, scope.project], found.total)
        yield from (rate, votes)

    def _refreshes(self) -> Iterator[Metric]:
        stage = GaugeMetricFamily(
            "heedful_refresh_stage",
            "The newest refresh run of a project: its stage and status, always 1.",
            labels=[*_PROJECT, "stage", "status"],
        )
        figure = GaugeMetricFamily(
            "heedful_refresh_figure",
            "What the newest refresh run reports of itself: loss, accuracy, KL and others.",
            labels=[*_PROJECT, "figure"],
        )
        for scope, project in self.figures.projects.items():
            run = project.run
            if run is None:
                continue
            stage.add_metric([scope.tenant, scope.project, run.stage, run.status], 1)
            for name, value in figures_of(run).items():
                figure.add_metric([scope.tenant, scope.project, name], value)
        yield from (stage, figure)

    def _residents(self) -> Metric:
        family = GaugeMetricFamily(
            "heedful_adapter_info",
            "Adapters that are loaded, always 1; version is empty for one of a run.",
            labels=["adapter", "version"],
        )
        for adapter_id, version in self.versions.items():
            family.add_metric([adapter_id[:12], version], 1)
        return family


def figures_of(run: Run) -> dict[str, float]:
    """Return the named numbers that a run reports."""
    figures = run.progress.get("figures")
    if not isinstance(figures, dict):
        return {}
    return {
        str(name): float(value)
        for name, value in figures.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
