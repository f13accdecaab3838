"""What the fuzzer feeds: every reader of something that others wrote, with good inputs to start from."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from scripts.faults.mutations import Mutation, mutate_bytes, mutate_json, mutate_row, mutate_template

__all__ = ["TARGETS", "Target", "small_artifact"]

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "recipes" / "quickstart" / "nano-qwen3moe-2m"
WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "manifest.json"


@dataclass
class Target:
    """Good inputs, and a function that reads one; raises errors of ours, or returns.

    Where `read` takes a short cut, `whole` is the way that users take: every 250th input goes there, and every one
    that ends the process on the short way.
    """

    name: str
    seeds: list[bytes]
    read: Callable[[bytes], object]
    mutations: tuple[Mutation, ...] = (mutate_bytes,)
    whole: Callable[[bytes], object] | None = None


def _recipes(folder: Path) -> Target:
    from toolkit.recipe import flat, parse, starter

    short = b"model: {model_name_or_path: a/b}\nlora: {r: 4}\ndata: {train: x.jsonl}\ntraining: {max_steps: 3}\n"
    tree: dict[str, dict[str, Any]] = {}
    for name, value in flat(parse(short.decode())).items():
        section, _, field = name.partition(".")
        tree.setdefault(section, {})[field] = value
    shipped = [path.read_bytes() for path in sorted((ROOT / "recipes").glob("*.yaml"))] + [starter("x.yaml").encode()]
    every_field, few_fields = json.dumps(tree).encode(), json.dumps({k: tree[k] for k in ("model", "data")}).encode()

    def read(data: bytes) -> None:
        parse(data.decode("utf-8", "replace"), note=lambda line: None)

    def mutate(seed: bytes, chance: Any) -> bytes:
        """A recipe as JSON, which is YAML, with a value exchanged; or the bytes of one as people write it.

        Large ones cost a third of a second each in the YAML parser, and come less often.
        """
        while True:
            is_json = chance.random() < 0.5
            tree = chance.choice((every_field, few_fields, few_fields))
            data = mutate_json(tree, chance) if is_json else mutate_bytes(seed, chance)
            if len(data) < 5000 or chance.random() < 0.02:
                return data

    return Target("recipe", [short] * 3 * len(shipped) + shipped, read, (mutate,))


def _rows(folder: Path) -> Target:
    from toolkit.data.reading import Reading
    from toolkit.data.sources import open_source

    file = folder / "rows.jsonl"
    seeds = [
        b'{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n',
        b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}\n' * 2,
        b'{"instruction": "a", "input": "", "output": "b"}\n',
        b'{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n',
        b'{"text": "words"}\n{"text": "more"}\n',
    ]

    def read(data: bytes) -> None:
        file.write_bytes(data)
        rows = open_source("rows.jsonl", base_folder=folder)
        Reading("auto", {}, None, "error").read("train", "rows.jsonl", rows)

    return Target("jsonl", seeds, read, (mutate_bytes, mutate_row))


def small_artifact(folder: Path) -> Path:
    """An artifact of one small LoRA, without a model."""
    import torch
    from safetensors.torch import save_file

    from toolkit.artifact.manifest import file_entry

    place = folder / "artifact"
    place.mkdir()
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{module}.lora_A.weight": torch.ones(2, 4), f"{module}.lora_B.weight": torch.ones(4, 2)}, place / WEIGHTS
    )
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "rank_pattern": {},
        "revision": None,
    }
    (place / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "a/b"}))
    files = {name: file_entry(place / name) for name in (WEIGHTS, CONFIG)}
    base = {"name": "a/b", "revision": None, "weights_sha256": "0" * 64}
    rest: dict[str, Any] = {"versions": {}, "recipe": {}, "results": {}, "coverage": {}}
    (place / MANIFEST).write_text(json.dumps({"format": 1, "files": files, "base": base, **rest}))
    return place


def _of_artifact(name: str, file: str, folder: Path) -> Target:
    """The artifact with one file mutated, read as `verify` and as loading do."""
    from toolkit.adapters.untrusted import check_adapter_files
    from toolkit.artifact import verify_artifact
    from toolkit.artifact.manifest import file_entry, load_adapter_config, read_manifest

    place = small_artifact(folder)
    good = json.loads((place / MANIFEST).read_bytes())

    def read(data: bytes) -> None:
        (place / file).write_bytes(data)
        if file != MANIFEST:  # whoever sends a bad file sends its hash too
            entry = {file: file_entry(place / file)}
            (place / MANIFEST).write_text(json.dumps({**good, "files": {**good["files"], **entry}}))
        verify_artifact(place)
        read_manifest(place)
        load_adapter_config(place)
        check_adapter_files(place)

    is_json = file.endswith("json")
    return Target(
        name, [(place / file).read_bytes()], read, (mutate_bytes, mutate_json) if is_json else (mutate_bytes,)
    )


def _header(folder: Path) -> Target:
    """The safetensors header alone mutated, with a length that fits it."""
    target = _of_artifact("safetensors header", WEIGHTS, folder)
    whole = target.seeds[0]
    length = int.from_bytes(whole[:8], "little")
    header, rest, read = whole[8 : 8 + length], whole[8 + length :], target.read
    return Target(
        target.name,
        [header.strip()],
        lambda data: read(len(data).to_bytes(8, "little") + data + rest),
        (mutate_bytes, mutate_json),
    )


def _checkpoint(folder: Path) -> Target:
    """A checkpoint's manifest, as it is and with a seal that fits what was changed."""
    import torch

    from toolkit.training.checkpoint import newest_checkpoint, open_checkpoint, sealed, write_checkpoint

    saved = write_checkpoint(
        folder, 1, tensors={"a.safetensors": {"x": torch.ones(3)}}, texts={"b.json": "{}"}, facts={"recipe": {"a.b": 1}}
    )
    file = saved.path / MANIFEST

    def read(data: bytes) -> None:
        file.write_bytes(data)
        newest_checkpoint(folder)
        open_checkpoint(saved.path)

    def reseal(seed: bytes, chance: Any) -> bytes:
        unsealed = {key: value for key, value in json.loads(seed).items() if key != "seal"}
        changed = json.loads(mutate_json(json.dumps(unsealed).encode(), chance))
        return sealed(changed).encode() if isinstance(changed, dict) else json.dumps(changed).encode()

    return Target("checkpoint manifest", [file.read_bytes()], read, (mutate_bytes, mutate_json, reseal, reseal))


