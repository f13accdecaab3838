"""What makes a run fit: `auto` settled from a device's bytes, and the three cheapest changes where it does not fit.

Cheap is what costs least of what the user wants: first time, then examples' length, then the adapter's capacity.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from toolkit.offload.place import spread
from toolkit.plan.budget import Budget
from toolkit.plan.memory import has_own_table
from toolkit.recipe import Recipe

__all__ = ["Change", "cheapest_changes", "nearest_change", "settle"]

_RANKS = (64, 32, 16, 8)
_SHORTEST = 128
_MOST = 3
_LONGEST = 32768
"""Where neither data nor model say less: longer than what a card of this kind trains."""


@dataclass(frozen=True)
class Change:
    """Overrides that make a run fit, as they are typed; what they cost; and the bytes then needed."""

    what: str
    costs: str
    total: int


def settle(recipe: Recipe, budget: Budget) -> tuple[Recipe, list[str]]:
    """The recipe with `auto` rank and length decided, rank first, and a line of reason for each."""
    notes: list[str] = []
    if recipe.training.max_length == "auto":
        rank = _RANKS[-1] if recipe.lora.r == "auto" else recipe.lora.r
        length, why = _longest(_with(recipe, "lora", r=rank), budget)
        recipe = _with(recipe, "training", max_length=length)
        notes.append(f"training.max_length: {length}, {why}")
    if recipe.lora.r == "auto":
        fitting = [r for r in _RANKS if _fits(_with(recipe, "lora", r=r), budget)]
        chosen = fitting[0] if fitting else _RANKS[-1]
        above = [r for r in _RANKS if r > chosen]
        why = f"the largest that fits: {above[-1]} does not" if above else "the largest tried, and it fits"
        notes.append(f"lora.r: {chosen}, {why if fitting else 'the smallest tried, and it does not fit'}")
        recipe = _with(recipe, "lora", r=chosen)
    return recipe, notes


def cheapest_changes(recipe: Recipe, budget: Budget) -> tuple[Change, ...]:
    """Up to three changes, each of which makes the run fit, the cheapest first."""
    found: list[Change] = []
    for what, costs, changed in _candidates(recipe, budget):
        total = budget.bytes(changed, budget.place(changed)).total
        if total <= budget.device.free and what not in {change.what for change in found}:
            found.append(Change(what, costs, total))
        if len(found) == _MOST:
            break
    return tuple(found)


def nearest_change(recipe: Recipe) -> str:
    """The cheapest change there is left, whether or not it suffices."""
    for what, _, _ in (*_for_time(recipe), *_shorter(recipe), *_lower(recipe)):
        return what
    return "a smaller model"


def _candidates(recipe: Recipe, budget: Budget) -> Iterator[tuple[str, str, Recipe]]:
    """Single changes, then those that cost only time together with each of the others."""
    cheap, words = recipe, []
    if budget.evaluating(recipe):
        words = ["eval.batch_size=1", "training.per_device_eval_batch_size=1"]
        cheap = _with(_with(recipe, "eval", batch_size=1), "training", per_device_eval_batch_size=1)
        yield " ".join(words), "evaluation takes longer", cheap
    for what, costs, changed in (*_for_time(recipe), *_off_the_card(recipe, budget)):
        yield what, costs, changed
        section, _, rest = what.partition(".")
        key, _, value = rest.partition("=")
        cheap = _with(cheap, section, **{key: _typed(value)})
        words.append(what)
    if len(words) > 1:
        yield " ".join(words), "time and some precision", cheap
    yield from _streamed(recipe, budget, "")
    for start, prefix in ((recipe, ""), (cheap, " ".join(words))):
        for what, costs, changed in (*_shorter(start), *_lower(start)):
            yield f"{prefix} {what}".strip(), costs, changed
        if prefix:
            yield from _streamed(start, budget, prefix)
    shortest = _with(cheap, "training", max_length=min(_SHORTEST, int(recipe.training.max_length)))
    small = _with(shortest, "lora", r=min(_RANKS[-1], int(recipe.lora.r)))
    words += [f"training.max_length={small.training.max_length}", f"lora.r={small.lora.r}"]
    yield " ".join(words), "length and capacity", small
    yield from _streamed(small, budget, " ".join(words))


def _for_time(recipe: Recipe) -> Iterator[tuple[str, str, Recipe]]:
    if recipe.quantization.experts == "none":
        yield (
            "quantization.experts=int8",
            "0.3 to 0.8% expert output error",
            _with(recipe, "quantization", experts="int8"),
        )
    if not recipe.training.gradient_checkpointing:
        changed = _with(recipe, "training", gradient_checkpointing=True)
        yield "training.gradient_checkpointing=true", "one extra forward per step", changed
    if "8bit" not in recipe.training.optim:
        changed = _with(recipe, "training", optim="paged_adamw_8bit")
        yield "training.optim=paged_adamw_8bit", "optimizer moments in 8 bit", changed


def _off_the_card(recipe: Recipe, budget: Budget) -> Iterator[tuple[str, str, Recipe]]:
    is_movable = has_own_table(budget.shapes) and not recipe.model.row_tokens
    if budget.device.kind == "cuda" and recipe.placement.embedding == "device" and is_movable:
        changed = _with(recipe, "placement", embedding="host")
        yield "placement.embedding=host", "one wait for the card each pass", changed


def _streamed(recipe: Recipe, budget: Budget, prefix: str) -> Iterator[tuple[str, str, Recipe]]:
    if recipe.quantization.experts == "none" or recipe.placement.experts == "auto":
        return
    layers, place = budget.layers, "disk" if budget.device.kind == "cpu" else "host"
    for count in range(1, len(layers) + 1):
        if budget.fits(recipe, spread(dict.fromkeys(layers, 0), count, place)):
            share = count / len(layers)
            changed = _with(recipe, "placement", experts=place, share=share)
            words = f"placement.experts={place} placement.share={share:.2f}"
            yield f"{prefix} {words}".strip(), f"{count} of {len(layers)} layers cross the bus in each pass", changed
            return


def _shorter(recipe: Recipe) -> Iterator[tuple[str, str, Recipe]]:
    length = int(recipe.training.max_length) // 2
    while length >= _SHORTEST:
        costs = f"examples over {length} tokens are dropped or cut"
        yield f"training.max_length={length}", costs, _with(recipe, "training", max_length=length)
        length //= 2


def _lower(recipe: Recipe) -> Iterator[tuple[str, str, Recipe]]:
    for rank in _RANKS:
        if rank < int(recipe.lora.r):
            yield f"lora.r={rank}", f"rank {rank} instead of {recipe.lora.r}", _with(recipe, "lora", r=rank)


def _longest(recipe: Recipe, budget: Budget) -> tuple[int, str]:
    """The longest of 128, 256, 384, … that fits, found by halving."""
    model = budget.shapes.numbers.get("max_position_embeddings") or _LONGEST
    needed = budget.shape.length if budget.shape else _LONGEST
    most, reason = min((needed, "enough for the data"), (model, "the model's limit"), (_LONGEST, "the longest tried"))
    if most <= _SHORTEST or _fits(_with(recipe, "training", max_length=most), budget):
        return most, f"{reason}, and it fits"
    low, high = 1, most // _SHORTEST + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = _fits(_with(recipe, "training", max_length=middle * _SHORTEST), budget)
        low, high = (middle, high) if fits else (low, middle)
    return low * _SHORTEST, f"the longest that fits in steps of {_SHORTEST}"


def _fits(recipe: Recipe, budget: Budget) -> bool:
    return budget.fits(recipe, budget.place(recipe))


def _with(recipe: Recipe, section: str, **values: Any) -> Recipe:
    changed = getattr(recipe, section).model_copy(update=values)
    return recipe.model_copy(update={section: changed})


def _typed(value: str) -> Any:
    return {"true": True}.get(value, value)
