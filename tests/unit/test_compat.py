"""Every private name of transformers, TRL, PEFT and Accelerate that is used is named in `toolkit.compat`, and there."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from toolkit.compat import SEAMS, Seam

HOUSE = Path(__file__).parents[2] / "toolkit"
FILES = sorted(path for path in HOUSE.rglob("*.py") if path.name != "compat.py")
LIBRARIES = ("accelerate", "peft", "transformers", "trl")
DOCUMENTED = {*LIBRARIES, "accelerate.utils", "peft.utils", "transformers.quantizers", "transformers.utils"}
"""Modules whose public names are meant to be imported."""


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: f"{seam.library}.{seam.name}")
def test_every_seam_is_there(seam: Seam) -> None:
    assert seam.check() is None


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A stand-in library of one module with a class, installed as version 9.9.9."""
    (tmp_path / "sesame").mkdir()
    (tmp_path / "sesame" / "__init__.py").write_text("")
    (tmp_path / "sesame" / "door.py").write_text(
        "class Door:\n    _hinge = 1\n    def open(self):\n        self._opened = 1\n"
    )
    (tmp_path / "sesame" / "extra.py").write_text("import a_module_that_nobody_has\n")
    (tmp_path / "sesame-9.9.9.dist-info").mkdir()
    (tmp_path / "sesame-9.9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: sesame\nVersion: 9.9.9")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "sesame"
    for name in [name for name in sys.modules if name.split(".")[0] == "sesame"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("door.Door", True),
        ("door.Door._hinge", True),
        ("door.Door._opened", True),  # given to instances
        ("door.Door._lock", False),
        ("door._hing", False),
        ("door.Gate", False),
        ("door.Gate._hinge", False),
        ("gate.Door", False),
        ("gate", False),
        ("extra.anything", True),  # cannot be asked without what it needs
    ],
)
def test_what_moved_is_one_readable_line(library: str, name: str, there: bool) -> None:
    line = Seam(library, name, ("quant", "mtp"), "to open doors").check()
    wanted = (
        f"sesame 9.9.9: {name} is gone, used in toolkit/quant, toolkit/mtp to open doors; install the sesame that "
        "pyproject.toml names"
    )
    assert line == (None if there else wanted)


def internal_imports(tree: ast.AST) -> Iterator[str]:
    """Names that come from inside a library: from a module that is not documented, or with an underscore."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), names=names) if module.split(".")[0] in LIBRARIES:
                yield from (
                    f"{module}.{name.name}" for name in names if module not in DOCUMENTED or name.name.startswith("_")
                )
            case ast.Import(names=names):
                yield from (
                    name.name for name in names if name.name.split(".")[0] in LIBRARIES and name.name not in DOCUMENTED
                )


def private(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"_[A-Za-z]\w*", name) is not None


def own_names(tree: ast.AST) -> Iterator[str]:
    """Underscore names that a module defines: functions, classes, variables, and what methods put into `self`."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                yield name


def foreign_attributes(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Underscore attributes that no module of ours defines, written out or by name, of anything not of Python's own."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=module)) if module in sys.stdlib_module_names:
                pass
            case ast.Attribute(attr=name) if private(name) and name not in own:
                yield name
            case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(value=name), *_]):
                if private(name) and name not in own:
                    yield name


def shared_names(tree: ast.Module, module: ModuleType | None) -> Iterator[str]:
    """Underscore names that a class of ours has in common with the library's class that it extends."""
    homes = {
        name.asname or name.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES
        for name in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.bases:
            bases = {ast.unparse(base) for base in node.bases}
            theirs = "".join(_source_of_module(homes[base]) for base in bases & homes.keys())
            cls = getattr(module, node.name, None)
            for base in cls.__mro__ if isinstance(cls, type) else ():
                theirs += _source_of_module(base.__module__) if base.__module__.split(".")[0] in LIBRARIES else ""
            used = {*own_names(node), *(part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute))}
            yield from (name for name in used if private(name) and re.search(rf"\b{name}\b", theirs))


@cache
def _source_of_module(name: str) -> str:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def _module(path: Path, tree: ast.Module) -> ModuleType | None:
    """Imported where a class in it may extend a library's through others of ours."""
    if not any(isinstance(node, ast.ClassDef) and node.bases for node in tree.body):
        return None
    return importlib.import_module(".".join(path.relative_to(HOUSE.parent).with_suffix("").parts))


@cache
def uses() -> dict[str, set[str]]:
    """Imports by full name and attributes by their own, to the rooms that use them."""
    trees = {path: ast.parse(path.read_text()) for path in FILES}
    shared = {path: set(shared_names(tree, _module(path, tree))) for path, tree in trees.items()}
    own = {name for tree in trees.values() for name in own_names(tree)}.difference(*shared.values())
    found: dict[str, set[str]] = defaultdict(set)
    for path, tree in trees.items():
        for name in [*internal_imports(tree), *foreign_attributes(tree, own), *shared[path]]:
            found[name].add(path.relative_to(HOUSE).parts[0].removesuffix(".py"))
    return found


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from transformers.core_model_loading import rename", "transformers.core_model_loading.rename"),
        ("from trl import _hidden", "trl._hidden"),
        ("import peft.tuners.lora", "peft.tuners.lora"),
        ("model.config._secret = 1", "_secret"),
        ("if hasattr(model, '_secret'): pass", "_secret"),
        ("getattr(model.config, '_secret', None)", "_secret"),
    ],
)
def test_the_scan_catches(source: str, name: str) -> None:
    tree = ast.parse(source)
    assert [*internal_imports(tree), *foreign_attributes(tree, set())] == [name]


@pytest.mark.parametrize(
    "body",
    ["def _save_checkpoint(self): pass", "def go_on(self): self._save_checkpoint = 0", "_save_checkpoint = None"],
)
def test_the_scan_catches_what_a_class_shares_with_its_base(body: str) -> None:
    source = f"from transformers.trainer import Trainer\nclass Ours(Trainer):\n    {body}"
    assert set(shared_names(ast.parse(source), None)) == {"_save_checkpoint"}


def test_the_scan_lets_our_own_and_documented_names_pass() -> None:
    tree = ast.parse("import os\nfrom peft.utils import CONFIG\nself._ours\nos._exit\nx.__dict__\nrow['_secret']")
    assert not [*internal_imports(tree), *foreign_attributes(tree, {"_ours"})]


def test_every_use_is_named() -> None:
    named: dict[str, set[str]] = defaultdict(set)
    for seam in SEAMS:
        full = f"{seam.library}.{seam.name}"
        named[full if full in uses() else seam.name.rpartition(".")[2]].update(seam.used_by)
    assert {name: rooms for name, rooms in uses().items() if rooms != named[name]} == {}
    assert len(uses()) > 70


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: f"{seam.library}.{seam.name}")
def test_every_seam_is_used(seam: Seam) -> None:
    name = seam.name.rpartition(".")[2]
    files = [path for path in FILES if re.search(rf"\b{name}\b", path.read_text())]
    assert set(seam.used_by) <= {path.relative_to(HOUSE).parts[0].removesuffix(".py") for path in files}


def test_the_list_itself_imports_nothing_heavy() -> None:
    tree = ast.parse(inspect.getsource(sys.modules["toolkit.compat"]))
    imported = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported if name} <= sys.stdlib_module_names
