"""YAML 1.2 and `section.key=value` overrides into a validated `Recipe`, with file:line in every complaint.

ruamel.yaml reads YAML 1.2 (`1e-4` is a number), refuses duplicate keys and knows the line of each key; pydantic checks
values. This module joins the two: it follows the aliases users of other toolkits type, and turns either library's
error into one line.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle, repeat
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, MappingStartEvent, NodeEvent

from toolkit.errors import RecipeError, did_you_mean
from toolkit.recipe.aliases import ALIASES, NEGATED, NOT_HERE
from toolkit.recipe.bounds import Section
from toolkit.recipe.rollouts import RewardFunction
from toolkit.recipe.schema import Recipe, TrainSource

__all__ = ["dump", "load", "parse"]

_COMMAND_LINE = "command line"
_MOST_BYTES = 1 << 20
_DEEPEST = 32
_DEPTH = 2  # a section and its key
_ITEMS: Mapping[tuple[str, ...], type[Section]] = {
    ("data", "train"): TrainSource,
    ("rewards", "functions"): RewardFunction,
}
"""Fields that are lists, and what an item of each is."""
_ENV = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def load(path: str | os.PathLike[str], overrides: Sequence[str] = (), note: Callable[[str], None] = print) -> Recipe:
    """Read the recipe at `path`.

    Args:
        path: a YAML file.
        overrides: `section.key=value` strings; the value is YAML.
        note: called with one line for each alias that was followed.

    Raises:
        RecipeError: the file cannot be read, or anything in it is not a recipe; the message has file:line.
    """
    file = Path(path)
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise RecipeError(f"{path}: larger than 1 MiB; this is not a recipe")
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = did_you_mean(file.name, [p.name for p in file.parent.glob("*.y*ml")]) if file.parent.is_dir() else ""
        raise RecipeError(f"{path}: no such recipe{near}; `onecard init` writes a starter") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error}); give a UTF-8 YAML file") from None
    return _resolve_paths(parse(text, str(path), overrides, note), file.parent)


def parse(
    text: str, where: str = "recipe", overrides: Sequence[str] = (), note: Callable[[str], None] = print
) -> Recipe:
    """As `load`, from a string; `where` is the name used in messages."""
    data, lines = _read(text, where)
    for override in overrides:
        _apply_override(data, lines, override)
    data = _follow_aliases(data, lines, where, note)
    _expand_environment(data, lines, where)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_explain(error, lines, where)) from None


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every field present, the Hub token left out."""
    stream = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 120
    yaml.dump(recipe.model_dump(exclude={"hub": {"hub_token"}}), stream)
    return stream.getvalue()


_PATHS = {
    "model": ("model_name_or_path", "tokenizer_name_or_path", "merge_base"),
    "lora": ("adapter_name_or_path",),
    "data": ("train", "validation", "chat_template_path"),
    "eval": ("metric", "regression"),
    "rewards": ("functions",),
}
"""Fields that may name something on this disk. Its last name stays: files of the Hub's cache are links to hashes."""


def _resolve_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Local names made absolute: relative to the current directory, else to the recipe's folder; others left alone."""
    changes: dict[str, Any] = {}
    for section, fields in _PATHS.items():
        part = getattr(recipe, section)
        found = {field: _existing_of(getattr(part, field), folder) for field in fields}
        changes[section] = part.model_copy(update={field: path for field, path in found.items() if path})
    return recipe.model_copy(update=changes)


def _existing_of(value: str | list[Any] | None, folder: Path) -> str | list[Any] | None:
    if isinstance(value, list):
        return [each.located(lambda name: _existing(name, folder)) for each in value]
    return _existing(value, folder)


def _existing(value: str | None, folder: Path) -> str | None:
    # `metric.py:function` goes with its file; of a link the own name stays, as the Hub's cache has files by hashes.
    name, colon, attribute = (value or "").partition(".py:")
    name = f"{name}.py" if colon else name
    candidates = (Path(name).expanduser(), folder / name) if name else ()
    found = next((str(path.parent.resolve() / path.name) for path in candidates if path.exists()), None)
    return f"{found}:{attribute}" if found and colon else found


_Lines = dict[tuple[str, ...], str]


def _read(text: str, where: str) -> tuple[dict[str, Any], _Lines]:
    yaml = YAML(typ="rt")
    yaml.allow_duplicate_keys = False
    try:
        _refuse_bombs(text, where)
        tree = yaml.load(text)
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        key = re.search(r'key "([^"]+)"', str(error.problem))
        name = key.group(1) if key else "a key"
        raise RecipeError(f"{where}:{line}: {name}: given twice; keep one") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 0
        raise RecipeError(f"{where}:{line}: not valid YAML: {error.problem or error.context}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{where}: not valid YAML: {str(error).splitlines()[0]}") from None
    if tree is None:
        raise RecipeError(f"{where}: empty; `onecard init` writes a starter")
    if not isinstance(tree, CommentedMap):
        raise RecipeError(f"{where}:1: a recipe is a mapping of sections (model, data, …), not a {_kind(tree)}")
    lines: _Lines = {}
    return _plain(tree, (), lines, where), lines


