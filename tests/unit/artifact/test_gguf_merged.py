"""A merged GGUF file has the converter's names and orders, the asked types, and the base's metadata."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.harness.as_gguf import CONFIGS, as_llama_cpp, tiny
from tests.unit.artifact.conftest import BASE
from toolkit.architecture import on_meta
from toolkit.artifact.manifest import file_entry, write_json
from toolkit.checkpoint.config import skeleton
from toolkit.checkpoint.formats.gguf_metadata import config_differences
from toolkit.checkpoint.formats.gguf_tensors import GgufNames
from toolkit.errors import DataError, ModelError, RecipeError
from toolkit.export import export_adapter
from toolkit.export.gguf_types import QUANTS, as_bytes, kind_of
from toolkit.export.ollama import turns_of

gguf = pytest.importorskip("gguf")
Write = Callable[..., Path]
TEXTS = [list(range(3, 60)), list(range(90, 120))]
ARCHITECTURES = {"qwen3_moe": "qwen3moe", "mixtral": "llama", "deepseek_v3": "deepseek2", "gpt_oss": "gpt-oss",
                 "glm4_moe": "glm4moe", "qwen3_5_moe_text": "qwen35moe"}  # fmt: skip


def stored(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}


def metadata(path: Path, key: str) -> Any:
    field = gguf.GGUFReader(str(path)).fields.get(key)
    return None if field is None else field.contents()


@pytest.mark.parametrize("family", CONFIGS)
def test_every_parameter_becomes_the_converters_tensors(family: str) -> None:
    model = tiny(family)
    wanted = as_llama_cpp(model)
    names = GgufNames(on_meta(model.config), ARCHITECTURES[family], "here")
    found = {part.name: part.value for name, value in model.state_dict().items() for part in names.tensors(name, value)}
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert tuple(value.shape) == wanted[name].shape, name
        np.testing.assert_array_equal(value.float().numpy(), wanted[name], err_msg=name)
    on_a_plan = {part.name: tuple(part.value.shape) for _, parts in names.every() for part in parts}
    assert on_a_plan == {name: value.shape for name, value in wanted.items()}


def test_a_file_with_gate_and_up_in_one_gets_them_in_one() -> None:
    model = tiny("qwen3_moe")
    shapes = {name: value.shape for name, value in as_llama_cpp(model).items() if "_exps" not in name}
    stack = model.state_dict()["model.layers.0.mlp.experts.gate_up_proj"]
    shapes |= {"blk.0.ffn_gate_up_exps.weight": tuple(stack.shape)}
    names = GgufNames(on_meta(model.config), "qwen3moe", "here", shapes)
    (part,) = names.tensors("model.layers.0.mlp.experts.gate_up_proj", stack)
    assert torch.equal(part.value, stack)
    with pytest.raises(ModelError, match=r"here: holds model\.layers\.1\.mlp\.experts\.down_proj in no form that"):
        names.tensors("model.layers.1.mlp.experts.down_proj", stack)


@pytest.mark.parametrize("kind", [few.kind for few in QUANTS.values()])
def test_bytes_are_the_librarys_own(kind: str) -> None:
    values = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    values[2] = 0.0
    values[3, :32] = torch.linspace(-1.27, 1.27, 32)  # halves between two codes among them
    made = np.concatenate([np.atleast_2d(some).reshape(-1) for some in as_bytes(values, kind)])
    wanted = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(made, np.ascontiguousarray(wanted).view(np.uint8).reshape(-1))


def test_what_llama_cpp_wants_in_fp32_stays() -> None:
    few = QUANTS["mxfp4"]
    kinds = {"blk.0.ffn_gate_inp.weight": "F32", "blk.0.attn_norm.weight": "F32", "blk.0.ffn_down_exps.bias": "F32",
             "blk.0.ffn_down_exps.weight": "MXFP4", "blk.0.attn_q.weight": "Q8_0", "output.weight": "Q8_0"}  # fmt: skip
    assert {name: kind_of(name, (4, 64), few) for name in kinds} == kinds
    assert kind_of("blk.0.attn_q.weight", (4, 40), few) == "F16"
    assert kind_of("output.weight", (4, 64), QUANTS["q4_0"]) == "Q8_0"


@pytest.fixture
def tuned(write: Write, tmp_path: Path) -> Path:
    """An artifact with a template and a second end of its own."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    return write(tmp_path / "adapter", tokenizer=tokenizer, chat={"form": "chat", "stop_token_ids": [2, 7]})


