"""What a request is bound to for its whole life: one version and the adapter behind it.

Owns that value and the names by which requests ask for models. Plain data, no input or output.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from heedful_store import BASE_VERSION, Scope

from heedful_server.protocol import BASE_POLICY, AdapterRole

CHAMPION: Final = "champion"
CHALLENGER: Final = "challenger"
RUN_PREFIX: Final = "run:"

MAX_NAME_BYTES = 200
# No separator and no leading dot: such a name cannot leave its directory.
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class ServedPolicy:
    """A version and where its files are; the base has none."""

    version: str
    adapter_id: str = BASE_POLICY  # what the engine calls it: the content hash, or "base"
    path: Path | None = None
    role: AdapterRole = "policy"

    @property
    def content_hash(self) -> str:
        """The hash of the adapter's files; empty for the base."""
        return "" if self.adapter_id == BASE_POLICY else self.adapter_id


BASE = ServedPolicy(BASE_VERSION)


@dataclass(frozen=True, slots=True)
class RunAdapterName:
    """An adapter of a run, which is not in the registry."""

    scope: Scope
    run_id: str
    name: str

    @property
    def model(self) -> str:
        """The name by which requests ask for it."""
        return f"{RUN_PREFIX}{self.run_id}/{self.name}"


def is_part(text: str) -> bool:
    """Say whether a text may be the id of a run or the name of one of its adapters."""
    return _PART.fullmatch(text) is not None


def run_adapter(scope: Scope, model: str) -> RunAdapterName | None:
    """Return which adapter of a run a model's name means; None where it means something else."""
    run_id, slash, name = model.removeprefix(RUN_PREFIX).partition("/")
    if not model.startswith(RUN_PREFIX) or not slash or not is_part(run_id) or not is_part(name):
        return None
    return RunAdapterName(scope, run_id, name)
