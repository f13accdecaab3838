"""How other programs load an adapter, as text for its model card: PEFT, vLLM, SGLang, llama.cpp and Ollama.

Servers read other layouts than the one PEFT writes, so each block starts with the export that it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolkit.packaging.base import BaseIdentity

__all__ = ["largest_rank", "loading_section"]

_SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `vllm serve --max-lora-rank` takes."""


def loading_section(base: BaseIdentity, config: Mapping[str, Any]) -> str:
    """The whole section; `config` is the adapter's configuration."""
    rank = largest_rank(config)
    served = next((allowed for allowed in _SERVED_RANKS if allowed >= rank), rank)
    revision = f" --revision {base.revision}" if base.revision else ""
    return "\n\n".join(
        (
            "## How to load it",
            f"### transformers and PEFT\n\n```python\n{_python(base)}```",
            "For the programs below, ADAPTER is this repository (`hf://owner/name`) or its folder; exports are read "
            "back and compared with the adapter before they are called done."
            + ("" if base.revision else f" Add `--base FOLDER`, the folder of `{base.name}`."),
            "### vLLM and SGLang\n\nBoth read one key an expert and projection. Where a server's own implementation of "
            "this model takes no adapter on routers or experts, `--format merged` gives a whole checkpoint.\n\n"
            "```bash\nonecard export ADAPTER --format per-expert --out per-expert\n"
            f"vllm serve {base.name}{revision} --enable-lora --max-lora-rank {served} --lora-modules tuned=per-expert\n"
            f"python -m sglang.launch_server --model-path {base.name} --enable-lora --lora-paths tuned=per-expert\n```",
            "### llama.cpp and Ollama\n\nWhere llama.cpp has no name for a part, the export says which, and `--format "
            "merged` gives a checkpoint that its converter reads.\n\n"
            "```bash\nonecard export ADAPTER --format gguf --out gguf\n"
            f"python convert_hf_to_gguf.py FOLDER_OF_{base.name.rpartition('/')[2]} --outfile gguf/base.gguf\n"
            "llama-server -m gguf/base.gguf --lora gguf/adapter.gguf\n"
            "(cd gguf && ollama create tuned -f Modelfile)\n```",
        )
    )


def largest_rank(config: Mapping[str, Any]) -> int:
    """Of any part: servers reserve room for one rank."""
    return int(max([config["r"], *(config.get("rank_pattern") or {}).values()]))


def _python(base: BaseIdentity) -> str:
    revision = f', revision="{base.revision}"' if base.revision else ""
    comment = "" if base.revision else "  # your folder with this model"
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base = "{base.name}"{comment}\n'
        'adapter = "."  # this folder, or its repository on the Hub\n'
        f'model = AutoModelForCausalLM.from_pretrained(base{revision}, dtype="auto")\n'
        "model = PeftModel.from_pretrained(model, adapter)\n"
        "tokenizer = AutoTokenizer.from_pretrained(adapter)\n\n"
        'messages = [{"role": "user", "content": "Hello!"}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
        ")\n"
        "output = model.generate(**inputs, max_new_tokens=64)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))\n'
    )
