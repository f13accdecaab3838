"""Preference tuning: a reference that is the model itself before the first step, TRL's losses, and what moves."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import AutoTokenizer, set_seed

from scripts.parity import method_families
from tests.harness.training import run_context
from tests.parity.conftest import EMBEDDED
from toolkit.adapters import adapter_coverage, attach_lora
from toolkit.architecture import describe
from toolkit.checkpoint.config import skeleton
from toolkit.errors import ModelError, RecipeError
from toolkit.evaluate.preferences import answer_figures, answer_logps, reward_figures
from toolkit.offload.attach import load_streamed
from toolkit.offload.place import spread
from toolkit.ops.token_scores import sequence_logps, token_scores
from toolkit.quant import load_int8
from toolkit.recipe import PREFERENCE_METHODS, DpoSection, TrainingSection
from toolkit.training import Preference, RunContext, train_adapter
from toolkit.training.callbacks import MetricsLog
from toolkit.training.preference import Pairs, PreferenceTrainer, without_noise
from toolkit.training.reference import START, kept_logps

ROUNDING = 1e-4
"""Nats: a sum of ten answer tokens' log-probabilities in fp32, each of about 1e-6 of their size of 10."""


def rows(count: int = 6, start: int = 0) -> Dataset:
    """Pairs: to a counting prompt, an answer that goes on and one that goes back; answers of two to five tokens."""
    found = []
    for number in range(start, start + count):
        prompt = [3 + (number * 7 + step) % 90 for step in range(6 + number % 3)]
        for sign, size in ((1, 2 + number % 3), (-1, 3 + number % 3)):
            answer = [3 + (prompt[-1] + sign * step) % 90 for step in range(1, size + 1)]
            found.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return Dataset.from_list(found)


def fresh(cache: Path | None = None) -> PeftModel:
    if cache is None:
        model, _ = load_int8(str(EMBEDDED))
    else:
        layers = [layer.name for layer in describe(skeleton(str(EMBEDDED))).layers]
        model, _ = load_streamed(str(EMBEDDED), spread(dict.fromkeys(layers, 1), len(layers), "disk"), cache=cache)
    set_seed(0)
    return attach_lora(model, r=2)


def context(
    folder: Path,
    *,
    dpo: dict[str, Any] = {},  # noqa: B006
    start: str = "",
    method: str = "dpo",
    **changes: Any,
) -> RunContext:
    """A run of the method; `dpo` are the options of its section."""
    own = {name: changes.pop(name) for name in ("resume", "telemetry", "console") if name in changes}
    forked = changes.pop("forked", None)
    given = {"max_steps": 2, "learning_rate": 1e-2, "warmup_steps": 0, "use_cpu": True, "method": method}
    section = TrainingSection(**{**given, "packing": False, "gradient_checkpointing": False, **changes})
    options = PREFERENCE_METHODS[method](**dpo).model_dump()
    facts = {START: start, "ld_alpha": str(options.get("ld_alpha"))}
    preference = Preference(options, folder / "reference.safetensors", facts, forked, method)
    return run_context(folder, section, preference=preference, **own)


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def adapter_of(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def by_hand(model: PeftModel, table: Dataset) -> torch.Tensor:
    """Log-probabilities of the answers (pairs, 2), one sequence at a time and from all logits."""
    found = []
    for row in table:
        ids, labels = torch.tensor(row["input_ids"])[None], torch.tensor(row["labels"])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0].float().log_softmax(-1)
        found.append(sum(log_probs[at - 1, ids[0, at]] for at in range(len(labels)) if labels[at] >= 0))
    return torch.stack(found).view(-1, 2)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PeftModel]:
    """A run of three steps of two pairs, looked at at its end."""
    folder, model = tmp_path_factory.mktemp("run"), fresh()
    given = context(folder, max_steps=3, per_device_train_batch_size=2, per_device_eval_batch_size=2)
    train_adapter(model, AutoTokenizer.from_pretrained(EMBEDDED), rows(), rows(3, start=20), given)
    return folder, model


