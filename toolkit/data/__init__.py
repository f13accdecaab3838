"""The data room: rows of any common shape to validated, masked examples.

`build_batches` reads and checks, `render_preview` shows what came of it. Packing and batching are TRL's.
"""

from __future__ import annotations

from toolkit.data.answers import Answer
from toolkit.data.build import Batches, build_batches
from toolkit.data.conversation import check_messages, check_tools
from toolkit.data.dialogue import ChatForm, Dialogue
from toolkit.data.encode import HeldOut
from toolkit.data.preview import render_preview
from toolkit.data.problems import InvalidRow
from toolkit.data.questions import Question
from toolkit.data.report import DataReport, SplitReport
from toolkit.data.sources import read_chat_template, require_source

__all__ = [
    "Answer",
    "Batches",
    "ChatForm",
    "DataReport",
    "Dialogue",
    "HeldOut",
    "InvalidRow",
    "Question",
    "SplitReport",
    "build_batches",
    "check_messages",
    "check_tools",
    "read_chat_template",
    "render_preview",
    "require_source",
]
