"""What bitsandbytes stores: the state of its own linears, as transformers saves it. Run by format_writers.py.

transformers 5 quantises linears alone, and experts are no linears there; so every expert is a linear here, under the
names that files written with transformers 4 have. The CPU kernel of 0.50.2 that dequantises 4 bits is wrong where a row
is even and no multiple of the block, so the values come from the function that the package runs where it has no kernel.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import tiny
import torch
from bitsandbytes import functional
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file
from tiny import DOWN, GATE, MAIN, Source, Variant, Written, run, tree, with_routers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

RAGGED = {GATE: (12, 64), DOWN: (5, 36)}
"""The second one's 180 values are no whole number of blocks."""


def _four(
    source: Source,
    kind: str,
    *,
    nested: bool = False,
    storage: torch.dtype = torch.uint8,
    block: int = 64,
    ran: bool = False,
    routers: bool = False,
) -> Written:
    if routers:
        source = with_routers(source)

    def linear(name: str, weight: torch.Tensor) -> torch.nn.Module:
        outputs, inputs = weight.shape
        made = Linear4bit(
            inputs, outputs, bias=False, quant_type=kind, compress_statistics=nested, quant_storage=storage
        )
        made.weight.data = weight.bfloat16()
        made.weight.blocksize = block
        made.to("cpu")  # this quantises
        if ran:  # what the layer's first forward on a CPU with AVX-512 BF16 does to it
            made.weight.data, _ = functional._convert_weight_packed_for_cpu(made.weight.data, made.weight.quant_state)
        return made

    model = tree(Source(source.linears, {}, {}), linear)
    expected = {} if ran else _values(model)
    tensors = dict(model.state_dict())
    if ran:  # saving has brought the codes back, the scales not: bf16 [inputs / block, outputs]
        for module in model.modules():
            if isinstance(module, Linear4bit) and not nested:
                module.weight.quant_state.absmax = module.weight.quant_state.absmax.T.float().reshape(-1)
        expected = _values(model)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_quant_storage=storage,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )
    return Written(tensors, expected, config.to_dict())


def _values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            absmax = state.absmax
            if state.nested:
                absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
            codes = module.weight.data.contiguous().view(torch.uint8).reshape(-1)
            found[f"{name}.weight"] = _dequantize_4bit_compute(
                codes, absmax.float(), state.code, state.blocksize, state.shape, torch.float32
            )
    return found


def _real(source: Source, **how: Any) -> Written:
    """As transformers 5 loads and saves it: attention and shared experts quantised, the routed experts plain."""
    config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **how)
    with tempfile.TemporaryDirectory() as scratch:
        before, after = Path(scratch) / "plain", Path(scratch) / "quantised"
        before.mkdir()
        tiny.save_plain(before, source)
        model = AutoModelForCausalLM.from_pretrained(before, dtype=torch.bfloat16, quantization_config=config)
        model.save_pretrained(after)
        tensors = load_file(after / "model.safetensors")
        more = json.loads((after / "config.json").read_text())
    expected = _values(model)
    for key, scale in tensors.items():
        if key.endswith(".SCB"):
            name = f"{key.removesuffix('SCB')}weight"
            expected[name] = functional.int8_vectorwise_dequant(tensors[name], scale)
    return Written(tensors, expected, more.pop("quantization_config"), more=more, whole=True)


def _eight(source: Source, routers: bool = False) -> Written:
    if routers:
        source = with_routers(source)

    def linear(name: str, weight: torch.Tensor) -> torch.nn.Module:
        made = Linear8bitLt(*reversed(weight.shape), bias=False, has_fp16_weights=False)
        made.weight.data = weight.half()
        return made.to("cpu")

    model = tree(Source(source.linears, {}, {}), linear)
    tensors = dict(model.state_dict())
    expected = {}
    for name in source.linears:
        codes, scale = tensors[f"{name}.weight"], tensors[f"{name}.SCB"]
        expected[f"{name}.weight"] = functional.int8_vectorwise_dequant(codes, scale)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    return Written(tensors, expected, config.to_dict())


def _variants() -> dict[str, Variant]:
    found = {}
    for kind in ("nf4", "fp4"):
        families = (*MAIN, "gpt_oss") if kind == "nf4" else ("qwen3_moe",)
        found[kind] = Variant(partial(_four, kind=kind), families=families, golden=RAGGED)
        golden = RAGGED if kind == "nf4" else None
        found[f"{kind}-double"] = Variant(partial(_four, kind=kind, nested=True), families=families, golden=golden)
    for storage in (torch.bfloat16, torch.float32):
        name = f"nf4-double-stored-as-{str(storage).removeprefix('torch.')}"
        write = partial(_four, kind="nf4", nested=True, storage=storage)
        found[name] = Variant(write, golden={GATE: (12, 64)} if storage == torch.bfloat16 else None)
    found["nf4-block-128"] = Variant(partial(_four, kind="nf4", block=128), golden=RAGGED)
    found["nf4-routers-too"] = Variant(
        partial(_four, kind="nf4", routers=True), families=("qwen3_moe", "mixtral"), golden=None
    )
    for nested in (False, True):
        found[f"nf4{'-double' if nested else ''}-after-a-forward"] = Variant(
            partial(_four, kind="nf4", nested=nested, block=32, ran=True),
            families=(),
            golden=None if nested else {GATE: (32, 64)},
            note="saved after a forward on a CPU with AVX-512 BF16",
        )
    for name, how in (
        ("real-nf4-double", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
        ("real-int8", {"load_in_8bit": True}),
    ):
        found[name] = Variant(partial(_real, **how), (*MAIN, "gpt_oss"), None, apart=False)
    found["int8"] = Variant(_eight, families=(*MAIN, "gpt_oss"))
    found["int8-routers-too"] = Variant(partial(_eight, routers=True), families=("qwen3_moe", "mixtral"), golden=None)
    return found


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run("bitsandbytes", _variants(), ("transformers",))
