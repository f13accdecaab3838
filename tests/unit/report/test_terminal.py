"""The data as the terminal shows it."""

from __future__ import annotations

import io

from rich.console import Console

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
