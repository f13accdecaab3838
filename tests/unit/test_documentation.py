"""The documentation: the pages build, read easily and hang together. Its commands: `tests/unit/documentation`."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.unit.test_house_laws import ORDER

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
NAVIGATION = YAML(typ="safe").load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
LONGEST_SENTENCE = 25

QUESTIONS = (
    ("how do I install it without a clone", "install.md#without-a-clone", "pip install ."),
    ("what must a row look like", "your-data.md#chat-messages", '{"messages": ['),
    ("how do I call it from Python", "python.md", "run_recipe(load_recipe("),
    ("what do I do when memory runs out", "memory.md#if-a-run-stops-with-out-of-memory", "Before the first step"),
    ("how do I resume", "resume.md", "Give the same command again"),
    ("how do I serve it in vLLM", "export.md#serve-it-in-vllm", "vllm serve BASE"),
    ("how do I use a metric of my own", "evaluation.md#a-metric-of-your-own", "eval.metric=metric.py:"),
    ("how do I switch MTP on", "drafts.md", "enabled: true"),
    ("how do I push", "push.md", "onecard push RUN OWNER/NAME"),
    ("which experts were trained", "your-data.md#which-experts-were-trained", "onecard report RUN"),
)
"""What a fresh reader asks, the page and heading where it is answered, and words of the answer."""


def pages_of(section: str) -> list[str]:
    """Names of the pages under a heading of the navigation."""
    (pages,) = (part[section] for part in NAVIGATION if isinstance(part, dict) and section in part)
    return [name for page in pages for name in page.values()]


def sentences(text: str) -> Iterator[str]:
    """Sentences of the running text: no headings, tables, pictures and code; a code span counts as one word."""
    text = re.sub(r"^```.*?^```\s*$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(?:[|#!].*|    (?![-*] ).*)$", "", text, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n|\n *(?=(?:[-*]|\d+\.) )", text):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "code", paragraph)).replace("**", "")
        yield from filter(None, re.split(r"(?<=[.!?])[)\"]*\s+", plain.strip()))


def words(sentence: str) -> int:
    return sum(re.search(r"\w", word) is not None for word in sentence.split())


def anchor(heading: str) -> str:
    """As Markdown's table of contents names a heading."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower())


def links(page: Path) -> set[Path]:
    """Pages of the documentation that a page links to."""
    named = re.findall(r"\]\(([\w./-]+\.md)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8"))
    return {(page.parent / name).resolve() for name in named}


def test_the_recipe_reference_is_current() -> None:
    spec = importlib.util.spec_from_file_location("recipe_reference", ROOT / "scripts" / "recipe_reference.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    written = (DOCS / "recipe.md").read_text(encoding="utf-8")
    assert written == script.reference(), "run scripts/recipe_reference.py docs/recipe.md"


@pytest.mark.skipif(importlib.util.find_spec("material") is None, reason="mkdocs-material is not installed")
def test_it_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    # The theme's advertisement against the builder's next version is no warning about these pages.
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "site" / "quickstart" / "index.html").is_file()


def test_the_readme_stays_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert len(re.findall(r"\d+(?:[.,]\d+)*", text)) <= 30


def test_every_page_is_in_the_navigation_once() -> None:
    sections = [name for part in NAVIGATION if isinstance(part, dict) for name in part]
    named = ["index.md", *(page for section in sections for page in pages_of(section))]
    assert sorted(named) == [path.name for path in sorted(DOCS.glob("*.md"))]


@pytest.mark.parametrize("page", PAGES[-2:], ids=lambda page: page.name)
def test_links_outside_of_the_site_lead_somewhere(page: Path) -> None:
    """Those within it fail its build."""
    for name, heading in re.findall(r"\]\(([\w./-]+)#?([\w-]*)\)", page.read_text(encoding="utf-8")):
        target = page.parent / name
        assert target.exists(), name
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in map(anchor, headings), heading


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(
        r"\b(?:toolkit|tests|scripts|recipes)/[\w./-]+\.(?:py|sh|yaml|jsonl)\b", page.read_text(encoding="utf-8")
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", pages_of("How to"))
def test_a_how_to_opens_with_its_command_and_measures_nothing(name: str) -> None:
    text = (DOCS / name).read_text(encoding="utf-8")
    assert re.match(r"# .+\n\n```bash\n", text)
    for row in re.findall(r"^\|.*\|$", text, re.MULTILINE):
        assert sum(re.match(r"\s*[\d.]+\s*[\w%×]*\s*$", cell) is not None for cell in row.split("|")) <= 1, row


def test_sentences_are_told_apart() -> None:
    text = "# Title\n\nOne `two three` four. Five\n[six](x.md)!\n\n- seven, eight\n- nine, ten\n"
    text += "\n| eleven |\n\n```\ntwelve\n```\n"
    assert [words(each) for each in sentences(text)] == [3, 2, 2, 2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences_are_short(page: Path) -> None:
    for sentence in sentences(page.read_text(encoding="utf-8")):
        assert words(sentence) <= LONGEST_SENTENCE, sentence


def test_the_rooms_stand_in_their_order() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    rooms = [row.split("|")[1] for row in re.findall(r"^\| `.*$", text, re.MULTILINE)]
    assert re.findall(r"`(\w+)`", "".join(rooms)) == list(ORDER)


def test_glossary_is_sorted() -> None:
    table = (DOCS / "glossary.md").read_text(encoding="utf-8").split("|---|---|\n")[1]
    terms = [row.split("|")[1].strip().lower() for row in table.splitlines()]
    assert all(first < second for first, second in pairwise(terms))
    assert len(terms) >= 30


@pytest.mark.parametrize(("question", "place", "answer"), QUESTIONS, ids=[each[0] for each in QUESTIONS])
def test_a_question_is_answered_two_clicks_from_the_readme_at_most(question: str, place: str, answer: str) -> None:
    name, _, heading = place.partition("#")
    page = DOCS / name
    first = links(ROOT / "README.md")
    assert page in first | {each for one in first if one.is_file() for each in links(one)}
    text = page.read_text(encoding="utf-8")
    if heading:
        parts = re.split(r"^##+ (.*)$", text, flags=re.MULTILINE)
        text = dict(zip(map(anchor, parts[1::2]), parts[2::2], strict=True))[heading]
    assert answer in text, question
