"""The model card: metadata the Hub accepts, the figures, and code that runs as printed."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.unit.packaging.conftest import BASE
from toolkit.packaging import BaseIdentity, model_card

HUB = BaseIdentity("owner/nano-moe", "0" * 40, "f" * 64)
CONFIG = {"r": 16, "lora_alpha": 32.0, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}


def card(base: BaseIdentity = HUB, results: dict[str, object] | None = None, license: str | None = None) -> str:
    return model_card(
        base=base,
        adapter_config=CONFIG,
        results=results or {},
        coverage={"expert_stacks_int8": {"done": 8, "total": 8}, "routers": [4, 4], "expert_bytes": 10},
        versions={"peft": "0.21.2"},
        license=license,
    )


def test_the_metadata_is_what_the_hub_reads() -> None:
    results = {"base": {"exact_match": 0.0}, "adapted": {"exact_match": 0.315, "loss": 1.25}, "examples": 500}
    data = ModelCard(card(results=results, license="apache-2.0")).data
    assert data.base_model == "owner/nano-moe"
    assert (data.library_name, data.pipeline_tag, data.license) == ("peft", "text-generation", "apache-2.0")
    assert {r.metric_type: r.metric_value for r in data.eval_results} == {"exact_match": 0.315, "loss": 1.25}


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
