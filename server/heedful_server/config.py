"""The server's configuration: one typed tree and where its values come from.

Owns names, defaults, ranges and descriptions of every setting, and the order of the sources:
command line, then environment (`HEEDFUL_GRPC__PORT=1`), then `heedful.toml`, then the defaults.
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
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from heedful_server.errors import InvalidConfig
from heedful_server.protocol import EngineConfig

ENV_PREFIX = "HEEDFUL_"
DEFAULT_FILE = Path("heedful.toml")
# Variables of the client, the kernels and the tests share the prefix but are not settings.
_FOREIGN_ENV_PREFIXES = ("HEEDFUL_TEST_", "HEEDFUL_CPU_", "HEEDFUL_CLIENT_")
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
# In postgresql://user:PASSWORD@host and in ?password=PASSWORD.
_PASSWORD = re.compile(r"(://[^:/@]*:).*(?=@)|([?&]password=)[^&#]*")

Port = Annotated[int, Field(ge=0, le=65535)]
PositiveInt = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(_Group):
    """Which model is served."""

    name_or_path: str = Field(
        default="SmolLM2-135M-Instruct",
        description="Name of a pulled model, Hugging Face id, or directory.",
    )
    quantize: str = Field(
        default="auto",
        description="Form of the weights: auto, float64, float32, bfloat16, int8, int4 or nf4.",
    )


class GrpcSettings(_Group):
    """The gRPC port."""

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: Port = Field(default=50051, description="Port to listen on; 0 takes a free one.")
    max_message_bytes: PositiveInt = Field(
        default=4 * 1024 * 1024, description="Longest request message that is read, in bytes."
    )
    write_timeout_s: PositiveSeconds = Field(
        default=60.0,
        description="A stream whose reader blocks it for so many seconds is cancelled.",
    )
    reflection: bool = Field(
        default=True, description="Whether the contract can be read from the port, without a key."
    )


class HttpSettings(_Group):
    """The HTTP port: metrics and health."""

    enabled: bool = Field(default=True, description="Whether the HTTP port is opened.")
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: Port = Field(default=8080, description="Port to listen on; 0 takes a free one.")


class EngineSettings(_Group):
    """The engine process."""

    device: str = Field(
        default="auto", description='Where the model runs: "auto", "cpu" or "cuda".'
    )
    threads: int = Field(default=0, ge=0, description="Compute threads; 0 uses every core.")
    kv_cache_bytes: int = Field(
        default=0,
        ge=0,
        description="Memory for keys and values, in bytes; 0 takes a share of what is free.",
    )
    max_model_len: int = Field(
        default=0,
        ge=0,
        description="Most tokens of prompt and completion together; 0 is the model's own.",
    )
    max_sequences: PositiveInt = Field(default=64, description="Most sequences that run at once.")
    max_batch_tokens: PositiveInt = Field(
        default=512, description="Most tokens computed in one step."
    )
    block_size: PositiveInt = Field(default=16, description="Tokens in one KV block.")
    prefix_cache: bool = Field(
        default=True, description="Whether prompts that begin alike share KV blocks."
    )
    native_kernels: bool = Field(
        default=True, description="Whether native CPU kernels may be used."
    )
    max_queue: int = Field(
        default=256,
        ge=0,
        description="Most sequences that wait beyond max_sequences; more are refused.",
    )
    heartbeat_timeout_s: PositiveSeconds = Field(
        default=10.0, description="An engine silent for so many seconds is reported as not ready."
    )
    hang_timeout_s: PositiveSeconds = Field(
        default=120.0,
        description="An engine silent for so many seconds is killed and started again.",
    )


class LimitSettings(_Group):
    """What one request may ask for, beside the limits that the contract itself names."""

    max_prompt_bytes: PositiveInt = Field(
        default=1024 * 1024, description="Longest prompt as text, in bytes of UTF-8."
    )
    max_messages: PositiveInt = Field(
        default=1024, description="Most messages of one conversation."
    )
    max_detokenize_tokens: PositiveInt = Field(
        default=262_144, description="Most token ids of one Detokenize call."
    )


class FeedbackSettings(_Group):
    """The log of answers and of what people say about them."""

    store_url: str = Field(
        default="",
        description="sqlite:///FILE or postgresql://…; empty: heedful.db in the home directory.",
    )
    profile: Literal["auto", "personal", "team", "public"] = Field(
        default="auto",
        description='Who the raters are; "auto" is "personal" on loopback and "team" elsewhere.',
    )
    consent_log: Literal["auto", "none", "metadata", "full"] = Field(
        default="auto",
        description="Most that is kept of an answer, which a request can only narrow; "
        '"auto" is "full" with the profile personal and "metadata" otherwise.',
    )
    consent_train: Literal["auto", "no", "yes"] = Field(
        default="auto",
        description="Whether answers may be trained on, which a request can only narrow; "
        '"auto" is "yes" with the profile personal and "no" otherwise.',
    )
    retention_days: int = Field(
        default=0,
        ge=0,
        description="Days after which the content of unrated answers is removed; 0 keeps it.",
    )
    disk_watermark_bytes: int = Field(
        default=512 * 1024 * 1024,
        ge=0,
        description="With less free space answers are no longer logged, so that feedback "
        "still is; 0 turns the check off.",
    )
    reserve_bytes: int = Field(
        default=64 * 1024 * 1024,
        ge=0,
        description="With less free space feedback is refused too; 0 turns the check off.",
    )
    log_timeout_s: PositiveSeconds = Field(
        default=1.0,
        description="Longest that the end of an answer waits for its log entry; an answer "
        "whose entry is late cannot be rated.",
    )
    token_days: PositiveInt = Field(
        default=90, description="Days for which a completion token is accepted."
    )


class TlsSettings(_Group):
    """Encryption of both ports."""

    cert_file: str = Field(
        default="",
        description="PEM file of the server's certificate with its chain; empty: no encryption.",
    )
    key_file: str = Field(default="", description="PEM file of the certificate's private key.")
    client_ca_file: str = Field(
        default="",
        description="PEM file of the authorities whose clients may connect to the gRPC port; "
        "empty: clients need no certificate.",
    )


class AuthSettings(_Group):
    """Who may call."""

    mode: Literal["auto", "none", "keys"] = Field(
        default="auto",
        description='"keys": every call needs an API key; "none": none does; "auto": keys beyond '
        "loopback unless insecure is set, and everywhere once a key was made.",
    )


class QuotaSettings(_Group):
    """How much each tenant may ask for; 0 sets no limit."""

    requests_per_s: Rate = Field(
        default=0.0, description="Generations, scorings and the like a second; 0: no limit."
    )
    tokens_per_s: Rate = Field(
        default=0.0,
        description="Tokens a second, of prompts and completions; max_tokens counts until the "
        "completion has ended. 0: no limit.",
    )
    feedback_per_s: Rate = Field(
        default=0.0, description="Judgements a second, imported ones too; 0: no limit."
    )
    burst_s: PositiveSeconds = Field(
        default=10.0, description="Seconds for which an unused quota is saved up."
    )


class LogSettings(_Group):
    """Logging to standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe level that is logged."
    )
    format: Literal["auto", "console", "json"] = Field(
        default="auto", description='"auto" is "console" on a terminal and "json" elsewhere.'
    )


class ServerConfig(_Group):
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
            prefix_cache=engine.prefix_cache,
            native_kernels=engine.native_kernels,
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
