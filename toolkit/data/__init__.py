"""The data room: rows of any common shape to validated, masked examples.

`build_batches` reads and checks, `render_preview` shows what came of it. Packing and batching are TRL's.
"""

from __future__ import annotations

from toolkit.data.build import Batches, build_batches
from toolkit.data.preview import render_preview
from toolkit.data.report import DataReport, HeldOut, SplitReport
from toolkit.data.sources import read_chat_template, require_source

__all__ = [
    "Batches",
    "DataReport",
    "HeldOut",
    "SplitReport",
    "build_batches",
    "read_chat_template",
    "render_preview",
    "require_source",
]
