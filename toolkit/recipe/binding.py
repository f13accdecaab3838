"""What a change of each recipe field means for a run that has begun: as data, one row a field.

A run goes on bit by bit only under the recipe that began it. Fields that change what is learnt bind the run; others may
change, and are then listed. A field without a row binds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pydantic import BaseModel

from toolkit.recipe.schema import Recipe

__all__ = ["EFFECTS", "Change", "Effect", "changes", "effect_of", "flat"]


class Effect(Enum):
    """What a changed field does to a run that goes on."""

    BINDS = "changes what is learnt"
    CONTENT = "the weights or examples that it gives are checked by hash"
    LENGTH = "moves the end of the run, and so the remaining learning rates"
    FREE = "changes nothing that is learnt"


EFFECTS: Mapping[str, Effect] = {
    "model.model_name_or_path": Effect.CONTENT,
    "model.revision": Effect.CONTENT,
    "model.tokenizer_name_or_path": Effect.CONTENT,
    "model.merge_base": Effect.FREE,
    "model.dtype": Effect.BINDS,
    "model.attn_implementation": Effect.BINDS,
    "model.new_tokens": Effect.BINDS,
    "model.trained_tokens": Effect.BINDS,
    "quantization.*": Effect.BINDS,
    "lora.*": Effect.BINDS,
    "mtp.*": Effect.BINDS,
    "placement.*": Effect.BINDS,
    "placement.embedding": Effect.FREE,
    "data.train": Effect.CONTENT,
    "data.validation": Effect.FREE,
    "data.validation_size": Effect.CONTENT,
    "data.name": Effect.CONTENT,
    "data.train_split": Effect.CONTENT,
    "data.validation_split": Effect.FREE,
    "data.group_by": Effect.CONTENT,
    "data.remove_columns": Effect.CONTENT,
    "data.dedupe": Effect.CONTENT,
    "data.format": Effect.CONTENT,
    "data.columns": Effect.CONTENT,
    "data.system_prompt": Effect.CONTENT,
    "data.chat_template_path": Effect.CONTENT,
    "data.chat_template_kwargs": Effect.CONTENT,
    "data.thoughts": Effect.CONTENT,
    "data.train_on": Effect.CONTENT,
    "data.assistant_only_loss": Effect.CONTENT,
    "data.completion_only_loss": Effect.CONTENT,
    "data.truncation": Effect.CONTENT,
    "data.on_invalid": Effect.CONTENT,
    "data.max_samples": Effect.CONTENT,
    "data.shuffle": Effect.CONTENT,
    "training.output_dir": Effect.FREE,
    "training.method": Effect.BINDS,
    "training.loss_type": Effect.BINDS,
    "training.label_smoothing_factor": Effect.BINDS,
    "training.num_train_epochs": Effect.LENGTH,
    "training.max_steps": Effect.LENGTH,
    "training.per_device_train_batch_size": Effect.BINDS,
    "training.gradient_accumulation_steps": Effect.BINDS,
    "training.max_length": Effect.BINDS,
    "training.packing": Effect.BINDS,
    "training.learning_rate": Effect.BINDS,
    "training.loraplus_lr_ratio": Effect.BINDS,
    "training.lr_scheduler_type": Effect.BINDS,
    "training.lr_scheduler_kwargs": Effect.BINDS,
    "training.warmup_steps": Effect.BINDS,
    "training.weight_decay": Effect.BINDS,
    "training.max_grad_norm": Effect.BINDS,
    "training.neftune_noise_alpha": Effect.BINDS,
    "training.max_nonfinite_steps": Effect.FREE,
    "training.optim": Effect.BINDS,
    "training.adam_beta1": Effect.BINDS,
    "training.adam_beta2": Effect.BINDS,
    "training.gradient_checkpointing": Effect.FREE,
    "training.activation_offloading": Effect.FREE,
    "training.router_aux_loss_coef": Effect.BINDS,
    "training.logging_steps": Effect.FREE,
    "training.eval_steps": Effect.FREE,
    "training.per_device_eval_batch_size": Effect.FREE,
    "training.save_steps": Effect.FREE,
    "training.save_total_limit": Effect.FREE,
    "training.seed": Effect.BINDS,
    "training.dataloader_num_workers": Effect.FREE,
    "training.load_best_model_at_end": Effect.BINDS,
    "training.early_stopping_patience": Effect.BINDS,
    "training.use_cpu": Effect.BINDS,
    "dpo.*": Effect.BINDS,
    "rewards.functions": Effect.BINDS,
    "rewards.columns": Effect.BINDS,
    "rewards.time_limit": Effect.FREE,
    "rewards.memory_limit": Effect.FREE,
    "grpo.*": Effect.BINDS,
    "rloo.*": Effect.BINDS,
    "kto.*": Effect.BINDS,
    "orpo.*": Effect.BINDS,
    "simpo.*": Effect.BINDS,
    "eval.*": Effect.FREE,
    "tracking.*": Effect.FREE,
    "hub.*": Effect.FREE,
}
"""By `section.field`, or `section.*` where a section has one answer."""


@dataclass(frozen=True)
class Change:
    """A field that differs between two recipes."""

    field: str
    before: Any
    now: Any
    effect: Effect

    def __str__(self) -> str:
        return f"{self.field}: {_shown(self.before)} -> {_shown(self.now)}"


def effect_of(field: str) -> Effect:
    """The effect of a change of `section.field`."""
    section = field.partition(".")[0]
    return EFFECTS.get(field) or EFFECTS.get(f"{section}.*") or Effect.BINDS


def flat(recipe: Recipe) -> dict[str, Any]:
    """Values by `section.field`; the Hub token is left out."""
    values = recipe.model_dump(exclude={"hub": {"hub_token"}})
    return {f"{section}.{name}": value for section, fields in values.items() for name, value in fields.items()}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Fields that differ, in the order of the recipe; a field that one side does not know counts with its default."""
    defaults = _defaults()
    names = dict.fromkeys([*now, *before])
    pairs = ((name, before.get(name, defaults.get(name)), now.get(name, defaults.get(name))) for name in names)
    return [Change(name, old, new, effect_of(name)) for name, old, new in pairs if old != new]


def _defaults() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for section, info in Recipe.model_fields.items():
        if isinstance(kind := info.annotation, type) and issubclass(kind, BaseModel):
            found |= {f"{section}.{name}": field.default for name, field in kind.model_fields.items()}
    return found


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
