"""Several answers behind one prompt: what they are given is what each has with its own prompt, or nothing is shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer

from scripts.parity import grpo_families
from tests.harness.families import build, tiny_config
from tests.harness.training import run_context
from tests.parity.conftest import EMBEDDED
from tests.parity.test_preference import context, fresh, logged, rows
from toolkit.adapters import attach_lora
from toolkit.architecture import shared_length
from toolkit.labels import IGNORED
from toolkit.ops.document_attention import attend_to_shared_prompts
from toolkit.ops.label_logits import padded
from toolkit.ops.shared_prompts import share_prompts
from toolkit.ops.token_scores import TokenScores, token_scores
from toolkit.quant import load_int8
from toolkit.recipe import TrainingSection
from toolkit.training import train_adapter
from toolkit.training.preference import PreferenceTrainer
from toolkit.training.rollout_steps import RolloutSteps
from toolkit.training.rollouts import by_prompt

ROUNDING = 1e-4
"""Nats: log-probabilities of about 10 in fp32, from two orders of the same sums."""


def answers(prompts: int = 2, shortest: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and labels of three answers of one to four tokens to each prompt, of two lengths."""
    found = []
    for number in range(prompts):
        prompt = [3 + (number * 7 + step) % 60 for step in range(shortest + number)]
        for size in (4 - number, 1, 3):
            said = [3 + (prompt[-1] * size + 5 * step) % 60 for step in range(size)]
            found.append({"input_ids": prompt + said, "labels": [IGNORED] * len(prompt) + said})
    return padded(found)


def both(
    model: PeftModel, *rows: torch.Tensor, balanced: bool = True, wide: int | None = None
) -> tuple[TokenScores, TokenScores, torch.Tensor]:
    """Scores with a prompt for each answer, scores behind one, and the latter's log-probabilities by sequence."""
    ids, mask, labels = rows
    alone = token_scores(model, {"input_ids": ids, "attention_mask": mask}, labels, balanced=balanced)
    with attend_to_shared_prompts(model):
        shared = share_prompts(ids, mask, labels, 3, wide=wide)
        assert shared is not None
        together = token_scores(model, shared.inputs, shared.labels, balanced=balanced)
    return alone, together, shared.of_sequences(together.log_probs)


def test_a_row_is_the_prompt_and_then_each_answer_after_its_last_token() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 4, 0], [1, 2, 3, 0, 0], [1, 2, 3, 4, 0]])
    mask = (ids > 0).long()
    is_prompt = torch.arange(5) < torch.tensor([[3], [3], [2], [2]])
    labels = ids.masked_fill(is_prompt | (mask == 0), IGNORED)
    shared = share_prompts(ids, mask, labels, 2)
    assert shared is not None
    assert shared.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 7, 4], [1, 2, 2, 3, 2, 3, 4]]
    assert shared.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3], [0, 1, 1, 2, 1, 2, 3]]
    assert shared.inputs["attention_mask"].tolist() == [[2, 2, 1, 1, 1, 1, 1], [2, 0, 1, 1, 1, 1, 1]]
    assert shared.labels.tolist() == [[-100, -100, -100, 8, 9, -100, 4], [-100, -100, -100, 3, -100, 3, 4]]
    assert share_prompts(ids[::2], mask[::2], labels[::2], 2) is None


@pytest.mark.parametrize("wide", [None, 0])
def test_scores_gradients_and_balance_are_those_of_each_answer_with_its_own_prompt(wide: int | None) -> None:
    """In one product with all of a row, and answer by answer."""
    model = fresh()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    ids, mask, labels = answers(shortest=9)
    told, gradients = labels[:, 1:] != IGNORED, []
    alone, together, log_probs = both(model, ids, mask, labels, wide=wide)
    torch.testing.assert_close(log_probs[told], alone.log_probs[told], rtol=0, atol=ROUNDING)
    torch.testing.assert_close(together.aux_loss, alone.aux_loss)
    for scores, values in ((alone, alone.log_probs), (together, log_probs)):
        model.zero_grad(set_to_none=True)
        (values[told].sum() + scores.aux_loss).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() <= 1e-3 * gradient.norm(), name


