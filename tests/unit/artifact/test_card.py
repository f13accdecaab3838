"""The model card: metadata the Hub accepts, the figures, and code that runs as printed."""

from __future__ import annotations

import re
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData
from ruamel.yaml import YAML

from tests.unit.artifact.conftest import BASE
from toolkit.artifact import model_card
from toolkit.checkpoint.identity import BaseIdentity
from toolkit.recipe import parse

HUB = BaseIdentity("owner/nano-moe", "0" * 40, "f" * 64)
CONFIG = {"r": 16, "lora_alpha": 32.0, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}


RECIPE = {
    "model": {"model_name_or_path": "owner/nano-moe"},
    "data": {"train": "owner/questions", "validation": None},
    "training": {"learning_rate": 1e-4, "max_steps": 3},
}


def card(
    base: BaseIdentity = HUB,
    results: dict[str, object] | None = None,
    license: str | None = None,
    **facts: Any,
) -> str:
    return model_card(
        base=base,
        adapter_config=facts.pop("adapter_config", CONFIG),
        results=results or {},
        coverage={"expert_stacks_int8": {"done": 8, "total": 8}, "routers": [4, 4], "expert_bytes": 10},
        versions={"peft": "0.21.2"},
        license=license,
        **facts,
    )


def test_the_metadata_is_what_the_hub_reads() -> None:
    results = {"base": {"exact_match": 0.0}, "adapted": {"exact_match": 0.315, "loss": 1.25}, "examples": 500}
    data = ModelCard(card(results=results, license="apache-2.0")).data
    assert data.base_model == "owner/nano-moe"
    assert (data.library_name, data.pipeline_tag, data.license) == ("peft", "text-generation", "apache-2.0")
    assert {r.metric_type: r.metric_value for r in data.eval_results} == {"exact_match": 0.315, "loss": 1.25}


def test_the_metadata_says_whose_adapter_it_is_and_of_which_data() -> None:
    results = {"adapted": {"exact_match": 0.315}}
    written = ModelCard(card(results=results, license="apache-2.0", recipe=RECIPE)).data
    again = ModelCardData(**yaml_of(card(results=results, license="apache-2.0", recipe=RECIPE)))
    for data in (written, again):
        assert data.datasets == ["owner/questions"]
        assert data.to_dict()["base_model_relation"] == "adapter"
    (result,) = written.eval_results
    assert (result.task_type, result.dataset_type, result.dataset_name) == ("text-generation", *["owner/questions"] * 2)
    assert (result.metric_type, result.metric_value, result.metric_name) == ("exact_match", 0.315, "exact match")
    assert written.to_dict()["model-index"] == again.to_dict()["model-index"]


@pytest.mark.parametrize("train", ["rows.jsonl", "data/rows.jsonl", None])
def test_a_file_of_the_users_is_no_dataset_of_the_hub(train: str | None) -> None:
    text = card(recipe={"data": {"train": train}}, results={"training": {"examples": 48, "steps": 3, "loss": 1.25}})
    assert ModelCard(text).data.datasets is None
    assert "| data | 48 examples of a data set that is not published |" in text
    assert "| steps | 3 |" in text


def test_several_datasets_are_named_and_files_are_not() -> None:
    train = [{"path": "owner/one", "weight": 2.0}, {"path": "/home/x/rows.jsonl"}, {"path": "owner/two"}]
    results = {"training": {"examples": 48}, "adapted": {"exact_match": 0.5}}
    text = card(recipe={"data": {"train": train}}, results=results)
    data = ModelCard(text).data
    assert data.datasets == ["owner/one", "owner/two"]
    assert data.eval_results[0].dataset_type == "held-out"
    told = [f"[{name}](https://huggingface.co/datasets/{name})" for name in data.datasets]
    assert f"48 examples of {told[0]}, {told[1]}, a data set that is not published" in text


def yaml_of(text: str) -> dict[str, Any]:
    found: dict[str, Any] = YAML(typ="safe").load(text.split("---\n")[1])
    return found


