"""Talking to an adapted model: in the terminal, and over HTTP through transformers' own server."""

from toolkit.serving.chat import Conversation, Screen, talk
from toolkit.serving.server import require_server, serve

__all__ = ["Conversation", "Screen", "require_server", "serve", "talk"]
