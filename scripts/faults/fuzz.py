"""Random and hostile input for everything that reads what others wrote: no traceback, no hang, no memory.

    python -m scripts.faults.fuzz [--inputs N] [TARGET …]

Each input is a mutation of a good one: bytes flipped, cut, doubled or replaced by fragments that have broken parsers;
values of JSON exchanged for hostile ones. Each must be accepted or refused with an error of ours, within two
seconds of processor time and one GiB. Prints a line a target and each failing input; exits with 1 where there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from scripts.faults.hostile import FRAGMENTS, VALUES
from toolkit.errors import OnecardError

__all__ = ["TARGETS", "Found", "Target", "fuzz", "mutate_bytes", "mutate_json"]

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "recipes" / "quickstart" / "nano-qwen3moe-2m"
MOST_SECONDS = 2
MOST_BYTES = 1 << 30


@dataclass
class Target:
    """Good inputs, and a function that reads one; raises errors of ours, or returns."""

    name: str
    seeds: list[bytes]
    read: Callable[[bytes], object]
    is_json: bool = False


@dataclass
class Found:
    """What came of one target."""

    inputs: int = 0
    refused: int = 0
    slowest: float = 0.0
    failures: list[str] = field(default_factory=list)


class _Hang(BaseException):
    pass


def mutate_bytes(seed: bytes, chance: random.Random) -> bytes:
    """One to five changes of bytes."""
    data = bytearray(seed)
    for _ in range(chance.randint(1, 5)):
        at = chance.randint(0, len(data))
        match chance.randint(0, 6):
            case 0 if data:
                data[at % len(data)] ^= 1 << chance.randint(0, 7)
            case 1:
                del data[at : at + chance.randint(1, 40)]
            case 2:
                data[at:at] = data[at : at + chance.randint(1, 200)]
            case 3:
                del data[at:]
            case 4:
                data[at : at + chance.randint(0, 8)] = chance.choice(FRAGMENTS)
            case 5:
                data[at:at] = chance.choice(FRAGMENTS)
            case _:
                data[at:at] = chance.randbytes(chance.randint(1, 8))
    return bytes(data)


def mutate_json(seed: bytes, chance: random.Random) -> bytes:
    """One to four values or keys of a JSON document exchanged."""
    tree = json.loads(seed)
    for _ in range(chance.randint(1, 4)):
        holder: Any = {"": tree}
        key: Any = ""
        while isinstance(holder[key], (dict, list)) and holder[key] and chance.random() < 0.8:
            holder = holder[key]
            key = chance.choice(list(holder)) if isinstance(holder, dict) else chance.randrange(len(holder))
        match chance.randint(0, 4):
            case 0 if isinstance(holder, dict) and key in holder and holder is not tree:
                holder[chance.choice(["", "r", "__class__", "files", "../x", key + "x"])] = holder.pop(key)
            case 1 if isinstance(holder, dict) and key:
                del holder[key]
            case _:
                holder[key] = copy.deepcopy(chance.choice(VALUES))
        tree = holder[""] if key == "" and isinstance(holder, dict) and "" in holder else tree
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def fuzz(target: Target, inputs: int, seed: int = 0) -> Found:
    """Read `inputs` mutations of the target's seeds, the same ones for the same `seed`."""
    found, chance = Found(), random.Random(f"{target.name} {seed}")
    before = signal.signal(signal.SIGPROF, _raise_hang)
    for number in range(inputs):
        good = chance.choice(target.seeds)
        data = mutate_json(good, chance) if target.is_json and chance.random() < 0.6 else mutate_bytes(good, chance)
        _try_one(target, data, found, number)
    signal.signal(signal.SIGPROF, before)
    return found


