"""Policy versions, refresh runs and deployments: the part of the client that closes the loop.

Owns those methods; `client.py` builds on this class and `feedback_calls.py` lies below it.
`transport.py` owns retries. Reads, loads and controls can be repeated; a promotion, a roll-back
and a start cannot, because the second one would mean something else, so where their answer is lost
the caller looks before trying again. `watching.py` owns what happens to a stream that breaks. Lives
on the event loop of its client.
"""

import math
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TypeAlias, TypeVar

import grpc
import grpc.aio
from heedful_proto.v1 import models_pb2 as pb

from heedful import model_replies as replies
from heedful.feedback_calls import FeedbackCalls
from heedful.model_types import (
    Deployment,
    Load,
    Method,
    ModelCard,
    Models,
    ModelVersion,
    Refresh,
    RefreshAction,
    RunAdapter,
)
from heedful.requests import assign, choose
from heedful.transport import Deadline
from heedful.watching import reopened

_Q = TypeVar("_Q")
_R = TypeVar("_R")
_RefreshStream: TypeAlias = grpc.aio.UnaryStreamCall[
    pb.WatchRefreshRequest, pb.WatchRefreshResponse
]
_DeploymentStream: TypeAlias = grpc.aio.UnaryStreamCall[
    pb.WatchDeploymentsRequest, pb.WatchDeploymentsResponse
]

_ACTIONS: Mapping[str, pb.RefreshAction.ValueType] = {
    "pause": pb.REFRESH_ACTION_PAUSE,
    "resume": pb.REFRESH_ACTION_RESUME,
    "stop": pb.REFRESH_ACTION_STOP,
}


