"""Where a conversation is shown: words as they come, and two answers in two columns where there is a terminal.

rich draws the columns; what it lacks is the plain form for pipes and logs, one answer after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

__all__ = ["Screen", "Tell"]

Tell = Callable[[str], None]
_NARROWEST = 60
_UNSEEN = {code: f"\\x{code:02x}" for code in (*range(32), 127) if chr(code) not in "\n\t"}
"""Control characters are written out: a model must not reach the terminal."""


@dataclass(frozen=True)
class Screen:
    """Takes words of the model, pieces of an answer, in `tell`, and whole lines of ours in `say`.

    `console` is where columns are drawn, if it is a terminal that is wide enough.
    """

    tell: Tell
    say: Tell
    console: Console | None = None

    @property
    def has_columns(self) -> bool:
        """Whether two answers stand side by side."""
        return self.console is not None and self.console.is_terminal and self.console.width >= _NARROWEST

    def words(self, text: str) -> None:
        """Show a piece of an answer."""
        self.tell(text.translate(_UNSEEN) if self.console is not None and self.console.is_terminal else text)

    @contextmanager
    def both(self, left: str, right: str) -> Iterator[tuple[Tell, Tell]]:
        """What takes the words of each of two speakers, the left one's first."""
        if self.console is None or not self.has_columns:
            yield self._labelled(f"{left}: "), self._labelled(f"\n{right}: ")
            self.words("\n")
            return
        columns = Table(left, right, expand=True, box=None, padding=(0, 1))
        texts = Text(), Text(style="bold")
        columns.add_row(*texts)
        # The whole answer stays on the screen once it is finished; while it grows, its end is what counts least.
        with Live(columns, console=self.console, refresh_per_second=12) as live:

            def into(text: Text) -> Tell:
                def told(piece: str) -> None:
                    text.append(piece.translate(_UNSEEN))
                    live.refresh()

                return told

            yield into(texts[0]), into(texts[1])

    def _labelled(self, label: str) -> Tell:
        """`words`, with a label before the first of them."""
        waiting = [label]

        def told(text: str) -> None:
            self.words("".join(waiting) + text)
            waiting.clear()

        return told
