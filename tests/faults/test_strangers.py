"""Adapters and templates from strangers: refused in one line, with nothing run, nothing asked and nothing written."""

from __future__ import annotations

import json
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from scripts.faults.targets import small_artifact
from tests.faults.conftest import MODEL
from toolkit.adapters import attach_lora, load_adapter
from toolkit.adapters.untrusted import check_adapter_files
from toolkit.artifact import verify_artifact
from toolkit.data.template import ChatTemplate
from toolkit.errors import DataError, ModelError
from toolkit.quant import load_int8

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A harmless adapter; the network raises."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return small_artifact(tmp_path)


def configure(folder: Path, **values: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


class Bomb:
    """A pickle that leaves a trace where it is opened."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.trace),))


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(folder.parent / "trace")))


def pickle_as_safetensors(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb(folder.parent / "trace")))


def endless_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((2**40).to_bytes(8, "little") + b"{")


def large_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((99 << 20).to_bytes(8, "little") + b" " * 100)


def beyond_the_file(folder: Path) -> None:
    header = json.dumps({"x.lora_A.weight": {"dtype": "F32", "shape": [2**40, 4], "data_offsets": [0, 2**44]}}).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)


def truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-5])


def absent(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def a_pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def a_device(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to("/dev/zero")


def a_large_config(folder: Path) -> None:
    with (folder / CONFIG).open("wb") as stream:
        stream.truncate(9 << 20)


def a_deep_config(folder: Path) -> None:
    (folder / CONFIG).write_text("[" * 100_000)


HOSTILE: list[Callable[[Path], None]] = [
    pickled, pickle_as_safetensors, endless_header, large_header, beyond_the_file, truncated, absent, a_pipe, a_device,
    a_large_config, a_deep_config,
]  # fmt: skip
VALUES: list[dict[str, Any]] = [
    {"peft_type": "PROMPT_TUNING"},
    {"peft_type": None},
    {"r": 10**9},
    {"r": -1},
    {"r": "2"},
    {"rank_pattern": {"q_proj": 10**9}},
    {"rank_pattern": {"(a+)+$": 2}},
    {"target_modules": "(.*)*x"},
    {"target_modules": ".*.*.*.*.*.*x"},
    {"exclude_modules": "(a|a)*$"},
]


def refused(adapter: Path, read: Callable[[Path], object]) -> None:
    before = sorted(path for path in adapter.parent.rglob("*"))
    with pytest.raises(ModelError) as error:
        read(adapter)
    assert "\n" not in str(error.value)
    assert sorted(path for path in adapter.parent.rglob("*")) == before


@pytest.mark.parametrize("spoil", HOSTILE, ids=lambda spoil: spoil.__name__)
def test_hostile_files_are_refused_before_peft_opens_them(adapter: Path, spoil: Callable[[Path], None]) -> None:
    check_adapter_files(adapter)
    spoil(adapter)
    refused(adapter, check_adapter_files)
    assert not verify_artifact(adapter).ok


@pytest.mark.parametrize("values", VALUES, ids=lambda values: next(iter(values)))
def test_a_hostile_configuration_is_refused(adapter: Path, values: dict[str, Any]) -> None:
    configure(adapter, **values)
    refused(adapter, check_adapter_files)


def test_what_people_write_as_patterns_is_read(adapter: Path) -> None:
    for pattern in (r".*\.(q_proj|v_proj)$", r"model\.layers\.\d+\.self_attn\.(q|k)_proj", "all-linear"):
        configure(adapter, target_modules=pattern)
        check_adapter_files(adapter)
    configure(adapter, auto_mapping={"base_model_class": "X", "parent_library": "os"})
    check_adapter_files(adapter)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    attach_lora(load_int8(str(MODEL))[0], r=2).save_pretrained(folder, save_embedding_layers=False)
    return folder


def without_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[min(tensors)]


def with_one_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.0.mlp.invented.lora_A.weight"] = torch.ones(2, 128)


def of_another_shape(tensors: dict[str, torch.Tensor]) -> None:
    name = min(tensors)
    tensors[name] = torch.ones(*tensors[name].shape[:-1], 3)


@pytest.mark.parametrize("spoil", [without_one, with_one_more, of_another_shape], ids=lambda spoil: spoil.__name__)
def test_an_adapter_that_does_not_fit_is_refused(
    written: Path, tmp_path: Path, spoil: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    tensors = load_file(written / WEIGHTS)
    spoil(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_bytes((written / CONFIG).read_bytes())
    refused(tmp_path, lambda folder: load_adapter(load_int8(str(MODEL))[0], folder))


RUNAWAY = {
    "endless": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "multiplied": "{{ 'a' * 10**10 }}",
    "doubled": "{% set n=namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "padded": "{{ '%9999999999d' % 1 }}",
    "later": "{% if messages|length > 2 %}{{ 'a' * 10**10 }}{% endif %}",
}


@pytest.mark.parametrize("template", RUNAWAY.values(), ids=RUNAWAY)
def test_a_template_that_runs_away_is_refused(template: str) -> None:
    with pytest.raises(DataError, match="chat template: "):
        ChatTemplate(AutoTokenizer.from_pretrained(MODEL), template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.mkdir('trace') }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_reaches_nothing(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit.data.problems import InvalidRow

    monkeypatch.chdir(tmp_path)
    renderer = ChatTemplate(AutoTokenizer.from_pretrained(MODEL), template)
    try:
        assert "object" not in renderer.render(({"role": "user", "content": "hi"},))
    except InvalidRow as refusal:
        assert "refused" in refusal.reason
    assert list(tmp_path.iterdir()) == []
