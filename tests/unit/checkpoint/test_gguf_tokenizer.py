"""A tokenizer comes out of a GGUF file as the model had it, or is asked for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from toolkit.checkpoint.formats.gguf_file import open_gguf
from toolkit.checkpoint.formats.gguf_tokenizer import load_tokenizer, tokenizer_place
from toolkit.errors import ModelError

gguf = pytest.importorskip("gguf")

from tests.harness.as_gguf import add_vocabulary  # noqa: E402

NANO = Path(__file__).parents[3] / "recipes/quickstart/nano-qwen3moe-2m"
TEXTS = (
    "It is a truth universally acknowledged,  that\n\n a single man",
    "naïve café 1234567 日本語 🙂 don't DON'T \t\ty = 3.14;\r\n",
    "cafe\u0301 and a\u0308",
    " begins with a space",
    "<|im_start|>user\nhi<|im_end|>\n",
)


def with_vocabulary(path: Path, kind: str = "gpt2", split: str = "gpt-2", **changed: Any) -> Path:
    """The nano model's vocabulary as the converter writes it."""
    writer = gguf.GGUFWriter(str(path), "deepseek2")
    add_vocabulary(writer, NANO, kind, split, **changed)
    writer.add_tensor("x", np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("split", ["gpt-2", "qwen2"])
def test_tokens_are_those_of_the_original(split: str, tmp_path: Path) -> None:
    original = Tokenizer.from_file(str(NANO / "tokenizer.json"))
    if split == "qwen2":
        parts = [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
        original.pre_tokenizer, original.normalizer = pre_tokenizers.Sequence(parts), normalizers.NFC()
    file = open_gguf(with_vocabulary(tmp_path / "model.gguf", split=split))
    assert tokenizer_place(file) == "the GGUF file"
    found = load_tokenizer(file)
    assert found.eos_token == "<|im_end|>"
    for text in TEXTS:
        assert found(text)["input_ids"] == original.encode(text).ids, text


def test_files_beside_it_are_believed(tmp_path: Path) -> None:
    file = open_gguf(with_vocabulary(tmp_path / "model.gguf", split="unheard-of"))
    for path in NANO.glob("tokenizer*"):
        shutil.copy(path, tmp_path)
    assert tokenizer_place(file) == "the files beside it"
    assert (
        load_tokenizer(file)(TEXTS[0])["input_ids"]
        == Tokenizer.from_file(str(NANO / "tokenizer.json")).encode(TEXTS[0]).ids
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"split": "unheard-of"}, "elsewhere: transformers does not know how unheard-of splits text"),
        ({"kind": "llama"}, "elsewhere: of the kind llama"),
        ({"kind": "rwkv"}, "elsewhere: of the kind rwkv"),
        ({"eos": 10**6}, "elsewhere: list index out of range"),
        ({"merges": ["never heard of"]}, "elsewhere: "),
    ],
)
def test_what_would_be_another_tokenizer_is_asked_for(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = open_gguf(with_vocabulary(tmp_path / "model.gguf", **changed))
    with pytest.raises(ModelError, match=rf"model\.gguf: its tokenizer must come from {words}") as caught:
        load_tokenizer(file)
    assert str(caught.value).endswith("; set model.tokenizer_name_or_path")
    assert "\n" not in str(caught.value)