@pytest.mark.parametrize(
    "family",
    ["deepseek_v3", "flint", "gemma4_text", "gpt_oss", "jamba", "lfm2_moe", "inkling_text", "qwen3_5_moe_text"],
)
@pytest.mark.parametrize("shortest", [4, 9])
def test_families_that_may_share_give_the_same_scores(family: str, shortest: int, tmp_path: Path) -> None:
    build(tiny_config(family)).save_pretrained(tmp_path / "model")
    model = attach_lora(load_int8(str(tmp_path / "model"))[0], r=2).eval()
    given = answers(shortest=shortest)
    told = given[2][:, 1:] != IGNORED
    with torch.no_grad():
        alone, _, log_probs = both(model, *given, balanced=False)
    same = bool((log_probs[told] - alone.log_probs[told]).abs().max() < ROUNDING)
    assert same == (shared_length(model.get_base_model()) >= given[0].shape[1])


def learnt(folder: Path, method: str, monkeypatch: pytest.MonkeyPatch, *, shares: bool) -> tuple[dict[str, Any], str]:
    """What the first step logs, and what the run says."""
    if not shares:
        kind = RolloutSteps if method == "grpo" else PreferenceTrainer
        monkeypatch.setattr(kind, "may_share", lambda self: 1)
    model, tokenizer = fresh(), AutoTokenizer.from_pretrained(EMBEDDED)
    steps = {"max_steps": 2, "logging_steps": 1, "warmup_steps": 0, "use_cpu": True, "packing": False}
    batches = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": method != "grpo",
    }
    if method == "grpo":
        told = grpo_families.rollouts(model, tokenizer, options={"num_generations": 4, "beta": 0.05}, share=4)
        # Load-balancing is of the answers that are passed together, which are dealt out otherwise.
        section = TrainingSection(method=method, router_aux_loss_coef=0.0, **steps, **batches)
        given = run_context(folder, section, rollouts=told)
        try:
            train_adapter(model, tokenizer, grpo_families.table(told), None, given)
        finally:
            told.judge.close()
    else:
        given = context(folder, method=method, **{**steps, **batches, "per_device_train_batch_size": 2})
        train_adapter(model, tokenizer, rows(8), rows(3, start=20), given)
    return logged(folder)[0], given.console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["grpo", "dpo", "orpo"])
def test_a_run_learns_the_same_from_shared_prompts(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, said = learnt(tmp_path / "shared", method, monkeypatch, shares=True)
    alone, told = learnt(tmp_path / "alone", method, monkeypatch, shares=False)
    assert f"prompts: passed through the model once for {4 if method == 'grpo' else 2} answers, checked" in said
    assert "prompts:" not in told
    for name in ("loss", "grad_norm", "entropy"):
        assert shared[name] == pytest.approx(alone[name], rel=1e-3), name


def test_a_family_that_keeps_a_state_passes_each_prompt_and_says_so(tmp_path: Path) -> None:
    row = grpo_families.train("jamba", tmp_path, steps=1)
    assert row.passes
    assert row.told.endswith("prompts read for each answer")


def test_answers_are_dealt_out_by_prompt() -> None:
    batches = [
        {"asked": torch.tensor(asked), "ids": torch.tensor(ids)[:, None], "failed": failed, "count": torch.tensor(6)}
        for asked, ids, failed in (
            ([1, 2, 1], [10, 20, 11], ["a", "b", "c"]),
            ([2, 1, 2], [21, 12, 22], ["d", "e", "f"]),
        )
    ]
    first, second = by_prompt(batches, 2)
    assert (first["ids"].flatten().tolist(), second["ids"].flatten().tolist()) == ([10, 11, 12], [20, 21, 22])
    assert (first["failed"], second["failed"]) == (["a", "c", "e"], ["b", "d", "f"])
    apart = by_prompt(batches, 1)
    assert [each["ids"].flatten().tolist() for each in apart] == [[10, 11, 20], [12, 21, 22]]


def test_pairs_that_begin_with_an_answer_have_no_prompt_to_share() -> None:
    table = Dataset.from_list([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7, 6], "labels": [7, 6]}])
    ids, mask, labels = padded(list(table))
    assert share_prompts(ids, mask, labels, 2) is None
