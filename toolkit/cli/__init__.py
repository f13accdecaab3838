"""The command `onecard`: one module a group of verbs, joined in `command`."""

from toolkit.cli.command import app, main

__all__ = ["app", "main"]
