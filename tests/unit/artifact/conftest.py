"""A stock PEFT adapter on a tiny MoE, in the layout our own trained models have, and its artifact."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from toolkit.artifact import write_artifact
from toolkit.checkpoint.identity import identify_base

BASE = Path(__file__).parents[3] / "recipes/quickstart/nano-qwen3moe-2m"
RECIPE = """\
model: {model_name_or_path: /home/alice/models/nano, revision: main}
data: {train: /home/alice/rows.jsonl, system_prompt: Be brief.}
training: {output_dir: runs/nano, learning_rate: 1e-4}
hub: {hub_model_id: alice/nano, hub_token: hf_abcdefghijklmnopqrstuvwxyz0123}
"""
RESULTS = {
    "examples": 500,
    "base": {"loss": 3.48, "exact_match": 0.0},
    "adapted": {"loss": 1.25, "exact_match": 0.315},
    "samples": [{"prompt": "CANARY-ROW: what is a fern?", "answer": "CANARY-ROW: plant"}],
}
COVERAGE = {"expert_stacks_int8": {"done": 8, "total": 8}, "routers": [4, 4]}
VERSIONS = {"onecard": "0.1.0", "peft": "0.21.2", "torch": "2.13.0", "transformers": "5.23.0"}


PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]


def stock_adapter(rank_pattern: dict[str, int] | None = None, parameters: list[str] = PARAMETERS) -> PeftModel:
    """Stock PEFT on experts, routers and attention, every B non-zero."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=parameters,
        rank_pattern=rank_pattern or {},
        task_type="CAUSAL_LM",
    )
    model = PeftModel(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


@pytest.fixture(scope="session")
def adapted() -> PeftModel:
    return stock_adapter()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture
def write(adapted: PeftModel, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Path]:
    """`write(folder, **changes)`: write the artifact with some arguments changed."""
    ours = tokenizer

    def write(
        folder: Path, model: PeftModel = adapted, tokenizer: PreTrainedTokenizerBase = ours, **changes: Any
    ) -> Path:
        facts: dict[str, Any] = {
            "base": identify_base(str(BASE)),
            "recipe_yaml": RECIPE,
            "results": RESULTS,
            "coverage": COVERAGE,
            "versions": VERSIONS,
        }
        return write_artifact(model, tokenizer, folder, **{**facts, **changes})

    return write


@pytest.fixture(scope="session")
def pristine(adapted: PeftModel, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "adapter"
    return write_artifact(
        adapted,
        tokenizer,
        folder,
        base=identify_base(str(BASE)),
        recipe_yaml=RECIPE,
        results=RESULTS,
        coverage=COVERAGE,
        versions=VERSIONS,
    )


@pytest.fixture
def artifact(pristine: Path, tmp_path: Path) -> Path:
    """A copy of a good artifact, to be damaged."""
    return Path(shutil.copytree(pristine, tmp_path / "adapter"))


@pytest.fixture
def of_base(write: Callable[..., Path], base: Path) -> Callable[..., Path]:
    """`of_base(folder, **changes)`: the artifact of a run on the test's own `base`."""

    def made(folder: Path, **changes: Any) -> Path:
        facts = {"base": identify_base(str(base)), "base_folder": base, **changes}
        return write(folder, tokenizer=AutoTokenizer.from_pretrained(base), **facts)

    return made
