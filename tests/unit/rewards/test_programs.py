"""Answers that are programs: those that pass their tests, and what code that goes astray can reach. Nothing of ours."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

import pytest

from toolkit.errors import RecipeError
from toolkit.recipe import Recipe
from toolkit.rewards import Asked, Judge, Reward, programs
from toolkit.rewards.programs import code_in, passes

ADDS = "Sure:\n```python\ndef add(a, b):\n    return a + b\n```\nThat is all."


def running(text: str) -> list[bytes]:
    """Commands of processes that are children of ours, or theirs, or of nobody, with this text in them."""
    found = []
    for place in (Path("/proc") / name for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):
            command, parent = (
                (place / "cmdline").read_bytes(),
                int((place / "stat").read_text().rsplit(")")[-1].split()[1]),
            )
            if text.encode() in command and parent in (1, os.getpid()):
                found.append(command)
    return found


@pytest.fixture(autouse=True, scope="module")
def confined() -> None:
    try:
        programs.require_confinement()
    except RecipeError as error:
        pytest.skip(str(error))


def test_a_program_is_worth_what_its_tests_say() -> None:
    texts = [ADDS, ADDS.replace("+", "-"), "def add(a, b): return a + b", "no code", ADDS]
    tests = ["assert add(1, 2) == 3", "assert add(1, 2) == 3", ["x = add(1, 2)", "assert x == 3"], "add", " "]
    asked = Asked(
        prompts=["p"] * 5, completions=["c"] * 5, completion_ids=[[1]] * 5, texts=texts, answer=[""] * 5,
        trainer_state={"global_step": 0, "max_steps": 1, "epoch": 0.0}, columns={"checks": tests},
    )  # fmt: skip
    judge = Judge([Reward("tests", "tests", options={"column": "checks"})], seconds=60.0, memory=4 << 30)
    judge.start()
    try:
        scores = judge.score(asked)
    finally:
        judge.close()
    assert scores.failures == ()
    assert scores.values == ((1.0, 0.0, 1.0, 0.0, None),)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a = 1", "a = 1"),
        ("```\na = 1\n```", "a = 1\n"),
        ("```py\na = 1\n```\n```python3 title\nb = 2\n```\n```json\n{}\n```", "b = 2\n"),
        ("```bash\nls\n```", "```bash\nls\n```"),
    ],
)
def test_the_last_block_of_python_is_the_program(text: str, code: str) -> None:
    assert code_in(text) == code


@pytest.mark.parametrize(
    "code",
    ["import os; os._exit(0)", "raise SystemExit(0)", "import sys; sys.exit()", "1 / 0", "def", "while True: pass"],
)
def test_only_a_program_that_reaches_its_end_passes(code: str) -> None:
    started = time.monotonic()
    assert not passes([code, "1"], 2.0)
    assert time.monotonic() - started < 20


def test_a_program_reaches_no_file_of_ours_no_network_and_no_process(tmp_path: Path) -> None:
    secret, listening = tmp_path / "secret.txt", socket.create_server(("127.0.0.1", 0))
    secret.write_text("x")
    port = listening.getsockname()[1]
    with listening:
        for code in (
            f"open({str(secret)!r})",
            f"open({str(secret)!r}, 'a')",
            f"import os; os.listdir({str(Path.home())!r})",
            f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)",
            f"import os; os.kill({os.getpid()}, 0)",
            f"open({str(tmp_path / 'new')!r}, 'w')",
        ):
            assert not passes([code], 20.0), code
    assert passes(["open('mine.txt', 'w').write('x')", "assert open('mine.txt').read() == 'x'"], 20.0)
    assert secret.read_text() == "x"


def test_what_a_program_leaves_running_ends_with_it(tmp_path: Path) -> None:
    mark = "onecard_left_running_by_a_test"
    code = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)  # {mark}'])"
    assert passes([code], 20.0)
    time.sleep(0.2)
    assert not running(mark)


def test_a_reward_that_takes_too_long_takes_its_programs_along() -> None:
    mark = "onecard_hangs_in_a_test"
    asked = Asked(
        prompts=["p"], completions=["c"], completion_ids=[[1]], texts=[f"import time; time.sleep(60)  # {mark}"],
        answer=[""], trainer_state={"global_step": 0, "max_steps": 1, "epoch": 0.0}, columns={"checks": ["1"]},
    )  # fmt: skip
    options = {"column": "checks", "seconds": 60}
    judge = Judge([Reward("tests", "tests", options=options)], seconds=2.0, memory=4 << 30)
    judge.start()
    scores = judge.score(asked)
    assert scores.values == ((None,),)
    assert scores.failures == ("reward tests: took longer than 2 s, rewards.time_limit",)
    time.sleep(0.2)
    assert not running("confined.py")


def test_where_nothing_can_be_confined_the_recipe_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "confined.py").write_text("import os; print('switched off'); os.sys.stdout.flush(); os._exit(97)")
    monkeypatch.setattr(programs, "__file__", str(tmp_path / "programs.py"))
    with pytest.raises(RecipeError, match=r"no program can be confined here \(switched off\)"):
        passes(["1"], 20.0)


def test_the_column_of_the_tests_is_kept_and_has_to_be_named() -> None:
    base = {
        "model": {"model_name_or_path": "m"},
        "data": {"train": "d.jsonl"},
        "training": {"method": "grpo", "per_device_train_batch_size": 8},
    }
    recipe = Recipe.model_validate({**base, "rewards": {"functions": [{"function": "tests", "column": "checks"}]}})
    assert recipe.rewards.columns == ["checks"]
    with pytest.raises(ValueError, match="tests needs column"):
        Recipe.model_validate({**base, "rewards": {"functions": ["tests"]}})
    with pytest.raises(ValueError, match="seconds is for tests"):
        Recipe.model_validate({**base, "rewards": {"functions": [{"function": "number", "seconds": 1}]}})