def test_every_program_has_its_commands_and_the_recipe_can_be_run_again() -> None:
    config = {**CONFIG, "rank_pattern": {"experts": 24}}
    text = card(recipe=RECIPE, adapter_config=config)
    for words in (
        "onecard export ADAPTER --format per-expert --out per-expert",
        f"vllm serve owner/nano-moe --revision {'0' * 40} --enable-lora --max-lora-rank 32 --lora-modules",
        "python -m sglang.launch_server --model-path owner/nano-moe --enable-lora --lora-paths",
        "llama-server -m gguf/base.gguf --lora gguf/adapter.gguf",
        "ollama create tuned -f Modelfile",
        "| other ranks | `experts` 24 |",
    ):
        assert words in text
    assert "--base FOLDER" not in text
    assert "--base FOLDER" in card(BaseIdentity("nano", None, "f" * 64))
    match = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert match is not None
    parsed = parse(match[1], "README.md")
    assert parsed.training.learning_rate == 1e-4
    assert parsed.model.model_name_or_path == "owner/nano-moe"


def test_accepted_drafts_and_pictures_are_shown_where_there_are_any() -> None:
    mtp = {"trained": {"tau": 2.25, "acceptance": {"1": 0.75, "2": 0.5}}, "training": {"loss": 4.0}}
    text = card(results={"mtp": mtp}, pictures=["loss.png"])
    assert "| trained | 2.25 | 0.75 | 0.5 |" in text
    assert "](loss.png)" in text
    assert "experts.png" not in text
    assert "## Multi-token prediction" not in card()


def test_without_results_or_licence_there_is_no_empty_metadata() -> None:
    text = card()
    data = ModelCard(text).data
    assert data.eval_results is None
    assert "license:" not in text
    assert "## Results" not in text


def test_a_local_base_is_not_offered_as_a_repository() -> None:
    text = card(BaseIdentity("nano", None, "f" * 64))
    assert ModelCard(text).data.base_model is None
    assert "revision" not in text


def test_the_body_tells_results_and_coverage() -> None:
    text = card(results={"base": {"loss": 3.4801}, "adapted": {"loss": 1.25, "accuracy": None}, "examples": 500})
    assert "| loss | 3.48 | 1.25 |" in text
    assert "| accuracy | n/a | n/a |" in text
    assert "On 500 examples." in text
    assert "| expert stacks int8 | 8 of 8 |" in text
    assert "| routers | 4 of 4 |" in text
    assert HUB.weights_sha256 in text


def test_a_merge_base_is_named() -> None:
    model = {**RECIPE["model"], "merge_base": "owner/nano-moe-bf16"}
    assert "A merge starts from `owner/nano-moe-bf16`" in card(recipe={**RECIPE, "model": model})
    assert "A merge starts from" not in card(recipe=RECIPE)


def test_a_base_that_was_not_rounded_is_not_called_8_bit() -> None:
    results = {"base": {"loss": 3.5}, "adapted": {"loss": 1.25}}
    plain = card(results=results, recipe={"quantization": {"experts": "none", "linears": "none"}})
    for words in ("held in 8 bit", "the same 8 bits", "8-bit base"):
        assert words in card(results=results)
        assert words not in plain.partition("## The recipe")[0] + plain.partition("## Limits")[2]


def test_an_int8_base_is_loaded_by_what_can_read_it() -> None:
    code = re.search(r"```python\n(.*?)```", card(base=replace(HUB, is_int8=True)), re.DOTALL)
    assert code is not None
    assert code[1].index("toolkit.register()") < code[1].index("from_pretrained") < code[1].index("load_adapter(model")
    assert "PeftModel" not in code[1]


def test_the_loading_code_runs_as_printed(pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    match = re.search(r"```python\n(.*?)```", (pristine / "README.md").read_text(), re.DOTALL)
    assert match is not None
    code = (
        match[1]
        .replace(f'base = "{BASE.name}"', f"base = {str(BASE)!r}")
        .replace('adapter = "."', f"adapter = {str(pristine)!r}")
    )
    assert code.count(str(BASE)) == 1
    assert code.count(str(pristine)) == 1
    (tmp_path / "load.py").write_text(code)
    runpy.run_path(str(tmp_path / "load.py"))
    assert capsys.readouterr().out.strip()
