"""The data set as a person checks it: the first examples as tokens with their mask, the lengths, the drops.

rich draws it. What is fed is dim, what is trained has a colour for thought, calls, answer and end; where the console
has none, marks show the same, so that a log shows the mask too. Control characters of the data are written out: they
must not reach the terminal.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from toolkit.data.build import Batches
from toolkit.data.dialogue import Dialogue
from toolkit.data.report import DataReport, SplitReport
from toolkit.labels import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["render_preview"]

_MOST_TOKENS = 400
_BAR = 40
_TRAINED = "trained"
_PARTS = {
    "thought": ("yellow", "‹{}›"),
    "answer": ("green", "{}"),
    "calls": ("magenta", "⟦{}⟧"),
    "end": ("bold cyan", "{}"),
}
"""What is trained: its colour, and its mark where there is none."""


def render_preview(console: Console, batches: Batches, tokenizer: PreTrainedTokenizerBase, count: int = 3) -> None:
    """Print the first `count` training examples, then counts, drops and lengths of every split.

    Args:
        console: where to; without colour the trained tokens stand in «…».
        batches: what `build_batches` returned.
        tokenizer: the one they were built with.
        count: how many examples are shown, at most `_MOST_TOKENS` tokens of each.
    """
    marked = console.color_system is None or console.no_color
    dialogue = Dialogue(tokenizer, batches.form)
    sides = 2 if batches.pairs else 1
    for index in range(min(count, len(batches.train) // sides)):
        place = f" ({batches.report.examples[index]})" if index < len(batches.report.examples) else ""
        if batches.pairs:
            _print_pair(console, batches, index, place, dialogue, marked)
            continue
        row = batches.train[index]
        called = {True: ", good", False: ", bad"}.get(row.get("desirable"), "")
        title = f"example {index + 1}{place}{called}: {len(row['input_ids'])} tokens, {_counted(row)} trained"
        if batches.questions:
            prompt = len(batches.questions[index].prompt_ids)
            told = "; the answer in «…» is what rewards see" if _counted(row) else "; it has no answer"
            title = f"question {index + 1}{place}: prompt {prompt} tokens{told}"
        console.print(Text(_visible(title), style="bold"))
        console.print(_tokens(row["input_ids"], row["labels"], dialogue, marked))
        console.print()
    does = "count" if batches.pairs else "are wanted" if batches.questions else _TRAINED
    _print_report(console, batches.report, _legend(marked), does)


def _print_pair(console: Console, batches: Batches, index: int, place: str, dialogue: Dialogue, marked: bool) -> None:
    """The prompt once, then the two answers, each through the token that ends it."""
    chosen, rejected = (batches.train[2 * index + side] for side in (0, 1))
    prompt = next(number for number, label in enumerate(chosen["labels"]) if label != IGNORED)
    title = f"pair {index + 1}{place}: prompt {prompt} tokens, chosen {_counted(chosen)}, rejected {_counted(rejected)}"
    console.print(Text(_visible(title), style="bold"))
    before = chosen["input_ids"][:prompt]
    console.print(_tokens(before, [IGNORED] * prompt, dialogue, marked))
    for side, row in (("chosen", chosen), ("rejected", rejected)):
        answer = _tokens(row["input_ids"][prompt:], row["labels"][prompt:], dialogue, marked, before)
        console.print(Text(f"{side}: ", style="bold").append(answer))
    console.print()


def _counted(row: Mapping[str, Sequence[int]]) -> int:
    return sum(label != IGNORED for label in row["labels"])


def _legend(marked: bool) -> Text:
    legend = Text("trained: ")
    for part, (style, mark) in _PARTS.items():
        legend.append(f"{part} {mark.format('…')}  " if marked else f"{part}  ", "" if marked else style)
    legend.append("all of it in «…»" if marked else "", "")
    legend.append("" if marked else "only read", "dim")
    return legend


def _tokens(ids: list[int], labels: list[int], dialogue: Dialogue, marked: bool, before: Sequence[int] = ()) -> Text:
    shown = Text()
    pairs = list(zip(ids, labels, strict=True))[:_MOST_TOKENS]
    read = list(before)
    # Whole runs are decoded: one character may be spread over several tokens.
    for trained, run in itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        tokens = [token for token, _ in run]
        if trained:
            shown.append("«" if marked else "")
            for text, part in _parts(tokens, read, dialogue):
                style, mark = _PARTS[part]
                text = _visible(text)
                shown.append(mark.format(text) if marked else text, "" if marked else style)
            shown.append("»" if marked else "")
        else:
            shown.append(_visible(dialogue.tokens.decode(tokens)), "dim")
        read += tokens
    if len(ids) > _MOST_TOKENS:
        shown.append(f" … {len(ids) - _MOST_TOKENS} more tokens", "italic")
    shown.rstrip()
    return shown


def _parts(ids: list[int], before: list[int], dialogue: Dialogue) -> Iterator[tuple[str, str]]:
    """An answer's text in pieces, each with what it is."""
    ends = ids[-1] in dialogue.form.stop_token_ids
    text, end = dialogue.tokens.decode(ids[:-1] if ends else ids), dialogue.tokens.decode(ids[-1:]) if ends else ""
    answer = dialogue.read(ids, before)
    if answer.thought and (at := text.find(answer.thought)) >= 0:
        yield text[: at + len(answer.thought)], "thought"
        text = text[at + len(answer.thought) :]
    at = text.find(answer.text) + len(answer.text) if answer.text in text else 0
    yield from ((piece, part) for piece, part in ((text[:at], "answer"),) if piece)
    if text[at:]:
        yield text[at:], "calls" if answer.calls else "answer"
    if end:
        yield end, "end"


