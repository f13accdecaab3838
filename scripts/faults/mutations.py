"""Mutations of good input, for the fuzzer: of bytes, of JSON values, of one row of many, of a template's parts."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from typing import Any

from scripts.faults.hostile import FRAGMENTS, VALUES

__all__ = ["Mutation", "mutate_bytes", "mutate_json", "mutate_row", "mutate_template"]

Mutation = Callable[[bytes, random.Random], bytes]

_PARTS = re.compile(rb"(\{%.*?%\}|\{\{.*?\}\}|[\n])", re.DOTALL)
_TEMPLATE = tuple(fragment for fragment in FRAGMENTS if fragment.startswith(b"{") and fragment.endswith(b"}"))
_COSTLY = (b"100000", b"9999", b"10**10", b"10 ** 9")
"""Each of these costs a second of processor time or a fork, so they are put in less often."""


def mutate_bytes(seed: bytes, chance: random.Random) -> bytes:
    """One to five changes of bytes."""
    data = bytearray(seed)
    for _ in range(chance.randint(1, 5)):
        at = chance.randint(0, len(data))
        match chance.randint(0, 6):
            case 0 if data:
                data[at % len(data)] ^= 1 << chance.randint(0, 7)
            case 1:
                del data[at : at + chance.randint(1, 40)]
            case 2:
                data[at:at] = data[at : at + chance.randint(1, 200)]
            case 3:
                del data[at:]
            case 4:
                data[at : at + chance.randint(0, 8)] = chance.choice(FRAGMENTS)
            case 5:
                data[at:at] = chance.choice(FRAGMENTS)
            case _:
                data[at:at] = chance.randbytes(chance.randint(1, 8))
    return bytes(data)


def mutate_json(seed: bytes, chance: random.Random) -> bytes:
    """One to four values or keys of a JSON document exchanged."""
    tree = json.loads(seed)
    for _ in range(chance.randint(1, 4)):
        holder: Any = {"": tree}
        key: Any = ""
        while isinstance(holder[key], (dict, list)) and holder[key] and chance.random() < 0.8:
            holder = holder[key]
            key = chance.choice(list(holder)) if isinstance(holder, dict) else chance.randrange(len(holder))
        match chance.randint(0, 4):
            case 0 if isinstance(holder, dict) and key in holder and holder is not tree:
                holder[chance.choice(["", "r", "__class__", "files", "../x", key + "x"])] = holder.pop(key)
            case 1 if isinstance(holder, dict) and key:
                del holder[key]
            case _:
                holder[key] = copy.deepcopy(chance.choice(VALUES))
        tree = holder[""] if key == "" and isinstance(holder, dict) and "" in holder else tree
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def mutate_row(seed: bytes, chance: random.Random) -> bytes:
    """One line of JSON lines mutated as JSON; the others stay good."""
    rows = seed.splitlines()
    at = chance.randrange(len(rows))
    rows[at] = mutate_json(rows[at], chance)
    return b"\n".join(rows)


def mutate_template(seed: bytes, chance: random.Random) -> bytes:
    """Statements, expressions and texts of a Jinja template left out, doubled, exchanged, or hostile ones put between.

    What comes of it is a template more often than what changes of bytes leave.
    """
    parts = _PARTS.split(seed)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(parts))
        match chance.randint(0, 4):
            case 0 if len(parts) > 1:
                del parts[at]
            case 1:
                parts.insert(at, parts[chance.randrange(len(parts))])
            case 2:
                other = chance.randrange(len(parts))
                parts[at], parts[other] = parts[other], parts[at]
            case _:
                hostile = chance.choice(_TEMPLATE)
                if chance.random() < 0.05 or not any(part in hostile for part in _COSTLY):
                    parts.insert(at, hostile)
    return b"".join(parts)
