"""The shipped small tokenizer, and what the data tests write and read again and again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from toolkit.data import Batches, build_batches

MODEL = Path(__file__).parents[3] / "recipes" / "quickstart" / "nano-qwen3moe-2m"


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def tokenizer_with() -> Callable[..., Any]:
    """A fresh tokenizer with these special tokens too, and perhaps another end-of-sequence token."""

    def make(*tokens: str, eos: str | None = None) -> Any:
        fresh = AutoTokenizer.from_pretrained(MODEL)
        fresh.add_tokens(list(tokens), special_tokens=True)
        if eos is not None:
            fresh.eos_token = eos
        return fresh

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSONL (bytes and strings as they are) and return the path."""

    def to(rows: Iterable[Any], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, bytes) else _line(row) for row in rows]
        path.write_bytes(b"\n".join(lines) + (b"\n" if lines else b""))
        return path

    return to


@pytest.fixture
def build(tokenizer: Any, write: Callable[..., Path]) -> Callable[..., Batches]:
    """Batches of the given rows; `tok` replaces the tokenizer, the rest goes to `build_batches`. Not shuffled."""

    def run(rows: Iterable[Any], *, tok: Any = None, **options: Any) -> Batches:
        options = {"shuffle": False, **options}
        return build_batches(tok or tokenizer, train=str(write(rows)), **options)

    return run


@pytest.fixture
def trained(tokenizer: Any) -> Callable[..., list[str]]:
    """The trained runs of one example, decoded."""

    def runs(batches: Batches, index: int = 0, tok: Any = None) -> list[str]:
        row = batches.train[index]
        found: list[list[int]] = []
        before = -100
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            if label != -100:
                assert label == token
                if before == -100:
                    found.append([])
                found[-1].append(token)
            before = label
        return [(tok or tokenizer).decode(run) for run in found]

    return runs


def _line(row: Any) -> bytes:
    return (row if isinstance(row, str) else json.dumps(row)).encode()
