"""What is shown to be typed next can be pasted; a launcher that starts one process of several is seen."""

from __future__ import annotations

import io
import shlex

import pytest
from rich.console import Console

from toolkit.cli.options import next_commands
from toolkit.errors import RecipeError
from toolkit.processes import require_all_started


def test_commands_under_next_are_words_of_a_shell() -> None:
    shown = io.StringIO()
    words = ["train", "my recipes/a [b].yaml", "data.columns={prompt: q}", "eval.metric=it's.py:f"]
    next_commands(Console(file=shown, soft_wrap=True), words, ["push", "runs/a b", "OWNER/NAME"])
    first, second = shown.getvalue().splitlines()[1:]
    assert shlex.split(first)[-4:] == words
    assert second.endswith("push 'runs/a b' OWNER/NAME")


def test_one_process_in_place_of_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    require_all_started()
    for name, value in (("ACCELERATE_USE_CPU", "True"), ("ACCELERATE_MIXED_PRECISION", "no")):
        monkeypatch.setenv(name, value)
    require_all_started()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(RecipeError, match=r"starts one process, whatever --num_processes says: write --multi_gpu"):
        require_all_started()
    monkeypatch.setenv("WORLD_SIZE", "2")
    require_all_started()