def _refuse_bombs(text: str, where: str) -> None:
    """On the event stream, before anything is built: aliases can outgrow all memory, deep nesting takes for ever, and a
    key that is a collection cannot be looked up."""
    places: list[Iterator[bool]] = []  # of each open collection: whether the next node in it is a key
    for event in YAML().parse(text):
        line = event.start_mark.line + 1
        if isinstance(event, AliasEvent):
            raise RecipeError(f"{where}:{line}: YAML aliases (*name) are not used in recipes: write the value out")
        if isinstance(event, CollectionEndEvent):
            places.pop()
        is_key = isinstance(event, NodeEvent) and bool(places) and next(places[-1])
        if not isinstance(event, CollectionStartEvent):
            continue
        if is_key:
            raise RecipeError(f"{where}:{line}: a key is a name, not a mapping or a list ('? ' makes one)")
        places.append(cycle((True, False)) if isinstance(event, MappingStartEvent) else repeat(False))
        if len(places) > _DEEPEST:
            raise RecipeError(f"{where}:{line}: nested more than {_DEEPEST} deep; this is not a recipe")


def _plain(value: Any, path: tuple[str, ...], lines: _Lines, where: str) -> Any:
    if isinstance(value, Mapping):
        result = {}
        for key, item in value.items():
            here = (*path, str(key))
            if isinstance(value, CommentedMap):
                lines[here] = f"{where}:{value.lc.key(key)[0] + 1}"
            if not isinstance(key, str):
                raise RecipeError(f"{lines.get(here, where)}: {key!r}: a key must be a string; quote it")
            result[key] = _plain(item, here, lines, where)
        return result
    if isinstance(value, list):
        if isinstance(value, CommentedSeq):  # one with a tag of its own knows no lines
            lines |= {(*path, str(n)): f"{where}:{at[0] + 1}" for n, at in (value.lc.data or {}).items()}
        return [_plain(item, (*path, str(index)), lines, where) for index, item in enumerate(value)]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "mapping"
    if isinstance(value, list):
        return "list"
    return {"str": "string", "int": "whole number", "float": "number", "bool": "true/false", "NoneType": "null"}.get(
        type(value).__name__, type(value).__name__
    )


def _apply_override(data: dict[str, Any], lines: _Lines, override: str) -> None:
    key, equals, raw = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise RecipeError(f"{override!r}: an override is section.key=value, e.g. training.learning_rate=1e-4")
    wrapped, _ = _read(f"value: {raw}" if raw.strip() else "value:", f"override {key}")
    target = data
    for step in path[:-1]:
        if target.get(step) is None:
            target[step] = {}
        target = target[step]
        if not isinstance(target, dict):
            raise RecipeError(f"override {key}: {step} is a {_kind(target)}, it has no keys")
    target[path[-1]] = wrapped["value"]
    lines[path] = _COMMAND_LINE


def _follow_aliases(data: dict[str, Any], lines: _Lines, where: str, note: Callable[[str], None]) -> dict[str, Any]:
    sections = Recipe.model_fields
    result: dict[str, Any] = {}
    moved: list[tuple[tuple[str, ...], str, Any]] = []
    for key, value in data.items():
        if key in sections and isinstance(value, dict):
            fields = _fields(key)
            result[key] = {k: v for k, v in value.items() if k in fields or k not in ALIASES}
            moved += [((key, k), ALIASES[k], v) for k, v in value.items() if k not in fields and k in ALIASES]
        elif key in ALIASES and key not in sections:
            moved.append(((key,), ALIASES[key], value))
        elif key not in sections and (homes := [s for s in sections if key in _fields(s)]):
            raise RecipeError(f"{lines.get((key,), where)}: {key}: belongs in a section: write it as {homes[0]}.{key}")
        else:
            result[key] = value
    for source, target, value in moved:
        _move(result, lines, where, source, target, value, note)
    return result


def _move(
    data: dict[str, Any],
    lines: _Lines,
    where: str,
    source: tuple[str, ...],
    target: str,
    value: Any,
    note: Callable[[str], None],
) -> None:
    section, field = target.split(".")
    place = lines.get(source, where)
    home = data.setdefault(section, {})
    if not isinstance(home, dict):
        raise RecipeError(f"{lines.get((section,), where)}: {section}: a section is a mapping, not a {_kind(home)}")
    overrides = place == _COMMAND_LINE != lines.get((section, field))
    if field in home and not overrides:
        raise RecipeError(f"{place}: {source[-1]}: means {target}, which is given too; keep one")
    if source[-1] in NEGATED and isinstance(value, bool):
        value = not value
    home[field] = value
    lines[(section, field)] = place
    note(f"{place}: {'.'.join(source)} is called {target} here")


