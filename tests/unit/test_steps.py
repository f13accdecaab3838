"""Parts of a verb: told, timed once, silent where nobody listens."""

from __future__ import annotations

import contextvars
import io
from collections.abc import Callable

import pytest
from rich.console import Console

from toolkit import steps


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass."""
    now = [0.0]
    monkeypatch.setattr(steps.time, "perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def listening(verb: Callable[[], None], *, terminal: bool = False) -> tuple[str, dict[str, float]]:
    """What `verb` printed, and its seconds."""

    def run() -> tuple[str, dict[str, float]]:
        console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
        steps.listen(console)
        verb()
        return console.file.getvalue(), steps.seconds_by_part()  # type: ignore[attr-defined]

    return contextvars.copy_context().run(run)


def test_a_part_within_a_part_is_counted_once(clock: Callable[[float], None]) -> None:
    @steps.part("evaluate")
    def evaluate() -> None:
        clock(3)

    def verb() -> None:
        for _ in range(2):
            with steps.part("train"):
                clock(2)
                evaluate()

    text, seconds = listening(verb)
    assert seconds == {"evaluate": 6, "train": 4}
    assert "evaluate: 3.0 s" in text


def test_plain_lines_carry_rate_and_time_left(clock: Callable[[float], None]) -> None:
    def verb() -> None:
        with steps.part("calibrate"):
            for done in range(1, 11):
                clock(2)
                steps.advance(done, 10, "layers")

    text, _ = listening(verb)
    assert text.splitlines() == [
        "calibrate 3 of 10 layers, 0.5/s, ETA 14 s",
        "calibrate 6 of 10 layers, 0.5/s, ETA 8 s",
        "calibrate 9 of 10 layers, 0.5/s, ETA 2 s",
        "calibrate: 20.0 s",
    ]
    assert "\x1b" not in text


def test_a_terminal_gets_a_bar_that_goes_away(clock: Callable[[float], None]) -> None:
    def verb() -> None:
        with steps.part("calibrate"):
            steps.advance(1, 2, "layers")

    text, _ = listening(verb, terminal=True)
    assert "calibrate 1 of 2 layers" in text
    assert "\x1b" in text


def test_a_part_that_fails_is_over(clock: Callable[[float], None]) -> None:
    def verb() -> None:
        with pytest.raises(ValueError, match="no"):
            fail()

    @steps.part("load")
    def fail() -> None:
        clock(1)
        raise ValueError("no")

    assert listening(verb)[1] == {"load": 1}


def test_with_nobody_listening_nothing_happens() -> None:
    def verb() -> None:
        with steps.part("load"):
            steps.advance(1, 2, "shards")
        assert steps.seconds_by_part() == {}

    contextvars.Context().run(verb)


def test_bytes_are_told_in_what_they_are_read_in(clock: Callable[[float], None]) -> None:
    def verb() -> None:
        with steps.part("download"):
            clock(10)
            steps.advance(2.5e9, 10e9, "bytes")
            clock(6)
            steps.advance(4e6, 0, "bytes")

    lines = listening(verb)[0].splitlines()[:2]
    assert lines == ["download 2.5 GB of 10.0 GB, 250.0 MB/s, ETA 30 s", "download 4.0 MB, 0.2 MB/s"]


def test_time_spent_in_an_inner_part_does_not_slow_the_outer_one(clock: Callable[[float], None]) -> None:
    def verb() -> None:
        with steps.part("train"):
            clock(2)
            with steps.part("evaluate"):
                clock(8)
            steps.advance(2, 4, "steps")

    assert "train 2 of 4 steps, 1/s, ETA 2 s" in listening(verb)[0]


def test_on_a_terminal_one_line_is_live_at_a_time() -> None:
    live: list[list[bool]] = []

    def verb() -> None:
        def look() -> None:
            listener = steps.current()
            assert listener is not None
            live.append([each._bar is not None for each in listener._open])

        with steps.part("train", drawn=False):
            look()
            with steps.part("evaluate"):
                look()
                with steps.part("load"):
                    look()
                look()
            look()
            steps.advance(1, 2, "answers")
            look()

    text, _ = listening(verb, terminal=True)
    assert live == [[False], [False, True], [False, False, True], [False, True], [False], [True]]
    assert "evaluate" in text
