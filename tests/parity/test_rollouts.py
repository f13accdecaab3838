"""Learning from rewards: answers that are written, judged and scored as TRL's own trainers would, and what moves."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer
from trl import GRPOTrainer

from scripts.parity import grpo_families
from tests.harness.training import run_context
from tests.parity.conftest import EMBEDDED
from tests.parity.test_preference import adapter_of, fresh, logged
from toolkit.adapters import adapter_coverage
from toolkit.errors import DataError, DivergedError
from toolkit.evaluate.generate import answer_ids
from toolkit.evaluate.sampler import Sampler
from toolkit.recipe import TrainingSection
from toolkit.rewards import Asked, Judge, Scores
from toolkit.training import RunContext, train_adapter
from toolkit.training.callbacks import MetricsLog
from toolkit.training.rollout_steps import RolloutSteps
from toolkit.training.scores import answers_first

ROUNDING = 1e-4
"""Nats: log-probabilities of about 10 in fp32, from two orders of the same sums."""


def context(folder: Path, model: PeftModel, options: dict[str, Any] = {}, **changes: Any) -> RunContext:  # noqa: B006
    given = {"max_steps": 2, "learning_rate": 1e-2, "warmup_steps": 0, "per_device_train_batch_size": 4}
    section = TrainingSection(
        **{"method": "grpo", "packing": False, "gradient_checkpointing": False, "use_cpu": True, **given, **changes}
    )
    told = grpo_families.rollouts(model, AutoTokenizer.from_pretrained(EMBEDDED), section.method, options)
    return run_context(folder, section, rollouts=told)


def learn(given: RunContext, model: PeftModel) -> str:
    """What the run says."""
    assert given.rollouts is not None
    with_rewards = given.rollouts
    try:
        train_adapter(model, AutoTokenizer.from_pretrained(EMBEDDED), grpo_families.table(with_rewards), None, given)
    finally:
        with_rewards.judge.close()
    told = given.console.file
    assert isinstance(told, io.StringIO)
    return told.getvalue()


def trainer_of(folder: Path, **options: Any) -> RolloutSteps:
    """A trainer as a run has it, before its first step."""
    from toolkit.training.train import _trainer

    model = fresh()
    given, tokenizer = context(folder, model, options), AutoTokenizer.from_pretrained(EMBEDDED)
    assert given.rollouts is not None
    log = MetricsLog(given.metrics, "cpu")
    made = _trainer(model, tokenizer, grpo_families.table(given.rollouts), None, given, log)
    assert isinstance(made, RolloutSteps)
    return made


def test_scores_of_answers_are_those_of_trl_whatever_the_padding(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run", temperature=0.7)
    trainer.model.eval()
    ids = torch.tensor([[0, 0, 5, 9, 11, 40, 41, 42], [7, 8, 5, 9, 11, 40, 41, 0], [0, 0, 0, 8, 9, 3, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 7 + [0], [0, 0, 0, 1, 1, 1, 0, 0]])
    given = (trainer.model, ids, mask, 3)
    asked = {"batch_size": 2, "compute_entropy": True, "compute_aux_loss": True}
    ours = trainer._get_per_token_logps_and_entropies(*given, **asked)  # type: ignore[arg-type]
    theirs = GRPOTrainer._get_per_token_logps_and_entropies(trainer, *given, **asked)
    counted = mask[:, -3:] != 0
    for own, other in zip(ours[:2], theirs[:2], strict=True):
        assert own is not None
        assert torch.allclose(own[counted], other[counted], atol=ROUNDING)
        assert (own[~counted] == 0).all()
    alone = trainer._get_per_token_logps_and_entropies(trainer.model, ids[2:, 3:6], mask[2:, 3:6], 1)[0]
    assert torch.allclose(alone[0, 0], ours[0][2, 0], atol=ROUNDING)
    assert trainer.check_fused_head()


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_answers_without_an_advantage_change_no_gradient(loss_type: str, tmp_path: Path) -> None:
    """And are passed through the model only where something counts them."""
    trainer = trainer_of(tmp_path / "run", loss_type=loss_type)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps, trainer.aux_loss_enabled = 1, False
    batch = {**trainer._longest_batch(), "advantages": torch.tensor([0.0, 1.5, 0.0, -1.5])}
    found, seen = [], []
    trainer.model.register_forward_pre_hook(
        lambda _, args, given: seen.append(len(given["input_ids"])), with_kwargs=True
    )
    for loss in (GRPOTrainer._compute_loss, type(trainer)._compute_loss):
        trainer.model.zero_grad(set_to_none=True)
        loss(trainer, trainer.model, batch).backward()
        found.append({name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None})
    assert seen == [4, 2 if loss_type == "dapo" else 4]
    assert any(grad.any() for grad in found[0].values())
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6)
    if loss_type == "dapo":
        trainer._compute_loss(trainer.model, {**batch, "advantages": torch.zeros(4)}).backward()
        assert seen[-1] == 1


def test_sequences_are_padded_on_the_right_alone() -> None:
    ids = torch.tensor([[0, 0, 5, 6, 7, 8, 0], [1, 2, 3, 4, 9, 0, 0]])
    mask = (ids > 0).long()
    ids, mask, labels, places = answers_first(ids, mask, 3)
    assert ids.tolist() == [[5, 6, 7, 8, 0], [1, 2, 3, 4, 9]]
    assert mask.tolist() == [[1, 1, 1, 1, 0], [1] * 5]
    assert labels.tolist() == [[-100, -100, 7, 8, -100], [-100] * 4 + [9]]
    assert places.tolist() == [[1, 2, 3], [3, 3, 3]]


@pytest.mark.parametrize(("family", "method"), [("gpt_oss", "grpo"), ("jamba", "rloo")])
def test_families_learn_from_rewards(family: str, method: str, tmp_path: Path) -> None:
    row = grpo_families.train(family, tmp_path, steps=1, method=method)
    assert row.passes, row


def test_the_reference_is_the_adapter_switched_off(tmp_path: Path) -> None:
    model = fresh()
    learn(context(tmp_path / "run", model, {"beta": 0.1}, max_steps=3), model)
    reached = adapter_coverage(model)
    assert reached.moved == reached.adapters > 0
    assert list(model.peft_config) == ["default"], "no copied reference adapter"
    lines = logged(tmp_path / "run")
    assert lines[0]["kl"] == pytest.approx(0.0, abs=ROUNDING)
    assert lines[2]["kl"] > 10 * ROUNDING
    assert {"rewards/even/mean", "rewards/start/mean", "reward", "completions/mean_length"} <= lines[0].keys()
    assert lines[0]["reward"] == pytest.approx(lines[0]["rewards/even/mean"] + 0.5 * lines[0]["rewards/start/mean"])
    held = next(line for line in lines if "eval_reward" in line)
    assert held["eval_kl"] > 10 * ROUNDING


@pytest.mark.parametrize("from_start", [True, False])
def test_the_reference_is_the_adapter_that_training_starts_from(from_start: bool, tmp_path: Path) -> None:
    model = fresh()
    trained = [each for each in model.parameters() if each.requires_grad]
    torch.manual_seed(0)
    for each in trained:
        each.data.normal_(std=0.05)
    first = [each.detach().clone() for each in trained]
    given = context(tmp_path / "run", model, {"beta": 0.1}, max_steps=3)
    assert given.rollouts is not None
    learn(replace(given, rollouts=replace(given.rollouts, from_start=from_start)), model)
    lines = logged(tmp_path / "run")
    if from_start:
        assert lines[0]["kl"] == pytest.approx(0.0, abs=ROUNDING)
    else:
        assert lines[0]["kl"] > 10 * ROUNDING
    assert lines[2]["kl"] > 10 * ROUNDING
    held = next(line for line in lines if "eval_kl" in line)
    assert held["eval_kl"] > 10 * ROUNDING
    assert all(not torch.equal(now, before) for now, before in zip(trained, first, strict=True)), (
        "trained, not put back"
    )


def test_streamed_experts_change_no_bit(tmp_path: Path) -> None:
    adapters = []
    for name, cache in (("resident", None), ("streamed", tmp_path / "int8")):
        model = fresh(cache)
        learn(context(tmp_path / name, model, gradient_accumulation_steps=2), model)
        adapters.append(adapter_of(model))
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())


def failing_at(given: RunContext, *steps: int) -> RunContext:
    """The same, with a reward that fails at these steps."""
    assert given.rollouts is not None
    score = given.rollouts.judge.score

    class Failing(Judge):
        def score(self, asked: Asked) -> Scores:
            found = score(asked)
            fails = asked.trainer_state["global_step"] in steps
            return replace(found, failures=("reward even: took longer than 1 s",)) if fails else found

    judge = Failing(given.rollouts.judge.rewards, seconds=1.0, memory=1 << 30)
    return replace(given, rollouts=replace(given.rollouts, judge=judge))


def test_a_step_whose_reward_fails_is_left_out_and_named(tmp_path: Path) -> None:
    model = fresh()
    given = failing_at(context(tmp_path / "run", model, max_steps=3, save_steps=1, save_total_limit=3), 1)
    said = learn(given, model)
    assert "step 2: reward even: took longer than 1 s on row " in said
    assert "the step is skipped" in said
    kept = sorted((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    files = [(path / "adapter_model.safetensors").read_bytes() for path in kept]
    assert files[0] == files[1] != files[2]
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])["skipped_steps"] == 1


def test_a_reward_that_never_works_ends_the_run(tmp_path: Path) -> None:
    model = fresh()
    given = failing_at(context(tmp_path / "run", model, max_steps=3, max_nonfinite_steps=2), 0, 1, 2)
    with pytest.raises(DivergedError, match=r"reward even: took .* 2 steps in a row .*: mend the reward"):
        learn(given, model)


def test_answers_that_cannot_be_drawn_end_the_run_in_one_line() -> None:
    model, tokenizer = fresh(), AutoTokenizer.from_pretrained(EMBEDDED)
    with torch.no_grad():
        next(tensor for name, tensor in model.named_parameters() if name.endswith("model.norm.weight")).fill_(torch.inf)
    with pytest.raises(DivergedError, match="no answer can be drawn; start again with a lower"):
        Sampler(model, {"temperature": 1.0}, 2).write([[5, 6]])
    with pytest.raises(DivergedError, match="no answer can be drawn"):
        answer_ids(model, tokenizer, [[5, 6]], max_new_tokens=2, temperature=1.0)


def test_too_few_prompts_are_refused(tmp_path: Path) -> None:
    model = fresh()
    with pytest.raises(DataError, match="24 prompts, and 32 are asked at once"):
        learn(context(tmp_path / "run", model, per_device_train_batch_size=64), model)


def test_the_batch_that_goes_first_has_answers_of_full_length(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run")
    batch = trainer._longest_batch()
    longest = max(len(question.prompt_ids) for question in trainer.rollouts.train)
    assert batch["input_ids"].shape == (4, longest + trainer.max_completion_length)
