"""A compensated base is one set of integers: in the run that trained on it, on disk, wherever either is reopened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.faults.conftest import MODEL, Run, onecard, recipe
from tests.harness.families import build, tiny_config
from toolkit import run as job
from toolkit.errors import ModelError
from toolkit.plan import make_plan
from toolkit.quant import load_int8
from toolkit.quant.gptq.calibrate import compensate_model
from toolkit.quant.gptq.keep import int8_state, read_compensated, write_compensated
from toolkit.recipe import load

__all__ = ["onecard", "recipe"]

ASKED = "quantization.error_compensation=gptq"


def compensated(recipe: Path) -> nn.Module:
    """The recipe's base as its compensation leaves it, made afresh."""
    plan = make_plan(load(recipe, (ASKED,)))
    model, tokenizer = job.load(plan)
    assert job.compensate(model, job.build_batches(tokenizer, plan), plan) is not None
    return model


def assert_same_integers(first: nn.Module, second: nn.Module) -> None:
    ours, theirs = int8_state(first), int8_state(second)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 0
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_run_is_reopened_on_the_base_it_was_trained_on(
    onecard: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, err = onecard("train", recipe, ASKED, "--json")
    assert status == 0, err
    summary, run = json.loads(out), tmp_path / "run"
    fresh = compensated(recipe)
    # From here on nobody calibrates again: what is kept has to do.
    monkeypatch.setattr("toolkit.run.model.compensate_model", None)
    plan = make_plan(load(run / "recipe.yaml"))
    reopened, tokenizer = job.reopen(plan, run / "adapter")
    assert_same_integers(reopened.unload(), fresh)
    status, out, err = onecard("eval", run, "--json")
    assert status == 0, err
    assert json.loads(out) == {k: v for k, v in summary["results"].items() if k != "training"}
    # A resumed run takes the same integers and tells of the same compensation.
    model, _ = job.load(plan)
    batches = job.build_batches(tokenizer, plan)
    report = job.compensate(model, batches, plan, run / "compensated.safetensors")
    assert report is not None
    assert json.loads(json.dumps(report.to_dict())) == summary["compensation"]
    assert_same_integers(model, fresh)


def test_quantize_with_a_recipe_writes_the_compensated_integers(onecard: Run, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8"
    status, _, err = onecard("quantize", MODEL, out, "--recipe", recipe)
    assert status == 0, err
    assert "compensated" in err
    fresh, _ = compensated(recipe), onecard("quantize", MODEL, tmp_path / "plain")
    assert_same_integers(load_int8(str(out))[0], fresh)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert_same_integers(stock, fresh)
    changed = {name for name, value in int8_state(stock).items() if not torch.equal(value, plain.state_dict()[name])}
    assert changed >= {name for name in int8_state(stock) if not name.endswith("_scale")}
    rest = plain.state_dict().keys() - int8_state(plain).keys()
    assert all(torch.equal(stock.state_dict()[name], plain.state_dict()[name]) for name in rest)
    with torch.no_grad():
        ids = torch.arange(3, 40)[None]
        assert torch.equal(stock(ids).logits, fresh(ids).logits)
    status, _, err = onecard("quantize", MODEL, out, "--recipe", recipe)
    assert status == 2
    assert "already exists" in err


def test_a_kept_file_that_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    models = []
    for family in ("qwen2_moe", "gpt_oss"):
        build(tiny_config(family)).save_pretrained(tmp_path / family)
        models.append(load_int8(str(tmp_path / family))[0])
    model, other = models
    report = compensate_model(model, str(tmp_path / "qwen2_moe"), [list(range(3, 30))] * 4)
    kept = tmp_path / "compensated.safetensors"
    write_compensated(model, report, kept, base="1f")
    assert [path.name for path in tmp_path.glob("*compensated*")] == [kept.name]
    again, _ = load_int8(str(tmp_path / "qwen2_moe"))
    assert read_compensated(again, kept, base="1f") == report
    assert_same_integers(again, model)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ModelError, match="of another model than the one loaded"):
        read_compensated(other, kept, base="1f")
    with pytest.raises(ModelError, match="rounded from other weights than the base"):
        read_compensated(again, kept, base="2e")
    kept.write_bytes(kept.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"damaged.*remove it to compensate again"):
        read_compensated(other, kept, base="1f")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in before.items())
