"""Versions and the base as ModelService describes them.

Owns what is gathered for a description: the registry's row, what is loaded, the card, the evidence
of the gate and the votes. Event loop; the store is read in threads.
"""

import asyncio

from heedful_proto.v1 import models_pb2 as pb
from heedful_store import BASE_VERSION, PolicyVersion, Scope, Store

from heedful_server.deployment.card import base_card, model_card
from heedful_server.deployment.parts import DeploymentParts
from heedful_server.deployment.served import CHALLENGER, CHAMPION, ServedPolicy
from heedful_server.deployment.votes import count_votes
from heedful_server.engine_client.client import EngineClient, EngineState
from heedful_server.errors import NotFound
from heedful_server.rpc import model_convert


class Describer:
    """Describes the versions of one server."""

    def __init__(
        self,
        store: Store,
        parts: DeploymentParts,
        engine: EngineClient,
        model_name: str,
        model_path: str,
        quantize: str,
    ) -> None:
        self._store = store
        self._directory = parts.directory
        self._residency = parts.residency
        self._promotions = parts.promotions
        self._engine = engine
        self._model_name = model_name
        self._model_path = model_path
        self._quantize = quantize

    def versions(self, scope: Scope) -> list[pb.Model]:
        """Return the versions of a project on the base that is served, newest first."""
        base_id = self._directory.base_id
        found = [p for p in self._directory.policies(scope) if p.base_id == base_id]
        return [*(self._version(policy) for policy in found), self._base(scope)]

    def base_model(self, with_path: bool) -> pb.BaseModel:
        """Return what all versions stand on."""
        message = pb.BaseModel(
            name=self._model_name,
            base_id=self._directory.base_id,
            template_hash=self._directory.template_hash,
            path=self._model_path if with_path else "",
            quantize=self._quantize,
        )
        info = self._engine.info
        if info is not None:
            message.quantization = info.quantization
            message.kernel_path = info.kernel_path
            message.context_tokens = info.context_tokens
            message.vocab_size = info.vocab_size
        return message

    def loaded(self, scope: Scope, policy: ServedPolicy) -> pb.Model:
        """Return an adapter that was just loaded, be it in the registry or not."""
        row = self._directory.policy(scope, policy.version)
        if row is not None:
            return self._version(row)
        if policy.version == BASE_VERSION:
            return self._base(scope)
        return pb.Model(
            version=policy.version,
            base_model=self._model_name,
            content_hash=policy.content_hash,
            loaded=True,
            role=policy.role,
        )

    async def card(self, scope: Scope, model: str) -> pb.GetModelResponse:
        """Return a version with its card and evidence; raises NotFound."""
        version: str | None = model or CHAMPION
        if version in (CHAMPION, CHALLENGER):
            version = self._directory.alias(scope, version)
        if version == BASE_VERSION:
            return pb.GetModelResponse(model=self._base(scope), card=base_card(self._model_name))
        policy = self._directory.policy(scope, version) if version is not None else None
        if policy is None:
            raise NotFound(f"no model {model[:80]!r} (field model)")
        report, run = await self._promotions.known_about(scope, policy)
        evidence: dict[str, object] = dict(run.evidence) if run is not None else {}
        if report:
            evidence["gate"] = report
        if policy.role == "policy":
            evidence["canary"] = await self._votes(scope, policy.version)
        return pb.GetModelResponse(
            model=self._version(policy),
            card=model_card(policy, run, report),
            evidence=model_convert.struct(evidence),
        )

    async def _votes(self, scope: Scope, version: str) -> dict[str, object]:
        """Return the blind votes against the champion, or the one before where it is that."""
        other = self._directory.champion(scope)
        if other == version:
            move = self._directory.last_move(scope)
            other = (move.from_version if move is not None else None) or BASE_VERSION
        votes = await asyncio.to_thread(count_votes, self._store, scope, version, other)
        return votes.to_json()

    def _version(self, policy: PolicyVersion) -> pb.Model:
        is_loaded = policy.content_hash in self._residency.loaded_ids
        return model_convert.version(policy, self._model_name, self._engine.info, is_loaded)

    def _base(self, scope: Scope) -> pb.Model:
        is_loaded = self._engine.state is EngineState.READY
        is_champion = self._directory.champion(scope) == BASE_VERSION
        return model_convert.base_version(
            self._model_name, self._engine.info, is_loaded, is_champion
        )
