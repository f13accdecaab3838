"""Every script that a page shows is run, cut to size, by the command that is shown; a new one needs a row."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.harness.families import build, tiny_config
from tests.unit.documentation.commands import PAGES, ROOT, shown_in, source_of
from tests.unit.documentation.environments import PEERS, STOCK, llama_stand_in, stock_environment, vllm_stand_in
from tests.unit.documentation.script_rows import ROWS, Row
from tests.unit.documentation.warm import warm_python

QUICKSTART = ROOT / "recipes" / "quickstart"
NANO = QUICKSTART / "nano-qwen3moe-2m"
RUN = [row for row in ROWS if not row.test]
NAMED = [row for row in ROWS if row.test]
RECIPE = """\
model: {{model_name_or_path: {place}/tiny}}
lora: {{r: 4, lora_alpha: 64}}
mtp: {{enabled: true, own_answers: 2}}
data: {{train: {place}/train.jsonl, validation: {place}/held-out.jsonl}}
training:
  {{output_dir: {place}/run, max_steps: 3, max_length: 128, learning_rate: 3e-2, warmup_steps: 0, use_cpu: true}}
eval: {{max_samples: 4, max_new_tokens: 4}}
"""


@cache
def shown_scripts() -> dict[str, str]:
    """Each script that a page names, in a command or without one, and how it is begun: by path or as a module."""
    found: dict[str, str] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"\bscripts/([\w/]+\.py)", text):
            found.setdefault(path, "path")
        for name in re.findall(r"-m scripts\.([\w.]+\w)", text):
            found[name.replace(".", "/") + ".py"] = "module"
    return found


def options(words: list[str]) -> set[str]:
    return {word.strip("[]") for word in words if word.strip("[").startswith("--")}


def test_every_script_that_is_shown_has_a_row_and_every_row_is_shown() -> None:
    assert {row.script for row in ROWS} == set(shown_scripts())
    assert all((ROOT / "scripts" / row.script).is_file() for row in ROWS)
    commands = [each for page in PAGES for each in shown_in(page) if "scripts" in each.text and ".sh" not in each.text]
    assert {each.script for each in commands} <= {row.script for row in ROWS}
    assert len(commands) >= 45


def test_every_option_that_is_shown_is_used() -> None:
    used: dict[str, set[str]] = {}
    for row in ROWS:
        given = shlex.split(row.arguments) if not row.test else re.findall(r"--[\w-]+", source_of(row.test))
        used.setdefault(row.script, set()).update(options(given))
    for page in PAGES:
        for command in shown_in(page):
            if command.script:
                assert options(command.text.split()) <= used[command.script], command


@pytest.mark.parametrize("row", NAMED, ids=lambda row: row.test.rpartition("::")[2])
def test_the_tests_that_rows_name_run_the_script(row: Row) -> None:
    assert Path(row.script).stem in source_of(row.test)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tiny`, `train.jsonl`, `held-out.jsonl`, `recipe.yaml` and `for-a-card.yaml`."""
    place = tmp_path_factory.mktemp("scripts")
    config = tiny_config("qwen3_moe")
    config.vocab_size = 2112  # of the tokenizer beside it
    build(config).save_pretrained(place / "tiny")
    for path in NANO.iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(path, place / "tiny")
    for name, split, count in (("train", "train", 24), ("held-out", "validation", 8)):
        rows = (QUICKSTART / "data" / f"category.{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (place / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (place / "recipe.yaml").write_text(RECIPE.format(place=place), encoding="utf-8")
    shutil.copy(ROOT / "recipes" / "olmoe-1b-7b.yaml", place / "for-a-card.yaml")
    return place


@pytest.fixture(scope="module")
def warm() -> Iterator[None]:
    with warm_python():
        yield


class Made:
    """What rows ask for by name, each made when it is first asked for."""

    def __init__(self, place: Path) -> None:
        self.place, self.known = place, {"place": place}

    def filled(self, arguments: str) -> list[str]:
        for name in re.findall(r"\{(\w+)\}", arguments):
            if name not in self.known:
                self.known[name] = getattr(self, name)(self.place / f"made-{name}")
        return shlex.split(arguments.format(**self.known))

    def run(self, _: Path) -> Path:
        ended(["-m", "toolkit", "train", str(self.place / "recipe.yaml")])
        return self.place / "run"

    def shape(self, folder: Path) -> Path:
        ended(["scripts/make_qwen3_30b_shape.py", str(folder), "--layers", "2", "--smaller", "64"])
        return folder

    def stock(self, folder: Path) -> Path:
        return stock_environment(folder, STOCK)

    def peers(self, folder: Path) -> Path:
        return stock_environment(folder, PEERS)

    def vllm(self, folder: Path) -> Path:
        return vllm_stand_in(folder)

    def llama(self, folder: Path) -> Path:
        return llama_stand_in(folder)


@pytest.fixture(scope="module")
def made(place: Path, warm: None) -> Made:
    return Made(place)


def ended(words: list[str]) -> str:
    """Stdout of `python WORDS` in the repository; fails where it does not end with 0."""
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("row", RUN, ids=lambda row: shlex.split(row.script + " " + row.arguments)[0])
def test_it_runs(row: Row, made: Made) -> None:
    module = ["-m", "scripts." + row.script.removesuffix(".py").replace("/", ".")]
    entry = module if shown_scripts()[row.script] == "module" else [f"scripts/{row.script}"]
    said = ended([*entry, *made.filled(row.arguments)])
    for pattern in row.says:
        assert re.search(pattern, said, re.MULTILINE), said
    for name in row.writes:
        assert (made.place / name).stat().st_size > 0, name
