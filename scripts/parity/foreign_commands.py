"""Releases of other toolkits, what their environments need, and what their users type: for `foreign_toolkits.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["EXPERTS", "LINEARS", "SIDE", "TOOLKITS", "Toolkit", "command"]

LINEARS, EXPERTS = "all linears", "experts by name"
SIDE = str(Path(__file__).with_name("foreign_side.py"))
_TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Toolkit:
    """A release: what its environment needs, torch first; what is installed without its requirements; what it takes."""

    packages: tuple[str, ...]
    alone: tuple[str, ...]
    asked: tuple[str, ...] = (LINEARS, EXPERTS)


TOOLKITS = {
    "LLaMA-Factory 0.9.5": Toolkit(
        (
            *(_TORCH, "transformers==5.6.0", "peft==0.18.1", "trl==0.24.0", "accelerate==1.11.0", "datasets==4.0.0"),
            *("av==16.0.0", "einops", "fastapi", "fire", "matplotlib", "omegaconf", "protobuf", "scipy"),
            *("sentencepiece", "sse-starlette", "tiktoken", "tyro<0.9", "uvicorn"),
        ),
        ("llamafactory==0.9.5", "torchdata==0.11.0", "modelscope"),
        (LINEARS,),
    ),
    "ms-swift 4.6.0": Toolkit((_TORCH, "ms-swift==4.6.0", "transformers==5.19.0", "peft==0.20.0"), ()),
    "Axolotl 0.19.0": Toolkit(
        (
            *(_TORCH, "transformers==5.16.1", "peft==0.20.0", "trl==1.9.0", "accelerate==1.13.0", "datasets==4.8.4"),
            *("huggingface_hub==1.17.0", "pydantic==2.12.5", "addict", "art", "click", "colorama", "einops"),
            *("evaluate==0.4.1", "fastcore", "fire", "mistral-common==1.11.5", "numba", "posthog==6.7.11"),
            *("python-dotenv==1.0.1", "requests", "rich", "schedulefree==1.4.1", "scipy", "sentencepiece"),
            *("tensorboard", "triton", "wandb"),
        ),
        (
            *("axolotl==0.19.0", "axolotl-contribs-lgpl==0.0.7", "axolotl-contribs-mit==0.0.6", "optimum==1.16.2"),
            *("torchao==0.17.0", "liger-kernel==0.8.1", "bitsandbytes==0.50.2"),
        ),
    ),
    "Unsloth 2026.10.9": Toolkit(
        (
            *(_TORCH, "transformers==5.17.0", "peft==0.20.0", "trl==1.15.0", "accelerate==1.15.0", "datasets==4.8.4"),
            *("einops", "hf_transfer", "json5", "msgspec", "nest-asyncio", "pillow", "protobuf", "psutil", "regex"),
            *("sentencepiece", "structlog", "triton", "typer", "tyro"),
        ),
        (
            *("unsloth==2026.10.9", "unsloth_zoo==2026.10.9", "torchao==0.17.0", "cut_cross_entropy==25.1.1"),
            "bitsandbytes==0.50.2",
        ),
    ),
    "KTransformers 0.7.2": Toolkit(
        (_TORCH, "transformers==5.19.0", "peft==0.20.0", "gguf", "triton"), ("kt-kernel==0.7.2",), (EXPERTS,)
    ),
}


_LLAMA_FACTORY = """\
model_name_or_path: {base}
stage: sft
do_train: true
finetuning_type: lora
lora_target: all
lora_rank: {rank}
dataset_dir: {folder}
dataset: rows
template: chatml
cutoff_len: {length}
output_dir: {out}
per_device_train_batch_size: 4
max_steps: {steps}
learning_rate: {rate}
save_strategy: "no"
report_to: none
"""
_AXOLOTL = """\
base_model: {base}
adapter: lora
lora_target_linear: true
lora_target_parameters: {experts}
lora_r: {rank}
lora_alpha: 4
lora_dropout: 0
datasets:
  - {{path: {rows}, ds_type: json, type: chat_template, field_messages: messages}}
dataset_prepared_path: {folder}/prepared
chat_template: chatml
sequence_len: {length}
output_dir: {out}
micro_batch_size: 4
gradient_accumulation_steps: 1
max_steps: {steps}
learning_rate: {rate}
save_strategy: "no"
optimizer: adamw_torch
lora_mlp_kernel: false
lora_qkv_kernel: false
lora_o_kernel: false
bf16: false
fp16: false
tf32: false
"""
_SWIFT = """--model {base} --template chatml --tuner_type lora --target_modules all-linear --lora_rank {rank}
    --lora_dropout 0 --dataset {rows} --split_dataset_ratio 0 --max_length {length} --max_steps {steps}
    --per_device_train_batch_size 4 --learning_rate {rate} --torch_dtype float32 --output_dir {out} --report_to none
    --add_version false --device_map cpu"""


def command(toolkit: str, python: str, job: Mapping[str, Any], folder: Path) -> list[str]:
    """What its user types, with the files that it reads written into `folder`.

    Args:
        toolkit: its name in `TOOLKITS`. python: of its environment.
        job: base, rows (JSON lines), out, experts (names of parameters, or none), rank, steps, length, rate.
    """
    programs, filled = Path(python).parent, {"folder": folder, **job}
    name = toolkit.partition(" ")[0]
    if name == "ms-swift":
        experts = ["--target_parameters", *job["experts"]] if job["experts"] else []
        told = ["--model_type", "mixtral"] if Path(job["base"]).name == "mixtral" else []  # two of its types look so
        return [str(programs / "swift"), "sft", *_SWIFT.format(**filled).split(), *told, *experts]
    if name in ("LLaMA-Factory", "Axolotl"):
        recipe = folder / "toolkit.yaml"
        recipe.write_text((_AXOLOTL if name == "Axolotl" else _LLAMA_FACTORY).format(**filled))
        _register(Path(job["rows"]), folder)
        if name == "Axolotl":
            return [str(programs / "axolotl"), "train", str(recipe), "--launcher", "python"]
        return [str(programs / "llamafactory-cli"), "train", str(recipe)]
    (folder / "job.json").write_text(json.dumps(dict(job)))
    return [python, SIDE, name.lower(), str(folder / "job.json")]


def _register(rows: Path, folder: Path) -> None:
    """As LLaMA-Factory finds a data set."""
    (folder / "rows.json").write_text(json.dumps([json.loads(line) for line in rows.read_text().splitlines()]))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    told = {"file_name": "rows.json", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": told}))
