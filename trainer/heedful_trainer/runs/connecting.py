"""Connections to the server, as the configuration describes them.

Owns nothing else. The server is asked by gRPC only.
"""

from __future__ import annotations

from pathlib import Path

import heedful

from heedful_trainer.config import TrainerConfig


def client(config: TrainerConfig, project: str) -> heedful.Client:
    """Return a client that blocks; close it, or use it as a context manager."""
    return heedful.Client(
        config.target, api_key=config.api_key or None, tls=_tls(config), project=project
    )


def async_client(config: TrainerConfig, project: str) -> heedful.AsyncClient:
    """Return a client for the event loop that first uses it."""
    return heedful.AsyncClient(
        config.target, api_key=config.api_key or None, tls=_tls(config), project=project
    )


class ServerLoad:
    """Asks over and over whether people wait for answers."""

    def __init__(self, config: TrainerConfig, project: str) -> None:
        self._client = client(config, project)
        self._timeout_s = max(1.0, config.yielding.poll_s)

    def is_busy(self) -> bool:
        """Return whether interactive requests run; False where the server does not say."""
        try:
            return self._client.get_load(timeout_s=self._timeout_s).num_interactive > 0
        except heedful.HeedfulError:
            return False

    def close(self) -> None:
        """End the connection."""
        self._client.close()


def _tls(config: TrainerConfig) -> heedful.TLS | None:
    return heedful.TLS.from_files(ca=Path(config.tls_ca).expanduser()) if config.tls_ca else None