def _visible(text: str) -> str:
    """`text` with its control characters written out, line ends kept and marked."""
    return "".join(
        "⏎\n" if char == "\n" else char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )


def _print_report(console: Console, report: DataReport, legend: Text, does: str) -> None:
    console.print(Text(f"format: {report.format}; ").append(legend))
    table = Table("split", "rows", "kept", "tokens", "trained", "dropped")
    for name, split in report.splits.items():
        table.add_row(
            name, str(split.rows), str(split.kept), str(split.tokens), str(split.trained_tokens), _drops(split)
        )
    console.print(table)
    for name, split in report.splits.items():
        console.print(Text(f"tokens per example, {name}"))
        for line in _histogram(split):
            console.print(Text(line))
    for name, split in report.splits.items():
        console.print(Text(f"{name}: {_turns(split, does)}"))
    for source in report.sources:
        console.print(Text(str(source)))
    for notice, examples in report.notices.items():
        console.print(Text(f"notice: {notice} ({examples})"))
    if report.overlap:
        console.print(Text(f"notice: {report.overlap} validation prompts are training prompts too", style="yellow"))


def _turns(split: SplitReport, does: str) -> str:
    """What was trained of a split, and what became of rows that could not stay one example."""
    more = split.examples - split.kept
    parts = [f"{split.turns} answers {does} in {split.examples} examples"]
    parts += [f"{split.split} rows split by turn ({more} examples more)"] if split.split and does == _TRAINED else []
    parts += [f"thoughts: {split.thoughts} trained, {split.dropped_thoughts} left out"]
    parts += ["ends: " + (", ".join(f"{_visible(end)} {count}" for end, count in split.enders.items()) or "none")]
    return "; ".join(parts)


def _drops(split: SplitReport) -> str:
    return "\n".join(f"{reason}: {count}" for reason, count in split.drops.items()) or "none"


def _histogram(split: SplitReport) -> Iterable[str]:
    widest = len(str(split.lengths[-1].high)) if split.lengths else 0
    most = max((each.count for each in split.lengths), default=1)
    for each in split.lengths:
        bar = "█" * max(round(_BAR * each.count / most), each.count > 0)
        yield f"{each.low:>{widest}}–{each.high:<{widest}} {bar} {each.count}"
