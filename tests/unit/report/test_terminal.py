"""The data as the terminal shows it."""

from __future__ import annotations

import ast
import io
import re
from pathlib import Path

from rich.console import Console

import toolkit
from toolkit.data import DataReport, SplitReport
from toolkit.data.report import SourceReport
from toolkit.report import terminal


def test_each_data_set_and_each_notice_is_a_line() -> None:
    split = SplitReport(rows=3, kept=5, drops={}, tokens=50, trained_tokens=20, lengths=())
    sources = (SourceReport("a[b].jsonl", 2.0, 2, 2, 4, 40, 16), SourceReport("c.jsonl", 1.0, 1, 1, 1, 10, 4))
    report = DataReport("text", {"train": split}, 0, {"column '[red]' is not used": 3}, (), sources)
    console = Console(file=io.StringIO(), width=200, no_color=True)
    terminal.data(console, report)
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue().splitlines()
    assert "a[b].jsonl, weight 2: an epoch sees 4 of 2 examples in 2 rows, 40 tokens, 16 trained" in said[1]
    assert "c.jsonl, weight 1" in said[2]
    assert "column '[red]' is not used: 3" in said[3]


PATHS = re.compile(r"\b(folder|artifact|path|out|file|why|line)\b")


def test_no_path_is_read_as_markup() -> None:
    """rich takes `[a]` in a folder's name for a style and leaves it out."""
    wrong = []
    for source in sorted(Path(toolkit.__file__).parent.rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Call)):
            is_print = isinstance(call.func, ast.Attribute) and call.func.attr == "print"
            if not is_print or any(keyword.arg == "markup" for keyword in call.keywords):
                continue
            shown = [
                part for argument in call.args for part in ast.walk(argument) if isinstance(part, ast.FormattedValue)
            ]
            words = [ast.unparse(part.value) for part in shown]
            wrong += [
                f"{source.name}:{call.lineno}: {each}" for each in words if PATHS.search(each) and "escape(" not in each
            ]
    assert not wrong
