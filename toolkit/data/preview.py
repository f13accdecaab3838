"""The data set as a person checks it: the first examples as tokens with their mask, the lengths, the drops.

rich draws it. Trained tokens are green, and stand in «…» where the console has no colour, so that a log shows the
mask too. Control characters of the data are written out: they must not reach the terminal.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from toolkit.data.build import IGNORED, Batches
from toolkit.data.report import DataReport, SplitReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["render_preview"]

_MOST_TOKENS = 400
_BAR = 40


def render_preview(console: Console, batches: Batches, tokenizer: PreTrainedTokenizerBase, count: int = 3) -> None:
    """Print the first `count` training examples, then counts, drops and lengths of every split.

    Args:
        console: where to; without colour the trained tokens stand in «…».
        batches: what `build_batches` returned.
        tokenizer: the one they were built with.
        count: how many examples are shown, at most `_MOST_TOKENS` tokens of each.
    """
    marked = console.color_system is None or console.no_color
    for index in range(min(count, len(batches.train))):
        row = batches.train[index]
        place = f" ({batches.report.examples[index]})" if index < len(batches.report.examples) else ""
        trained = sum(label != IGNORED for label in row["labels"])
        title = f"example {index + 1}{place}: {len(row['input_ids'])} tokens, {trained} trained"
        console.print(Text(_visible(title), style="bold"))
        console.print(_tokens(row["input_ids"], row["labels"], tokenizer, marked))
        console.print()
    _print_report(console, batches.report, "trained tokens stand in «…»" if marked else "trained tokens are green")


def _tokens(ids: list[int], labels: list[int], tokenizer: Any, marked: bool) -> Text:
    shown = Text()
    pairs = list(zip(ids, labels, strict=True))[:_MOST_TOKENS]
    # Whole runs are decoded: one character may be spread over several tokens.
    for trained, run in itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        text = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        shown.append(f"«{_visible(text)}»" if trained and marked else _visible(text), "green" if trained else "dim")
    if len(ids) > _MOST_TOKENS:
        shown.append(f" … {len(ids) - _MOST_TOKENS} more tokens", "italic")
    shown.rstrip()
    return shown


def _visible(text: str) -> str:
    """`text` with its control characters written out, line ends kept and marked."""
    return "".join(
        "⏎\n" if char == "\n" else char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )


def _print_report(console: Console, report: DataReport, legend: str) -> None:
    console.print(f"format: {report.format}; {legend}")
    table = Table("split", "rows", "kept", "tokens", "trained", "dropped")
    for name, split in report.splits.items():
        table.add_row(
            name, str(split.rows), str(split.kept), str(split.tokens), str(split.trained_tokens), _drops(split)
        )
    console.print(table)
    for name, split in report.splits.items():
        console.print(Text(f"tokens an example, {name}"))
        for line in _histogram(split):
            console.print(Text(line))
    for notice, examples in report.notices.items():
        console.print(Text(f"notice: {notice} ({examples})"))
    if report.overlap:
        console.print(Text(f"notice: {report.overlap} validation prompts are training prompts too", style="yellow"))


def _drops(split: SplitReport) -> str:
    return "\n".join(f"{reason}: {count}" for reason, count in split.drops.items()) or "none"


def _histogram(split: SplitReport) -> Iterable[str]:
    widest = len(str(split.lengths[-1].high)) if split.lengths else 0
    most = max((each.count for each in split.lengths), default=1)
    for each in split.lengths:
        bar = "█" * max(round(_BAR * each.count / most), each.count > 0)
        yield f"{each.low:>{widest}}–{each.high:<{widest}} {bar} {each.count}"
