"""Chat templates as they are published, each with a tokenizer that knows its special tokens.

A template comes without its tokenizer, so one is made: the embedded model's byte-level merges, and the tokens that a
side file names, or those that stand in the template's text.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer

__all__ = ["Family", "find_families", "make_tokenizer", "special_tokens_in"]

EMBEDDED = Path(__file__).resolve().parents[2] / "recipes/quickstart/nano-qwen3moe-2m"
# How special tokens are written: <|x|>, <|x>, <x|>, full-width bars, [INST], and a few bare words in angle brackets.
_PATTERNS = (
    r"<\|[A-Za-z_][\w./:-]*\|?>|<[A-Za-z_]\w*\|>|<\|\"\|>",
    r"<｜[^<>{}'\"]{1,40}｜>",
    r"\[/?[A-Z][A-Z_]{2,24}\]",
    r"</?s>|<bos>|<eos>|<pad>|<unk>|<image>",
    r"<(?:start|end)_(?:of_)?(?:turn|image|audio|function_call|function_response|function_declaration|utterance)>",
    r"<end_of_utterance>|<escape>|<\[?(?:begin|end)[▁_]of[▁_]\w+\]?>",
)
# Added tokens that decoding keeps, in the families that have them.
_KEPT = r"</?(?:think|tool_call|tool_response|arg_key|arg_value)>|\[/?THINK\]"


@dataclass(frozen=True)
class Family:
    """One template; `side` has special_tokens, bos_token, eos_token, stop_tokens and kwargs, as far as known."""

    name: str
    template: str
    side: Mapping[str, Any] = field(default_factory=dict)


def find_families(source: str, side: Path | None = None) -> list[Family]:
    """The templates of a folder, of one file, or of an importable package: .jinja files and JSON's `chat_template`.

    Raises:
        SystemExit: neither a path nor a package, or no template in it.
    """
    path = Path(source)
    if not path.exists():
        spec = importlib.util.find_spec(source) if source.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(f"{source}: neither a folder nor an installed package")
        path = Path(spec.submodule_search_locations[0])
    folder = path if path.is_dir() else path.parent
    side = side or folder / "templates.json"
    known = json.loads(side.read_text("utf-8")) if side.exists() else {}
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found: dict[str, Family] = {}
    for family in (each for file in files if file.is_file() for each in _families(file, folder)):
        given = known.get(family.name, known.get(Path(family.name).name, {}))
        found.setdefault(family.template, Family(family.name, family.template, {**family.side, **given}))
    if not found:
        raise SystemExit(f"{source}: no chat template in it")
    return list(found.values())


def _families(file: Path, folder: Path) -> Iterator[Family]:
    name = str(file.relative_to(folder).with_suffix(""))
    if file.suffix in {".jinja", ".jinja2"}:
        yield Family(name, file.read_text("utf-8"))
    elif file.suffix == ".json" and '"chat_template"' in (text := file.read_text("utf-8", errors="ignore")):
        try:
            yield from _in_json(json.loads(text), name)
        except ValueError:
            return


def _in_json(value: Any, name: str) -> Iterator[Family]:
    """Every object with a `chat_template`, be it a tokenizer's configuration or a list of model descriptions."""
    if isinstance(value, list):
        for index, each in enumerate(value):
            yield from _in_json(each, f"{name}[{index}]")
    elif isinstance(value, dict):
        template = value.get("chat_template")
        name = str(value.get("model_name", name))
        if isinstance(template, str) and "messages" in template:
            yield Family(name, template, _side_of(value))
        elif isinstance(template, list):
            for each in template:
                yield Family(f"{name}:{each.get('name')}", each["template"], _side_of(value))
        for key, each in value.items():
            if isinstance(each, dict | list) and key != "chat_template":
                yield from _in_json(each, name)


def _side_of(config: Mapping[str, Any]) -> dict[str, Any]:
    def text(token: Any) -> str | None:
        return token.get("content") if isinstance(token, dict) else token

    added = config.get("added_tokens_decoder", {}).values()
    side: dict[str, Any] = {key: text(config[key]) for key in ("bos_token", "eos_token") if text(config.get(key))}
    if added:
        side["special_tokens"] = [token["content"] for token in added if token.get("special")]
        side["kept_tokens"] = [token["content"] for token in added if not token.get("special")]
    if isinstance(config.get("stop"), list):
        side["stop_tokens"] = [stop for stop in config["stop"] if isinstance(stop, str) and stop]
    return side


def special_tokens_in(template: str) -> tuple[list[str], list[str]]:
    """Special tokens by the look of them, and tokens that are added but kept in decoded text, both sorted.

    `<|role|>` that a template puts together from pieces is found for the usual roles.
    """
    special = {token for pattern in _PATTERNS for token in re.findall(pattern, template)}
    if re.search(r"<\|['\"]\s*[+~]", template):
        special |= {f"<|{role}|>" for role in ("system", "user", "assistant", "tool")}
    kept = set(re.findall(_KEPT, template))
    return sorted(special - kept), sorted(kept)


def make_tokenizer(family: Family, folder: Path | None = None) -> Any:
    """A tokenizer for `family`: the merges of the one in `folder` (the embedded model's) and the family's own tokens.

    A special token may be written `"<|end|>~"` in a side file: white space after it belongs to it.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder or EMBEDDED)
    special, kept = special_tokens_in(family.template)
    special = [*family.side.get("special_tokens", special), *family.side.get("stop_tokens", [])]
    kept = list(family.side.get("kept_tokens", [token for token in kept if token not in special]))
    for role in ("bos_token", "eos_token"):
        token = family.side.get(role)
        if token is None and re.search(rf"\b{role}\b", family.template):
            token = next((t for t in special if t in _USUAL[role]), _USUAL[role][0])
        if token is not None:
            special.append(token)
        setattr(tokenizer, role, token)
    written = {token.removesuffix("~"): token for token in sorted(special)}  # "x~" stands after "x" and wins
    there = set() if folder is None else set(tokenizer.get_vocab())
    new = [_added(token, special=True) for name, token in written.items() if name not in there]
    tokenizer.add_tokens(new, special_tokens=True)
    tokenizer.add_tokens([_added(token, special=False) for token in dict.fromkeys(kept) if token not in there])
    if tokenizer.eos_token is None:
        tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


_USUAL = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<|startoftext|>", "[gMASK]"),
    "eos_token": ("</s>", "<eos>", "<|im_end|>", "<｜end▁of▁sentence｜>", "<|eot_id|>", "<|endoftext|>"),
}


def _added(token: str, *, special: bool) -> AddedToken:
    swallows = token.endswith("~")
    return AddedToken(token.removesuffix("~"), rstrip=swallows, special=special, normalized=False)
