"""The server's configuration: one typed tree and where its values come from.

Owns the tree of the groups that ``setting_groups`` describes, and the order of the sources: command
line, then environment (`HEEDFUL_GRPC__PORT=1`), then `heedful.toml`, then the defaults.
It reads the file and the mapping that it is given, starts nothing and knows nothing of sockets,
models or gRPC. Runs in the server process, once.
"""

import difflib
import ipaddress
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from heedful_server.errors import InvalidConfig
from heedful_server.protocol import EngineConfig
from heedful_server.setting_groups import (
    AuthSettings,
    DeploymentSettings,
    EngineSettings,
    FeedbackSettings,
    GrpcSettings,
    HttpSettings,
    LimitSettings,
    LogSettings,
    ModelSettings,
    QuotaSettings,
    SettingGroup,
    TlsSettings,
)

ENV_PREFIX = "HEEDFUL_"
DEFAULT_FILE = Path("heedful.toml")
# Variables of the client, the kernels and the tests share the prefix but are not settings.
_FOREIGN_ENV_PREFIXES = ("HEEDFUL_TEST_", "HEEDFUL_CPU_", "HEEDFUL_CLIENT_", "HEEDFUL_TRAINER__")
_FOREIGN_ENV = frozenset(
    {
        "HEEDFUL_API_KEY",
        "HEEDFUL_FAILPOINTS",
        "HEEDFUL_METRICS_URL",
        "HEEDFUL_PROJECT",
        "HEEDFUL_TARGET",
        "HEEDFUL_TLS_CA",
        "HEEDFUL_TOKEN",
    }
)
# The trainer reads its own table of the same file, and its own variables.
_FOREIGN_TABLES = frozenset({"trainer"})
# In postgresql://user:PASSWORD@host and in ?password=PASSWORD.
_PASSWORD = re.compile(r"(://[^:/@]*:).*(?=@)|([?&]password=)[^&#]*")


class ServerConfig(SettingGroup):
    """Everything that can be set."""

    home: Path = Field(
        default=Path("~/.heedful"), description="Directory of models, store and keys."
    )
    insecure: bool = Field(
        default=False, description="Allows to listen beyond loopback without encryption and keys."
    )
    stream_interval_s: float = Field(
        default=0.03,
        ge=0,
        le=10,
        description="Least seconds between two messages about one streamed completion; "
        "in proportion longer where more than 16 requests run.",
    )
    grace_s: float = Field(
        default=30.0, ge=0, description="Seconds that running calls may take to end at shutdown."
    )
    model: ModelSettings = ModelSettings()
    grpc: GrpcSettings = GrpcSettings()
    http: HttpSettings = HttpSettings()
    engine: EngineSettings = EngineSettings()
    limits: LimitSettings = LimitSettings()
    feedback: FeedbackSettings = FeedbackSettings()
    tls: TlsSettings = TlsSettings()
    auth: AuthSettings = AuthSettings()
    quota: QuotaSettings = QuotaSettings()
    deployment: DeploymentSettings = DeploymentSettings()
    log: LogSettings = LogSettings()

    @property
    def home_dir(self) -> Path:
        """The home directory with `~` expanded."""
        return self.home.expanduser()

    @property
    def store_url(self) -> str:
        """URL of the store."""
        return self.feedback.store_url or f"sqlite:///{self.home_dir / 'heedful.db'}"

    @property
    def profile(self) -> Literal["personal", "team", "public"]:
        """Who the raters are, with "auto" resolved."""
        if self.feedback.profile != "auto":
            return self.feedback.profile
        return "team" if self.exposed else "personal"

    @property
    def exposed(self) -> tuple[str, ...]:
        """The settings of the addresses that other machines can reach."""
        hosts = {"grpc.host": self.grpc.host}
        if self.http.enabled:
            hosts["http.host"] = self.http.host
        return tuple(setting for setting, host in hosts.items() if not _is_loopback(host))

    @property
    def key_rule(self) -> Literal["never", "once_one_exists", "always"]:
        """When calls need a key; "insecure" leaves a server without keys open, as it says."""
        if self.auth.mode == "none":
            return "never"
        if self.auth.mode == "keys" or (self.exposed and not self.insecure):
            return "always"
        return "once_one_exists"

    @property
    def consent_log(self) -> Literal["none", "metadata", "full"]:
        """Most that is kept of an answer, with "auto" resolved."""
        if self.feedback.consent_log != "auto":
            return self.feedback.consent_log
        return "full" if self.profile == "personal" else "metadata"

    @property
    def consent_train(self) -> bool:
        """Whether answers may be trained on, with "auto" resolved."""
        if self.feedback.consent_train != "auto":
            return self.feedback.consent_train == "yes"
        return self.profile == "personal"

    def engine_config(self, model_dir: Path) -> EngineConfig:
        """Return what the engine child is told."""
        engine = self.engine
        return EngineConfig(
            model_dir=str(model_dir),
            quantize=self.model.quantize,
            device=engine.device,
            num_threads=engine.threads,
            block_size=engine.block_size,
            kv_cache_bytes=engine.kv_cache_bytes,
            max_model_len=engine.max_model_len,
            max_sequences=engine.max_sequences,
            max_batch_tokens=engine.max_batch_tokens,
            max_background_tokens=engine.max_background_tokens,
            prefix_cache=engine.prefix_cache,
            native_kernels=engine.native_kernels,
            deterministic=engine.deterministic,
            max_adapters=self.deployment.max_adapters,
            max_adapter_rank=self.deployment.max_adapter_rank,
            log_level=self.log.level,
        )


