"""What a method of training asks of the other sections, and direct preference optimisation's own, by TRL's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from toolkit.recipe.bounds import Misfit, Section
from toolkit.recipe.preference import KtoSection, OrpoSection, SimpoSection
from toolkit.recipe.rollouts import ROLLOUTS, rollout_misfits, with_rollouts

__all__ = [
    "PAIR_METRICS",
    "PREFERENCE_METHODS",
    "REFERENCE_FREE",
    "SCHEDULE_FREE",
    "DpoSection",
    "Optimizer",
    "Schedule",
    "misfits",
    "with_method",
]

Schedule = Literal[
    "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_min_lr", "cosine_with_restarts", "polynomial",
    "inverse_sqrt", "warmup_stable_decay",
]  # fmt: skip
"""transformers' schedules that are a function of the step."""

Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit", "schedule_free_adamw"
]  # fmt: skip
SCHEDULE_FREE = "schedule_free_adamw"

Loss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
PAIR_METRICS = ("rewards/accuracies", "rewards/margins")
"""Figures of held-out pairs that an adapter may be chosen by, by TRL's names; better high."""
_OF_DIFFERENCES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
"""Losses that every divergence fits."""


class DpoSection(Section):
    """Direct preference optimisation, for `training.method: dpo`; TRL's names and meanings."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """How close the model stays to its reference: higher is closer. With `ipo` it is that paper's τ."""
    loss_type: Loss | Annotated[list[Loss], Field(min_length=1)] = "sigmoid"
    """The loss, or several that are added. `sigmoid` is DPO's own."""
    loss_weights: list[float] | None = None
    """A weight for each of several losses; 1 without it."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Share of pairs that are thought to be the wrong way round, for `robust`, `exo_pair`, `aot` and `aot_unpaired`."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """How distance from the reference is measured."""
    f_alpha_divergence_coef: float = 0.5
    """α of `alpha_divergence`."""
    ld_alpha: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """Weight of what a longer answer says beyond the length of the shorter one; without it all counts."""
    use_weighting: bool = False
    """Weigh pairs by how probable the model finds them (WPO)."""
    discopop_tau: Annotated[float, Field(gt=0)] = 0.05
    """Temperature of `discopop`."""

    @property
    def losses(self) -> list[str]:
        """The losses as a list."""
        return [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)

    @model_validator(mode="after")
    def _fits_its_losses(self) -> DpoSection:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.losses):
            raise ValueError(f"loss_weights has {len(self.loss_weights)} weights for {len(self.losses)} losses")
        if "exo_pair" in self.losses and not self.label_smoothing:
            raise ValueError("loss_type: exo_pair needs label_smoothing above 0; its paper recommends 1e-3")
        if self.f_divergence_type != "reverse_kl" and (other := set(self.losses) - _OF_DIFFERENCES):
            raise ValueError(f"f_divergence_type: {min(other)} is defined for reverse_kl alone")
        if self.use_weighting and {"aot", "aot_unpaired"} & set(self.losses):
            raise ValueError("use_weighting: aot and aot_unpaired sort pairs, so that none has a weight of its own")
        return self


PREFERENCE_METHODS: Mapping[str, type[Section]] = {
    "dpo": DpoSection,
    "kto": KtoSection,
    "orpo": OrpoSection,
    "simpo": SimpoSection,
}
"""Methods that learn from better and worse answers, and their sections, which have the method's name."""


REFERENCE_FREE = ("orpo", "simpo")
"""Those that compare with no reference."""


def with_method(values: Any) -> Any:
    """A recipe's values before they are checked: preferences are padded, so packing is off unless it is asked for."""
    values = with_rollouts(values)
    training = values.get("training") if isinstance(values, Mapping) else None
    if isinstance(training, Mapping) and training.get("method") in PREFERENCE_METHODS and "packing" not in training:
        return {**values, "training": {**training, "packing": False}}
    return values


