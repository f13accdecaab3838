"""What a plan reads of a model: its parts, its parameters' shapes, a few numbers of its config.

transformers asks the Hub for a config of 2 kB; the models of our recipes are planned without any connection, and where
the record that comes with the package was made with the installed versions, without torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

from toolkit.parts import Architecture, ExpertLayer, Linear

__all__ = [
    "Shapes",
    "by_versions",
    "fold",
    "is_published",
    "published",
    "published_config",
    "published_from",
    "read_record",
    "recorded_shapes",
    "rehearsal_versions",
    "stated_billions",
    "stored_method",
    "unfold",
]

_FOLDER = Path(__file__).parent / "published"
_OURS = ("stated_billions", "revision", "source", "quant_method")
_STACKED = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class Shapes:
    """A model without its weights.

    Args:
        parameters: name to shape, in the model's order.
        numbers: of its text config: hidden_size, num_hidden_layers, vocab_size, num_attention_heads, head_dim,
            max_position_embeddings, experts_per_token; shared_length: tokens up to which answers share their prompt in
            a row; head_parameters: of one multi-token-prediction layer.
        stacks: what an expert stack is in, where that is not what the recipe says of all.
        budget: bytes of all stacks, where it is still open which layers of int4 are int8.
    """

    architecture: Architecture
    parameters: Mapping[str, tuple[int, ...]]
    numbers: Mapping[str, int]
    stacks: Mapping[str, str] = field(default_factory=dict)
    budget: int | None = None

    def to_record(self) -> dict[str, Any]:
        """JSON-able and short: what repeats from layer to layer is said once."""
        return {
            "parameters": fold(f"{name} {' '.join(map(str, shape))}" for name, shape in self.parameters.items()),
            "layers": fold(json.dumps(astuple(layer)) for layer in self.architecture.layers),
            "linears": fold(f"{linear.name} {linear.role}" for linear in self.architecture.linears),
            "numbers": dict(self.numbers),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Shapes:
        """The inverse of `to_record`."""
        lines = [line.split(" ") for line in unfold(record["parameters"])]
        layers = tuple(ExpertLayer(*json.loads(line)) for line in unfold(record["layers"]))
        linears = tuple(Linear(*line.split(" ")) for line in unfold(record["linears"]))
        shapes = {name: tuple(map(int, shape)) for name, *shape in lines}
        return cls(Architecture(layers, linears), shapes, record["numbers"])

    def to_dict(self) -> dict[str, Any]:
        """Everything in full, to compare with."""
        return {"architecture": asdict(self.architecture), "parameters": self.parameters, "numbers": self.numbers}


def fold(lines: Iterable[str]) -> list[Any]:
    """Lines in which a layer's number stands between dots; equal layers in a row become [first, how many, lines]."""
    result: list[Any] = []
    for number, of_layer in groupby(lines, _number):
        each = list(of_layer)
        if number is None:
            result += each
            continue
        plain = [line.replace(f".{number}.", ".#.") for line in each]
        last = result[-1] if result and isinstance(result[-1], list) else None
        if last and last[2] == plain and last[0] + last[1] == number:
            last[1] += 1
        else:
            result.append([number, 1, plain])
    return result


def unfold(folded: Iterable[Any]) -> Iterator[str]:
    """The inverse of `fold`."""
    for item in folded:
        if isinstance(item, str):
            yield item
            continue
        first, count, plain = item
        for number in range(first, first + count):
            yield from (line.replace(".#.", f".{number}.") for line in plain)


def _number(line: str) -> int | None:
    found = re.search(r"\.(\d+)\.", line)
    return int(found[1]) if found else None


def published() -> tuple[str, ...]:
    """Models whose config.json comes with the package, by their names on the Hub."""
    return tuple(sorted(path.stem.replace("__", "/") for path in _FOLDER.glob("*.json")))


def published_config(name: str) -> dict[str, Any]:
    """What decides shapes in that model's config.json, `model_type` among it."""
    return {key: value for key, value in _read(name).items() if key not in _OURS}


def published_from(name: str) -> tuple[str, str]:
    """The commit on the Hub that people pin this model by, 40 hex digits; and where its config was read, in words."""
    values = _read(name)
    return values["revision"], values["source"]


def stated_billions(name: str) -> float:
    """Parameters as the model's card states them, which shows that the config is the right one."""
    return float(_read(name)["stated_billions"])


def stored_method(name: str) -> str | None:
    """How that model's expert weights are quantised on the Hub, None where they are plain."""
    method: str | None = _read(name).get("quant_method")
    return method


def is_published(name: str, revision: str) -> bool:
    """Whether no connection is needed for this model's shapes."""
    if Path(name).exists() or not _file(name).is_file():
        return False
    return revision in ("main", published_from(name)[0])


def rehearsal_versions() -> dict[str, str]:
    """What a record depends on: releases of torch, transformers and peft, whatever they were built for."""
    return {package: _version(package) for package in _STACKED}


def read_record(name: str) -> dict[str, Any]:
    """What the record of a published model says of the installed versions; empty where it says nothing of them.

    `scripts/record_plans.py` writes it.
    """
    path = _FOLDER / "records" / _file(name).name
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return next((each for each in by_versions(record) if rehearsal_versions() in each["versions"]), {})


def by_versions(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A record for each group of versions that it was found the same with, in full.

    The file has the first of them, and under `differing` what is not the same with others; null is what is not known.
    """
    if not record:
        return []
    first = {key: record[key] for key in ("versions", "shapes", "steps")}
    wholes = [first]
    for each in record.get("differing", []):
        steps = {**first["steps"], **each["steps"]}
        known = {digest: held for digest, held in steps.items() if held is not None}
        wholes.append({**first, **each, "steps": known})
    return wholes


def recorded_shapes(record: Mapping[str, Any]) -> Shapes | None:
    """The shapes in a record, None where it is empty."""
    return Shapes.from_record(record["shapes"]) if record else None


def _version(package: str) -> str:
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return ""


def _file(name: str) -> Path:
    return _FOLDER / f"{name.replace('/', '__')}.json"


def _read(name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(_file(name).read_text(encoding="utf-8"))
    return values
