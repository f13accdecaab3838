"""Talking to an adapted model: in the terminal, and over HTTP through transformers' own server."""

from toolkit.serving.chat import Conversation, talk
from toolkit.serving.screen import Screen
from toolkit.serving.server import require_server, serve

__all__ = ["Conversation", "Screen", "require_server", "serve", "talk"]
