"""Checked reading of single values from a model's JSON files.

Owns the complaint about a value that is missing, of the wrong type or out of bounds; knows no keys
and no families. Pure functions, run while loading and wherever a model is looked at.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

from heedful_server.model.errors import BadCheckpoint

Config = Mapping[str, Any]

# Beyond any model there is, so that a damaged number is refused before it is allocated.
MAX_SIZE: Final = 1 << 24


def size(config: Config, key: str, default: int | None = None, most: int = MAX_SIZE) -> int:
    """A whole number from 1 to `most`; BadCheckpoint names the key otherwise."""
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise BadCheckpoint(f"config.json: {key} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise BadCheckpoint(f"config.json: {key} is {value!r}, not a whole number from 1 to {most}")
    return value


def number(config: Config, key: str, default: float | None = None) -> float:
    """A positive finite number; BadCheckpoint names the key otherwise."""
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadCheckpoint(f"config.json: {key} is {value!r}, not a number")
    if not math.isfinite(value) or value <= 0:
        raise BadCheckpoint(f"config.json: {key} is {value!r}, not a positive number")
    return float(value)


def flag(config: Config, key: str, default: bool) -> bool:
    """True or false; BadCheckpoint names the key otherwise."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise BadCheckpoint(f"config.json: {key} is {value!r}, not true or false")
    return value


def read_json(path: Path) -> Config:
    """The JSON object in a file.

    Raises:
        BadCheckpoint: there is no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadCheckpoint(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadCheckpoint(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{path}: expected a JSON object")
    return cast(Config, content)
