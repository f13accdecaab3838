"""A run under a budget: measured once, and the same mixture of int8 and int4 wherever it is opened again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.conftest import MODEL, QUICKSTART, Run, onecard, recipe
from tests.unit.quant.test_storage import tiny
from toolkit import run as job
from toolkit.errors import ModelError, RecipeError
from toolkit.plan import audit, make_plan
from toolkit.plan.skeletons import shape_of, shapes_of
from toolkit.plan.stacks import stack_bytes
from toolkit.plan.steps import StepBytes
from toolkit.quant import load_int8
from toolkit.recipe import load
from toolkit.run.mixture import kept_mixture
from toolkit.run_folder import RunFolder

__all__ = ["onecard", "recipe"]

SIZES = {"moe_intermediate_size": 64, "num_experts": 4, "num_local_experts": 4, "num_hidden_layers": 3}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's bytes need no rehearsal here."""
    monkeypatch.setattr("toolkit.plan.budget.Budget._answer", lambda *_: StepBytes(1 << 20, 1 << 18))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Three layers that four bits can hold, with the embedded model's tokenizer."""
    folder = tiny(tmp_path / "base", "qwen3_moe", vocab_size=2112, **SIZES)
    for path in (*MODEL.glob("tokenizer*"), MODEL / "chat_template.jinja"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def asked(base: Path, tmp_path: Path) -> tuple[str, ...]:
    """Overrides: one of the three layers in int8, a few examples."""
    for split in ("train", "validation"):
        lines = (QUICKSTART / "data" / f"category.{split}.jsonl").read_text(encoding="utf-8").splitlines()
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines[:24]), encoding="utf-8")
    return (
        f"data.train={tmp_path}/train.jsonl",
        f"data.validation={tmp_path}/validation.jsonl",
        f"model.model_name_or_path={base}",
        "quantization.experts=int4",
        f"quantization.budget={one_layer(base)}",
        "quantization.calibration_samples=12",
        "training.save_steps=1",
        "training.save_total_limit=3",
    )


def one_layer(base: Path) -> int:
    """Bytes of all layers in int4 and one in int8, and a few more."""
    shapes = shapes_of(shape_of(str(base)))
    small, large = (stack_bytes(shapes, kind, 4) for kind in ("int4", "int8"))
    return sum(small.values()) + max(large.values()) - max(small.values()) + 5


