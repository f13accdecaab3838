"""Learning from rewards: TRL's GRPO and RLOO trainers, on prompts that come tokenised and rewards that may fail.

TRL writes answers inside the first forward of a step, which a layer-major pass over streamed experts does not allow;
here they are written when the step begins. TRL saves neither the answers that wait nor its count of passes: a run that
resumes within a window of `steps_per_generation` and `num_iterations` would write anew and learn otherwise. It copies
the adapter to have a reference; here that is the base, the adapter switched off, or the adapter's first weights.

    B answers, P tokens of the longest prompt, C of the longest answer
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from toolkit.errors import DataError, ModelError, RecipeError, first_line
from toolkit.labels import IGNORED
from toolkit.processes import processes
from toolkit.training.adapter_steps import AdapterSteps, RunContext
from toolkit.training.preference import without_noise
from toolkit.training.resumable import STATE
from toolkit.training.rollouts import Rollouts, by_prompt, rows_of
from toolkit.training.scores import ScoredSteps, answers_first

__all__ = ["RolloutSteps", "rollout_trainer"]

_OURS = ("beta",)
"""Options that TRL's configuration is not told: with a `beta` it would copy the adapter."""
_COPY = "ref"
"""What TRL calls its copy of the adapter."""
_COUNTED_BEFORE = ("dapo", "cispo")
"""Losses that are divided by a number of tokens which is counted when answers are written."""
_PROBED = 8
"""Tokens on which TRL's head is compared with the model's own logits."""


