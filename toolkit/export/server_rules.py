"""Which servers take an adapter as it lies on the disk, by the rules that their loaders state in their sources.

A server that does not know a key drops it without a word or refuses the whole adapter, and no small program can ask it
first: both want a GPU. The rules are those of vLLM 0.33.0 (`lora/lora_model.py`, `lora/lora_weights.py`,
`lora/peft_helper.py`) and SGLang 0.5.23 (`srt/lora/lora.py`, `srt/lora/utils.py`, `srt/lora/lora_config.py`).
llama.cpp's are those of its converter, `convert_lora_to_gguf.py`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

__all__ = ["SERVERS", "llama_cpp_problems", "server_problems"]

SERVERS = ("vLLM 0.33.0", "SGLang 0.5.23")

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_SGLANG_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
"""SGLang finds a layer by its number, whatever stands before it."""
_EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<number>\d+)\.(?P<projection>\w+)")
_PROJECTIONS = ({"gate_proj", "up_proj", "down_proj"}, {"w1", "w2", "w3"}, {"up_proj", "down_proj"})
"""Of an expert, with a gate by its two usual sets of names, or without."""
_VLLM_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_SGLANG_TAKES = re.compile(
    r"(q|k|v|qkv|o|out|gate|up|gate_up|down|q_a|q_b|kv_b)_proj|kv_a_proj_with_mqa|w[123]|in_proj(_[qkvz]|_qkvz)?"
    r"|embed_tokens|lm_head"
)

Shapes = Mapping[str, tuple[int, ...]]


def server_problems(shapes: Shapes, config: Mapping[str, Any], num_experts: int) -> dict[str, list[str]]:
    """By server, one line for each thing that it would refuse or drop; an empty list is an adapter that it takes.

    Args:
        shapes: of every tensor of `adapter_model.safetensors`, by key. config: `adapter_config.json`.
        num_experts: of each stack.
    """
    vllm, sglang = (_modules(shapes, pattern) for pattern in (_KEY, _SGLANG_KEY))
    found = (
        [*_keys(shapes, config, _KEY), *_stacks(vllm, num_experts), *_vllm_config(config)],
        [
            *_keys(shapes, config, _SGLANG_KEY),
            *_stacks(sglang, num_experts),
            *_sglang_config(config),
            *_sglang_modules(sglang),
        ],
    )
    return dict(zip(SERVERS, found, strict=True))


def llama_cpp_problems(shapes: Shapes, config: Mapping[str, Any], num_experts: int) -> list[str]:
    """What llama.cpp's converter would stop at or leave out; arguments as of `server_problems`."""
    found = []
    for key in shapes:
        match = _KEY.fullmatch(key)
        if match is None:
            found.append(f"{key} is no A or B under base_model.model")
        elif ".base_layer" in key or match["module"].endswith(".experts"):
            found.append(f"{key} is PEFT's fused layout, which it has no name for")
    modules = _modules(shapes, _KEY)
    patterns = [name for name in ("use_rslora", "rank_pattern", "alpha_pattern") if config.get(name)]
    return [*found, *_stacks(modules, num_experts), *(f"{name} is not read: alpha / r scales all" for name in patterns)]


def _modules(shapes: Shapes, pattern: re.Pattern[str]) -> list[str]:
    return sorted({match["module"] for match in map(pattern.fullmatch, shapes) if match})


def _keys(shapes: Shapes, config: Mapping[str, Any], pattern: re.Pattern[str]) -> Iterator[str]:
    """Both loaders: pairs of 2-D tensors of the one rank that the configuration names."""
    sides: dict[str, set[str]] = defaultdict(set)
    for key, shape in shapes.items():
        match = pattern.fullmatch(key)
        if match is None:
            yield f"{key} is no LoRA key"
            continue
        sides[match["module"]].add(match["side"])
        if ".base_layer" in key or match["module"].endswith(".experts"):
            yield f"{key} is PEFT's fused layout, which is read for a few families only"
        elif len(shape) != 2 or shape[0 if match["side"] == "A" else 1] != config["r"]:
            yield f"{key} is {'×'.join(map(str, shape))}, not of rank {config['r']}"
    yield from (f"{module} has only one of A and B" for module, found in sorted(sides.items()) if len(found) == 1)


def _stacks(modules: Iterable[str], num_experts: int) -> Iterator[str]:
    """All experts are packed into one tensor, so each needs every projection."""
    experts: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for module in modules:
        if match := _EXPERT.fullmatch(module):
            experts[match["stack"]][int(match["number"])].add(match["projection"])
    for stack, found in sorted(experts.items()):
        if missing := sorted(set(range(num_experts)) - found.keys()):
            yield f"{stack} lacks expert {missing[0]} ({len(missing)} of {num_experts} are missing)"
        for number, projections in sorted(found.items()):
            if number >= num_experts:
                yield f"{stack}.{number} is beyond the last of {num_experts} experts"
            if projections not in _PROJECTIONS:
                yield f"{stack}.{number} has {', '.join(sorted(projections))}, not all projections of an expert"


def _vllm_config(config: Mapping[str, Any]) -> Iterator[str]:
    for field in ("use_dora", "lora_bias", "modules_to_save", "layer_replication", "alora_invocation_tokens"):
        if config.get(field):
            yield f"{field} is not supported"
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _VLLM_STARTS:
        yield f"init_lora_weights={start} changes the base's weights"
    if config["r"] > 512:
        yield f"rank {config['r']} is over 512, the largest --max-lora-rank"


def _sglang_config(config: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(config.get("target_modules"), list):
        yield "target_modules is not a list of names"
    for field in ("use_rslora", "rank_pattern", "alpha_pattern", "use_dora"):
        if config.get(field):
            yield f"{field} is not read: alpha / r scales everything"


def _sglang_modules(modules: Iterable[str]) -> Iterator[str]:
    by_leaf: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        by_leaf[module.rpartition(".")[2]].append(module)
    for leaf, found in sorted(by_leaf.items()):
        if not _SGLANG_TAKES.fullmatch(leaf):
            yield f"{found[0]}: no adapter on a module called {leaf} ({len(found)} modules)"
    for leaf, other in (("q_proj", "v_proj"), ("k_proj", "q_proj"), ("v_proj", "q_proj"), ("w1", "w3")):
        owners, others = ({m.rpartition(".")[0] for m in by_leaf[part]} for part in (leaf, other))
        yield from (f"{owner} has {leaf} without {other}" for owner in sorted(owners - others))
