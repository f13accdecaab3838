"""How other programs load an adapter, as text for its model card: PEFT, vLLM, SGLang, llama.cpp and Ollama.

Servers read other layouts than the one PEFT writes, so each block starts with the export that it needs. What ends an
answer, and how a prompt is written, is in none of them by itself: the base's own would be used.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from toolkit.checkpoint.identity import BaseIdentity

__all__ = ["form_of", "loading_section", "served_rank"]

_SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `vllm serve --max-lora-rank` takes."""

_QUESTION, _BEGINNING = "Hello!", "Once upon a time"
_OF_THE_CALL = frozenset({"add_generation_prompt", "conversation", "return_dict", "return_tensors", "tokenize"})


_PLAIN = "from peft import PeftModel\nfrom transformers import {}\n"
_INT8 = """import toolkit
from toolkit.adapters import load_adapter
from transformers import {}

# onecard reads the base's int8 weights, to which PEFT by itself would add its updates without their scales.
toolkit.register()
"""


def loading_section(
    base: BaseIdentity,
    config: Mapping[str, Any],
    chat: Mapping[str, Any],
    *,
    has_template: bool = False,
    new_tokens: Mapping[str, Any] | None = None,
) -> str:
    """The whole section.

    Args:
        config: the adapter's configuration. chat: how its conversations were written, as `write_artifact` takes it.
        has_template: the adapter has a chat template in a file.
        new_tokens: those that were added, as `read_manifest` gives them; servers read them in merged checkpoints alone.
    """
    name = shlex.quote(base.name)
    revision = f" --revision {base.revision}" if base.revision else ""
    is_chat = chat.get("form", "chat") == "chat"
    template = " --chat-template per-expert/chat_template.jinja" if is_chat and has_template else ""
    jinja = " --jinja --chat-template-file gguf/chat_template.jinja" if is_chat and has_template else ""
    ends = " --generation-config per-expert" if chat.get("stop_token_ids") else ""
    if base.name.endswith(".gguf") and not new_tokens:
        return _of_a_gguf(base.name, chat, jinja)
    python = f"### transformers and PEFT\n\n```python\n{_python(base, chat, (new_tokens or {}).get('rows'))}```"
    if config.get("use_dora") or new_tokens:
        beside = "trained rows of tokens" if new_tokens else "DoRA's magnitudes"
        return "\n\n".join(("## How to load it", python, _merged(base, chat, beside)))
    return "\n\n".join(
        (
            "## How to load it",
            python,
            "For the programs below, ADAPTER is this repository (`hf://owner/name`) or its folder; exports are read "
            "back and compared with the adapter before they are called done."
            + ("" if base.revision else f" Add `--base FOLDER`, the folder of `{base.name}`."),
            "### vLLM and SGLang\n\nBoth read one key per expert and projection. Where a server's own implementation "
            "of this model takes no adapter on routers or experts, `--format merged` gives a whole checkpoint.\n\n"
            "```bash\nonecard export ADAPTER --format per-expert --out per-expert\n"
            f"vllm serve {name}{revision} --enable-lora --max-lora-rank {served_rank(config)} "
            f"--lora-modules tuned=per-expert{template}{ends}\n"
            f"python -m sglang.launch_server --model-path {name} --enable-lora --lora-paths tuned=per-expert{revision}"
            f"{template}\n{_request(chat)}```",
            "### llama.cpp and Ollama\n\nWhere llama.cpp has no name for a part, the export says which, and `--format "
            f"merged` gives a checkpoint that its converter reads.{_ends_there(chat)}\n\n"
            "```bash\nonecard export ADAPTER --format gguf --out gguf\n"
            f"python convert_hf_to_gguf.py FOLDER_OF_{shlex.quote(base.name.rpartition('/')[2])} --outfile "
            f"gguf/base.gguf\nllama-server -m gguf/base.gguf --lora gguf/adapter.gguf{jinja}\n"
            "(cd gguf && ollama create tuned -f Modelfile)\n```",
        )
    )


def _merged(base: BaseIdentity, chat: Mapping[str, Any], beside: str) -> str:
    """How servers load an adapter that has something beside pairs, for which their own layouts have no place."""
    given = "" if base.revision else " --base FOLDER"
    return (
        f"### vLLM, SGLang and llama.cpp\n\nNone of them takes {beside} from an adapter. The merged export is "
        "a plain checkpoint with its tokenizer, which all of them read or convert. ADAPTER is this repository "
        "(`hf://owner/name`) or its folder.\n\n```bash\n"
        f"onecard export ADAPTER --format merged --out merged{given}\n"
        "vllm serve merged --served-model-name tuned\n"
        f"python -m sglang.launch_server --model-path merged --served-model-name tuned\n{_request(chat)}```"
    )


def _of_a_gguf(base: str, chat: Mapping[str, Any], jinja: str) -> str:
    """The section where the base is a GGUF file, which llama.cpp reads as it is and others do not."""
    name = shlex.quote(base)
    return "\n\n".join(
        (
            "## How to load it",
            f"The base is the GGUF file `{base}`. ADAPTER is this repository (`hf://owner/name`) or its folder; "
            "exports are read back and compared with the adapter before they are called done.",
            f"### llama.cpp and Ollama\n\nWhere llama.cpp has no name for a part, the export says which."
            f"{_ends_there(chat)}\n\n```bash\nonecard export ADAPTER --format gguf --out gguf --base {name}\n"
            f"cp {name} gguf/base.gguf\nllama-server -m gguf/base.gguf --lora gguf/adapter.gguf{jinja}\n"
            "(cd gguf && ollama create tuned -f Modelfile)\n```",
            "### transformers, vLLM and SGLang\n\nThe merged export is a plain checkpoint: the file multiplied out, "
            "and the adapter added.\n\n```bash\n"
            f"onecard export ADAPTER --format merged --out merged --base {name}\n"
            f"vllm serve merged --served-model-name tuned\npython -m sglang.launch_server --model-path merged "
            f"--served-model-name tuned\n{_request(chat)}```",
        )
    )