def test_every_default_adapter_moves_from_a_reference_that_is_the_model_itself(run: tuple[Path, PeftModel]) -> None:
    folder, model = run
    reached = adapter_coverage(model)
    assert reached.routers == reached.routers_all > 0
    assert reached.moved == reached.adapters > reached.routers
    assert abs(logged(folder)[0]["rewards/margins"]) <= ROUNDING
    assert abs(logged(folder)[1]["rewards/margins"]) > 10 * ROUNDING
    assert "default" in model.peft_config
    assert len(model.peft_config) == 1, "no copied reference adapter"


def test_what_is_kept_is_what_the_base_gives_each_answer(run: tuple[Path, PeftModel]) -> None:
    folder, model = run
    with model.disable_adapter():
        base = by_hand(model.eval(), rows())
    kept = kept_logps(folder / "reference.safetensors", Pairs(rows()))
    assert kept is not None
    assert torch.tensor(kept).allclose(base, atol=ROUNDING)
    assert kept_logps(folder / "reference.safetensors", Pairs(rows(start=50))) is None


def test_the_figures_of_an_evaluation_are_of_every_pair(run: tuple[Path, PeftModel]) -> None:
    """Three pairs in batches of two and one: a mean over batches would be another."""
    folder, model = run
    table = rows(3, start=20)
    (held,) = [line for line in logged(folder) if "eval_loss" in line]
    now, before = by_hand(model.eval(), table), torch.tensor(kept_logps(folder / "reference.safetensors", Pairs(table)))
    rewards = 0.1 * (now - before)
    margins = rewards[:, 0] - rewards[:, 1]
    assert held["eval_loss"] == pytest.approx(float(-logsigmoid(margins).mean()), abs=ROUNDING)
    assert held["eval_rewards/margins"] == pytest.approx(float(margins.mean()), abs=ROUNDING)
    assert held["eval_rewards/accuracies"] == pytest.approx(float((margins > 0).float().mean()))
    ours = torch.tensor(answer_logps(model, table, 2))
    assert ours.allclose(now.reshape(-1), atol=ROUNDING)
    figures = reward_figures((0.1 * (ours - before.reshape(-1))).tolist(), table)
    assert figures["rewards/margins"] == pytest.approx(float(margins.mean()), abs=1e-4)
    assert figures["rewards/accuracies"] == held["eval_rewards/accuracies"]
    share = float((now[:, 0] > now[:, 1]).float().mean())
    assert answer_figures(ours.tolist(), table)["preference_accuracy"] == pytest.approx(share)


def trainer_of(folder: Path, **changes: Any) -> PreferenceTrainer:
    """A trainer as a run has it, before its first step."""
    from toolkit.training.train import _trainer

    given, tokenizer = context(folder, **changes), AutoTokenizer.from_pretrained(EMBEDDED)
    made = _trainer(fresh(), tokenizer, rows(), None, given, MetricsLog(given.metrics, "cpu"))
    assert isinstance(made, PreferenceTrainer)
    return made


