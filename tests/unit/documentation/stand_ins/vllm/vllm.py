"""What `scripts/parity/vllm_side.py` imports of vLLM, in a few lines: keys are parsed, pairs counted, stacks packed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file


class PEFTHelper:
    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    @classmethod
    def from_local_dir(cls, folder: str, _: None) -> PEFTHelper:
        return cls(json.loads((Path(folder) / "adapter_config.json").read_text()))

    def _validate_features(self) -> list[str]:
        return [name for name in ("use_dora", "modules_to_save") if self.config.get(name)]


def parse_fine_tuned_lora_name(key: str) -> tuple[str, bool]:
    module, side, weight = key.rsplit(".", 2)
    if not module.startswith("base_model.model.") or side not in ("lora_A", "lora_B") or weight != "weight":
        raise ValueError(f"{key} is no LoRA weight")
    return module.removeprefix("base_model.model."), side == "lora_A"


class LoRAModel:
    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.loras: dict[str, dict[bool, torch.Tensor]] = {}

    @classmethod
    def from_local_checkpoint(
        cls, folder: str, leaves: set[str], helper: PEFTHelper, *, lora_model_id: int, device: str
    ) -> LoRAModel:
        model = cls(helper.config["r"])
        for key, tensor in load_file(Path(folder) / "adapter_model.safetensors").items():
            module, is_A = parse_fine_tuned_lora_name(key)
            if not module.endswith(tuple(leaves)):
                raise ValueError(f"{module} is not expected")
            model.loras.setdefault(module, {})[is_A] = tensor
        return model

    def get_lora(self, module: str) -> dict[bool, torch.Tensor] | None:
        return self.loras.get(module)


class PackedLoRALayerWeights:
    @staticmethod
    def pack_moe(parts: list[dict[bool, torch.Tensor] | None], stack: str) -> tuple[torch.Tensor, ...]:
        """A and B of all experts, for each of the three matrices [E, …]."""
        if missing := [number for number, part in enumerate(parts) if part is None]:
            raise ValueError(f"{stack}: nothing for {missing}")
        return tuple(
            torch.stack([part[is_A] for part in parts[matrix::3] if part is not None])
            for matrix in range(3)
            for is_A in (True, False)
        )


for name, content in {
    "vllm.lora": {},
    "vllm.lora.lora_model": {"LoRAModel": LoRAModel},
    "vllm.lora.lora_weights": {"PackedLoRALayerWeights": PackedLoRALayerWeights},
    "vllm.lora.peft_helper": {"PEFTHelper": PEFTHelper},
    "vllm.lora.utils": {"parse_fine_tuned_lora_name": parse_fine_tuned_lora_name},
}.items():
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__dict__.update(content)
