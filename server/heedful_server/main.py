"""The program `heedful-server`: the command line, signals and the life of the process.

Owns which commands there are and the order of a start and a shutdown; everything else is built from
here. Imports no torch: the model lives in the engine child. Exit codes: 0 after a clean shutdown, 1
where the server cannot start, 2 for a command line or a configuration that is wrong.
"""

import asyncio
import enum
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from heedful_store import Scope

from heedful_server import catalogue
from heedful_server.config import ServerConfig, load_config, to_toml
from heedful_server.engine_client.client import EngineClient
from heedful_server.errors import EngineUnavailable, HeedfulServerError, InvalidConfig
from heedful_server.feedback import migration_command, token_keys
from heedful_server.feedback.migrating import NewBase
from heedful_server.identity import LOCAL_CALLER
from heedful_server.logging_setup import configure_logging
from heedful_server.model_sources import Progress
from heedful_server.security import key_commands
from heedful_server.serving import ServedModel, Server, load_text
from heedful_server.startup_report import StartupReport

app = typer.Typer(
    name="heedful-server",
    help="Serves a model over gRPC, with metrics and health over HTTP.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
model_app = typer.Typer(help="Models on this machine.", no_args_is_help=True)
config_app = typer.Typer(help="The configuration.", no_args_is_help=True)
app.add_typer(model_app, name="model")
app.add_typer(config_app, name="config")
tokens_app = typer.Typer(help="The keys behind completion tokens.", no_args_is_help=True)
app.add_typer(tokens_app, name="tokens")
keys_app = typer.Typer(help="API keys.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")

_LOADING_POLL_S = 0.1
_EXIT_CANNOT_START = 1
_EXIT_USAGE = 2
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Dtype(enum.StrEnum):
    """Float types that weights are written in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file. Default: heedful.toml here, if any.", metavar="FILE"),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting, e.g. engine.block_size=32.", metavar="PATH=VALUE"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Home = Annotated[Path | None, typer.Option("--home", help="Directory of pulled models.")]


@app.command()
def serve(
    config_file: ConfigFile = None,
    settings: Settings = None,
    home: Home = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Pulled model, Hugging Face id or directory.")
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="Form of the weights.")] = None,
    host: Annotated[str | None, typer.Option(help="Address of both ports.")] = None,
    port: Annotated[int | None, typer.Option(help="gRPC port; 0 takes a free one.")] = None,
    http_port: Annotated[int | None, typer.Option(help="HTTP port; 0 takes a free one.")] = None,
    threads: Annotated[int | None, typer.Option(help="Compute threads; 0 uses all cores.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure", help="Allow to listen beyond loopback without encryption or keys."
        ),
    ] = False,
) -> None:
    """Serve a model until SIGTERM or Ctrl-C."""
    flags = {
        "home": home,
        "model.name_or_path": model,
        "model.quantize": quantize,
        "grpc.host": host,
        "http.host": host,
        "grpc.port": port,
        "http.port": http_port,
        "engine.threads": threads,
        "log.level": log_level,
        "insecure": insecure or None,
    }
    config = _load(config_file, settings, flags)
    raise typer.Exit(_serve(config))


@model_app.command("pull")
def model_pull(
    name: Annotated[str, typer.Argument(help="Name or Hugging Face id.")] = catalogue.DEFAULT_MODEL,
    home: Home = None,
) -> None:
    """Get a model onto this machine."""
    config = _load(None, None, {"home": home})
    with StartupReport() as report:
        resolved = catalogue.pull(name, config.home_dir, _bytes_progress(report, name))
    typer.echo(str(resolved.path))


@model_app.command("list")
def model_list(home: Home = None) -> None:
    """List the models on this machine."""
    config = _load(None, None, {"home": home})
    rows = [("MODEL", "SIZE", "WEIGHTS", "SOURCE", "PATH")]
    for item in catalogue.list_models(config.home_dir):
        size = f"{item.size_bytes / 1e6:.0f} MB"
        rows.append((item.name, size, item.quantization, item.source, str(item.path)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())


@model_app.command("verify")
def model_verify(
    name: Annotated[str, typer.Argument(help="Name or Hugging Face id.")] = catalogue.DEFAULT_MODEL,
    home: Home = None,
) -> None:
    """Compare a pulled model with the checksums of its manifest."""
    config = _load(None, None, {"home": home})
    problems = catalogue.verify(name, config.home_dir)
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise typer.Exit(_EXIT_CANNOT_START)
    typer.echo(f"{name}: whole")


@model_app.command("dequantize")
def model_dequantize(
    out: Annotated[Path, typer.Option(help="Directory to write.", metavar="DIR")],
    model: Annotated[
        str | None, typer.Option("--model", help="Pulled model, Hugging Face id or directory.")
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="Form of the weights.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Form of what is written.")] = Dtype.FLOAT32,
    config_file: ConfigFile = None,
    settings: Settings = None,
    home: Home = None,
) -> None:
    """Write the weights that are served as a Hugging Face directory, for training on them."""
    config = _load(
        config_file,
        settings,
        {"home": home, "model.name_or_path": model, "model.quantize": quantize},
    )
    name = config.model.name_or_path
    with StartupReport() as report:
        resolved = catalogue.resolve(name, config.home_dir, _bytes_progress(report, name))
    engine = config.engine_config(resolved.path)
    arguments = {
        "--model-dir": engine.model_dir,
        "--quantize": engine.quantize,
        "--device": engine.device,
        "--native-kernels": str(int(engine.native_kernels)),
        "--out": str(out),
        "--dtype": dtype.value,
    }
    # A program of its own, because this one imports no torch.
    command = [sys.executable, "-P", "-m", "heedful_server.model.export"]
    command += [word for pair in arguments.items() for word in pair]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


@tokens_app.command("rotate")
def tokens_rotate(
    config_file: ConfigFile = None, settings: Settings = None, home: Home = None
) -> None:
    """Sign tokens with a new key; tokens given before stay valid until they expire."""
    config = _load(config_file, settings, {"home": home})
    key = token_keys.rotate(config.home_dir / token_keys.FILE_NAME, config.feedback.token_days)
    typer.echo(f"tokens are signed with key {key.kid} from now on")


@keys_app.command("create")
def keys_create(
    scope: Annotated[
        list[str],
        typer.Option(
            help="What the key permits: generate, feedback:own, feedback:any, train, deploy, "
            "admin or erase; may be given several times."
        ),
    ],
    tenant: Annotated[
        str, typer.Option(help='Whose key it is; "local" owns what was said without keys.')
    ] = LOCAL_CALLER.tenant,
    project: Annotated[str, typer.Option(help="The one project it opens. Default: all.")] = "",
    name: Annotated[str, typer.Option(help="What to call it.")] = "",
    expires_days: Annotated[
        int | None, typer.Option(min=1, help="Days for which it is valid. Default: for good.")
    ] = None,
    config_file: ConfigFile = None,
    settings: Settings = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Make an API key and print its secret, which is shown this once."""
    config = _load(config_file, settings, {"home": home})
    made = key_commands.create(config, Scope(tenant, project), name, scope, expires_days)
    typer.echo(key_commands.created_text(made, as_json))
    typer.echo(f"key {made.key.key_id} is made; its secret is not shown again", err=True)


@keys_app.command("list")
def keys_list(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's keys.")] = None,
    config_file: ConfigFile = None,
    settings: Settings = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """List API keys, revoked ones too, without their secrets."""
    keys = key_commands.find(_load(config_file, settings, {"home": home}), tenant)
    typer.echo(key_commands.listed_text(keys, as_json))


@keys_app.command("revoke")
def keys_revoke(
    key_id: Annotated[str, typer.Argument(help="Its id, from `keys list`.")],
    config_file: ConfigFile = None,
    settings: Settings = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Make an API key invalid for good; a running server follows within seconds."""
    key = key_commands.revoke(_load(config_file, settings, {"home": home}), key_id)
    done = json.dumps(key_commands.as_json(key)) if as_json else f"key {key.key_id} is revoked"
    typer.echo(done)


@app.command("migrate-base")
def migrate_base(
    to: Annotated[str, typer.Option("--to", help="The new base: name, id or directory.")],
    tenant: Annotated[str, typer.Option(help="Whose feedback.")] = LOCAL_CALLER.tenant,
    project: Annotated[str | None, typer.Option(help="Only this project. Default: all.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count, write nothing.")] = False,
    config_file: ConfigFile = None,
    settings: Settings = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Carry feedback to a new base model: the same texts as that model's tokens.

    The next refresh under the new base learns from the copies; the old base keeps the originals.
    Safe to repeat: what was said since is added, what was taken back is taken back there too.
    """
    config = _load(config_file, settings, {"home": home})
    with StartupReport() as report:
        resolved = catalogue.resolve(to, config.home_dir, _bytes_progress(report, to))
    model = load_text(resolved.name, resolved.path)
    base = NewBase(model.base_id, model.tokenizer, model.template)
    done = migration_command.run(config, base, tenant, project, dry_run)
    typer.echo(migration_command.text(done, base.base_id, dry_run, as_json))


@config_app.command("show")
def config_show(config_file: ConfigFile = None, settings: Settings = None) -> None:
    """Print the configuration in effect as TOML; passwords are masked."""
    typer.echo(to_toml(_load(config_file, settings, {})), nl=False)


def main() -> None:
    """Run the command line."""
    try:
        app()
    except InvalidConfig as error:
        sys.exit(_complain(error, _EXIT_USAGE))
    except HeedfulServerError as error:
        sys.exit(_complain(error, _EXIT_CANNOT_START))


def _complain(error: HeedfulServerError, exit_code: int) -> int:
    typer.echo(f"heedful-server: {error}", err=True)
    return exit_code


def _load(
    file: Path | None, settings: list[str] | None, flags: dict[str, str | int | Path | None]
) -> ServerConfig:
    overrides = []
    for setting in settings or ():
        path, equals, value = setting.partition("=")
        if not equals:
            raise InvalidConfig(f"--set {setting}: must be PATH=VALUE")
        overrides.append((path.strip(), value.strip()))
    overrides += [(path, str(value)) for path, value in flags.items() if value is not None]
    return load_config(file, os.environ, overrides)


def _serve(config: ServerConfig) -> int:
    started_at_s = time.monotonic()
    configure_logging(config.log.level, config.log.format)
    with StartupReport() as report:
        name = config.model.name_or_path
        report.line(f"model {name}", model=name)
        resolved = catalogue.resolve(name, config.home_dir, _bytes_progress(report, name))
        model = load_text(resolved.name, resolved.path)
    return asyncio.run(run(config, model, started_at_s))


async def run(
    config: ServerConfig,
    model: ServedModel,
    started_at_s: float,
    make_engine: Callable[..., EngineClient] = EngineClient,
) -> int:
    """Serve until a signal asks to stop; return the exit code.

    Args:
        config: the configuration.
        model: what is served.
        started_at_s: when the process began, by the monotonic clock.
        make_engine: makes the engine's client.

    Raises:
        StartupError: a port cannot be opened.
    """
    server = Server(config, model, make_engine)
    stop_requested = asyncio.create_task(_listen_to_signals(server).wait())
    try:
        await server.start()
        with StartupReport() as report:
            await _until_ready(server, stop_requested, report, started_at_s)
        await stop_requested
    except EngineUnavailable as error:
        return _complain(error, _EXIT_CANNOT_START)
    finally:
        stop_requested.cancel()
        await server.stop(config.grace_s)
        for number in _STOP_SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)
    return 0


def _listen_to_signals(server: Server) -> asyncio.Event:
    """Return an event that the first signal sets; the second one hurries the server's stop."""
    stopping = asyncio.Event()

    def on_signal() -> None:
        if stopping.is_set():
            server.hurry()
        stopping.set()

    for number in _STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stopping


async def _until_ready(
    server: Server, stop_requested: asyncio.Task[bool], report: StartupReport, started_at_s: float
) -> None:
    report.line(f"gRPC on {server.grpc_address}", grpc=server.grpc_address)
    if server.http_address:
        scheme = "http" if server.certificates is None else "https"
        report.line(f"HTTP on {scheme}://{server.http_address}", http=server.http_address)
    ready = asyncio.create_task(server.engine.wait_ready())
    while not ready.done() and not stop_requested.done():
        report.progress(*server.engine.loading)
        await asyncio.wait(
            (ready, stop_requested),
            timeout=_LOADING_POLL_S,
            return_when=asyncio.FIRST_COMPLETED,
        )
    if not ready.done():
        ready.cancel()
        return
    info = ready.result()
    elapsed_s = time.monotonic() - started_at_s
    report.line(
        f"ready in {elapsed_s:.1f} s: {info.quantization} weights on {info.device}, "
        f"{info.kernel_path} kernels, context {info.context_tokens} tokens",
        elapsed_s=round(elapsed_s, 2),
        quantization=info.quantization,
        device=info.device,
    )


def _bytes_progress(report: StartupReport, name: str) -> Progress:
    def progress(num_bytes: int, total_bytes: int) -> None:
        report.progress(f"pulling {name}", num_bytes / total_bytes if total_bytes else 0.0)

    return progress


if __name__ == "__main__":
    main()
