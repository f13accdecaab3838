"""Whole models that others quantised, in their layouts, load to the int8 of the plain model with the same values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.quant.test_storage import FP4, Tensors, rewrite, same, tiny
from toolkit.architecture import describe
from toolkit.errors import ModelError
from toolkit.plan.audit import audit
from toolkit.quant import load_int8, quantize_checkpoint
from toolkit.quant.stored import multiplied_out

GROUP = 32
WIDE = {"moe_intermediate_size": 64, "intermediate_size": 64}
"""So that each half of an expert's inputs is a whole group, as four bits that are kept want it."""
LINEAR = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")

Pack = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
"""A weight [..., O, I] to the parts that it is stored in, by the last word of their names, and what these are worth."""


def codes_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes 0 to 15 and scales [..., O, I/32] with about the weight's values."""
    groups = weight.unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1) / 7
    return ((groups / scale[..., None]).round() + 8).flatten(-2).to(torch.uint8), scale


def in_words(codes: torch.Tensor) -> torch.Tensor:
    """Eight codes a word, the first in the lowest bits."""
    word = (codes.long().unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def spread(scale: torch.Tensor) -> torch.Tensor:
    return scale.float().repeat_interleave(GROUP, -1)


def compressed_int4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, scale = codes_of(weight)
    scale = scale.bfloat16()
    parts = {"weight_packed": in_words(codes), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
    return parts, (codes.float() - 8) * spread(scale)


def gptq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, scale = codes_of(weight)
    scale = scale.half()
    zeros = torch.full((scale.shape[1], len(weight) // 8), 0x77777777, dtype=torch.int32)
    parts = {"qweight": in_words(codes).T, "qzeros": zeros, "scales": scale.T}
    return parts, (codes.float() - 8) * spread(scale)


def gptq_with_zeros(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    parts, exact = gptq(weight)
    zeros = torch.full_like(parts["qzeros"], 0x66666666)
    return {**parts, "qzeros": zeros}, exact + spread(parts["scales"].T)


def compressed_mxfp4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    _, scale = codes_of(weight)
    codes = torch.randint(0, 16, weight.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    power = scale.log2().round() + 127
    parts = {"weight_packed": codes[..., ::2] | codes[..., 1::2] << 4, "weight_scale": power.to(torch.uint8)}
    return parts, FP4[codes.long()] * spread(torch.exp2(power - 127))


def mlx(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, scale = codes_of(weight)
    scale, bias = scale.bfloat16(), (-8 * scale).bfloat16()
    parts = {"weight": in_words(codes).view(torch.uint32), "scales": scale, "biases": bias}
    return parts, codes.float() * spread(scale) + spread(bias)


def per_module(tensors: Tensors, pack: Pack, name: Callable[[str], str] = lambda name: name) -> tuple[Tensors, Tensors]:
    """Every linear in the layers packed, under the module name that `name` makes of its own: (stored, exact)."""
    stored, exact = {}, dict(tensors)
    for key, weight in tensors.items():
        if ".layers." not in key or not key.endswith(LINEAR):
            stored[key] = weight
            continue
        parts, exact[key] = pack(weight)
        stored |= {f"{name(key.removesuffix('.weight'))}.{leaf}": part for leaf, part in parts.items()}
    return stored, exact


def projections(name: str) -> str:
    """Mixtral's w1 and so on in other words."""
    at, _, last = name.rpartition(".")
    return f"{at}.{ {'w1': 'gate_proj', 'w2': 'down_proj', 'w3': 'up_proj'}.get(last, last) }"


def taken_apart(tensors: Tensors, pack: Pack, *, halves: bool = False) -> tuple[Tensors, Tensors]:
    """gpt-oss' experts [E, I, O] as linears; gate and up are rows by turns, or the halves of all rows."""
    stored, exact = {}, dict(tensors)
    for key, whole in tensors.items():
        at, _, last = key.rpartition(".")
        if not at.endswith(".experts"):
            stored[key] = whole
            continue
        count = whole.shape[-1] // 2
        rows = {"down_proj": slice(None)}
        if last.startswith("gate_up"):
            rows = {"gate_proj": slice(count), "up_proj": slice(count, None)} if halves else {}
            rows = rows or {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
        exact[key] = whole.clone()
        for number, expert in enumerate(whole):
            for role, chosen in rows.items():
                if last.endswith("_bias"):
                    stored[f"{at}.{number}.{role}.bias"] = expert[chosen]
                    continue
                parts, value = pack(expert.T[chosen])
                exact[key][number].T[chosen] = value
                stored |= {f"{at}.{number}.{role}.{leaf}": part for leaf, part in parts.items()}
    return stored, exact


def stacked(tensors: Tensors, pack: Pack) -> tuple[Tensors, Tensors]:
    """As mlx-lm: each projection of all experts in one, and routers, embedding and head quantised too."""
    stored, exact, experts = {}, dict(tensors), dict[str, list[str]]()
    for key, weight in tensors.items():
        at, is_expert, rest = key.partition(".experts.")
        if is_expert:
            experts.setdefault(f"{at}.switch_mlp.{rest.split('.')[1]}", []).append(key)
        elif weight.dim() == 2:
            parts, exact[key] = pack(weight)
            stored |= {f"{key.removesuffix('.weight')}.{leaf}": part for leaf, part in parts.items()}
        else:
            stored[key] = weight
    for module, keys in experts.items():
        keys.sort(key=lambda key: int(key.partition(".experts.")[2].split(".")[0]))
        parts, value = pack(torch.stack([tensors[key] for key in keys]))
        exact |= dict(zip(keys, value, strict=True))
        stored |= {f"{module}.{leaf}": part for leaf, part in parts.items()}
    return stored, exact


def groups(format: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": GROUP, **weights}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}


INT4 = groups("pack-quantized", type="int", strategy="group", symmetric=True)
MXFP4 = groups("mxfp4-pack-quantized", type="float", strategy="group")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "checkpoint_format": "gptq"}
GPTQMODEL = {**GPTQ, "meta": {"quantizer": ["gptqmodel:7.7.0"]}}
MLX = {"group_size": GROUP, "bits": 4, "mode": "affine"}

LAYOUTS: dict[str, tuple[str, dict[str, Any], Callable[[Tensors], tuple[Tensors, Tensors]]]] = {
    "by expert": ("qwen3_moe", INT4, lambda tensors: per_module(tensors, compressed_int4)),
    "Mixtral by other names": ("mixtral", GPTQ, lambda tensors: per_module(tensors, gptq, projections)),
    "gpt-oss by expert": ("gpt_oss", MXFP4, lambda tensors: taken_apart(tensors, compressed_mxfp4)),
    "gpt-oss in halves": ("gpt_oss", GPTQMODEL, lambda tensors: taken_apart(tensors, gptq, halves=True)),
    "MLX": ("qwen3_moe", MLX, lambda tensors: stacked(tensors, mlx)),
    "with zero points": ("qwen3_moe", GPTQ, lambda tensors: per_module(tensors, gptq_with_zeros)),
}
KEPT = {
    "by expert": "grouped:32:BF16",
    "Mixtral by other names": "grouped:32:F16",
    "gpt-oss by expert": "mxfp4",
    "gpt-oss in halves": "grouped:32:F16",
}
"""What can stay in four bits, and as what."""


def pair(tmp_path: Path, layout: str, shards: int = 1) -> tuple[Path, Path]:
    """A quantised checkpoint, and the plain one with the same values in fp32."""
    family, declared, quantise = LAYOUTS[layout]
    folder = tiny(tmp_path / "float", family, **WIDE)
    stored, exact = quantise(load_file(folder / "model.safetensors"))
    quantized = rewrite(folder, tmp_path / "quantized", stored, declared, shards)
    return quantized, rewrite(folder, tmp_path / "exact", exact, None)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_rounds_as_its_exact_values(tmp_path: Path, layout: str, shards: int) -> None:
    quantized, exact = pair(tmp_path, layout, shards)
    same(quantized, exact)
    _, coverage = load_int8(str(quantized))
    assert coverage.stacks_int8 == coverage.stacks == 4
    assert coverage.linears_8bit == coverage.linears > 0


@pytest.mark.parametrize("layout", KEPT)
def test_four_bits_are_kept_as_they_are(tmp_path: Path, layout: str) -> None:
    quantized, exact = pair(tmp_path, layout)
    kept, _ = load_int8(str(quantized), experts="source")
    plain, _ = load_int8(str(exact), experts="none")
    assert set(kept.config.quantization_config.stacks.values()) == {KEPT[layout]}
    state, wanted, seen = kept.state_dict(), plain.state_dict(), 0
    for layer in describe(plain).layers:
        for stack in layer.stacks:
            assert state[stack].dtype == torch.uint8
            values = multiplied_out(state, stack, is_transposed=layer.is_transposed)
            assert torch.equal(values, wanted[stack]), stack
            seen += 1
    assert seen == 4


@pytest.mark.parametrize("layout", KEPT)
def test_what_was_kept_is_written_and_taken_stock_of(tmp_path: Path, layout: str) -> None:
    """Its shapes on the disk are those of bytes, and not of the config."""
    quantized, _ = pair(tmp_path, layout)
    quantize_checkpoint(str(quantized), tmp_path / "kept", experts="source")
    first, again = (load_int8(str(folder), experts="source") for folder in (quantized, tmp_path / "kept"))
    assert all(torch.equal(tensor, again[0].state_dict()[name]) for name, tensor in first[0].state_dict().items())
    stacks = audit(str(tmp_path / "kept")).parts[0]
    assert (stacks.stored, stacks.bytes) == (KEPT[layout], again[1].expert_bytes)


@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - KEPT.keys()))
def test_four_bits_of_another_kind_are_not_kept(tmp_path: Path, layout: str) -> None:
    quantized, _ = pair(tmp_path, layout)
    with pytest.raises(ModelError, match=r"stored as int4, groups of 32, which cannot be kept") as caught:
        load_int8(str(quantized), experts="source")
    assert "\n" not in str(caught.value)


def test_a_missing_part_of_an_expert_is_named(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "float", "qwen3_moe", **WIDE)
    stored, _ = per_module(load_file(folder / "model.safetensors"), compressed_int4)
    lost = "model.layers.1.mlp.experts.3.up_proj"
    for spoil in (f"{lost}.weight_scale", f"{lost}.weight_packed"):
        spoilt = {key: value for key, value in stored.items() if key != spoil}
        with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.(3\.up_proj|gate_up_proj)") as caught:
            load_int8(str(rewrite(folder, tmp_path / spoil, spoilt, INT4)))
        assert "\n" not in str(caught.value)
