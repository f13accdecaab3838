"""The laws of the house, read off the source: who may import whom, what a module shows, how long things may get.

Each law is a function from source text to complaints, and is tried on an offender before it is put to the house.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOUSE = ROOT / "toolkit"
MODULES = sorted(HOUSE.rglob("*.py"))
PUBLIC = [path for path in MODULES if path.name == "__init__.py" or not path.name.startswith("_")]
PROGRAMS = sorted(path for folder in ("toolkit", "scripts", "tests") for path in (ROOT / folder).rglob("*.py"))

ORDER = (
    *(
        "errors",
        "compat",
        "processes",
        "durable",
        "run_folder",
        "steps",
        "recipe",
        "parts",
        "labels",
        "families",
    ),
    *("architecture", "checkpoint", "ops", "quant", "offload", "adapters", "mtp", "rehearsal", "plan", "data"),
    *("rewards", "training", "evaluate", "artifact", "export", "sweep", "report", "run", "serving", "cli"),
)
"""The rooms of the house; each may import those before it, and no other."""
APART: dict[str, set[str]] = {
    "compat": set(),
    "durable": {"errors"},
    "run_folder": set(),
    "steps": {"errors"},
    "recipe": {"errors"},
    "parts": set(),
    "labels": set(),
    "families": set(),
    "ops": {"errors", "steps", "parts", "labels", "architecture"},
    "offload": set(ORDER[: ORDER.index("offload")]),
    "data": {"errors", "processes", "durable", "steps", "recipe", "labels"},
    "rewards": {"errors"},
}
"""Rooms that may import less than what stands before them."""
MAY_IMPORT = {room: APART.get(room, set(ORDER[:place])) for place, room in enumerate(ORDER)}


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _room(path: Path) -> str:
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


def imported(source: str) -> Iterator[str]:
    """Dotted names of ours that a module imports, wherever it stands, or holds as text for `import_module`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found = [alias.name for alias in names]
            case ast.ImportFrom(module="toolkit", level=0, names=names):
                found = [f"toolkit.{alias.name}" for alias in names]
            case ast.ImportFrom(module=str(module), level=0):
                found = [module]
            case ast.ImportFrom():
                found = ["toolkit.(a relative import)"]
            case ast.Constant(value=str(text)) if re.fullmatch(r"toolkit(\.\w+)+", text):
                found = [text]
            case _:
                found = []
        yield from (name for name in found if name.split(".")[0] == "toolkit")


def forbidden_imports(room: str, source: str) -> list[str]:
    """Imports of rooms that stand later in the house. The version is the package's own and free to all."""
    free = MAY_IMPORT[room] | {room, "__version__"}
    return sorted({name for name in imported(source) if ([*name.split("."), ""])[1] not in free})


@pytest.mark.parametrize(
    ("room", "source", "complaint"),
    [
        ("quant", "def f():\n    from toolkit.training.loop import x", "toolkit.training.loop"),
        ("recipe", "from toolkit import plan", "toolkit.plan"),
        ("data", "import toolkit.adapters as a", "toolkit.adapters"),
        ("ops", "from . import reference", "toolkit.(a relative import)"),
        ("artifact", "import toolkit", "toolkit"),
        ("errors", "importlib.import_module('toolkit.cli')", "toolkit.cli"),
        ("plan", "ROOM = 'toolkit.training'\nimport_module(ROOM)", "toolkit.training"),
        ("ops", "HOMES = {'x': 'toolkit.quant.load'}", "toolkit.quant.load"),
    ],
)
def test_the_import_law_catches(room: str, source: str, complaint: str) -> None:
    assert forbidden_imports(room, source) == [complaint]


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_rooms_import_only_earlier_rooms(path: Path) -> None:
    room = _room(path)
    if room in {"__init__", "__main__"}:  # the front door opens every room
        return
    assert room in MAY_IMPORT, f"{room} has no place in the house yet: write it into MAY_IMPORT and the design"
    assert not forbidden_imports(room, path.read_text())


def exported(source: str) -> list[str] | None:
    """The `__all__` of a module, None where it has none."""
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            names = ast.literal_eval(node.value)  # type: ignore[attr-defined]
            return [str(name) for name in names]
    return None


@pytest.mark.parametrize("path", PUBLIC, ids=_name)
def test_all_is_there_and_sorted(path: Path) -> None:
    names = exported(path.read_text())
    assert names is not None
    # ruff's order (RUF022), which its --fix writes: constants, then classes, then the rest.
    assert names == sorted(set(names), key=lambda name: (not name.isupper(), not name[0].isupper(), name))


def test_at_most_twelve_public_names() -> None:
    assert len(exported((HOUSE / "__init__.py").read_text()) or []) <= 12


