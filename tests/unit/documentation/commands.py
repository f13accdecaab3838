"""Every command that the documentation shows, and where it is run.

`onecard` commands are run by the walks of `test_commands.py`, in a folder where `recipes/quickstart.yaml` is cut short;
scripts by `test_scripts.py`; those of `ELSEWHERE` by the tests that it names. What remains, `FOREIGN`, begins other
people's programs or asks a registry. Besides, the parser of a command's own program reads each as it stands.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = [
    "ELSEWHERE",
    "FOREIGN",
    "PAGES",
    "ROOT",
    "Shown",
    "foreign",
    "is_walked",
    "named_test",
    "shown",
    "shown_in",
    "source_of",
]

ROOT = Path(__file__).parents[3]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]

PLACEHOLDERS = {
    "RECIPE": "recipes/quickstart.yaml",
    "RUN": "runs/quickstart",
    "ARTIFACT": "runs/quickstart/adapter",
    "OWNER/NAME": "alice/mine",
    "owner/name@revision": "alice/mine@main",
    "A": "runs/quickstart",
    "B": "runs/slower",
    "FOLDER": "folder",
}
"""What stands for the reader's own, and what stands for it here."""

_SERVER = "tests/unit/serving/test_server.py::test_serve_answers_what_the_documentation_asks_and_ends_with_ctrl_c"
_SHELL = "tests/unit/documentation/test_shell.py"
ELSEWHERE: tuple[tuple[str, str], ...] = (
    (r"onecard serve", _SERVER),
    (r"curl localhost", _SERVER),
    (r"onecard sweep", "tests/unit/sweep/test_sweep.py::test_the_sweeps_of_the_documentation_on_ray"),
    (
        r"onecard quantize .*--budget",
        "tests/unit/run/test_mixture.py::test_quantize_writes_a_mixture_that_needs_no_budget",
    ),
    (
        r"onecard quantize .*--recipe",
        "tests/parity/test_compensated_base.py::test_quantize_with_a_recipe_writes_the_compensated_integers",
    ),
    (r"onecard .*model-Q4_K_M\.gguf", "tests/parity/test_gguf_source.py::test_the_commands_of_the_page"),
    (r"mkdocs build", "tests/unit/test_documentation.py::test_it_builds_without_warnings"),
    (r"onecard --install-completion", f"{_SHELL}::test_completion_is_installed"),
    (
        r"bash scripts/(setup\.sh dev|test\.sh --stack) newest",
        f"{_SHELL}::test_the_newest_stack_is_another_environment",
    ),
    (r"bash scripts/setup\.sh", f"{_SHELL}::test_setup_leaves_a_current_environment_alone"),
    (r"bash scripts/test\.sh --card", f"{_SHELL}::test_the_tests_on_a_card_say_what_is_missing"),
    (r"bash scripts/test\.sh", f"{_SHELL}::test_the_checks_run_and_take_arguments"),
    (r"bash scripts/finetune\.sh --processes", f"{_SHELL}::test_finetune_in_two_processes"),
    (r"bash scripts/finetune\.sh", f"{_SHELL}::test_finetune_trains"),
    (r"accelerate launch .*--num_machines", f"{_SHELL}::test_two_machines"),
    (
        r"accelerate launch",
        "tests/parity/test_several_processes.py::test_two_processes_train_what_one_does_and_resume",
    ),
)
"""Pattern of commands that a test of their own runs, and that test."""

FOREIGN: tuple[tuple[str, str], ...] = (
    (r"pip install", "asks a registry; that the extra is one of ours is checked"),
    (r"vllm serve", "vLLM, which wants a card"),
    (r"llama-server", "llama.cpp's server, and a GGUF file of the base"),
    (r"hf auth login", "asks for a token of the Hub"),
)
"""Pattern of the commands that no test runs, and why."""

_PROGRAMS = r"(\.venv/bin/)?(onecard|python|bash|pip|accelerate|curl|vllm|llama-server|hf|mkdocs|scripts/\S+\.py)\b"
_SYNOPSIS = re.compile(r"…|<|^\[")


@dataclass(frozen=True)
class Shown:
    """One command as the page has it, placeholders and comments included."""

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        """As the shell hands them over, with our own values for the reader's."""
        words = shlex.split(self.text.rpartition(" | ")[2], comments=True)
        return [_filled(word) for word in words]

    @property
    def typed(self) -> str:
        """Standard input, where `echo` gives some."""
        before = self.text.rpartition(" | ")[0]
        return " ".join(shlex.split(before)[1:])

    @property
    def script(self) -> str | None:
        """Of this repository, in Python: its path in `scripts`."""
        found = re.match(r"(?:python )?(?:-m )?scripts[./]([\w./]+)", self.text)
        if found is None or found[1].endswith(".sh"):
            return None
        return found[1] if found[1].endswith(".py") else found[1].replace(".", "/") + ".py"

    @property
    def is_synopsis(self) -> bool:
        """Whether it names a verb or a form and is nothing to be typed as it stands."""
        rest = self.text.partition("onecard ")[2]
        words = shlex.split(self.text.rpartition(" | ")[2], comments=True)
        return any(map(_SYNOPSIS.search, words)) or (
            self.text.startswith("onecard ") and re.fullmatch(r"[a-z]+", rest) is not None and rest not in _ALONE
        )


_ALONE = {"doctor", "schema"}
"""Verbs that are whole commands by themselves."""


def shown(text: str, page: str = "") -> list[Shown]:
    """The commands of a page: lines of its bash blocks, and indented lines and code spans that begin with a program."""
    found: list[tuple[int, str]] = []
    for block in re.finditer(r"```bash\n(.*?)```", text, re.DOTALL):
        joined = re.sub(r"\\\n\s*", "", block[1])
        lines = [line.strip() for line in joined.splitlines()]
        found += [(block.start() + n, line) for n, line in enumerate(lines) if line and not line.startswith("#")]
    outside = re.sub(r"```.*?```", lambda block: " " * len(block[0]), text, flags=re.DOTALL)
    for span in re.finditer(r"`([^`\n]+)`|^    (\S.*)$", outside, re.MULTILINE):
        text = span[1] or span[2]
        if re.match(_PROGRAMS + " ", text):
            found.append((span.start(), text))
    return [Shown(page, re.sub(r"(^|\s)\.venv/bin/", r"\1", line)) for _, line in sorted(found)]


def shown_in(path: Path) -> list[Shown]:
    """The commands of a page of the repository."""
    return shown(path.read_text(encoding="utf-8"), path.name)


def named_test(command: Shown) -> str | None:
    """The test of its own that runs it."""
    return next((test for pattern, test in ELSEWHERE if re.match(pattern, command.text)), None)


def foreign(command: Shown) -> str | None:
    """Why no test runs it, or None where one does."""
    return next((why for pattern, why in FOREIGN if re.match(pattern, command.text)), None)


def is_walked(command: Shown) -> bool:
    """Whether it is one of ours to be typed as it stands, and has no test of its own."""
    return re.match(r"(echo .* \| )?onecard ", command.text) is not None and not (
        command.is_synopsis or named_test(command)
    )


@cache
def source_of(test: str) -> str:
    """The text of the test file that a node id names; raises where there is no such test in it."""
    path, _, function = test.partition("::")
    text = (ROOT / path).read_text(encoding="utf-8")
    if not re.search(rf"^def {function}\(", text, re.MULTILINE):
        raise LookupError(test)
    return text


def _filled(word: str) -> str:
    for name, value in PLACEHOLDERS.items():
        word = re.sub(rf"(?<!\w)(?<!\w/){re.escape(name)}(?!\w)", value, word)
    return word
