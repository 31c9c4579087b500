"""The server program with everything but its engine, which stays "loading" for ever.

Usage: server_without_engine.py MODEL_DIR SETTING=VALUE... Feedback is served as always, and a start
costs a second instead of the loading of a model.
"""

import asyncio
import sys
import time
from pathlib import Path

from heedful_server.config import load_config
from heedful_server.engine_client.client import EngineClient, EngineState
from heedful_server.logging_setup import configure_logging
from heedful_server.main import run
from heedful_server.serving import load_text


class NoEngine(EngineClient):
    """An engine that never comes."""

    async def start(self) -> None:
        self._set_state(EngineState.LOADING)


def main() -> int:
    started_at_s = time.monotonic()
    model_dir, *settings = sys.argv[1:]
    overrides = [(path, value) for path, _, value in (item.partition("=") for item in settings)]
    config = load_config(None, {}, overrides)
    configure_logging("warning")
    return asyncio.run(run(config, load_text("chaos", Path(model_dir)), started_at_s, NoEngine))


if __name__ == "__main__":
    sys.exit(main())