def served_rank(config: Mapping[str, Any]) -> int:
    """What to give as `--max-lora-rank`: the least that vLLM takes and that has room for every part's rank."""
    rank = int(max([config["r"], *(config.get("rank_pattern") or {}).values()]))
    return next((allowed for allowed in _SERVED_RANKS if allowed >= rank), rank)


def form_of(chat: Mapping[str, Any]) -> str:
    """How the training data were written, in one line of a Markdown table; empty where it is not known."""
    if not chat:
        return ""
    parts = ["plain prompts and completions, no chat template" if chat.get("form") == "text" else "chat template"]
    parts += [f"`{name}` = `{json.dumps(value, ensure_ascii=False)}`" for name, value in _options(chat).items()]
    parts += [f"dated {chat['date']}"] if chat.get("date") else []
    parts += ["with a system prompt"] if chat.get("system_prompt") else []
    if stops := chat.get("stop_token_ids"):
        parts += [f"ends at token {' or '.join(map(str, stops))}"]
    return ", ".join(parts).replace("|", "\\|").replace("\n", " ")


def _options(chat: Mapping[str, Any]) -> dict[str, Any]:
    options = chat.get("chat_template_kwargs") or {}
    return {name: value for name, value in sorted(options.items()) if name not in _OF_THE_CALL}


def _messages(chat: Mapping[str, Any]) -> list[dict[str, str]]:
    system = [{"role": "system", "content": chat["system_prompt"]}] if chat.get("system_prompt") else []
    return [*system, {"role": "user", "content": _QUESTION}]


def _request(chat: Mapping[str, Any]) -> str:
    """A request to either server that says what the base does not; none where nothing is known."""
    if not chat:
        return ""
    is_text = chat.get("form") == "text"
    asked: dict[str, Any] = {"prompt": _BEGINNING} if is_text else {"messages": _messages(chat)}
    options = {} if is_text else _options(chat)
    body = {
        "model": "tuned",
        **asked,
        "max_tokens": 64,
        **({"chat_template_kwargs": options} if options else {}),
        **({"stop_token_ids": chat["stop_token_ids"]} if chat.get("stop_token_ids") else {}),
    }
    where = "completions" if is_text else "chat/completions"
    return (
        "# … and of SGLang at port 30000:\n"
        f"curl http://localhost:8000/v1/{where} -H 'Content-Type: application/json' \\\n"
        f"  -d {shlex.quote(json.dumps(body, ensure_ascii=False))}\n"
    )


def _ends_there(chat: Mapping[str, Any]) -> str:
    said = ""
    if chat.get("stop_token_ids"):
        said += ' The Modelfile names what ends an answer; a request to llama-server gives the same texts as `"stop"`.'
    if chat.get("form") == "text":
        said += " Ask llama-server at `/v1/completions`: prompts are plain text."
    return said


def _python(base: BaseIdentity, chat: Mapping[str, Any], rows: int | None = None) -> str:
    revision = f', revision="{base.revision}"' if base.revision else ""
    comment = "" if base.revision else "  # your folder with this model"
    ends = bool(chat.get("stop_token_ids"))
    limit = "generation_config=generation" if ends else "max_new_tokens=64"
    names = f"AutoModelForCausalLM, AutoTokenizer{', GenerationConfig' if ends else ''}"
    return (
        (_INT8 if base.is_int8 else _PLAIN).format(names) + "\n"
        f"base = {json.dumps(base.name)}{comment}\n"
        f'adapter = "."  # this folder{"" if base.is_int8 else ", or its repository on the Hub"}\n'
        f'model = AutoModelForCausalLM.from_pretrained(base{revision}, dtype="auto")\n'
        + (f"model.resize_token_embeddings({rows}, mean_resizing=False)  # room for the new tokens\n" if rows else "")
        + f"model = {'load_adapter' if base.is_int8 else 'PeftModel.from_pretrained'}(model, adapter)\n"
        "tokenizer = AutoTokenizer.from_pretrained(adapter)\n"
        + ("# What ends an answer is in the adapter's generation_config.json, not in the base's.\n" if ends else "")
        + ("generation = GenerationConfig.from_pretrained(adapter, max_new_tokens=64)\n" if ends else "")
        + f"\n{_inputs(chat)}"
        'ids, mask = inputs["input_ids"], inputs["attention_mask"]\n'
        f"output = model.generate(input_ids=ids, attention_mask=mask, {limit})\n"
        "print(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))\n"
    )


def _inputs(chat: Mapping[str, Any]) -> str:
    """A prompt as the training data wrote it."""
    if chat.get("form") == "text":
        return f'inputs = tokenizer({json.dumps(_BEGINNING)}, return_tensors="pt")  # plain text, no chat template\n'
    options = _options(chat)
    given = ", **options" if options else ""
    return (
        f"messages = {_literal(_messages(chat))}\n"
        + (f"options = {_literal(options)}  # of the chat template, as in training\n" if options else "")
        + "inputs = tokenizer.apply_chat_template(\n"
        f'    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True{given}\n'
        ")\n"
    )


def _literal(value: Any) -> str:
    """JSON-like data as Python writes it, with double quotes where it can."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
