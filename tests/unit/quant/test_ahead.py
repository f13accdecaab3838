"""Reading ahead: files' pages are asked for in the order of their use, never too early, and all of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.parity.conftest import COMMON, FAMILIES
from toolkit.quant import ahead, load_int8, quantize_checkpoint, rounding


class Source:
    """A tensor that knows whether it was asked for."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.is_asked = tensor, False

    def __getitem__(self, index: object) -> torch.Tensor:
        assert index is ...
        self.is_asked = True
        return self.tensor


def test_at_most_so_many_bytes_are_asked_for_before_their_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_AHEAD", 1000)
    sources = [Source(torch.zeros(100)) for _ in range(9)]  # 400 bytes each
    reader = ahead.ReadAhead(sources)
    assert [source.is_asked for source in sources] == [True] * 3 + [False] * 6
    reader.used(400)
    assert [source.is_asked for source in sources] == [True] * 4 + [False] * 5
    reader.used(3200)
    assert all(source.is_asked for source in sources)


def test_every_page_of_a_large_tensor_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_CHUNK", 5000)
    touched: list[torch.Tensor] = []
    monkeypatch.setattr(ahead, "_touch", touched.append)
    tensor = torch.arange(8000, dtype=torch.bfloat16).view(2, 10, 400)
    reader = ahead.ReadAhead([Source(tensor[0, 0, 0]), Source(tensor), Source(tensor.transpose(0, 2))])
    reader._pool.shutdown()
    assert [chunk.numel() for chunk in touched] == [2, 5000, 5000, 5000, 1000]
    assert torch.equal(torch.cat(touched[1:]), tensor.flatten().view(torch.uint8))


class Recorder(ahead.ReadAhead):
    """Keeps what it was asked for and told."""

    expected: list[torch.Tensor]
    spent: list[int]

    def __init__(self, sources: Iterable[Any]) -> None:
        self.expected.extend(source[...] for source in sources)

    def used(self, size: int) -> None:
        self.spent.append(size)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_what_is_rounded_is_expected_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    config = CONFIG_MAPPING[family](**{**COMMON, **FAMILIES[family]})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        rounded = [key for key in file.keys() if "proj" in key and "bias" not in key]  # noqa: SIM118
        wanted = sum(file.get_tensor(key).nbytes for key in rounded)
    monkeypatch.setattr(rounding, "ReadAhead", Recorder)
    for read in (load_int8, lambda model: quantize_checkpoint(model, tmp_path / "int8")):
        monkeypatch.setattr(Recorder, "expected", [], raising=False)
        monkeypatch.setattr(Recorder, "spent", [], raising=False)
        read(str(tmp_path / "model"))
        assert sum(tensor.nbytes for tensor in Recorder.expected) == sum(Recorder.spent) == wanted