def test_scores_of_labelled_tokens_are_those_of_trls_fused_head(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run")
    batch = trainer.data_collator([{"pair": number, "held_out": False} for number in (0, 3)])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    labels = inputs["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    ours = token_scores(trainer.model, inputs, labels, balanced=True)
    theirs = trainer.model(**inputs, output_router_logits=True, labels=labels, fused_lm_head=True)
    for name in ("log_probs", "entropy", "mean_logits"):
        assert torch.allclose(getattr(ours, name), getattr(theirs, name), atol=ROUNDING), name
    assert torch.equal(ours.is_top1, theirs.is_top1)
    assert torch.allclose(ours.aux_loss, theirs.aux_loss, atol=ROUNDING)
    assert torch.allclose(sequence_logps(trainer.model, inputs, labels), ours.log_probs.sum(1), atol=ROUNDING)
    assert ours.log_probs.requires_grad
    assert not ours.entropy.requires_grad


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_head_that_passes_over_what_a_family_does_to_its_logits_is_not_used(method: str, tmp_path: Path) -> None:
    """TRL's fused head knows no width multiplier; the first step is then right by the family's own logits."""
    row = method_families.train("inkling_text", tmp_path, steps=1, method=method)
    assert (row.head, row.passes, row.failed) == ("another", True, "")


def test_a_head_that_computes_the_familys_own_logits_is_used(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run")
    assert trainer.check_fused_head()
    assert trainer.aux_loss_enabled


def test_noise_is_off_for_model_and_reference_alike() -> None:
    model = fresh()
    module = next(model.modules())
    module.router_jitter_noise, module.attention_dropout, module.scale = 0.1, 0.2, 0.3  # type: ignore[assignment]
    without_noise(model)
    assert (module.router_jitter_noise, module.attention_dropout, module.scale) == (0.0, 0.0, 0.3)


def test_streamed_experts_change_no_bit(tmp_path: Path) -> None:
    adapters = []
    for name, cache in (("resident", None), ("streamed", tmp_path / "int8")):
        model = fresh(cache)
        given = context(tmp_path / name, gradient_accumulation_steps=3)
        train_adapter(model, AutoTokenizer.from_pretrained(EMBEDDED), rows(), None, given)
        adapters.append(adapter_of(model))
        assert logged(tmp_path / name)[1]["rewards/margins"] != 0
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())
    one, two = (load_file(tmp_path / name / "reference.safetensors") for name in ("resident", "streamed"))
    assert torch.equal(one["logps"], two["logps"])


def fork_of(run: tuple[Path, PeftModel], folder: Path, table: Dataset, **changes: Any) -> tuple[str, list[Any]]:
    """A fork of the run with this data: what it says, and its reference."""
    source, trained = run
    model, said = fresh(), io.StringIO()
    with torch.no_grad():
        for name, parameter in adapter_of(trained).items():
            model.get_parameter(name).copy_(parameter)
    given = context(
        folder, start="the fork's own start", forked=source / "reference.safetensors",
        console=Console(file=said, width=200), **changes,
    )  # fmt: skip
    train_adapter(model, AutoTokenizer.from_pretrained(EMBEDDED), table, None, given)
    kept = kept_logps(folder / "reference.safetensors", Pairs(table))
    assert kept is not None
    return said.getvalue(), kept


def test_a_fork_keeps_the_reference_of_its_run_and_says_so(run: tuple[Path, PeftModel], tmp_path: Path) -> None:
    said, kept = fork_of(run, tmp_path / "same", rows())
    assert "reference: the base of the run that this is a fork of, not the weights that the fork starts from" in said
    assert kept == kept_logps(run[0] / "reference.safetensors", Pairs(rows()))
    margin = logged(tmp_path / "same")[0]["rewards/margins"]
    assert abs(margin) > 10 * ROUNDING, "it begins where the run ended, at a distance from the reference"
    _, other = fork_of(run, tmp_path / "other", rows(2, start=40))
    with run[1].disable_adapter():
        assert torch.tensor(other).allclose(by_hand(run[1].eval(), rows(2, start=40)), atol=ROUNDING)


def test_a_fork_whose_reference_is_lost_is_refused(run: tuple[Path, PeftModel], tmp_path: Path) -> None:
    model, table = run[1], rows(2)
    given = context(tmp_path / "run", start="sha of an adapter")
    train_adapter(model, AutoTokenizer.from_pretrained(EMBEDDED), table, None, given)
    forked = tmp_path / "run" / "reference.safetensors"
    again = context(tmp_path / "fork", start="x", forked=forked)
    with pytest.raises(RecipeError, match="2 pairs are new to this fork, and the run's reference was another adapter"):
        train_adapter(model, AutoTokenizer.from_pretrained(EMBEDDED), rows(2, start=60), None, again)
    forked.write_bytes(b"no file")
    with pytest.raises(ModelError, match="damaged"):
        train_adapter(
            model, AutoTokenizer.from_pretrained(EMBEDDED), table, None, context(tmp_path / "f", forked=forked)
        )


def test_a_run_goes_on_with_its_own_reference_or_not_at_all(tmp_path: Path) -> None:
    tokenizer, folder = AutoTokenizer.from_pretrained(EMBEDDED), tmp_path / "run"
    train_adapter(fresh(), tokenizer, rows(2), None, context(folder, max_steps=1, save_steps=1))
    (folder / "reference.safetensors").unlink()  # the model before the first step gives the same again
    train_adapter(fresh(), tokenizer, rows(2), None, context(folder, max_steps=2, save_steps=1))
    moved = fresh()
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    (folder / "reference.safetensors").unlink()
    with pytest.raises(ModelError, match=r"checkpoint-2: the reference differs .*--fork"):
        train_adapter(moved, tokenizer, rows(2), None, context(folder, max_steps=3, save_steps=1))


@pytest.fixture
def pings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What TRL would send to the Hub."""
    sent: list[str] = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda topic, **_: sent.append(topic))
    return sent


@pytest.mark.parametrize("asked", [False, True])
def test_nothing_is_told_to_the_hub_unless_it_is_asked_for(asked: bool, pings: list[str], tmp_path: Path) -> None:
    from dataclasses import replace

    from toolkit.training.train import _trainer

    given, tokenizer = context(tmp_path / "run", telemetry=asked), AutoTokenizer.from_pretrained(EMBEDDED)
    for each in (given, replace(given, preference=None)):
        _trainer(fresh(), tokenizer, rows(2), None, each, MetricsLog(each.metrics, "cpu"))
    assert len(pings) == (2 if asked else 0)


def test_every_loss_of_trls_is_one_that_the_recipe_knows(tmp_path: Path) -> None:
    """And gives a finite loss with a gradient."""
    known = DpoSection.model_fields["loss_type"].annotation
    names = known.__args__[0].__args__  # type: ignore[union-attr]
    trainer = trainer_of(tmp_path / "run", dpo={"use_weighting": False, "label_smoothing": 0.1})
    pairs = trainer.pairs
    pairs.reference = trainer.reference_of(pairs, range(len(pairs))).tolist()
    batch = trainer._prepare_inputs(trainer.data_collator([{"pair": n, "held_out": False} for n in (0, 1)]))
    trainer.model.train()
    assert len(names) == 15
    for name in names:
        trainer.loss_types = [name]
        loss = trainer._own_loss(trainer.model, batch)
        assert loss is not None
        assert torch.isfinite(loss)
        assert loss.requires_grad, name


def test_pairs_are_looked_up_and_padded_on_the_right() -> None:
    from toolkit.training.preference import _Collator

    pairs = Pairs(rows(2))
    pairs.reference = [(-1.0, -2.0), (-3.0, -4.0)]
    batch = _Collator(pairs, None, 0)([{"pair": 1, "held_out": False}, {"pair": 0, "held_out": False}])
    table = rows(2)
    for line, row in enumerate((2, 0, 3, 1)):
        ids = table[row]["input_ids"]
        assert batch["input_ids"][line].tolist() == ids + [0] * (batch["input_ids"].shape[1] - len(ids))
        assert batch["completion_mask"][line].sum() == sum(label >= 0 for label in table[row]["labels"])
    assert batch["ref_rejected_logps"].tolist() == [-4.0, -2.0]
    assert pairs.longest(1) == [1]


def test_pairs_of_like_length_are_asked_together() -> None:
    pairs = Pairs(rows(9))
    groups = pairs.groups(range(9), 26)
    assert sorted(number for group in groups for number in group) == list(range(9))
    assert all(len(group) * pairs.lengths[group].max() <= 26 for group in groups)
    assert [pairs.lengths[group].max() for group in groups] == sorted(pairs.lengths[g].max() for g in groups)[::-1]
    assert (len(groups), len(pairs.groups(range(9), 1))) == (5, 9)
