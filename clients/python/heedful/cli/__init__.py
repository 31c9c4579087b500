"""The command line: starts programs and calls the client; imports neither server nor torch."""

from heedful.cli.app import main

__all__ = ["main"]
