"""`scripts/parity/llama_side.py` on stock transformers: a GGUF file, and the logits of base, base with LoRA, and merge.

    llama.py LLAMA_SIDE convert JOB.json
    llama.py LLAMA_SIDE run JOB.json NAME

The GGUF file is read by gguf and multiplied into the base's weights by llama.cpp's own rule. One
layout of names is known, which is that of a family with plain attention and experts named gate, up and down.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate_inp": "mlp.gate"}  # fmt: skip
STACKS = {
    "ffn_gate_exps": ("gate_up_proj", 0),
    "ffn_up_exps": ("gate_up_proj", 1),
    "ffn_down_exps": ("down_proj", None),
}


def run(job: dict[str, Any], name: str) -> None:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    @torch.no_grad()
    def logits(folder: str, adapter: str | None = None) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if adapter:
            apply(model, adapter)
        return model(torch.tensor([job["tokens"]])).logits[0].numpy()

    files = job["models"][name]
    found = {
        "base": logits(files["base"]),
        "adapter": logits(files["base"], files["adapter"]),
        "merged": logits(files["merged"]),
    }
    np.savez(Path(job["out"]) / f"{name}.npz", **found)


def convert(job: dict[str, Any]) -> None:
    """Each base to a file beside it, by the tests' own conversion."""
    from transformers import AutoModelForCausalLM

    sys.path.insert(0, str(Path(__file__).resolve().parents[4]))
    from tests.harness.as_gguf import write_gguf

    for files in job["models"].values():
        model = AutoModelForCausalLM.from_pretrained(files["base"])
        write_gguf(Path(f"{files['base']}.gguf"), model)


def blocks(job: dict[str, Any]) -> None:
    """One type, which the gguf library can make."""
    import numpy as np
    from gguf import GGMLQuantizationType, quants

    made = quants.quantize(np.linspace(-1, 1, 64, dtype=np.float32)[None], GGMLQuantizationType.Q8_0)
    values = quants.dequantize(made, GGMLQuantizationType.Q8_0)
    np.savez(Path(job["out"]) / "blocks.npz", **{"blocks Q8_0": made, "values Q8_0": values})


def apply(model: Any, adapter: str) -> None:
    """Add every pair of the GGUF file to the weights that it names."""
    import torch
    from gguf import GGUFReader

    reader = GGUFReader(adapter)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())  # 0 where the factors are scaled already
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    for name, A in tensors.items():
        if name.endswith(".lora_a"):
            B = tensors[name.removesuffix("a") + "b"]
            block, kind = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight\.lora_a", name).groups()  # type: ignore[union-attr]
            matrix_of(model.model.layers[int(block)], kind).add_((alpha / A.shape[-2] if alpha else 1.0) * B @ A)


def matrix_of(layer: Any, kind: str) -> Any:
    """The weights [out, in], or of all experts [E, out, in]."""
    if kind in NAMES:
        return layer.get_submodule(NAMES[kind]).weight.data
    stack, half = STACKS[kind]
    weights = getattr(layer.mlp.experts, stack).data
    return weights if half is None else weights.chunk(2, dim=1)[half]


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[3]).read_text())
    if sys.argv[2] == "run":
        run(given, sys.argv[4])
    else:
        {"convert": convert, "blocks": blocks}[sys.argv[2]](given)