def _try_one(target: Target, data: bytes, found: Found, number: int) -> None:
    began = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS + 1)
    try:
        target.read(data)
    except OnecardError as error:
        found.refused += 1
        if "\n" in str(error).strip():
            found.failures.append(f"input {number}: more than one line: {str(error)[:200]!r}")
    except _Hang:
        found.failures.append(f"input {number}: a hang: {data[:300]!r}")
    except Exception:
        last = traceback.format_exc().splitlines()
        found.failures.append(f"input {number}: {last[-1][:200]} at {last[-3].strip()[:160]}: {data[:300]!r}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    found.inputs += 1
    found.slowest = max(found.slowest, time.process_time() - began)


def _raise_hang(number: int, frame: FrameType | None) -> None:
    raise _Hang


def _recipes() -> Target:
    from toolkit.recipe import parse, starter

    seeds = [path.read_bytes() for path in sorted((ROOT / "recipes").glob("*.yaml"))] + [starter("x.yaml").encode()]
    short = b"model: {model_name_or_path: a/b}\nlora: {r: 4}\ndata: {train: x.jsonl}\ntraining: {max_steps: 3}\n"

    def read(data: bytes) -> None:
        parse(data.decode("utf-8", "replace"), note=lambda line: None)

    return Target("recipe", [short, short, short, *seeds], read)


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

    return Target("jsonl", seeds, read)


def _artifact(folder: Path) -> Path:
    """An artifact of one small LoRA, without a model."""
    import torch
    from safetensors.torch import save_file

    from toolkit.packaging.manifest import file_entry

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


WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "manifest.json"


def _of_artifact(name: str, file: str, folder: Path) -> Target:
    """The artifact with one file mutated, read as `verify` and as loading do."""
    from toolkit.adapters.stranger import check_adapter_files
    from toolkit.packaging import verify_artifact
    from toolkit.packaging.manifest import file_entry, load_adapter_config, read_manifest

    place = _artifact(folder)
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

    return Target(name, [(place / file).read_bytes()], read, is_json=file.endswith("json"))


def _header(folder: Path) -> Target:
    """The safetensors header alone mutated, with a length that fits it."""
    target = _of_artifact("safetensors header", WEIGHTS, folder)
    whole = target.seeds[0]
    length = int.from_bytes(whole[:8], "little")
    header, rest, read = whole[8 : 8 + length], whole[8 + length :], target.read
    return Target(
        target.name, [header.strip()], lambda data: read(len(data).to_bytes(8, "little") + data + rest), is_json=True
    )


def _checkpoint(folder: Path) -> Target:
    import torch

    from toolkit.training.checkpoint import newest_checkpoint, open_checkpoint, write_checkpoint

    saved = write_checkpoint(
        folder, 1, tensors={"a.safetensors": {"x": torch.ones(3)}}, texts={"b.json": "{}"}, facts={"recipe": {"a.b": 1}}
    )
    file = saved.path / MANIFEST

    def read(data: bytes) -> None:
        file.write_bytes(data)
        newest_checkpoint(folder)
        open_checkpoint(saved.path)

    return Target("checkpoint manifest", [file.read_bytes()], read, is_json=True)


def _templates() -> Target:
    from transformers import AutoTokenizer

    from toolkit.data.formats import Example
    from toolkit.data.problems import InvalidRow
    from toolkit.data.template import ChatRenderer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
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

    def read(data: bytes) -> None:
        with contextlib.suppress(InvalidRow):
            ChatRenderer(tokenizer, data.decode("utf-8", "replace")).answers(example)

    return Target("chat template", [plain, marked, (MODEL / "chat_template.jinja").read_bytes()], read)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "recipe": lambda folder: _recipes(),
    "jsonl": _rows,
    "adapter config": lambda folder: _of_artifact("adapter config", CONFIG, folder),
    "artifact manifest": lambda folder: _of_artifact("artifact manifest", MANIFEST, folder),
    "adapter weights": lambda folder: _of_artifact("adapter weights", WEIGHTS, folder),
    "safetensors header": _header,
    "checkpoint manifest": _checkpoint,
    "chat template": lambda folder: _templates(),
}


def main() -> int:
    """Fuzz the chosen targets."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failed = 0
    for name in options.targets or TARGETS:
        folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
        target = TARGETS[name](folder)
        room = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MOST_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
        found = fuzz(target, options.inputs, options.seed)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        shutil.rmtree(folder)
        failed += bool(found.failures)
        print(
            f"{name:20} {found.inputs} inputs, {found.refused} refused, slowest {found.slowest:.2f} s, "
            f"{len(found.failures)} failures",
            *found.failures[:8],
            sep="\n  ",
            flush=True,
        )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
