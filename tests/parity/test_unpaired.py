"""KTO, ORPO and SimPO: losses and figures by hand, mismatched answers, streamed experts, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn.functional import logsigmoid
from transformers import AutoTokenizer

from tests.parity.conftest import EMBEDDED
from tests.parity.test_preference import ROUNDING, adapter_of, by_hand, context, fresh, logged, rows
from toolkit.adapters import adapter_coverage
from toolkit.evaluate.preferences import answer_figures, reward_figures
from toolkit.training import train_adapter
from toolkit.training.reference import kept_logps
from toolkit.training.unpaired import Answers, answers_of, weight_advice

TWO = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
METHODS: dict[str, dict[str, Any]] = {
    "kto": {"beta": 0.5, "undesirable_weight": 2.0},
    "orpo": {"beta": 0.3},
    "simpo": {"simpo_gamma": 0.7, "cpo_alpha": 0.4, "label_smoothing": 0.1},
}


@pytest.fixture(scope="module", params=METHODS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, PeftModel]:
    """Three steps by the method, looked at at their end."""
    folder, model = tmp_path_factory.mktemp(request.param), fresh()
    given = context(folder, method=request.param, dpo=METHODS[request.param], max_steps=3, **TWO)
    train_adapter(model, AutoTokenizer.from_pretrained(EMBEDDED), rows(), rows(2, start=20), given)
    return request.param, folder, model


def test_every_default_adapter_moves_by_a_loss_that_is_the_papers(run: tuple[str, Path, PeftModel]) -> None:
    method, folder, model = run
    reached = adapter_coverage(model)
    assert reached.moved == reached.adapters > reached.routers > 0
    assert len(model.peft_config) == 1, "no copied reference adapter"
    (held,) = [line for line in logged(folder) if "eval_loss" in line]
    table = rows(2, start=20)
    now = by_hand(model.eval(), table)
    counts = torch.tensor([sum(label >= 0 for label in row["labels"]) for row in table]).view(-1, 2)
    chosen, rejected = (now / counts).T
    own = -now[:, 0].sum() / counts[:, 0].sum()
    wanted = {
        "orpo": lambda: own - 0.3 * logsigmoid(odds(chosen) - odds(rejected)).mean(),
        "simpo": lambda: 0.4 * own + smoothed(2.0 * (chosen - rejected) - 0.7, 0.1).mean(),
        "kto": lambda: of_answers(folder, model, table, now),
    }[method]()
    assert held["eval_loss"] == pytest.approx(float(wanted), abs=ROUNDING)
    assert held["eval_rewards/margins"] == pytest.approx(margin(method, folder, table, now, counts), abs=ROUNDING)


def odds(means: torch.Tensor) -> torch.Tensor:
    return means - torch.log1p(-means.exp())


def smoothed(differences: torch.Tensor, share: float) -> torch.Tensor:
    return -(1 - share) * logsigmoid(differences) - share * logsigmoid(-differences)


def of_answers(folder: Path, model: PeftModel, table: Dataset, now: torch.Tensor) -> torch.Tensor:
    """KTO's loss of the two batches of two answers, the mismatched ones run by hand."""
    answers = Answers(table, 2)
    before = torch.tensor(kept_logps(folder / "reference.safetensors", answers))
    mismatched = [{k: v.tolist() for k, v in answers.sequence(number, 1).items()} for number in range(len(answers))]
    gains = now.reshape(-1)[answers.order] - before[:, 0]
    away = by_hand(model, Dataset.from_list(mismatched)).reshape(-1) - before[:, 1]
    losses = []
    for start in (0, 2):
        kl = away[start : start + 2].mean().clamp(min=0)
        for number in (start, start + 1):
            sign, weight = (1, 1.0) if answers.desirable[number] else (-1, 2.0)
            losses.append(weight * (1 - torch.sigmoid(0.5 * sign * (gains[number] - kl))))
    return torch.stack(losses).mean()