class ModelCalls(FeedbackCalls):
    """The methods of `AsyncClient` that concern versions, runs and deployments."""

    async def list_models(self, *, timeout_s: float | None = None) -> Models:
        """Returns the project's versions, newest first, its aliases, and the base model.

        Raises:
            HeedfulError: see `heedful.errors`.
        """
        request = pb.ListModelsRequest(project=self.project)
        response = await self._repeatable(
            self._transport.stubs.models.ListModels, request, timeout_s
        )
        return replies.models_from_wire(response)

    async def get_model(self, model: str, *, timeout_s: float | None = None) -> ModelCard:
        """Returns one version, named by itself or by an alias, with its card and evidence.

        Raises:
            NotFound: there is no such version.
            HeedfulError: see `heedful.errors`.
        """
        request = pb.GetModelRequest(model=model, project=self.project)
        response = await self._repeatable(self._transport.stubs.models.GetModel, request, timeout_s)
        return replies.card_from_wire(response)

    async def promote(
        self, version: str, *, reason: str = "", timeout_s: float | None = None
    ) -> Deployment:
        """Makes a version the champion; not repeated where the answer is lost.

        Raises:
            FailedPrecondition: it may not be: another base, damaged, rejected, tainted, or the
                gate found it unsafe.
            HeedfulError: see `heedful.errors`.
        """
        response = await self._transport.unary(
            self._transport.stubs.models.Promote,
            pb.PromoteRequest(version=version, project=self.project, reason=reason),
            deadline=self._transport.deadline(timeout_s),
            repeatable=False,
        )
        return replies.deployment_from_wire(response.deployment)

    async def roll_back(self, *, reason: str = "", timeout_s: float | None = None) -> Deployment:
        """Makes the champion before this one champion again; not repeated where the answer is lost.

        Raises:
            FailedPrecondition: there is nothing to go back to.
            HeedfulError: see `heedful.errors`.
        """
        response = await self._transport.unary(
            self._transport.stubs.models.RollBack,
            pb.RollBackRequest(project=self.project, reason=reason),
            deadline=self._transport.deadline(timeout_s),
            repeatable=False,
        )
        return replies.deployment_from_wire(response.deployment)

    async def deployments(
        self, *, after: int = 0, follow: bool = False, timeout_s: float | None = None
    ) -> AsyncGenerator[Deployment, None]:
        """Yields the deployment log after position `after`, each entry once.

        Args:
            after: the `seq` of the last entry that is known.
            follow: wait for more; goes on over a lost connection.
            timeout_s: seconds for all of it; default: the client's, with `follow` no limit.

        Raises:
            HeedfulError: see `heedful.errors`.
        """
        request = pb.WatchDeploymentsRequest(project=self.project, until_now=not follow)
        assign(request, "after_seq", after, "after_seq")
        deadline = self._stream_deadline(timeout_s, follow)

        def open_stream() -> _DeploymentStream:
            return self._transport.stubs.models.WatchDeployments(
                request, timeout=deadline.remaining_s(), metadata=self._transport.metadata
            )

        stream = reopened(self._transport, open_stream, deadline)
        async with aclosing(stream):
            async for message in stream:
                if message is None and not follow:
                    return
                if message is not None:
                    # Where the stream is opened again it goes on after what was yielded.
                    request.after_seq = max(request.after_seq, message.deployment.seq)
                    yield replies.deployment_from_wire(message.deployment)

    async def start_refresh(
        self,
        method: Method = "auto",
        *,
        overrides: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Refresh:
        """Queues a refresh of the project's policy for a trainer to work on.

        Args:
            method: how to train; "auto" lets the data decide.
            overrides: settings of the trainer by dotted path, for example {"dpo.beta": "0.2"}.
            timeout_s: seconds for the call.

        Raises:
            AlreadyExists: a run of this project has not ended yet.
            HeedfulError: see `heedful.errors`.
        """
        request = pb.StartRefreshRequest(
            project=self.project, method=method, overrides=dict(overrides or {})
        )
        response = await self._transport.unary(
            self._transport.stubs.models.StartRefresh,
            request,
            deadline=self._transport.deadline(timeout_s),
            repeatable=False,
        )
        return replies.refresh_from_wire(response.refresh)

    async def get_refresh(self, run_id: str, *, timeout_s: float | None = None) -> Refresh:
        """Returns a run.

        Raises:
            HeedfulError: see `heedful.errors`.
        """
        request = pb.GetRefreshRequest(run_id=run_id, project=self.project)
        response = await self._repeatable(
            self._transport.stubs.models.GetRefresh, request, timeout_s
        )
        return replies.refresh_from_wire(response.refresh)

    async def list_refreshes(
        self, *, limit: int = 20, timeout_s: float | None = None
    ) -> tuple[Refresh, ...]:
        """Returns the project's runs, newest first, at most `limit` (1 to 100).

        Raises:
            HeedfulError: see `heedful.errors`.
        """
        request = pb.ListRefreshesRequest(project=self.project)
        assign(request, "limit", limit, "limit")
        response = await self._repeatable(
            self._transport.stubs.models.ListRefreshes, request, timeout_s
        )
        return tuple(replies.refresh_from_wire(item) for item in response.refreshes)

    async def control_refresh(
        self, run_id: str, action: RefreshAction, *, timeout_s: float | None = None
    ) -> Refresh:
        """Asks a run to pause, resume or stop, which it does at its next step.

        Raises:
            HeedfulError: see `heedful.errors`.
        """
        request = pb.ControlRefreshRequest(
            run_id=run_id, project=self.project, action=choose(action, _ACTIONS, "action")
        )
        response = await self._repeatable(
            self._transport.stubs.models.ControlRefresh, request, timeout_s
        )
        return replies.refresh_from_wire(response.refresh)

    async def watch_refresh(
        self, run_id: str, *, timeout_s: float | None = None
    ) -> AsyncGenerator[Refresh, None]:
        """Yields a run whenever something about it changed, until it is over.

        Goes on over a lost connection and a restart of the server; what was yielded is not
        yielded again. Without `timeout_s` there is no limit.

        Raises:
            HeedfulError: see `heedful.errors`.
        """
        request = pb.WatchRefreshRequest(run_id=run_id, project=self.project)
        deadline = self._stream_deadline(timeout_s, follow=True)

        def open_stream() -> _RefreshStream:
            return self._transport.stubs.models.WatchRefresh(
                request, timeout=deadline.remaining_s(), metadata=self._transport.metadata
            )

        last: Refresh | None = None
        stream = reopened(self._transport, open_stream, deadline)
        async with aclosing(stream):
            async for message in stream:
                if message is None:
                    continue
                refresh = replies.refresh_from_wire(message.refresh)
                if refresh != last:
                    last = refresh
                    yield refresh
                if refresh.is_over:
                    return

    async def load_adapter(
        self, adapter: str | RunAdapter, *, lease_s: int = 0, timeout_s: float | None = None
    ) -> ModelVersion:
        """Loads an adapter into the engine, or renews its lease.

        Args:
            adapter: a published version, or (scope train) an adapter of a run.
            lease_s: seconds after which it is freed unless loaded again; 0 keeps a published
                version. An adapter of a run needs 1 to 3600.
            timeout_s: seconds for the call with its retries.

        Raises:
            FailedPrecondition: its files are damaged, or it belongs to another base.
            HeedfulError: see `heedful.errors`.
        """
        request = pb.LoadAdapterRequest(project=self.project)
        assign(request, "lease_s", lease_s, "lease_s")
        if isinstance(adapter, RunAdapter):
            request.ephemeral.run_id, request.ephemeral.name = adapter.run_id, adapter.name
        else:
            request.version = adapter
        response = await self._repeatable(
            self._transport.stubs.models.LoadAdapter, request, timeout_s
        )
        return replies.model_from_wire(response.model)

    async def unload_adapter(
        self, adapter: str | RunAdapter, *, timeout_s: float | None = None
    ) -> None:
        """Frees an adapter once no sequence uses it.

        Raises:
            HeedfulError: see `heedful.errors`.
        """
        version = adapter.model if isinstance(adapter, RunAdapter) else adapter
        request = pb.UnloadAdapterRequest(version=version, project=self.project)
        await self._repeatable(self._transport.stubs.models.UnloadAdapter, request, timeout_s)

    async def get_load(self, *, timeout_s: float | None = None) -> Load:
        """Returns how busy the engine is, so that work in the background can give way.

        Raises:
            HeedfulError: see `heedful.errors`.
        """
        response = await self._repeatable(
            self._transport.stubs.models.GetLoad, pb.GetLoadRequest(), timeout_s
        )
        return replies.load_from_wire(response)

    async def _repeatable(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Q, _R],
        request: _Q,
        timeout_s: float | None,
    ) -> _R:
        """Calls what can be repeated."""
        deadline = self._transport.deadline(timeout_s)
        return await self._transport.unary(method, request, deadline=deadline, repeatable=True)

    def _stream_deadline(self, timeout_s: float | None, follow: bool) -> Deadline:
        return self._transport.deadline(math.inf if follow and timeout_s is None else timeout_s)
