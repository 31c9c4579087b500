"""ModelService: a thin layer between messages and deployment.

Owns no rules and no state: messages are validated by deploy_rules.py, answered by deployment/ and
refreshes.py and turned back by model_convert.py. Runs on the event loop.
"""
# ruff: noqa: N802 - the contract names the methods

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc.aio
from heedful_proto.v1 import models_pb2 as pb
from heedful_proto.v1.models_pb2_grpc import ModelServiceServicer
from heedful_store import Scope, Store

from heedful_server.deployment.adapters import AdapterDesk
from heedful_server.deployment.parts import DeploymentParts
from heedful_server.errors import Draining
from heedful_server.feedback.access import scope_of
from heedful_server.identity import DEPLOY, TRAIN, Caller
from heedful_server.readiness import Readiness
from heedful_server.rpc import deploy_rules, model_convert
from heedful_server.rpc.admission import Admission
from heedful_server.rpc.call import caller
from heedful_server.rpc.describing import Describer
from heedful_server.rpc.refreshes import Refreshes

Context = grpc.aio.ServicerContext[Any, Any]

_WATCH_S = 0.5
_PAGE = 100


class ModelService(ModelServiceServicer):
    """Answers for the versions and runs of all projects."""

    def __init__(
        self,
        store: Store,
        parts: DeploymentParts,
        describer: Describer,
        admission: Admission,
        readiness: Readiness,
    ) -> None:
        self._store = store
        self._directory = parts.directory
        self._promotions = parts.promotions
        self._adapters = AdapterDesk(
            store, parts.directory, parts.residency, parts.leases, parts.keeper
        )
        self._describer = describer
        self._refreshes = Refreshes(store, parts.directory, readiness)
        self._admission = admission
        self._readiness = readiness

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """List versions and aliases."""
        who, scope = _who(request.project)
        await self._directory.refresh()
        aliases = self._directory.aliases(scope)
        return pb.ListModelsResponse(
            models=self._describer.versions(scope),
            aliases=[pb.Alias(name=name, version=version) for name, version in aliases.items()],
            base=self._describer.base_model(with_path=TRAIN in who.scopes),
        )

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """Return one version with its card and evidence."""
        _, scope = _who(request.project)
        await self._directory.refresh()
        return await self._describer.card(scope, request.model)

    async def Promote(self, request: pb.PromoteRequest, context: Context) -> pb.PromoteResponse:
        """Point the champion alias at a version."""
        who, scope = _who(request.project)
        version = deploy_rules.version(request.version)
        reason = deploy_rules.reason(request.reason)
        moved = await self._promotions.promote(scope, version, reason, _actor(who))
        return pb.PromoteResponse(deployment=model_convert.deployment(moved))

    async def RollBack(self, request: pb.RollBackRequest, context: Context) -> pb.RollBackResponse:
        """Point the champion alias back."""
        who, scope = _who(request.project)
        reason = deploy_rules.reason(request.reason)
        moved = await self._promotions.roll_back(scope, reason, _actor(who))
        return pb.RollBackResponse(deployment=model_convert.deployment(moved))

    async def StartRefresh(
        self, request: pb.StartRefreshRequest, context: Context
    ) -> pb.StartRefreshResponse:
        """Queue a refresh run."""
        _, scope = _who(request.project)
        method = deploy_rules.method(request.method)
        overrides = deploy_rules.overrides(dict(request.overrides))
        run = await self._refreshes.start(scope, method, overrides)
        return pb.StartRefreshResponse(refresh=model_convert.refresh(run))

    async def GetRefresh(
        self, request: pb.GetRefreshRequest, context: Context
    ) -> pb.GetRefreshResponse:
        """Return a run."""
        _, scope = _who(request.project)
        run = await self._refreshes.get(scope, deploy_rules.run_id(request.run_id))
        return pb.GetRefreshResponse(refresh=model_convert.refresh(run))

    async def WatchRefresh(
        self, request: pb.WatchRefreshRequest, context: Context
    ) -> AsyncGenerator[pb.WatchRefreshResponse, None]:
        """Stream a run until it ends."""
        _, scope = _who(request.project)
        async for run in self._refreshes.watch(scope, deploy_rules.run_id(request.run_id)):
            yield pb.WatchRefreshResponse(refresh=model_convert.refresh(run))

    async def ListRefreshes(
        self, request: pb.ListRefreshesRequest, context: Context
    ) -> pb.ListRefreshesResponse:
        """List runs, newest first."""
        _, scope = _who(request.project)
        runs = await self._refreshes.find(scope, deploy_rules.limit(request.limit))
        return pb.ListRefreshesResponse(refreshes=map(model_convert.refresh, runs))

    async def ControlRefresh(
        self, request: pb.ControlRefreshRequest, context: Context
    ) -> pb.ControlRefreshResponse:
        """Pause, resume or stop a run."""
        _, scope = _who(request.project)
        run_id = deploy_rules.run_id(request.run_id)
        run = await self._refreshes.control(scope, run_id, deploy_rules.control(request.action))
        return pb.ControlRefreshResponse(refresh=model_convert.refresh(run))

    async def WatchDeployments(
        self, request: pb.WatchDeploymentsRequest, context: Context
    ) -> AsyncGenerator[pb.WatchDeploymentsResponse, None]:
        """Stream the deployment log of a project."""
        _, scope = _who(request.project)
        after = deploy_rules.position(request.after_seq)
        while True:
            page = await asyncio.to_thread(self._store.deployments, scope, after, _PAGE)
            for entry in page:
                yield pb.WatchDeploymentsResponse(deployment=model_convert.deployment(entry))
            after = page[-1].deployment_id if page else after
            if len(page) == _PAGE:
                continue
            if request.until_now:
                return
            await self._directory.wait_change(_WATCH_S)
            if self._readiness.draining:
                raise Draining("the server is shutting down")

    async def LoadAdapter(
        self, request: pb.LoadAdapterRequest, context: Context
    ) -> pb.LoadAdapterResponse:
        """Load a published version, or an adapter of a run for the time of its lease."""
        who, scope = _who(request.project)
        wanted = deploy_rules.load_request(request, scope)
        if wanted.run_adapter is not None:
            who.require(TRAIN)
            policy = await self._adapters.load_run_adapter(wanted.run_adapter, wanted.lease_s)
        else:
            who.require(DEPLOY)
            policy = await self._adapters.load_version(scope, wanted.version, wanted.lease_s)
        return pb.LoadAdapterResponse(model=self._describer.loaded(scope, policy))

    async def UnloadAdapter(
        self, request: pb.UnloadAdapterRequest, context: Context
    ) -> pb.UnloadAdapterResponse:
        """Free the slot of a version or of an adapter of a run."""
        who, scope = _who(request.project)
        of_run = deploy_rules.unloaded(request.version, scope)
        who.require(DEPLOY if of_run is None else TRAIN)
        await self._adapters.unload(scope, request.version)
        return pb.UnloadAdapterResponse()

    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.GetLoadResponse:
        """Say how many sequences are admitted."""
        background = self._admission.num_background
        return pb.GetLoadResponse(
            num_interactive=self._admission.num_in_flight - background, num_background=background
        )


def _who(project: str) -> tuple[Caller, Scope]:
    who = caller()
    return who, scope_of(who, project)


def _actor(who: Caller) -> str:
    return who.key_id or who.tenant
