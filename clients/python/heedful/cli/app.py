"""The commands of `heedful` put together, and how the program starts.

Owns the list of commands; each module beside it owns one of them.
"""

from importlib import metadata
from typing import Annotated

import typer

from heedful.cli.bench import bench
from heedful.cli.chat import chat
from heedful.cli.connection import ENVIRONMENT_HELP
from heedful.cli.demo import demo
from heedful.cli.erase import erase
from heedful.cli.evaluate import evaluate
from heedful.cli.feedback import build_feedback
from heedful.cli.gate import build_gate
from heedful.cli.generate import generate
from heedful.cli.models import build_models
from heedful.cli.output import write
from heedful.cli.programs import PASS_THROUGH, keys, migrate_base, model, serve, train
from heedful.cli.refresh import build_refresh
from heedful.cli.status import status
from heedful.cli.text import detokenize, score, tokenize
from heedful.cli.up import up

EXIT_CODES_HELP = (
    "Exit codes: 0 done; 1 the request failed (status: not ready; bench: some request failed); "
    "2 wrong usage; 3 no server, or not ready in time; 4 --timeout passed; 130 interrupted."
)


def version() -> None:
    """Print the version of this program."""
    write(f"heedful {metadata.version('heedful')}\n")


def _version_option(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


def build_app() -> typer.Typer:
    """Returns the command line with all its commands."""
    app = typer.Typer(
        name="heedful",
        no_args_is_help=True,
        pretty_exceptions_show_locals=False,
        help="Serve a model that learns from its users, and talk to it.",
        epilog=f"{EXIT_CODES_HELP}\n\n{ENVIRONMENT_HELP}",
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def options(
        show_version: Annotated[
            bool,
            typer.Option(
                "--version",
                help="Print the version and leave.",
                is_eager=True,
                callback=_version_option,
            ),
        ] = False,
    ) -> None:
        pass

    for passed_on in (serve, train, evaluate, model, keys, migrate_base):
        name = passed_on.__name__.replace("_", "-")
        app.command(name, context_settings=PASS_THROUGH, add_help_option=False)(passed_on)
    for name, group in (
        ("feedback", build_feedback()),
        ("models", build_models()),
        ("refresh", build_refresh()),
        ("gate", build_gate()),
    ):
        app.add_typer(group, name=name)
    for command in (
        up,
        demo,
        erase,
        chat,
        generate,
        status,
        score,
        tokenize,
        detokenize,
        bench,
        version,
    ):
        app.command()(command)
    return app


def main() -> None:
    """Runs the program `heedful`."""
    build_app()()
