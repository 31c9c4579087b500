"""ModelService: what is served; the life of policy versions is not served yet.

Owns nothing: the base is described from what the engine said of itself. Runs on the event loop.
"""
# ruff: noqa: N802 - the contract names the methods

from collections.abc import AsyncGenerator
from typing import Any

import grpc.aio
from heedful_proto.v1 import models_pb2 as pb
from heedful_proto.v1.models_pb2_grpc import ModelServiceServicer

from heedful_server.engine_client.client import EngineClient, EngineState
from heedful_server.errors import NotImplementedYet
from heedful_server.rpc import convert, validate

Context = grpc.aio.ServicerContext[Any, Any]

_REASON = "this server has one policy version and does not train"


class ModelService(ModelServiceServicer):
    """Answers for the base."""

    def __init__(self, engine: EngineClient, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """List the base and the champion alias."""
        validate.require_project(request.project)
        return pb.ListModelsResponse(models=[self._base()], aliases=[convert.champion_alias()])

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """Return the base, which has no card yet."""
        validate.require_project(request.project)
        validate.require_model(request.model)
        return pb.GetModelResponse(model=self._base())

    async def Promote(self, request: pb.PromoteRequest, context: Context) -> pb.PromoteResponse:
        """Refuse."""
        raise NotImplementedYet(_REASON)

    async def RollBack(self, request: pb.RollBackRequest, context: Context) -> pb.RollBackResponse:
        """Refuse."""
        raise NotImplementedYet(_REASON)

    async def StartRefresh(
        self, request: pb.StartRefreshRequest, context: Context
    ) -> pb.StartRefreshResponse:
        """Refuse."""
        raise NotImplementedYet(_REASON)

    async def GetRefresh(
        self, request: pb.GetRefreshRequest, context: Context
    ) -> pb.GetRefreshResponse:
        """Refuse."""
        raise NotImplementedYet(_REASON)

    async def WatchRefresh(
        self, request: pb.WatchRefreshRequest, context: Context
    ) -> AsyncGenerator[pb.WatchRefreshResponse, None]:
        """Refuse."""
        raise NotImplementedYet(_REASON)
        yield

    async def ListRefreshes(
        self, request: pb.ListRefreshesRequest, context: Context
    ) -> pb.ListRefreshesResponse:
        """Refuse."""
        raise NotImplementedYet(_REASON)

    async def ControlRefresh(
        self, request: pb.ControlRefreshRequest, context: Context
    ) -> pb.ControlRefreshResponse:
        """Refuse."""
        raise NotImplementedYet(_REASON)

    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.GetLoadResponse:
        """Refuse."""
        raise NotImplementedYet(_REASON)

    async def WatchDeployments(
        self, request: pb.WatchDeploymentsRequest, context: Context
    ) -> AsyncGenerator[pb.WatchDeploymentsResponse, None]:
        """Refuse."""
        raise NotImplementedYet(_REASON)
        yield

    async def LoadAdapter(
        self, request: pb.LoadAdapterRequest, context: Context
    ) -> pb.LoadAdapterResponse:
        """Refuse."""
        raise NotImplementedYet(_REASON)

    async def UnloadAdapter(
        self, request: pb.UnloadAdapterRequest, context: Context
    ) -> pb.UnloadAdapterResponse:
        """Refuse."""
        raise NotImplementedYet(_REASON)

    def _base(self) -> pb.Model:
        loaded = self._engine.state is EngineState.READY
        return convert.base_model(self._model_name, self._engine.info, loaded)
