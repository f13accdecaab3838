"""NEFTune, LoRA+, DoRA, DFT and schedules with options are the libraries' own; here it is that they reach the steps."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from scripts.faults.resume_matrix import MODEL, PLAIN, Case, train
from tests.harness.families import build, tiny_config
from toolkit.adapters import attach_lora, check_start, load_adapter
from toolkit.architecture import describe
from toolkit.checkpoint.config import skeleton
from toolkit.errors import ModelError, RecipeError
from toolkit.export.tokens import require_carried
from toolkit.ops.label_logits import summed_loss
from toolkit.plan import make_plan
from toolkit.quant import load_int8
from toolkit.recipe import parse
from toolkit.training.schedule import require_rate, require_schedule


def losses(folder: Path, **knobs: Any) -> list[float]:
    """Of two steps; the first has a rate of 0."""
    folder.mkdir()
    train(Case("knobs", {**PLAIN, "max_steps": 2, "warmup_steps": 1, **knobs}, lora={"r": 2}, rows=6), folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def held_out(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


def test_they_reach_the_steps(tmp_path: Path) -> None:
    plain, noisy = losses(tmp_path / "plain"), losses(tmp_path / "noisy", neftune_noise_alpha=20.0)
    assert all(one != other for one, other in zip(plain, noisy, strict=True))
    assert losses(tmp_path / "plus", loraplus_lr_ratio=4.0) == plain, "what is learnt shows from the third step on"
    state = json.loads((tmp_path / "plus/checkpoints/checkpoint-2/state.json").read_text())
    assert state["schedule"]["base_lrs"] == [0.01, 1e-6, 0.04, 0.04]
    optimizer = json.loads((tmp_path / "plus/checkpoints/checkpoint-2/optimizer.json").read_text())
    sizes = [len(group["params"]) for group in optimizer["param_groups"]]
    assert sizes[0] == sizes[2] + sizes[3] == 28, "an A and a B of each stack, router and linear"


def test_dynamic_fine_tuning_is_trls_whichever_head_computes_it(tmp_path: Path) -> None:
    ours = losses(tmp_path / "ours", loss_type="dft", eval_steps=1)
    with mock.patch("toolkit.training.trainer.pays_to_keep_logits", return_value=False):
        theirs = losses(tmp_path / "theirs", loss_type="dft", eval_steps=1)
    assert ours == pytest.approx(theirs, rel=1e-5)
    smoothed = losses(tmp_path / "smoothed", label_smoothing_factor=0.2, eval_steps=1)
    assert smoothed[0] > 2 * ours[0], "a token that is not expected weighs little in one, and much in the other"
    found = [held_out(tmp_path / run)[0] for run in ("ours", "theirs", "smoothed")]
    assert found == pytest.approx([found[0]] * 3, rel=1e-5), "held-out losses are cross entropies"


def test_what_a_label_weighs() -> None:
    logits, labels = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 3, 6, 2, 2])
    log_probs = logits.log_softmax(-1)
    of_labels = log_probs.gather(1, labels[:, None])[:, 0]
    assert torch.allclose(summed_loss(logits, labels, dft=True), -(of_labels.exp() * of_labels).sum())
    smoothed = -(0.9 * of_labels + 0.1 * log_probs.mean(-1)).sum()
    assert torch.allclose(summed_loss(logits, labels, label_smoothing=0.1), smoothed)


def test_dora_is_what_stock_peft_opens(tmp_path: Path) -> None:
    build(tiny_config("qwen3_moe")).save_pretrained(tmp_path / "base")
    model, _ = load_int8(str(tmp_path / "base"), experts="none", linears="none")
    adapted = attach_lora(model, r=2, use_dora=True, experts=False, router=False)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                parameter.add_(torch.rand_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ids = torch.arange(3, 19)[None]
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path / "adapter"
    )
    again = load_adapter(load_int8(str(tmp_path / "base"), experts="none", linears="none")[0], tmp_path / "adapter")
    with torch.no_grad():
        wanted, found, reopened = (each.eval()(input_ids=ids).logits for each in (adapted, stock, again))
    assert torch.allclose(found, wanted, atol=1e-4)
    assert torch.allclose(reopened, wanted, atol=1e-5)
    check_start(tmp_path / "adapter", skeleton(str(tmp_path / "base")), use_dora=True)
    with pytest.raises(ModelError, match="use_dora: DoRA's magnitudes"):
        check_start(tmp_path / "adapter", skeleton(str(tmp_path / "base")))
    with pytest.raises(ModelError, match="--format gguf: has no place for DoRA's magnitudes; take --format merged"):
        require_carried("gguf", tmp_path / "adapter")


def test_what_they_take_is_planned() -> None:
    def planned(**lora: Any) -> Any:
        told = f"model: {{model_name_or_path: {MODEL}}}\ndata: {{train: x.jsonl}}\nquantization: {{linears: none}}\n"
        alone = json.dumps({"experts": False, "router": False, **lora})
        told += f"training: {{use_cpu: true, max_length: 64}}\nlora: {alone}\n"
        return make_plan(parse(told)).bytes

    plain, dora = planned(), planned(use_dora=True)
    outputs = sum(layer.weight.shape[0] for layer in attention_linears())
    assert dora.adapter - plain.adapter == 4 * outputs


def test_without_its_package_a_schedule_free_optimizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.plan.make.find_spec", lambda name: None)
    told = f"model: {{model_name_or_path: {MODEL}}}\ndata: {{train: x.jsonl}}\n"
    told += "training: {optim: schedule_free_adamw, lr_scheduler_type: constant, warmup_steps: 10}\n"
    with pytest.raises(RecipeError, match="schedulefree is not installed; pip install schedulefree"):
        make_plan(parse(told))


def test_what_an_optimizer_averages_is_what_the_run_ends_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = []
    monkeypatch.setattr("torch.optim.AdamW.eval", lambda self: left.append(self.state and "stepped"), raising=False)
    losses(tmp_path / "run")
    assert left[-1] == "stepped"


def attention_linears() -> list[Any]:
    model = skeleton(str(MODEL))
    return [model.get_submodule(name) for name in describe(model).linear_names("attention")]


@pytest.mark.parametrize(
    ("line", "examples", "refused"),
    [
        ("max_steps: 1", 60, True),
        ("max_steps: 1, warmup_steps: 0", 60, False),
        ("max_steps: 1, lr_scheduler_type: constant", 60, False),
        ("max_steps: 2", 1, False),
        ("num_train_epochs: 0.1, per_device_train_batch_size: 4", 40, True),
        ("num_train_epochs: 0.1, per_device_train_batch_size: 4", 41, False),
    ],
)
def test_a_run_whose_only_step_has_no_rate_is_refused(line: str, examples: int, refused: bool) -> None:
    recipe = parse(f"model: {{model_name_or_path: a/b}}\ndata: {{train: x.jsonl}}\ntraining: {{{line}}}\n")
    with pytest.raises(RecipeError, match="the only step would be 0") if refused else nullcontext():
        require_rate(recipe.training.model_dump(), examples)


def test_a_schedule_that_cannot_be_is_refused_before_anything_is_loaded() -> None:
    require_schedule("cosine_with_min_lr", {"min_lr_rate": 0.1})
    for name, options, words in (
        ("cosine_with_min_lr", {}, "One of min_lr or min_lr_rate"),
        ("warmup_stable_decay", {}, "num_decay_steps"),
        ("cosine", {"min_lr": 1}, "unexpected keyword argument 'min_lr'"),
    ):
        with pytest.raises(RecipeError, match=words):
            require_schedule(name, options)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("training: {lr_scheduler_type: constant, lr_scheduler_kwargs: {a: 1}}", "constant has no options"),
        ("training: {neftune_noise_alpha: 5}\nmtp: {enabled: true}", "a head would learn from the noise"),
        ("training: {label_smoothing_factor: 0.1, method: dpo}", "its loss has dpo.label_smoothing"),
        ("training: {loss_type: dft, method: kto}", "loss_type: is for training.method: sft; remove the line"),
        ("training: {label_smoothing_factor: 0.1, loss_type: dft}", "dft weighs labels as they are"),
        ("training: {optim: schedule_free_adamw}", "takes the place of a schedule; set it to constant"),
        (
            "training: {optim: schedule_free_adamw, lr_scheduler_type: constant}",
            "warms up by whole steps; give 0, or 1 and more",
        ),
        ("lora: {init_lora_weights: pissa}", "move a part of the base's weights into the adapter"),
        ("lora: {use_dora: true}", "DoRA for linears alone; set experts: false and router: false"),
        ("lora: {use_dora: true, experts: false, router: false}", "lora.use_dora: PEFT takes the norm"),
        ("lora: {use_dora: true, experts: false, router: false}", "set quantization.linears: none"),
    ],
)
def test_what_does_not_apply_is_refused_by_name(line: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse(f"model: {{model_name_or_path: a/b}}\ndata: {{train: x.jsonl}}\n{line}\n")