def test_the_file_is_the_merge_in_the_asked_type(tuned: Path, tmp_path: Path) -> None:
    labels = [[-100] * 20 + TEXTS[0][20:], TEXTS[1]]
    done = export_adapter(tuned, BASE, "gguf-merged", tmp_path / "out", quant="q8_0", texts=TEXTS, labels=labels)
    assert done.difference <= done.bound
    assert done.stored == {"Q8_0": 29, "F32": 21}
    assert done.survival is not None
    assert done.survival.share > 0.9
    assert done.survival.losses is not None
    assert done.survival.losses.tokens == 37 + 29
    card = (tmp_path / "out/README.md").read_text()
    assert f"- {done.survival.losses}" in card
    assert 'library_name: "gguf"' in card
    export_adapter(tuned, BASE, "gguf-merged", tmp_path / "plain", quant="f32")
    plain, rounded = (stored(tmp_path / name / "model.gguf") for name in ("plain", "out"))
    for name, tensor in rounded.items():
        wanted = plain[name].data if tensor.tensor_type.name == "F32" else gguf.quants.quantize(
            plain[name].data, gguf.GGMLQuantizationType.Q8_0)  # fmt: skip
        np.testing.assert_array_equal(tensor.data, wanted, err_msg=name)
    path = tmp_path / "out/model.gguf"
    assert metadata(path, "tokenizer.chat_template").startswith("{% for m in messages %}<|im_start|>{{ m.content }}")
    assert metadata(path, "tokenizer.ggml.eot_token_id") == 7
    assert metadata(path, "general.file_type") == 7
    assert (tmp_path / "out/Modelfile").read_text().startswith("FROM ./model.gguf\nTEMPLATE")
    assert json.loads((tmp_path / "out/export.json").read_text())["stored"] == {"Q8_0": 29, "F32": 21}


def test_a_file_of_the_base_keeps_its_metadata_and_what_is_not_adapted(
    tuned: Path, write: Write, tmp_path: Path
) -> None:
    none = tmp_path / "none"
    plain = write(none, chat={"form": "chat", "stop_token_ids": [2]})
    weights = none / "adapter_model.safetensors"
    save_file({key: value * 1e-4 for key, value in load_file(weights).items()}, weights)
    manifest = json.loads((plain / "manifest.json").read_text())
    manifest["files"]["adapter_model.safetensors"] = file_entry(weights)
    write_json(plain / "manifest.json", manifest)
    export_adapter(plain, BASE, "gguf-merged", tmp_path / "base", quant="q8_0")
    base = tmp_path / "base/model.gguf"
    done = export_adapter(tuned, BASE, "gguf-merged", tmp_path / "out", base_gguf=base)
    assert done.difference <= done.bound
    before, after = stored(base), stored(tmp_path / "out/model.gguf")
    assert {name: t.tensor_type for name, t in before.items()} == {name: t.tensor_type for name, t in after.items()}
    changed = {name.split(".")[-2] for name in before if not np.array_equal(before[name].data, after[name].data)}
    assert changed == {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps",
                       "ffn_down_exps"}  # fmt: skip
    assert metadata(tmp_path / "out/model.gguf", "general.name") == metadata(base, "general.name")
    assert "m.content" in metadata(tmp_path / "out/model.gguf", "tokenizer.chat_template")
    merged = tmp_path / "out/model.gguf"
    with pytest.raises(ModelError, match=r"was not made from this checkpoint; correct --base-gguf"):
        export_adapter(tuned, BASE, "gguf-merged", tmp_path / "again", base_gguf=merged)


def test_what_cannot_be_written_is_one_line(tuned: Path, tmp_path: Path) -> None:
    cases: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
        ({}, RecipeError, "give the type of its weights with --quant"),
        (
            {"quant": "iq2_xs"},
            RecipeError,
            "reads such blocks and cannot write them; take one of f32, .* or a K-quant such as q4_k_m",
        ),
        ({"quant": "q9"}, RecipeError, "--quant q9: no such type"),
        ({"quant": "q4_0"}, DataError, "give rows like those it was trained on with --data FILE"),
    )
    for options, error, why in cases:
        with pytest.raises(error, match=why) as caught:
            export_adapter(tuned, BASE, "gguf-merged", tmp_path / "out", **options)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
    with pytest.raises(RecipeError, match="--format merged: takes no --quant; leave it out"):
        export_adapter(tuned, BASE, "merged", tmp_path / "out", quant="q8_0")


def test_what_llama_cpp_would_compute_otherwise_is_a_difference() -> None:
    config = skeleton(str(BASE)).config
    other = type(config)(**{**config.to_dict(), "norm_topk_prob": False, "initializer_range": 0.5})
    assert config_differences(config, other) == {"norm_topk_prob": (True, False)}
    assert config_differences(config, type(config)(**config.to_dict())) == {}


CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_of_turns_is_told_to_ollama(artifact: Path) -> None:
    (artifact / "chat_template.jinja").write_text(CHATML)
    turns = turns_of(artifact, {})
    assert turns is not None
    assert turns.start + turns.before_question == "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n"
    assert turns.go().startswith("{{ if not .System }}<|im_start|>system\nYou help.")
    trimming = CHATML.replace("{{ m.content }}", "{{ m.content.split('two')[0] }}")
    (artifact / "chat_template.jinja").write_text(trimming)
    assert turns_of(artifact, {}) is None
    (artifact / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    assert turns_of(artifact, {}) is None
    assert turns_of(artifact, {"form": "text"}) is None