def misfits(recipe: Any) -> Iterator[Misfit]:
    """What the other sections say that the method cannot do."""
    training = recipe.training
    if training.lr_scheduler_kwargs and training.lr_scheduler_type.startswith("constant"):
        yield Misfit("training.lr_scheduler_kwargs", f"{training.lr_scheduler_type} has no options; remove the line")
    if training.neftune_noise_alpha and recipe.mtp.enabled:
        yield Misfit("training.neftune_noise_alpha", "a head would learn from the noise; set mtp.enabled: false")
    if recipe.model.row_tokens:
        field = "model.new_tokens" if recipe.model.new_tokens else "model.trained_tokens"
        if recipe.mtp.enabled:
            yield Misfit(field, "a head cannot be trained beside rows of tokens; set mtp.enabled: false")
        if recipe.placement.embedding == "host":
            yield Misfit("placement.embedding", f"{field} trains rows of the embedding; set it to device")
    if recipe.lora.use_dora and recipe.quantization.linears != "none":
        yield Misfit("lora.use_dora", "PEFT takes the norm of the weights as they are; set quantization.linears: none")
    if training.optim == SCHEDULE_FREE:
        yield from _of_no_schedule(training)
    yield from _of_single_answers(training)
    method, metric, read = recipe.training.method, recipe.eval.metric, recipe.data.format
    yield from rollout_misfits(recipe)
    for name, section in PREFERENCE_METHODS.items():
        if name != method and getattr(recipe, name) != section():
            yield Misfit(name, f"is for training.method: {name}; remove it, or set that")
    if read == "unpaired" and method != "kto":
        yield Misfit("data.format", "unpaired is for training.method: kto")
    if method in PREFERENCE_METHODS:
        yield from _of_preferences(recipe)
    if method in (*PREFERENCE_METHODS, *ROLLOUTS):
        return
    methods = ", ".join(PREFERENCE_METHODS)
    if read == "preference":
        yield Misfit("data.format", f"preference is for training.method: {methods}")
    if metric in PAIR_METRICS:
        yield Misfit("eval.metric", f"{metric} is for training.method: {methods}")


def _of_no_schedule(training: Any) -> Iterator[Misfit]:
    """Of an optimizer that needs no schedule and warms up by itself: a share of steps reaches it as so many steps."""
    if training.lr_scheduler_type != "constant":
        yield Misfit("training.lr_scheduler_type", f"{SCHEDULE_FREE} takes the place of a schedule; set it to constant")
    if 0 < training.warmup_steps < 1:
        yield Misfit("training.warmup_steps", f"{SCHEDULE_FREE} warms up by whole steps; give 0, or 1 and more")


def _of_single_answers(training: Any) -> Iterator[Misfit]:
    """Of losses that other methods would pass over, and that exclude each other."""
    smoothing = training.label_smoothing_factor
    for field, is_set in (("loss_type", training.loss_type != "nll"), ("label_smoothing_factor", smoothing > 0)):
        if is_set and training.method != "sft":
            own = "; its loss has dpo.label_smoothing" if training.method == "dpo" and smoothing else ""
            yield Misfit(f"training.{field}", f"is for training.method: sft{own}; remove the line")
    if smoothing and training.loss_type == "dft":
        yield Misfit("training.label_smoothing_factor", "dft weighs labels as they are; remove one of the two")


def _of_preferences(recipe: Any) -> Iterator[Misfit]:
    """Of a method that learns from better and worse answers."""
    data, training, method = recipe.data, recipe.training, recipe.training.method
    if training.packing:
        yield Misfit("training.packing", "pairs are padded, never packed; remove the line")
    if recipe.mtp.enabled:
        yield Misfit("mtp.enabled", "a head learns from single answers; set training.method: sft, or remove the line")
    if recipe.lora.lora_dropout:
        yield Misfit("lora.lora_dropout", "model and reference are compared without dropout; remove the line")
    if data.format not in ("auto", "preference", "unpaired"):
        reads = "preference or unpaired" if method == "kto" else "preference"
        yield Misfit("data.format", f"{data.format} has no rejected answers; training.method: {method} reads {reads}")
    for field, only in (("train_on", "all"), ("assistant_only_loss", True), ("completion_only_loss", True)):
        if getattr(data, field) != only:
            yield Misfit(f"data.{field}", "of a pair the answers count and nothing else; remove the line")
    if method == "kto" and recipe.kto.loss_type == "kto" and training.per_device_train_batch_size == 1:
        yield Misfit(
            "training.per_device_train_batch_size",
            "kto estimates its distance from the reference by the other answers of a batch; set 2 or more",
        )
    if method == "kto" and recipe.eval.metric == PAIR_METRICS[0]:
        yield Misfit("eval.metric", f"{PAIR_METRICS[0]} needs pairs in every batch; kto has {PAIR_METRICS[1]}")
