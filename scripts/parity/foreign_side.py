"""What `foreign_toolkits.py` runs in another toolkit's environment; it knows nothing of onecard.

    PYTHON scripts/parity/foreign_side.py unsloth|ktransformers|merged JOB.json

`unsloth`: its loader, LoRA and trainer, on the CPU. `ktransformers`: its own LoRA buffers beside PEFT's linears,
its own saving and its converter for SGLang. Its kernel needs AMX, so random numbers stand for a step. `merged`: PEFT
loads an adapter on its base and merges it. Which parameters, and of a stack which experts, are others then?
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

__all__ = ["main"]

Job = dict[str, Any]


def main() -> None:
    """Run one of them."""
    warnings.simplefilter("ignore")
    {"unsloth": _unsloth, "ktransformers": _ktransformers, "merged": _merged}[sys.argv[1]](
        json.loads(Path(sys.argv[2]).read_text())
    )


def _unsloth(job: Job) -> None:
    from unsloth import FastLanguageModel  # isort: skip  before all others, as it asks

    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = FastLanguageModel.from_pretrained(
        job["base"], max_seq_length=job["length"], dtype=torch.float32, load_in_4bit=False
    )
    experts = {"target_parameters": job["experts"]} if job["experts"] else {}
    model = FastLanguageModel.get_peft_model(
        model, r=job["rank"], lora_alpha=2 * job["rank"], use_gradient_checkpointing=False, **experts
    )
    rows = [json.loads(line)["messages"] for line in Path(job["rows"]).read_text().splitlines()]
    texts = [{"text": tokenizer.apply_chat_template(row, tokenize=False)} for row in rows]
    arguments = SFTConfig(
        output_dir=f"{job['out']}-run",
        max_steps=job["steps"],
        learning_rate=job["rate"],
        per_device_train_batch_size=4,
        max_length=job["length"],
        dataset_text_field="text",
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    SFTTrainer(model=model, processing_class=tokenizer, train_dataset=Dataset.from_list(texts), args=arguments).train()
    model.save_pretrained(job["out"])


def _ktransformers(job: Job) -> None:
    import torch
    from kt_kernel.sft.arch import get_moe_arch_config
    from kt_kernel.sft.artifacts import save_kt_adapter_artifacts
    from kt_kernel.sft.convert_kt_to_sglang_adapter import convert_kt_to_sglang_adapter
    from kt_kernel.sft.lora import kt_adapt_peft_lora
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32)
    layout = get_moe_arch_config(model.config)
    blocks = [(number, layer.mlp) for number, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    model._kt_wrappers = [
        SimpleNamespace(
            layer_idx=number,
            hidden_size=model.config.hidden_size,
            moe_config=layout,
            experts=block.experts,
            lora_experts=None,
            wrapper=SimpleNamespace(init_lora_weights=lambda **_: None),
            _use_fused_expert_lora=True,
            _fused_experts=True,
            _lora_rank=job["rank"],
            _lora_alpha=2.0 * job["rank"],
        )
        for number, block in blocks
    ]
    config = LoraConfig(r=job["rank"], lora_alpha=2 * job["rank"], target_modules=r".*self_attn\.\w*proj\w*")
    model = get_peft_model(model, config)
    kt_adapt_peft_lora(model)
    torch.manual_seed(0)
    changed: dict[str, Any] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
                changed[name.removeprefix("base_model.model.").partition(".lora_")[0] + ".weight"] = True
        for number, wrapper in enumerate(model.base_model.model._kt_wrappers):
            moved = [expert for expert in range(layout.expert_num) if expert != number]
            for parameter in wrapper._fused_expert_lora_params[1::2]:
                parameter[moved] = torch.randn_like(parameter[moved])
            for stack in ("gate_up_proj", "down_proj"):
                changed[f"model.layers.{wrapper.layer_idx}.mlp.experts.{stack}"] = moved
    model.save_pretrained(job["out"])
    save_kt_adapter_artifacts(model, job["out"])
    Path(job["changed"]).write_text(json.dumps(changed))
    convert_kt_to_sglang_adapter(job["out"], f"{job['out']}-sglang", base_model_name_or_path=job["base"])


def _merged(job: Job) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    merged = PeftModel.from_pretrained(base, job["out"]).merge_and_unload()
    changed: dict[str, Any] = {}
    for name, parameter in merged.named_parameters():
        other = parameter.detach() != before[name]
        if other.any():
            changed[name] = other.flatten(1).any(1).nonzero().flatten().tolist() if other.dim() == 3 else True
    Path(job["changed"]).write_text(json.dumps(changed))


if __name__ == "__main__":
    main()
