"""Every command that the documentation shows, and what a test can do with it: run it, or at least parse it.

Run is what can be, in a folder where `recipes/quickstart.yaml` is cut short. `ELSEWHERE` has rows for the rest:
a card, an hour or another program, each with its reason; those are still read by the parsers of their programs.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ELSEWHERE", "PAGES", "ROOT", "Shown", "reason", "shown", "shown_in"]

ROOT = Path(__file__).parents[3]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]

PLACEHOLDERS = {
    "RECIPE": "recipes/quickstart.yaml",
    "RUN": "runs/quickstart",
    "ARTIFACT": "runs/quickstart/adapter",
    "OWNER/NAME": "alice/mine",
}
"""What stands for the reader's own, and what stands for it here."""

ELSEWHERE: tuple[tuple[str, str], ...] = (
    (r"pip install", "needs a registry; the extra's name is checked"),
    (r"(vllm|llama-server|curl|hf) ", "another program's"),
    (r"bash scripts/(setup|test)\.sh", "makes an environment, or is what runs this test"),
    (r"bash scripts/finetune\.sh", "makes an environment; what it hands to onecard is parsed"),
    (r"accelerate launch", "several machines or cards; two processes are started in test_several_processes.py"),
    (r"python (-m )?scripts", "minutes to hours, models that scripts make first, or a card"),
    (r"onecard .*--lm-eval", "lm-eval is no part of the tests' environment; test_metrics.py runs it where it is"),
    (r"onecard sweep (?!.*--out runs/two)", "six trials; test_sweep.py runs others"),
    (r"onecard quantize .*--recipe", "a minute and more; test_error_compensation.py and test_prequantized.py do it"),
    (r"onecard serve", "does not end; test_server.py starts, asks and stops it"),
    (r"onecard --(install|show)-completion", "changes the reader's shell; test_starting.py asks for completions"),
)
"""Pattern of commands that are not run by the test of the documentation, and why."""

_PROGRAMS = r"(\.venv/bin/)?(onecard|python|bash|pip|accelerate|curl|vllm|llama-server|hf|mkdocs|scripts/\S+\.py)\b"
_SYNOPSIS = re.compile(r"[…\[|]|<")


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
    def is_synopsis(self) -> bool:
        """Whether it names a verb or a form and is nothing to be typed as it stands."""
        rest = self.text.partition("onecard ")[2]
        return bool(_SYNOPSIS.search(self.text.rpartition(" | ")[2])) or (
            self.text.startswith("onecard ") and re.fullmatch(r"[a-z]+", rest) is not None and rest not in _ALONE
        )


_ALONE = {"doctor", "schema"}
"""Verbs that are whole commands by themselves."""


def shown(text: str, page: str = "") -> list[Shown]:
    """The commands of a page: lines of its bash blocks, and code spans that begin with a program."""
    found: list[tuple[int, str]] = []
    for block in re.finditer(r"```bash\n(.*?)```", text, re.DOTALL):
        joined = re.sub(r"\\\n\s*", "", block[1])
        lines = [line.strip() for line in joined.splitlines()]
        found += [(block.start() + n, line) for n, line in enumerate(lines) if line and not line.startswith("#")]
    outside = re.sub(r"```.*?```", lambda block: " " * len(block[0]), text, flags=re.DOTALL)
    for span in re.finditer(r"`([^`\n]+)`", outside):
        if re.match(_PROGRAMS + " ", span[1]):
            found.append((span.start(), span[1]))
    return [Shown(page, re.sub(r"(^|\s)\.venv/bin/", r"\1", line)) for _, line in sorted(found)]


def shown_in(path: Path) -> list[Shown]:
    """The commands of a page of the repository."""
    return shown(path.read_text(encoding="utf-8"), path.name)


def reason(command: Shown) -> str | None:
    """Why it is not run here, or None where it is."""
    return next((why for pattern, why in ELSEWHERE if re.match(pattern, command.text)), None)


def _filled(word: str) -> str:
    for name, value in PLACEHOLDERS.items():
        word = re.sub(rf"(?<!\w)(?<!\w/){re.escape(name)}(?!\w)", value, word)
    return word