def field_named(name: str) -> str | None:
    """The `section.key` that a name stands for: one of ours, or one that other toolkits use."""
    homes = [section for section in Recipe.model_fields if name in _fields(section)]
    return f"{homes[0]}.{name}" if homes else ALIASES.get(name)


def field_words(started: str) -> list[str]:
    """`section.key=` for every field, and `section.key=word` for each word of the one that is `started` exactly."""
    found = []
    for section, info in Recipe.model_fields.items():
        annotation: Any = info.annotation
        for key, field in annotation.model_fields.items():
            name = f"{section}.{key}"
            found += [f"{name}={word}" for word in _words(field.annotation)] if name == started else []
            found.append(f"{name}=")
    return found


def _words(annotation: Any) -> list[str]:
    """What a field may be, where that is a choice of a few."""
    if annotation is bool:
        return ["true", "false"]
    options = get_args(annotation)
    if get_origin(annotation) is Literal:
        return [str(option) for option in options]
    return [word for option in options if option is not bool for word in _words(option)]


def _fields(section: str) -> list[str]:
    annotation = Recipe.model_fields[section].annotation
    return list(annotation.model_fields) if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def _expand_environment(data: dict[str, Any], lines: _Lines, where: str) -> None:
    for section, content in data.items():
        if not isinstance(content, dict):
            continue
        for key, value in content.items():
            place = f"{lines.get((section, key), where)}: {section}.{key}"
            names = _ENV.findall(value) if isinstance(value, str) else []
            if names and section != "hub":
                raise RecipeError(f"{place}: environment variables are read in the hub section only")
            for name in names:
                if name not in os.environ:
                    raise RecipeError(f"{place}: the environment variable {name} is not set")
                content[key] = content[key].replace(f"${{{name}}}", os.environ[name])
            if section == "hub" and key == "hub_token" and value is not None and not names:
                raise RecipeError(f"{place}: never write a token into a recipe; use ${{HF_TOKEN}}")


def _explain(error: ValidationError, lines: _Lines, where: str) -> str:
    problems: list[Any] = [*error.errors(include_url=False)]
    if any(len(_path(problem)) > _DEPTH for problem in problems):  # an item of a list: what else it could be is no news
        problems = [problem for problem in problems if len(_path(problem)) > _DEPTH]
    # A union reports each of its branches; the first problem with the shortest path is the one a person made.
    problem = min(problems, key=lambda p: (p["type"] != "extra_forbidden", len(_path(p))))
    path = _path(problem)
    # A problem of a whole section (two fields that disagree) is reported where the section begins.
    place = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), where)
    if place == where and any(key[:1] == path[:1] for key in lines):
        place = _COMMAND_LINE  # the file has no such section
    name = ".".join(path[:_DEPTH]) + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in path[_DEPTH:])
    if problem["type"] == "extra_forbidden":
        known = _fields(path[0]) if len(path) > 1 else list(Recipe.model_fields)
        known = list(_ITEMS[path[:_DEPTH]].model_fields) if len(path) > _DEPTH else known
        hint = did_you_mean(path[-1], known) or f"; known: {', '.join(known)}"
        if path[-1] in NOT_HERE:
            hint = f"; {NOT_HERE[path[-1]]}"
        return f"{place}: {name}: unknown key{hint}"
    if problem["type"] == "missing":
        return f"{place}: {name}: required and missing"
    wanted = "; or ".join(
        dict.fromkeys(_lower(p["msg"]) for p in problems if _path(p) == path and p["type"] != "extra_forbidden")
    )
    got = "" if problem["type"] == "value_error" else f" (got {_short(problem['input'])})"
    return f"{place}: {name}: {wanted}{got}"


def _path(problem: Any) -> tuple[str, ...]:
    """The recipe key of a pydantic problem, without the union branches that pydantic appends.

    Of a field that is an item's in a list, that is section, key, the item's number, and the field.
    """
    location = [str(part) for part in problem["loc"] or getattr(problem.get("ctx", {}).get("error"), "path", ())]
    depth = 1
    if len(location) > 1 and location[0] in Recipe.model_fields and location[1] not in ("",):
        depth = _DEPTH
    number = next((n for n, part in enumerate(problem["loc"]) if isinstance(part, int)), None)
    item = location[number : number + 2] if number is not None and tuple(location[:depth]) in _ITEMS else []
    return tuple(location[:depth] + item)


def _lower(message: str) -> str:
    message = message.removeprefix("Value error, ").removeprefix("Input ")
    return message if message[1:2].isupper() else message[:1].lower() + message[1:]  # PEFT stays PEFT


def _short(value: Any) -> str:
    shown = repr(value) if not isinstance(value, (dict, list)) else f"a {_kind(value)}"
    return shown if len(shown) <= 60 else shown[:57] + "…"
