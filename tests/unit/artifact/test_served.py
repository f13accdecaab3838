"""Servers' rules for adapters: an export of ours meets them, and each planted fault is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.faults.conftest import Run, onecard
from tests.unit.artifact.conftest import BASE, stock_adapter
from toolkit.export import export_adapter
from toolkit.export.server_rules import SERVERS, server_problems

__all__ = ["onecard"]
VLLM, SGLANG = SERVERS
EXPERTS = 8
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LAYER = "base_model.model.model.layers.0"

Adapter = tuple[dict[str, tuple[int, ...]], dict[str, Any]]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Adapter:
    """Keys and configuration of an export without routers, which SGLang takes no adapter on."""
    from toolkit.artifact import write_artifact
    from toolkit.checkpoint.identity import identify_base

    folder = tmp_path_factory.mktemp("served")
    write_artifact(
        stock_adapter(parameters=STACKS),
        tokenizer,
        folder / "adapter",
        base=identify_base(str(BASE)),
        recipe_yaml="",
        results={},
        coverage={},
    )
    made = export_adapter(folder / "adapter", BASE, "per-expert", folder / "out")
    assert made.servers == {VLLM: [], SGLANG: []}
    assert json.loads((folder / "out/export.json").read_bytes())["servers"] == made.servers
    with safe_open(folder / "out/adapter_model.safetensors", framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return shapes, json.loads((folder / "out/adapter_config.json").read_bytes())


def test_routers_are_for_vllm_alone(artifact: Path, tmp_path: Path) -> None:
    made = export_adapter(artifact, BASE, "per-expert", tmp_path / "out")
    assert made.servers[VLLM] == []
    (line,) = made.servers[SGLANG]
    assert line == "model.layers.0.mlp.gate: no adapter on a module called gate (4 modules)"


def test_the_command_for_vllm_has_room_for_the_rank(artifact: Path, tmp_path: Path, onecard: Run) -> None:
    """Rank 4 is none that vLLM takes, and 8 is the next."""
    out = tmp_path / "out"
    status, _, err = onecard("export", artifact, "--format", "per-expert", "--base", BASE, "--out", out)
    assert status == 0, err
    assert f"vllm serve BASE --enable-lora --max-lora-rank 8 --lora-modules mine={out}" in err


def test_peft_own_layout_is_taken_by_neither(artifact: Path) -> None:
    with safe_open(artifact / "adapter_model.safetensors", framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    problems = server_problems(shapes, json.loads((artifact / "adapter_config.json").read_bytes()), EXPERTS)
    assert all("PEFT's fused layout" in " ".join(problems[server]) for server in SERVERS)


Plant = Callable[[dict[str, tuple[int, ...]], dict[str, Any]], object]
PLANTED: list[tuple[str, Plant, str, tuple[str, ...]]] = [
    (
        "a key",
        lambda s, c: s.update({f"{LAYER}.mlp.experts.0.gate_proj.lora_C.weight": (4, 64)}),
        "no LoRA key",
        SERVERS,
    ),
    ("one side", lambda s, c: s.pop(f"{LAYER}.self_attn.q_proj.lora_B.weight"), "only one of A and B", SERVERS),
    (
        "an expert",
        lambda s, c: [s.pop(key) for key in list(s) if f"{LAYER}.mlp.experts.3." in key],
        "model.layers.0.mlp.experts lacks expert 3 (1 of 8 are missing)",
        SERVERS,
    ),
    (
        "a projection",
        lambda s, c: [s.pop(key) for key in list(s) if f"{LAYER}.mlp.experts.3.up_proj" in key],
        "experts.3 has down_proj, gate_proj, not all projections",
        SERVERS,
    ),
    ("a 3-D stack", lambda s, c: s.update({f"{LAYER}.mlp.experts.lora_A.weight": (8, 4, 64)}), "fused layout", SERVERS),
    (
        "another rank",
        lambda s, c: s.update({f"{LAYER}.self_attn.q_proj.lora_A.weight": (3, 64)}),
        "3×64, not of",
        SERVERS,
    ),
    ("rsLoRA", lambda s, c: c.update(use_rslora=True), "use_rslora is not read", (SGLANG,)),
    ("a pattern", lambda s, c: c.update(rank_pattern={"q_proj": 2}), "rank_pattern is not read", (SGLANG,)),
    ("a regular expression", lambda s, c: c.update(target_modules=".*_proj"), "not a list of names", (SGLANG,)),
    ("DoRA", lambda s, c: c.update(use_dora=True), "use_dora", SERVERS),
    ("an init", lambda s, c: c.update(init_lora_weights="pissa"), "changes the base's weights", (VLLM,)),
    (
        "a query alone",
        lambda s, c: [s.pop(key) for key in list(s) if f"{LAYER}.self_attn.v_proj" in key],
        "self_attn has q_proj without v_proj",
        (SGLANG,),
    ),
]


@pytest.mark.parametrize(
    ("plant", "line", "servers"), [case[1:] for case in PLANTED], ids=[case[0] for case in PLANTED]
)
def test_each_planted_fault_is_named(adapter: Adapter, plant: Plant, line: str, servers: tuple[str, ...]) -> None:
    shapes, config = dict(adapter[0]), dict(adapter[1])
    plant(shapes, config)
    problems = server_problems(shapes, config, EXPERTS)
    assert {server for server in SERVERS if any(line in problem for problem in problems[server])} == set(servers)
