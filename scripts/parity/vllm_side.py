"""vLLM's own loader on per-expert exports, without a GPU: configuration checks, key rules, packing of experts.

    python vllm_side.py FOLDER EXPERTS …      pairs of an export's folder and its number of experts

Prints one JSON line an export: tensors taken, modules, packed stacks, or the error. No model is built: which modules
vLLM's own class of a family has is taken from the export's names, so the form of keys, sides and stacks is proven here.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import PackedLoRALayerWeights
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.utils import parse_fine_tuned_lora_name

ORDER = (("gate_proj", "down_proj", "up_proj"), ("w1", "w2", "w3"))


def load(folder: Path, experts: int) -> dict[str, Any]:
    """What vLLM makes of one export; raises what vLLM raises."""
    helper = PEFTHelper.from_local_dir(str(folder), None)
    if problems := helper._validate_features():
        raise ValueError("; ".join(problems))
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        modules = {parse_fine_tuned_lora_name(key)[0] for key in file.keys()}  # noqa: SIM118
        tensors = len(list(file.keys()))
    leaves = {
        module[module.find(".experts") + 1 :] if ".experts" in module else module.rsplit(".", 1)[-1]
        for module in modules
    }
    # By another name of the same device: memory of "cpu" is pinned, which takes a GPU.
    model = LoRAModel.from_local_checkpoint(str(folder), leaves, helper, lora_model_id=1, device="cpu:0")
    stacks = sorted({match[1] for module in modules if (match := re.fullmatch(r"(.+\.experts)\.\d+\.\w+", module))})
    for stack in stacks:
        names = next(names for names in ORDER if f"{stack}.0.{names[0]}" in modules)
        parts = [model.get_lora(f"{stack}.{number}.{name}") for number in range(experts) for name in names]
        PackedLoRALayerWeights.pack_moe(parts, stack)
    return {"tensors": tensors, "modules": len(model.loras), "stacks": len(stacks), "rank": model.rank}


if __name__ == "__main__":
    for folder, experts in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        try:
            print(json.dumps({"folder": folder, **load(Path(folder), int(experts))}), flush=True)
        except Exception as error:  # one line an export, whatever it is
            print(json.dumps({"folder": folder, "error": f"{type(error).__name__}: {error}"[:300]}), flush=True)
