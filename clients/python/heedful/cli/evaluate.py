"""`heedful evaluate`: the trainer's evaluation of a version, with our key, certificate and target.

Owns how the trainer is told where the server is; the options and the work are its own. Imports
nothing of the trainer.
"""

import os

import typer

from heedful.cli.programs import TRAINER, become
from heedful.cli.trainer_process import environment


def evaluate(context: typer.Context) -> None:
    """Evaluate a version against a baseline: runs 'heedful-trainer evaluate' (see its --help)."""
    given = environment()
    if os.environ.get("HEEDFUL_TARGET"):
        given.setdefault("HEEDFUL_TRAINER__TARGET", os.environ["HEEDFUL_TARGET"])
    become(TRAINER, "evaluate", context.args, environment=given)