def _templates(folder: Path) -> Target:
    """Templates rendered in this process, and every 250th through the fork that tries them first, as users do.

    The tokenizer is a stand-in with the real one's special tokens: without torch a process forks ten times faster.
    """
    from unittest import mock

    from toolkit.data.formats import Example
    from toolkit.data.problems import InvalidRow
    from toolkit.data.template import ChatTemplate
    from toolkit.data.turns import TurnReader

    config = json.loads((MODEL / "tokenizer_config.json").read_bytes())
    special = {key: config[key] for key in ("bos_token", "eos_token", "pad_token")}
    tokenizer: Any = SimpleNamespace(
        **special,
        eos_token_id=2,
        convert_ids_to_tokens=lambda token: special["eos_token"],
        chat_template=None,
        special_tokens_map=special,
        all_special_tokens=sorted(set(special.values())),
        added_tokens_decoder={0: SimpleNamespace(content="<|im_start|>", special=True)},
        get_chat_template=lambda template, tools: template,
    )
    turns = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"})
    example = Example("here", messages=turns * 2)
    plain = (
        b"{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
        b"{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    marked = (
        b"{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        b"{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )

    def whole(data: bytes) -> None:
        with contextlib.suppress(InvalidRow):
            TurnReader(tokenizer, ChatTemplate(tokenizer, data.decode("utf-8", "replace"))).read(example, (1, 3))

    def read(data: bytes) -> None:
        with mock.patch("toolkit.data.template.require_frugal", lambda render, key: render()):
            whole(data)

    seeds = [plain, marked, (MODEL / "chat_template.jinja").read_bytes()]
    return Target("chat template", seeds, read, (mutate_bytes, mutate_template), whole)


def _gguf(folder: Path) -> Target:
    """A small model's header and numbers; every 250th on to its config and its parameters."""
    from tests.harness.as_gguf import tiny, write_gguf
    from toolkit.checkpoint.formats.gguf import read_gguf
    from toolkit.checkpoint.formats.gguf_file import open_gguf

    file = folder / "model.gguf"
    small = tiny("qwen3_moe", num_hidden_layers=1, num_experts=4, hidden_size=32, vocab_size=16)
    seeds = [write_gguf(file, small).read_bytes()]
    header = seeds[0].rindex(b"output.weight") + 100

    def read(data: bytes) -> None:
        file.write_bytes(data)
        open_gguf(file)

    def whole(data: bytes) -> None:
        file.write_bytes(data)
        read_gguf(file)

    def in_header(seed: bytes, chance: Any) -> bytes:
        return mutate_bytes(seed[:header], chance) + seed[header:]

    def a_number(seed: bytes, chance: Any) -> bytes:
        """One that says a length, a size, a place or a setting, exchanged."""
        at, width = chance.randrange(4, header), chance.choice((1, 2, 4, 8))
        value = chance.choice((0, 1, 2, 3, 31, 255, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1, chance.getrandbits(64)))
        return seed[:at] + (value % 256**width).to_bytes(width, "little") + seed[at + width :]

    return Target("gguf", seeds, read, (in_header, a_number, a_number), whole)


def _formats(folder: Path) -> Target:
    """Headers, config and small tensors of the golden cases of every quantised format; what is accepted is read too.

    A file of safetensors holds as many bytes as its header says, so a header is never larger than what is there.
    """
    from tests.harness.formats import CASES, DTYPES, Case

    cases = {name: Case(name) for name in CASES}

    def read(data: bytes) -> None:
        tree = json.loads(data)
        case = cases.get(str(tree.get("case")) if isinstance(tree, dict) else "")
        if case is not None:
            _read_format(case, tree)

    def a_size(seed: bytes, chance: Any) -> bytes:
        """A tensor's shape, dtype or number exchanged for a likely one, or its parts given to another tensor."""
        tree = json.loads(seed)
        for _ in range(chance.randint(1, 3)):
            key, other = chance.choice(list(tree["tensors"])), chance.choice(list(tree["tensors"]))
            dtype, shape, values = tree["tensors"][key]
            if (what := chance.randrange(5)) == 0:
                dtype = chance.choice(list(DTYPES))
            elif what == 1 and values and not isinstance(values, str):
                values[chance.randrange(len(values))] = chance.choice((0, 1, 2, 255, -1, 2**31 - 1, -(2**31)))
            elif what == 2:
                shape = chance.choice((shape[1:], [*shape, 1], [1, *shape], shape[::-1]))
            elif what == 3:
                dtype, shape, values = tree["tensors"][other]
            elif shape:
                at = chance.randrange(len(shape))
                shape[at] = chance.choice((0, 1, shape[at] - 1, shape[at] + 1, 2 * shape[at], shape[at] // 2))
            tree["tensors"][key] = [dtype, shape, values]
        return json.dumps(tree).encode()

    seeds = [_as_json(case) for case in cases.values()]
    return Target("quantised formats", seeds, read, (mutate_json, a_size, a_size))


_SMALL = 400
"""Bytes of a tensor that is put into the document, so that it is mutated too."""


def _as_json(case: Any) -> bytes:
    tensors = {}
    for key, header in case.files().headers.items():
        is_small = header.bytes <= _SMALL and header.dtype in ("U8", "I32", "I64")
        values = case.tensors[key].flatten().tolist() if is_small else None
        if values and ".quant_state." in key:
            values = bytes(values).decode()
        tensors[key] = [header.dtype, list(header.shape), values]
    declared, metadata = case.declared, case.metadata
    return json.dumps({"config": declared, "metadata": metadata, "tensors": tensors, "case": case.name}).encode()


def _read_format(case: Any, tree: dict[str, Any]) -> None:
    """What the document says, with the case's own bytes in tensors that say no values."""
    from tests.harness.formats import as_slice
    from toolkit.checkpoint.formats import Files, packed_weights

    tensors = {}
    named = tree.get("tensors")
    for key, told in named.items() if isinstance(named, dict) else ():
        if (tensor := _tensor(case.tensors.get(key), told)) is not None:
            tensors[key] = tensor
    declared, metadata = tree.get("config"), tree.get("metadata")
    texts = {key: text for key, text in (metadata if isinstance(metadata, dict) else {}).items() if type(text) is str}
    files = case.files(tensors, declared if isinstance(declared, dict) else {}, texts)
    assert isinstance(files, Files)
    for packed in packed_weights(files).values():
        as_slice(packed, tensors).read()


def _tensor(stored: Any, told: Any) -> Any:
    """A tensor as the document has it; None where no file could hold it."""
    import torch

    from tests.harness.formats import DTYPES

    if not isinstance(told, list) or len(told) != 3 or not isinstance(told[1], list):
        return None
    dtype, shape = DTYPES.get(str(told[0])), told[1]
    if dtype is None or any(type(size) is not int or not 0 <= size <= 1 << 16 for size in shape) or len(shape) > 8:
        return None
    size = math.prod(shape) * dtype.itemsize
    if not 0 <= size <= 1 << 20:
        return None
    if isinstance(told[2], str):
        data = told[2].encode("utf-8", "replace")
    elif isinstance(told[2], list):
        kind = torch.int64 if dtype == torch.int64 else torch.int32 if dtype == torch.int32 else torch.uint8
        limit = torch.iinfo(kind)
        numbers = [number for number in told[2] if type(number) is int and limit.min <= number <= limit.max]
        data = torch.tensor(numbers, dtype=kind).numpy().tobytes()
    else:
        data = b"" if stored is None else stored.flatten().view(torch.uint8).numpy().tobytes()
    whole = (data or b"\0") * (size // max(1, len(data)) + 1)
    return (
        torch.frombuffer(bytearray(whole[:size]), dtype=dtype).reshape(shape)
        if size
        else torch.empty(shape, dtype=dtype)
    )


TARGETS: dict[str, Callable[[Path], Target]] = {
    "recipe": _recipes,
    "jsonl": _rows,
    "adapter config": lambda folder: _of_artifact("adapter config", CONFIG, folder),
    "artifact manifest": lambda folder: _of_artifact("artifact manifest", MANIFEST, folder),
    "adapter weights": lambda folder: _of_artifact("adapter weights", WEIGHTS, folder),
    "safetensors header": _header,
    "checkpoint manifest": _checkpoint,
    "chat template": _templates,
    "gguf": _gguf,
    "quantised formats": _formats,
}