def _loaded_after(program: str, *modules: str) -> set[str]:
    """Which of `modules` a fresh interpreter has loaded once it ran `program`."""
    report = f"\nimport sys\nprint('loaded', *({set(modules)!r} & set(sys.modules)), file=sys.stderr)"
    command = [sys.executable, "-c", program + report]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *_, last = (line for line in done.stderr.splitlines() if line.startswith("loaded"))
    return set(last.split()[1:])


def test_loaded_after_sees_an_import() -> None:
    assert _loaded_after("import json", "json", "torch") == {"json"}


@pytest.mark.parametrize("module", ["toolkit", "toolkit.errors", "toolkit.recipe", "toolkit.rewards", "toolkit.cli"])
def test_light_modules_load_no_torch(module: str) -> None:
    assert not _loaded_after(f"import {module}", "torch", "transformers", "datasets", "peft")


def test_the_check_of_a_card_loads_torch_alone() -> None:
    """`gpu_check.py` runs where torch and triton are all there is: what it imports of ours must not need more."""
    pytest.importorskip("triton")
    program = ast.parse((ROOT / "scripts" / "gpu_check.py").read_text())
    nodes = (node for node in ast.walk(program) if isinstance(node, ast.ImportFrom))
    ours = [ast.unparse(node) for node in nodes if (node.module or "").startswith("toolkit.")]
    assert ours
    assert not _loaded_after("\n".join(ours), "transformers", "peft", "pydantic", "datasets", "accelerate")


def test_help_loads_nothing_heavy() -> None:
    program = """
import sys
from toolkit.cli import main
sys.argv = ["onecard", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
"""
    assert not _loaded_after(program, "torch", "transformers", "pydantic", "datasets", "peft")


@pytest.mark.parametrize("path", PROGRAMS, ids=_name)
def test_files_stay_short_and_are_named_for_what_they_hold(path: Path) -> None:
    assert path.stem not in {"common", "helper", "helpers", "misc", "util", "utils"}
    assert not set(path.relative_to(ROOT).parts) & {"common", "helpers", "utils"}
    if HOUSE / "ops" / "triton" not in path.parents:  # a kernel is one piece
        assert len(path.read_text().splitlines()) <= 400


_LONG = {"grouped_gemm_kernel", "four_bit_forward_kernel", "four_bit_gradient_kernel", "build_batches"}
"""A kernel is one piece; the last takes each field of the recipe's data section by name."""


def test_functions_stay_short() -> None:
    nodes = [node for path in MODULES for node in ast.walk(ast.parse(path.read_text()))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}
    assert statistics.median(lengths.values()) <= 7
    assert statistics.quantiles(lengths.values(), n=10)[-1] <= 20
    assert {node.name for node, length in lengths.items() if length > 60} == _LONG


# Families whose names are words of their own: accessibility attributes, beam search, a stone.
_ORDINARY = {"aria", "beam", "dots", "flint"}


@cache
def families() -> frozenset[str]:
    """MoE families of the installed transformers by folder name, and the brands that several of them share."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    sources = Path(spec.origin).parent.glob("models/*/modeling_*.py")
    names = {path.parent.name for path in sources if "use_experts_implementation" in path.read_text(encoding="utf-8")}
    brands = Counter(re.match(r"[a-z]*", name)[0] for name in names)  # type: ignore[index]
    return frozenset(names | {brand for brand, times in brands.items() if times > 1}) - _ORDINARY


def _words(source: str) -> Iterator[str]:
    """Identifiers and string literals of a module; docstrings may name what a figure was measured on."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value
        for field in ("id", "attr", "name", "arg", "module"):
            if isinstance(word := getattr(node, field, None), str):
                yield word


def named_families(source: str) -> set[str]:
    """Families that a module's code names, in snake, kebab or camel case, with or without a size."""
    found = set()
    for word in _words(source):
        snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", word).lower()
        parts = "_" + re.sub(r"[^a-z0-9]+", "_", snake) + "_"
        found |= {name for name in families() if re.search(rf"_{name}\d*_", parts)}
    return found


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("if 'qwen' in config.model_type: pass", "qwen"),
        ("from transformers import Qwen3MoeForCausalLM", "qwen3_moe"),
        ("is_deepseek_v3 = True", "deepseek_v3"),
        ("name = 'Mixtral-8x7B'", "mixtral"),
        ("def load_gpt_oss(): pass", "gpt_oss"),
    ],
)
def test_the_family_law_catches(source: str, name: str) -> None:
    assert name in named_families(source)


def test_the_family_law_lets_prose_and_plain_words_pass() -> None:
    assert not named_families('"""Measured on a Qwen3-MoE."""\nbeam_search = num_experts = "moe aria-label"')


@pytest.mark.parametrize("path", [path for path in MODULES if path != HOUSE / "families.py"], ids=_name)
def test_no_model_family_is_named(path: Path) -> None:
    assert not named_families(path.read_text())
