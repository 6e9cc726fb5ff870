"""The command line."""

from bayeskernel.cli.commands import main

__all__ = ["main"]
