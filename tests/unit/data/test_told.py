"""Every notice and every refusal of the data room stands in `docs/chat.md`, with what it means and what to do."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
MODULES = sorted((ROOT / "toolkit" / "data").glob("*.py"))
PAGE = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
TABLES = [
    {line.split(" | ")[0].removeprefix("| ").replace("`", "") for line in part.splitlines() if line.startswith("| ")}
    for part in re.split(r"^## (?:Notices|Refusals)$", PAGE, flags=re.MULTILINE)[1:]
]
TELLERS = {"odd_thoughts", "notices", "unread"}
"""Functions that yield or return notices."""


def refusals(tree: ast.Module) -> Iterator[str]:
    """The reasons under which rows are counted."""
    named = constants(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "InvalidRow":
            yield from texts(node.args[0], named)
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("drops"):
            yield from texts(node.slice, named)


def notices(tree: ast.Module) -> Iterator[str]:
    """What notices say; of what is put together, the longest part."""
    named = constants(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("notices"):
            yield from texts(node.slice, named)
        elif isinstance(node, ast.Call) and re.search(r"(notices|told)\.append$", ast.unparse(node.func)):
            yield from texts(node.args[0], named)
        elif isinstance(node, ast.FunctionDef) and node.name in TELLERS:
            inside = (each for each in ast.walk(node) if isinstance(each, (ast.Yield, ast.ListComp)))
            for each in inside:
                value = each.elt if isinstance(each, ast.ListComp) else each.value
                value = value.elts[0] if isinstance(value, ast.Tuple) else value
                yield from texts(value, named) if value is not None else ()
        elif isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "_NOTICES":
            assert isinstance(node.value, ast.Dict)
            for value in node.value.values:
                yield from texts(value, named)
    # What a module names as a sentence is said somewhere.
    yield from (text for text in named.values() if text.count(" ") >= 3 and text[0].isalpha())


def constants(tree: ast.Module) -> dict[str, str]:
    """Texts that the module names."""
    return {
        ast.unparse(node.targets[0]): node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }


def texts(node: ast.AST, named: dict[str, str]) -> Iterator[str]:
    """The text of an expression, where it is known."""
    if isinstance(node, ast.IfExp):
        yield from texts(node.body, named)
        yield from texts(node.orelse, named)
    elif isinstance(node, ast.Name) and node.id in named:
        yield named[node.id]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        parts = [str(part.value) for part in node.values if isinstance(part, ast.Constant)]
        yield max(parts, key=len).strip()


def everything(find: object) -> list[tuple[str, str]]:
    assert callable(find)
    return sorted({(path.name, text) for path in MODULES for text in find(ast.parse(path.read_text(encoding="utf-8")))})


def test_many_are_found() -> None:
    found = dict.fromkeys(text for _, text in everything(notices))
    assert len(found) >= 28
    for sample in ("the chat template leaves out the tools", "does not close it", "is not used", "stand alone"):
        assert any(sample in text for text in found), sample
    reasons = {text for _, text in everything(refusals)}
    assert reasons >= {"longer than max_length", "no end of turn", "wrong number of fields"}


@pytest.mark.parametrize(("module", "text"), everything(notices), ids=lambda each: each[:40])
def test_every_notice_is_explained(module: str, text: str) -> None:
    assert any(text in row for table in TABLES for row in table), (
        f"docs/chat.md has no line for this notice of {module}"
    )


@pytest.mark.parametrize(("module", "text"), everything(refusals), ids=lambda each: each[:40])
def test_every_refusal_is_explained(module: str, text: str) -> None:
    named = {name for row in TABLES[1] for name in re.split(r"[;,] (?!$)", row)} | TABLES[1]
    assert text in named, f"docs/chat.md has no line for this refusal of {module}"
