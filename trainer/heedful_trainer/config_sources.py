"""Where the trainer's settings come from: command line, environment, file, defaults.

Owns the order of the sources and the errors about them; the tree itself is in ``config``. The file
is the server's ``heedful.toml``: its table ``[trainer]`` is ours, and home, store and profile are
read from the server's own keys, so that one file configures both. It reads the file and the mapping
that it is given. Pure apart from that, any thread.
"""

from __future__ import annotations

import difflib
import ipaddress
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heedful_store import Profile
from pydantic import BaseModel, ValidationError

from heedful_trainer.config import TrainerConfig
from heedful_trainer.errors import InvalidConfig
from heedful_trainer.presets import PRESETS

ENV_PREFIX = "HEEDFUL_TRAINER__"
DEFAULT_FILE = Path("heedful.toml")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a trainer finds what it shares with the server."""

    home: Path
    store_url: str
    profile: Profile


@dataclass(frozen=True, slots=True)
class Loaded:
    """The configuration of a process."""

    trainer: TrainerConfig
    place: Place


def load(
    file: Path | None,
    environ: Mapping[str, str],
    overrides: Sequence[tuple[str, str]] = (),
    *,
    home: Path | None = None,
    store_url: str = "",
) -> Loaded:
    """Merge the sources.

    Args:
        file: a TOML file that must exist; None reads ``heedful.toml`` if there is one here.
        environ: the environment variables.
        overrides: dotted paths below ``trainer`` with their values; the last one wins.
        home: overrides the file's and the environment's.
        store_url: the same for the store.

    Raises:
        InvalidConfig: an unknown key (the message names the nearest one) or a value out of range.
    """
    server = _read_file(file)
    tree = server.pop("trainer", {})
    if not isinstance(tree, dict):
        raise InvalidConfig("trainer: must be a table")
    for path in _leaves(tree):
        _require_known(path, "the table [trainer]")
    for name, value in sorted(environ.items()):
        if name.startswith(ENV_PREFIX):
            path = name.removeprefix(ENV_PREFIX).lower().replace("__", ".")
            _set(tree, path, value, f"environment variable {name}")
    for path, value in overrides:
        _set(tree, path, value, "command line")
    tree = _over_preset(tree)
    return Loaded(_validate(tree), _place(server, environ, home, store_url))


def with_overrides(config: TrainerConfig, overrides: Mapping[str, object]) -> TrainerConfig:
    """Return a run's configuration: the process's, with what StartRefresh was given.

    Raises:
        InvalidConfig: as for ``load``.
    """
    tree = config.model_dump(mode="json")
    # What a preset says gives way to what is set beside it.
    for path, value in PRESETS.get(str(overrides.get("preset", "none")), {}).items():
        _set(tree, path, value, "preset")
    for path, value in sorted(overrides.items()):
        _set(tree, path, value, "overrides of the run")
    return _validate(tree)


def settings(model: type[BaseModel] = TrainerConfig, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted path and the description of every setting."""
    for name, field in model.model_fields.items():
        group = field.annotation
        if isinstance(group, type) and issubclass(group, BaseModel):
            yield from settings(group, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.description or ""


def _validate(tree: Mapping[str, Any]) -> TrainerConfig:
    try:
        config = TrainerConfig.model_validate(tree)
    except ValidationError as error:
        lines = (
            f"trainer.{'.'.join(str(part) for part in item['loc'])}: {item['msg']} "
            f"(got {item['input']!r})"
            for item in error.errors()
        )
        raise InvalidConfig("; ".join(lines)) from None
    parts = config.dataset
    held_out = parts.validation_share + parts.calibration_share + parts.gate_share
    if held_out > 0.8:
        raise InvalidConfig(f"trainer.dataset: the held-out shares add up to {held_out:.2f} > 0.8")
    return config


def _read_file(file: Path | None) -> dict[str, Any]:
    if file is None and not DEFAULT_FILE.exists():
        return {}
    path = file or DEFAULT_FILE
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidConfig(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{path}: {error}") from None


def _place(
    server: Mapping[str, Any], environ: Mapping[str, str], home: Path | None, store_url: str
) -> Place:
    """Resolve what the server resolves, from the same keys and in the same order."""

    def value(path: str, default: str) -> str:
        name = "HEEDFUL_" + path.upper().replace(".", "__")
        if name in environ:
            return environ[name]
        table: Any = server
        for key in path.split("."):
            table = table.get(key, {}) if isinstance(table, Mapping) else {}
        return str(table) if not isinstance(table, Mapping) else default

    where = (home or Path(value("home", "~/.heedful"))).expanduser()
    url = store_url or value("feedback.store_url", "") or f"sqlite:///{where / 'heedful.db'}"
    profile = value("feedback.profile", "auto")
    if profile == "auto":
        hosts = [value("grpc.host", "127.0.0.1"), value("http.host", "127.0.0.1")]
        profile = "personal" if all(map(_is_loopback, hosts)) else "team"
    if profile not in ("personal", "team", "public"):
        raise InvalidConfig(f"feedback.profile: {profile!r} is none of personal, team, public")
    return Place(where, url, profile)  # type: ignore[arg-type]


def _over_preset(tree: dict[str, Any]) -> dict[str, Any]:
    """Return what was set, on top of the preset that is named in it."""
    whole: dict[str, Any] = {}
    for path, value in PRESETS.get(str(tree.get("preset", "none")), {}).items():
        _set(whole, path, value, "preset")
    for path in _leaves(tree):
        found: Any = tree
        for key in path.split("."):
            found = found[key]
        _set(whole, path, found, "settings")
    return whole


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _set(tree: dict[str, Any], path: str, value: object, source: str) -> None:
    _require_known(path, source)
    *groups, key = path.split(".")
    for group in groups:
        tree = tree.setdefault(group, {})
    tree[key] = value


def _require_known(path: str, source: str) -> None:
    known = [name for name, _ in settings()]
    if path in known:
        return
    last = path.rpartition(".")[2]
    by_last = {name.rpartition(".")[2]: name for name in reversed(known)}
    nearest = difflib.get_close_matches(path, known, 1, 0.6)
    nearest = nearest or [by_last[m] for m in difflib.get_close_matches(last, by_last, 1, 0.6)]
    message = f"unknown setting trainer.{path} ({source})"
    raise InvalidConfig(f"{message}; did you mean {nearest[0]!r}?" if nearest else message)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