def settings(model: type[BaseModel] = ServerConfig, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted path and the description of every setting."""
    for name, field in model.model_fields.items():
        group = field.annotation
        if isinstance(group, type) and issubclass(group, BaseModel):
            yield from settings(group, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.description or ""


def load_config(
    file: Path | None, environ: Mapping[str, str], overrides: Sequence[tuple[str, str]]
) -> ServerConfig:
    """Merge the sources and return the configuration.

    Args:
        file: a TOML file that must exist; None reads `heedful.toml` if there is one here.
        environ: the environment variables.
        overrides: dotted paths and their values, as the command line gives them; the last one wins.

    Raises:
        InvalidConfig: an unknown key (the message names the nearest one) or a value out of range.
    """
    tree = _read_file(file)
    for path, value in [*_environment(environ), *overrides]:
        _set(tree, path, value)
    try:
        config = ServerConfig.model_validate(tree)
    except ValidationError as error:
        raise InvalidConfig(_explain(error)) from None
    _require_whole_tls(config)
    _require_safe_binding(config)
    return config


def to_toml(config: ServerConfig) -> str:
    """Return the text of a `heedful.toml` with every setting and its description.

    A password in a URL is masked.
    """
    descriptions = dict(settings())
    feedback = config.feedback
    masked_url = _PASSWORD.sub(r"\1\2***", feedback.store_url)
    masked = feedback.model_copy(update={"store_url": masked_url})
    config = config.model_copy(update={"feedback": masked})
    scalars: list[str] = []
    tables: list[str] = []
    for name, value in config.model_dump(mode="json").items():
        if not isinstance(value, dict):
            scalars += [f"# {descriptions[name]}", f"{name} = {json.dumps(value)}"]
            continue
        tables += ["", f"[{name}]"]
        for key, inner in value.items():
            tables += [f"# {descriptions[f'{name}.{key}']}", f"{key} = {json.dumps(inner)}"]
    return "\n".join([*scalars, *tables, ""])


def _read_file(file: Path | None) -> dict[str, Any]:
    if file is None and not DEFAULT_FILE.exists():
        return {}
    path = file or DEFAULT_FILE
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidConfig(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{path}: {error}") from None
    tree = {name: value for name, value in tree.items() if name not in _FOREIGN_TABLES}
    for dotted in _leaves(tree):
        _require_known(dotted, str(path))
    return tree


def _environment(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    found = []
    for name, value in sorted(environ.items()):
        if not name.startswith(ENV_PREFIX) or name in _FOREIGN_ENV:
            continue
        if name.startswith(_FOREIGN_ENV_PREFIXES):
            continue
        path = name.removeprefix(ENV_PREFIX).lower().replace("__", ".")
        _require_known(path, f"environment variable {name}")
        found.append((path, value))
    return found


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _set(tree: dict[str, Any], path: str, value: str) -> None:
    _require_known(path, "command line")
    *groups, key = path.split(".")
    for group in groups:
        tree = tree.setdefault(group, {})
    tree[key] = value


def _require_known(path: str, source: str) -> None:
    known = [name for name, _ in settings()]
    if path in known:
        return
    message = f"unknown setting {path!r} ({source})"
    last = path.rpartition(".")[2]
    by_last = {name.rpartition(".")[2]: name for name in reversed(known)}
    nearest = difflib.get_close_matches(path, known, 1, 0.6)
    nearest = nearest or [by_last[m] for m in difflib.get_close_matches(last, by_last, 1, 0.6)]
    raise InvalidConfig(f"{message}; did you mean {nearest[0]!r}?" if nearest else message)


def _explain(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']} (got {item['input']!r})"
        for item in error.errors()
    )


def _require_safe_binding(config: ServerConfig) -> None:
    missing = []
    if not config.tls.cert_file:
        missing.append("encryption (tls.cert_file, tls.key_file)")
    if config.auth.mode == "none":
        missing.append("API keys (auth.mode)")
    if missing and config.exposed and not config.insecure:
        raise InvalidConfig(
            f"{' and '.join(config.exposed)} can be reached from other machines, and this server "
            f"has no {' and no '.join(missing)}; use 127.0.0.1, or say --insecure if the network "
            "is trusted"
        )


def _require_whole_tls(config: ServerConfig) -> None:
    tls = config.tls
    if bool(tls.cert_file) != bool(tls.key_file):
        given, other = ("cert", "key") if tls.cert_file else ("key", "cert")
        raise InvalidConfig(f"tls.{given}_file is given without tls.{other}_file")
    if tls.client_ca_file and not tls.cert_file:
        raise InvalidConfig("tls.client_ca_file is given without tls.cert_file and tls.key_file")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