class RolloutSteps(ScoredSteps):
    """Steps that learn from answers which the model wrote; put before a trainer of TRL's, whose loss it is."""

    rollouts: Rollouts
    _step: int
    _buffered_inputs: list[dict[str, Any]] | None
    _failures: Sequence[str] = ()
    _asked: Sequence[Any] = ()

    def __init__(self, context: RunContext, **trl: Any) -> None:
        """`trl`: what TRL's trainer takes beside data and rewards."""
        assert context.rollouts is not None
        self.rollouts = given = context.rollouts
        without_noise(trl["model"])
        super().__init__(
            context,
            **trl,
            reward_funcs=[_named(reward.name) for reward in given.judge.rewards],
            train_dataset=given.numbers(held_out=False),
            eval_dataset=given.numbers(held_out=True) if given.held_out else None,
        )
        self.beta = given.options["beta"]
        self.temperature = given.options["temperature"]
        self.data_collator = _as_they_are

    @property
    def window(self) -> int:
        """Micro-batches from one writing of answers to the next."""
        steps: int = self.args.steps_per_generation * self.num_iterations
        return steps

    # Written before the step

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """transformers' own, remembered: rows of questions. A resumed run has its random numbers only afterwards."""
        self._asked, count = super().get_batch_samples(*args, **kwargs)
        return self._asked, count

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As there; before the first micro-batch of an optimizer step the answers of all are written and judged."""
        number = next(number for number, rows in enumerate(self._asked) if rows is inputs)
        if number == 0:
            first, prepared = self._step, []
            self.model.train()
            for ahead, rows in enumerate(self._asked):
                self._step = first + ahead
                prepared.append(self._prepare_inputs(rows))
            self._step = first
            self._samples = by_prompt(prepared, self.args.steps_per_generation) if self.share > 1 else prepared
        loss: torch.Tensor = super().training_step(model, self._samples[number], *args, **kwargs)
        return loss

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        """Rows to a batch with answers; what is a batch already, as it is."""
        if isinstance(inputs, dict):
            return inputs
        batch = super(AdapterSteps, self)._prepare_inputs(inputs)  # TRL's own
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        return {**batch, "input_ids": ids, "attention_mask": mask}

    def _tokenize_prompts(self, prompts: list[int]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [list(self.rollouts.question(number).prompt_ids) for number in prompts], None, {}

    def _write(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        written = self.rollouts.write(prompt_ids)
        for name, value in self.rollouts.figures().items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)
        return written

    def _calculate_rewards(
        self, inputs: Sequence[Any], prompts: list[int], completions: list[str], completion_ids: list[list[int]]
    ) -> torch.Tensor:
        """Rewards [B, rewards], NaN where one does not apply; all NaN where one failed."""
        state = {"global_step": self.state.global_step, "max_steps": self.state.max_steps, "epoch": self.state.epoch}
        scores = self.rollouts.judge.score(self.rollouts.asked(prompts, completion_ids, state))
        self._failures = scores.failures
        for name, value in scores.metrics.items():
            self._pending_metrics[name].append(value)
        found = torch.tensor(
            [[torch.nan if value is None else value for value in values] for values in scores.values],
            device=self.accelerator.device,
        )
        return torch.full_like(found.T, torch.nan) if scores.failures else found.T

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._failures = ()
        with torch.no_grad():
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        output["asked"] = torch.tensor([row["prompt"] for row in inputs], device=output["prompt_ids"].device)
        output["failed"] = ["; ".join(self._failures)] * len(inputs)
        if self.model.training:
            return output
        if self.rollouts.options["beta"] == 0.0:
            self._metrics["eval"]["kl"].append(self._distance(output))
        if output["failed"][0]:
            self.say(f"step {self.state.global_step}: {output['failed'][0]}; these held-out answers have no reward")
        return output

    @torch.no_grad()
    def _distance(self, batch: Mapping[str, Any]) -> float:
        """How far answers are from the base: a mean over tokens that estimates the KL divergence in nats (k3)."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        kept = batch["completion_ids"].shape[1]
        own = self._get_per_token_logps_and_entropies(self.model, ids, mask, kept)[0]
        with self.model.disable_adapter():
            base = self._get_per_token_logps_and_entropies(self.model, ids, mask, kept)[0]
        estimate = ((base - own).exp() - (base - own) - 1) * batch["completion_mask"]
        return float(estimate.sum() / batch["completion_mask"].sum().clamp(min=1))

    # Scored

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Log-probabilities and entropies of the answers' tokens [B, C], and the load-balancing loss."""
        logps, entropies, balances = [], [], []
        for start in range(0, len(input_ids), batch_size or len(input_ids)):
            rows = slice(start, start + (batch_size or len(input_ids)))
            ids, mask, labels, places = answers_first(input_ids[rows], attention_mask[rows], logits_to_keep)
            with self.accelerator.autocast():
                found = self._scores_behind_prompts(
                    model,
                    {"input_ids": ids, "attention_mask": mask},
                    labels,
                    balanced=compute_aux_loss,
                    share=self.share if model.training else 1,
                    wide=self.wide,
                )
            counted = attention_mask[rows, -logits_to_keep:] != 0
            logps.append(found.log_probs.gather(1, places).masked_fill(~counted, 0.0))
            entropies.append(found.entropy.gather(1, places).masked_fill(~counted, 0.0))
            balances.append(found.aux_loss)
        entropy = torch.cat(entropies) if compute_entropy else None
        balance = torch.stack(balances).mean() if compute_aux_loss else None
        return torch.cat(logps), entropy, balance

    def _guarded(self, result: Any, inputs: dict[str, Any], loss: torch.Tensor, count: Any) -> Any:
        """As there; of answers whose reward failed nothing is learnt."""
        if any(inputs["failed"]):
            self.guard.refuse(inputs, next(filter(None, inputs["failed"])))
            return loss.new_zeros((), requires_grad=True)
        return super()._guarded(result, inputs, loss, count)

    def may_share(self) -> int:
        """As there."""
        return self.rollouts.share

    def longest_to_share(self) -> tuple[int, Sequence[Sequence[int]]]:
        """As there."""
        prompts = [question.prompt_ids for question in (self.rollouts.train[0], self.rollouts.train[-1])]
        return int(self.rollouts.lengths.max()) + self.max_completion_length, prompts

    # Kept

    def _state(self) -> dict[str, Any]:
        state = super()._state()
        waits = self._step % self.window != 0
        state[STATE]["rollouts"] = {"step": self._step, "waiting": self._buffered_inputs if waits else None}
        return state

    def restore_counters(self) -> None:
        """As there, with the answers that wait to be learnt from."""
        super().restore_counters()
        if self._restored is None:
            return
        kept = self._restored["rollouts"]
        self._step = kept["step"]
        self._buffered_inputs = [_on(batch, self.args.device) for batch in kept["waiting"]] if kept["waiting"] else None

    # Looked at

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As there; every evaluation draws the same random numbers, so that two differ by the model alone."""
        torch.manual_seed(self.args.seed)
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As there, without TRL's stopwatch: two runs of one recipe log the same."""
        self._metrics["train"].pop("step_time", None)
        super().log(logs, start_time)

    def _head_probe(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of a prompt, the last of which are labelled."""
        ids = torch.tensor(self.rollouts.train[0].prompt_ids)
        return ids, ids.masked_fill(torch.arange(len(ids)) < len(ids) - _PROBED, IGNORED)

    def _longest_batch(self) -> dict[str, Any]:
        """A batch of the longest prompts with answers of full length, as if they were written."""
        count, room = self.args.per_device_train_batch_size, self.max_completion_length
        numbers = np.argsort(-self.rollouts.lengths, kind="stable").repeat(self.share)
        prompts = [self.rollouts.train[int(number)].prompt_ids for number in np.resize(numbers, count)]
        width, device = max(map(len, prompts)), self.args.device
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        answers, zeros = ids[:, -1:].repeat(1, room), torch.zeros(count, device=device)
        kept = torch.ones_like(answers)
        return {
            "prompt_ids": ids, "prompt_mask": mask, "completion_ids": answers, "completion_mask": kept,
            "input_ids": torch.cat([ids, answers], 1), "attention_mask": torch.cat([mask, kept], 1),
            "advantages": zeros, "old_logps": zeros, "ref_per_token_logps": torch.zeros(answers.shape, device=device),
            "num_items_in_batch": kept.sum(), "failed": [""] * count,
        }  # fmt: skip


class _Start:
    """The trained tensors as they are now, held to be put in the place of what they become."""

    def __init__(self, model: nn.Module) -> None:
        trained = (each for each in model.parameters() if each.requires_grad)
        self._held = [(each, each.detach().clone()) for each in trained]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """For the block, the model as it was."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for now, held in self._held:
            other = now.detach().clone()
            now.copy_(held)  # in place, so that whatever was computed of the tensor is known to be old
            held.copy_(other)


class GroupTrainer(RolloutSteps, GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPO; answers without an advantage, whose gradient is 0, are not passed through the model."""

    def __init__(self, context: RunContext, **trl: Any) -> None:
        """As there."""
        super().__init__(context, **trl)
        self.start = _Start(self.model) if self.rollouts.from_start else None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """As there; TRL's reference is the base, and it is not asked for where the adapter's first weights are it."""
        if self.start is None:
            return super()._generate_and_score_completions(inputs)
        beta, self.beta = self.beta, 0.0
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self.beta = beta
        with self.start.in_place(), torch.no_grad():
            output["ref_per_token_logps"] = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                output["completion_ids"].shape[1],
                self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size,
            )[0]
        return output

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's, of the answers that differ from others to their prompt, where no term counts the rest."""
        plain = self.beta == 0.0 and not self.aux_loss_enabled and self.top_entropy_quantile == 1.0
        if plain and self.loss_type in _COUNTED_BEFORE and self.model.training:
            told = inputs["advantages"] != 0.0
            told[0] |= not told.any()
            told = told.view(-1, self.share).any(1).repeat_interleave(self.share)
            inputs = {name: rows_of(value, told) for name, value in inputs.items()}
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        return loss

    def _generate_single_turn(self, prompt_ids: list[list[int]], *images: Any) -> tuple[list[list[int]], None]:
        return self._write(prompt_ids), None


class LeaveOneOutTrainer(RolloutSteps, RLOOTrainer):  # type: ignore[misc]
    """TRL's RLOO, without the copy of the adapter that it makes even where nothing is compared with it."""

    def __init__(self, context: RunContext, **trl: Any) -> None:
        """As there.

        Raises:
            ModelError: the copy cannot be made.
        """
        try:
            super().__init__(context, **trl)
        except ValueError as error:
            family = type(trl["model"].get_base_model()).__name__
            why = f"TRL copies the adapter for rloo, which this family does not take ({first_line(error)[:80]}…)"
            raise ModelError(f"{family}: {why}; set training.method: grpo") from None
        if _COPY in self.model.peft_config:
            self.model.delete_adapter(_COPY)

    def _generate_single_turn(self, prompt_ids: list[list[int]], *images: Any) -> list[list[int]]:
        return self._write(prompt_ids)


def rollout_trainer(context: RunContext, common: Mapping[str, Any], **trl: Any) -> RolloutSteps:
    """The method's trainer.

    Args:
        common: the arguments that every method has. trl: what TRL's trainer takes beside data, rewards and `args`.

    Raises:
        DataError: there are fewer prompts than are asked at once. RecipeError: more processes than one.
    """
    rollouts = context.rollouts
    assert rollouts is not None
    if processes() > 1:
        raise RecipeError(f"training.method: {rollouts.method} runs in one process; start it without a launcher")
    kind, configured = (GroupTrainer, GRPOConfig) if rollouts.method == "grpo" else (LeaveOneOutTrainer, RLOOConfig)
    options = {name: value for name, value in rollouts.options.items() if name not in _OURS}
    config = configured(
        **{name: value for name, value in common.items() if name != "activation_offloading"},  # TRL has it not here
        **options,
        beta=0.0,
        reward_weights=[reward.weight for reward in rollouts.judge.rewards],
        remove_unused_columns=False,
        shuffle_dataset=False,
    )
    together = config.generation_batch_size // config.num_generations
    if len(rollouts.train) < together:
        raise DataError(
            f"data.train: {len(rollouts.train)} prompts, and {together} are asked at once; give more, or lower "
            "training.per_device_train_batch_size or training.gradient_accumulation_steps"
        )
    return kind(context, args=config, **trl)


def _named(name: str) -> Any:
    """Stands for a reward where TRL wants a function; the judge computes all of them."""

    def reward(**batch: Any) -> None:
        raise AssertionError("rewards are computed by the judge")

    reward.__name__ = name
    return reward


def _as_they_are(rows: list[Any]) -> Any:
    return rows


def _on(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