def test_a_run_chooses_once_and_is_reopened_and_resumed_on_its_mixture(
    onecard: Run, recipe: Path, base: Path, asked: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, err = onecard("train", recipe, *asked, "--json")
    assert status == 0, err
    assert "expert stacks int4 4, int8 2 of 6; " in err
    summary, run = json.loads(out), RunFolder(tmp_path / "run")
    stacks, plan, mixture = read(run.adapter / "manifest.json")["stacks"], read(run.plan), summary["mixture"]
    assert stacks == read(run.mixture)["stacks"]
    assert plan["mixture"]["is_chosen"]
    assert (summary["counts"]["expert stacks int8"], summary["counts"]["expert stacks int4"]) == ([2, 6], [4, 6])
    assert mixture["chosen"] == [max(mixture["gains"], key=lambda name: mixture["gains"][name])]
    assert {name.rpartition(".")[0] for name, kind in stacks.items() if kind == "int8"} == {*mixture["chosen"]}
    assert "What int8 gains by layer" in run.report.read_text(encoding="utf-8")

    # From here on nobody measures again: what is kept has to do.
    monkeypatch.setattr("toolkit.run.mixture.measure_gains", None)
    status, out, err = onecard("eval", run.path, "--json")
    assert status == 0, err
    assert json.loads(out) == {k: v for k, v in summary["results"].items() if k != "training"}
    shutil.copytree(run.adapter, tmp_path / "alone")
    texts = [
        onecard("generate", *place, "--prompt", "Which category is it: tin?")
        for place in ((run.path,), (tmp_path / "alone", "--base", base))
    ]
    assert texts[0][:2] == texts[1][:2]
    assert texts[0][0] == 0
    assert onecard("verify", run.adapter)[0] == 0
    first = {name: (run.adapter / name).read_bytes() for name in ("adapter_model.safetensors", "manifest.json")}
    for lost in (run.adapter, run.checkpoints / "checkpoint-3", run.checkpoints / "checkpoint-2"):
        shutil.rmtree(lost)
    run.summary.unlink()
    status, _, err = onecard("train", recipe, *asked, "quantization.budget=1GiB")
    assert status == 4
    assert f"quantization.budget: {one_layer(base)} -> 1GiB" in err
    status, _, err = onecard("train", recipe, *asked)
    assert status == 0, err
    assert {name: (run.adapter / name).read_bytes() for name in first} == first


def test_a_choice_counts_for_its_own_budget_examples_and_base(
    recipe: Path, base: Path, asked: tuple[str, ...], tmp_path: Path
) -> None:
    kept = tmp_path / "mixture.json"

    plan = make_plan(load(recipe, asked), for_training=False)
    batches = job.build_batches(job.load_tokenizer(plan), plan)

    def found(*more: str) -> object:
        return kept_mixture(kept, make_plan(load(recipe, (*asked, *more)), for_training=False), batches)

    assert found() is None
    chosen = job.choose_stacks(plan, batches, kept)
    assert found() == chosen
    assert found(f"quantization.budget={one_layer(base) - 1}") is None
    assert found("quantization.calibration_samples=11") is None
    assert found("quantization.linears=none") is None
    kept.write_text("{}")
    with pytest.raises(ModelError, match=r"mixture\.json: damaged .* remove it to measure again"):
        found()


def test_the_steps_by_python_with_compensation_on_top(
    recipe: Path, asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.quant.gptq.search._BUDGET", 1)  # one pass of feedback
    plan = make_plan(load(recipe, (*asked, "quantization.error_compensation=gptq")), for_training=False)
    with pytest.raises(ModelError, match=r"not chosen yet; call choose_stacks\(plan, batches\)"):
        job.load(plan)
    batches = job.build_batches(job.load_tokenizer(plan), plan)
    chosen = job.choose_stacks(plan, batches)
    known = make_plan(plan.recipe, for_training=False, stacks=chosen.stacks)
    with pytest.raises(ModelError, match="leaves no layer to choose"):
        job.choose_stacks(known, batches)
    model, _ = job.load(known)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = job.compensate(model, batches, known)
    assert report is not None
    assert all(part.compensated < part.rounded for part in report.parts if part.experts > 1)
    now = model.state_dict()
    assert all(now[name].dtype == plain[name].dtype for name in plain)
    assert {name for name in chosen.stacks if not torch.equal(plain[name], now[name])} == set(chosen.stacks)


def test_streamed_layers_are_chosen_and_then_streamed(
    recipe: Path, asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    streams = (*asked, "placement.experts=disk", "placement.share=0.5")
    plan, resident = (make_plan(load(recipe, each), for_training=False) for each in (streams, asked))
    batches = job.build_batches(job.load_tokenizer(plan), plan)
    chosen = job.choose_stacks(plan, batches)
    assert chosen == job.choose_stacks(resident, batches)
    known, whole = (make_plan(each.recipe, for_training=False, stacks=chosen.stacks) for each in (plan, resident))
    assert known.bytes.experts + known.bytes.slots <= plan.bytes.experts + plan.bytes.slots
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(job.load(known)[0](ids).logits, job.load(whole)[0](ids).logits)
    both = make_plan(load(recipe, (*streams, "quantization.error_compensation=gptq")), for_training=False)
    with pytest.raises(RecipeError, match="streamed experts are read from a file that is finished"):
        job.choose_stacks(both, batches)


def test_quantize_writes_a_mixture_that_needs_no_budget(
    onecard: Run, recipe: Path, base: Path, asked: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.quant.gptq.search._BUDGET", 1)  # one pass of feedback
    examples = Path(asked[0].partition("=")[2])
    recipe.write_text(recipe.read_text().replace(f"{QUICKSTART}/data/category.train.jsonl", str(examples)))
    out, budget = tmp_path / "mixed", one_layer(base)
    status, _, err = onecard("quantize", base, out, "--recipe", recipe, "--experts", "int4", "--budget", budget)
    assert status == 0, err
    assert "expert stacks int4 4, int8 2 of 6" in err
    _, coverage = load_int8(str(out), experts="int4")
    assert coverage.stacks_stored == {"int4": 4, "int8": 2}
    assert coverage.expert_bytes <= budget
    overrides = (f"model.model_name_or_path={out}", "quantization.experts=int4")
    assert make_plan(load(recipe, overrides), for_training=False).bytes.experts == coverage.expert_bytes
    stacks = audit(str(out)).parts[0]
    assert (stacks.stored, stacks.bytes) == ("int4, int8", coverage.expert_bytes)
    for wrong in (("--experts", "int4"), ("--recipe", recipe)):
        status, _, err = onecard("quantize", base, tmp_path / "none", *wrong, "--budget", "1.2MiB")
        assert status == 2
        assert "--budget: needs --experts int4, and --recipe" in err