def margin(method: str, folder: Path, table: Dataset, now: torch.Tensor, counts: torch.Tensor) -> float:
    if method != "kto":
        scale = {"orpo": 0.3, "simpo": 2.0}[method]
        return reward_figures((scale * now / counts).reshape(-1).tolist(), table)["rewards/margins"]
    answers = Answers(table, 2)
    before = torch.tensor(kept_logps(folder / "reference.safetensors", answers))[:, 0]
    gains = now.reshape(-1)[answers.order] - before
    return float(0.5 * (gains[answers.desirable].mean() - gains[~answers.desirable].mean()))


def test_streamed_experts_change_no_bit(tmp_path: Path) -> None:
    """The mismatched answers go through the layers before a step's other passes."""
    adapters = []
    for name, cache in (("resident", None), ("streamed", tmp_path / "int8")):
        model = fresh(cache)
        given = context(tmp_path / name, method="kto", gradient_accumulation_steps=2, **TWO)
        train_adapter(model, AutoTokenizer.from_pretrained(EMBEDDED), rows(), None, given)
        adapters.append(adapter_of(model))
        assert logged(tmp_path / name)[1]["kl"] > 0
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())


def table_of(desirable: list[bool]) -> Dataset:
    sequences = [[number] * 3 + [50 + number] * (2 + number) for number in range(len(desirable))]
    labels = [[-100] * 3 + ids[3:] for ids in sequences]
    return Dataset.from_dict({"input_ids": sequences, "labels": labels, "desirable": desirable})


def test_an_answer_goes_with_the_prompt_after_it_in_its_batch() -> None:
    answers = answers_of(table_of([True, False, True, True, False]), together=2, loss_type="kto")
    assert answers.desirable.tolist() == [True, False, True, True, False]
    assert [answers.partner(number) for number in range(5)] == [1, 0, 3, 2, 3], "the last one is alone in its batch"
    own, other = (answers.sequence(0, side) for side in (0, 1))
    assert own["input_ids"].tolist() == [0, 0, 0, 50, 50]
    assert other["input_ids"].tolist() == [0, 0, 0, 51, 51, 51]
    assert other["labels"].tolist() == [-100] * 3 + [51] * 3
    assert answers.lengths.tolist() == [6, 6, 8, 8, 9]
    assert answers.longest(2) == [4, 3]
    alone = answers_of(table_of([True, False]), together=2, loss_type="apo_zero_unpaired")
    assert (alone.sides, alone.lengths.tolist()) == ((0,), [5, 6])


def test_weights_are_advised_where_one_kind_prevails() -> None:
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    few = Answers(table_of([True, False, False, False]), 2)
    assert "1 good and 3 bad answers; set kto.desirable_weight to 3," in str(weight_advice(few, weights))
    assert weight_advice(few, {**weights, "desirable_weight": 3.5}) is None
    assert weight_advice(Answers(rows(4), 2), weights) is None
    assert "all 2 answers are good" in str(weight_advice(Answers(table_of([True, True]), 2), weights))


def test_good_and_bad_answers_of_pairs_take_turns_and_keep_apart() -> None:
    answers = Answers(rows(4), 2)
    assert answers.desirable.tolist() == [True, False] * 4
    assert sorted(answers.order.tolist()) == list(range(8))
    assert all(abs(one // 2 - other // 2) == 2 for one, other in answers.order.reshape(-1, 2).tolist())


def test_answers_without_pairs_are_compared_each_with_each() -> None:
    table = table_of([True, False, True])
    figures = reward_figures([1.0, 0.0, -1.0], table)
    assert figures == {"rewards/accuracies": 0.5, "rewards/margins": 0.0}
    assert reward_figures([1.0, 2.0], table_of([True, True])) == {}
    assert answer_figures([1.0, 0.0, -1.0], table) == {"logps_chosen": 0.0, "logps_rejected": 0.0}
    assert np.isclose(answer_figures([3.0, 1.0], rows(1))["preference_accuracy"], 1.0)
