"""What transformers itself stores: FP8 in blocks, and gpt-oss' MXFP4. Run by format_writers.py.

Its quantisers want a card; the operations that turn a weight into parts and back run anywhere, and are called here.
It has no writer of 4-bit floats that runs without one: those codes and scales are drawn at random, and the values are
what it reads from them.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import tiny
import torch
from tiny import DOWN, GATE, GOLDEN, MAIN, Source, Variant, Written, run
from transformers import FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors


def _fp8(source: Source, block: tuple[int, int] | None, scale_fmt: str = "float", experts: str = "fp8") -> Written:
    config = FineGrainedFP8Config(
        weight_block_size=block,
        scale_fmt=scale_fmt,
        expert_dtype=experts,
        modules_to_not_convert=["lm_head", *(name for name in source.left if name != "lm_head")],
    )
    quantizer: Any = SimpleNamespace(quantization_config=config)
    write, read = Fp8Quantize(quantizer), Fp8Dequantize(quantizer)
    tensors, expected = {}, {}
    generator = torch.Generator().manual_seed(5)
    for name, weight in source.linears.items():
        if experts == "fp4" and ".experts." in name:
            codes, scale = _random_fp4(weight.shape, generator)
            stored = {f"{name}.weight": codes.view(torch.int8), f"{name}.weight_scale_inv": scale}
        else:
            stored = write.convert({f"{name}.weight": weight})
        tensors |= stored
        parts = {key.removeprefix(f"{name}."): value for key, value in stored.items()}
        expected[f"{name}.weight"] = read._dequantize_one(
            parts["weight"], parts["weight_scale_inv"], output_dtype=torch.float32
        )
    return Written(tensors, expected, config.to_dict())


def _random_fp4(shape: tuple[int, ...], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Two E2M1 codes a byte [..., inputs / 2], and a power of two for every 32 of them [..., inputs / 32]."""
    *rows, inputs = shape
    codes = torch.randint(0, 256, (*rows, inputs // 2), generator=generator).to(torch.uint8)
    scale = torch.randint(121, 126, (*rows, inputs // 32), generator=generator).to(torch.uint8)
    return codes, scale.view(torch.float8_e8m0fnu)


def _mxfp4(source: Source) -> Written:
    """gpt-oss: blocks [experts, outputs, inputs / 32, 16] and scales; a golden case takes any stack for its experts."""
    stacks = {name: tensor.transpose(1, 2) for name, tensor in source.others.items() if name.endswith("_proj")}
    stacks |= {name: weight for name, weight in source.linears.items() if weight.dim() == 3}
    generator = torch.Generator().manual_seed(5)
    tensors, expected = {}, {}
    for name, weight in stacks.items():
        codes, scale = _random_fp4(weight.shape, generator)
        blocks = codes.unflatten(-1, (-1, 16))
        scales = scale.view(torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    plain = {name: value for name, value in tiny.plain_tensors(source).items() if name not in stacks}
    plain |= {f"{name}.weight": value for name, value in source.linears.items() if name not in stacks}
    others = {name: value.bfloat16() for name, value in plain.items()} if source.family else {}
    config = Mxfp4Config(modules_to_not_convert=["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"])
    return Written({**tensors, **others}, expected, config.to_dict(), whole=True)


def _variants() -> dict[str, Variant]:
    ours = ("qwen3_moe",)
    blocks = {GATE: (12, 64), DOWN: (8, 32)}
    stack = {"model.layers.0.mlp.experts.gate_up_proj": (2, 8, 64)}
    return {
        "fp8": Variant(partial(_fp8, block=(16, 16)), MAIN, None),
        "fp8-small-blocks": Variant(partial(_fp8, block=(4, 16)), (), blocks),
        "fp8-ue8m0": Variant(partial(_fp8, block=(16, 16), scale_fmt="ue8m0"), ours, None),
        "fp8-ue8m0-small-blocks": Variant(partial(_fp8, block=(4, 32), scale_fmt="ue8m0"), (), blocks),
        "fp8-one-block": Variant(partial(_fp8, block=None), ours, None),
        "fp8-fp4-experts": Variant(partial(_fp8, block=(16, 16), scale_fmt="ue8m0", experts="fp4"), ours, GOLDEN),
        "mxfp4": Variant(_mxfp4, ("gpt_oss",), stack, apart=False),
    }


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run("transformers", _variants())
