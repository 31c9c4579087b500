"""Build hook: a wheel that holds the native CPU kernels says for which platform it is.

Owns the wheel's tag. The kernels are built before, by `make wheel`; without them the wheel is plain
Python, and torch operators compute. Runs in the build's own environment.
"""

import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_LIBRARIES = "kernels/heedful_kernels/cpu/_lib"


class NativeWheelHook(BuildHookInterface):
    """Tags a wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Take the built libraries along; an editable install finds them where they are."""
        if version == "editable" or not any(Path(self.root, _LIBRARIES).glob("*.so")):
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["artifacts"].append(f"{_LIBRARIES}/*.so")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
