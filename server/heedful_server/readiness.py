"""Whether the server can generate now, and if not, why.

Owns the one answer behind the health service and `/readyz`: the engine has generated at its start,
its step loop reports, and the server is not shutting down. Knows nothing of gRPC or HTTP. Runs on
the server's event loop.
"""

from heedful_server.engine_client.client import EngineClient, EngineState
from heedful_server.errors import EngineUnavailable
from heedful_server.protocol import EngineInfo


class Readiness:
    """Readiness of one engine behind one server."""

    def __init__(self, engine: EngineClient, heartbeat_timeout_s: float) -> None:
        self._engine = engine
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self.draining = False

    def reason(self) -> str:
        """Return why the server cannot generate now; empty when it can."""
        if self.draining:
            return "the server is shutting down"
        engine = self._engine
        if engine.state is EngineState.LOADING:
            stage, fraction = engine.loading
            return f"the engine is loading: {stage} ({fraction:.0%})"
        if engine.state is not EngineState.READY:
            return engine.failure or f"the engine is {engine.state.value}"
        age_s = engine.heartbeat_age_s
        if age_s > self._heartbeat_timeout_s:
            return f"the engine has not reported for {age_s:.0f} s"
        return ""

    def require(self) -> EngineInfo:
        """Return what the engine serves; raise EngineUnavailable while it cannot generate."""
        reason = self.reason()
        if reason or self._engine.info is None:
            raise EngineUnavailable(reason)
        return self._engine.info
