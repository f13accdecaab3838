"""A model on a device: how many bytes a recipe takes there, asked as often as a search needs.

Shapes are read once; a step's bytes are asked for once for each choice that changes them (`toolkit.plan.steps`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from toolkit.errors import PackingError, cannot_pack, first_line, first_sentence
from toolkit.mtp.cost import MOST_STATES, drafting_bytes, head_step_bytes, most_answers, own_step_bytes
from toolkit.offload.place import most_micro_batches_per_pass, share_of, spread, streamed
from toolkit.plan.devices import Device
from toolkit.plan.duration import Duration, step_duration
from toolkit.plan.memory import Bytes, count_bytes
from toolkit.plan.shapes import Shapes, is_published, published_config, read_record, recorded_shapes
from toolkit.plan.stacks import room_for_stacks, stack_bytes
from toolkit.plan.steps import StepBytes, StepShape, StepSpec, cache_bytes, cached_bytes, rehearsed, step_spec
from toolkit.recipe import Recipe, rollout_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Budget"]

_HOST_SHARE = 0.8
"""Of a host's memory that pinned expert stacks may take."""
_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass
class Budget:
    """Sizes of one model under one device, dtype and backend."""

    name: str
    revision: str
    device: Device
    dtype: str
    backend: str
    attn: str
    counts_steps: bool = True
    shape: StepShape | None = None
    """Longest sequence and labels of the data at hand; without it every position of `max_length` carries a label."""
    note: str = ""
    """Why activations are estimated, where they are not counted."""
    _held: dict[StepSpec, StepBytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._record = read_record(self.name) if is_published(self.name, self.revision) else {}
        self.shapes: Shapes = recorded_shapes(self._record) or self._shapes()

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model on the meta device; it needs torch, which a plan of a published model does without."""
        return self._skeleton()

    def _shapes(self) -> Shapes:
        from toolkit.plan.skeletons import shapes_of

        return shapes_of(self.model)

    def _skeleton(self) -> PreTrainedModel:
        from toolkit.plan.skeletons import shape_of

        return shape_of(self.name, self.revision, self.attn)

    @cached_property
    def _config(self) -> str:
        """What tells this model's steps from another's."""
        if is_published(self.name, self.revision):
            return json.dumps(published_config(self.name), sort_keys=True)
        values = {key: value for key, value in self.model.config.to_dict().items() if not key.startswith("_name")}
        return json.dumps(values, sort_keys=True, default=str)

    @property
    def model_types(self) -> set[str]:
        """What the config calls itself, and its text part."""
        if is_published(self.name, self.revision):
            config = published_config(self.name)
            return {config["model_type"], config.get("text_config", {}).get("model_type", config["model_type"])}
        return {self.model.config.model_type, self.model.config.get_text_config().model_type}

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the compute dtype."""
        return _ITEMSIZE[self.dtype]

    @property
    def layers(self) -> tuple[str, ...]:
        """MoE layers' names."""
        return tuple(layer.name for layer in self.shapes.architecture.layers)

    def bytes(self, recipe: Recipe, placement: Mapping[str, str] | None = None) -> Bytes:
        """Of a recipe with rank and length decided; all stacks resident where no placement is given."""
        placement = placement or self._resident()
        return self._bytes(recipe, placement, self.micro_batches_per_pass(recipe, placement))

    def micro_batches_per_pass(self, recipe: Recipe, placement: Mapping[str, str]) -> int:
        """The most micro-batches that fit when they go through a streamed layer before the next: each waits once."""
        most = most_micro_batches_per_pass(recipe) if self.counts_steps and streamed(placement) else 1
        room = (self._bytes(recipe, placement, count).total <= self.device.free for count in range(most, 1, -1))
        return next((most - number for number, fits in enumerate(room) if fits), 1)

    def _bytes(self, recipe: Recipe, placement: Mapping[str, str], per_pass: int = 1, *, counts: bool = True) -> Bytes:
        counts = counts and self.counts_steps
        return count_bytes(
            self.shapes,
            recipe,
            placement,
            device=self.device.kind,
            itemsize=self.itemsize,
            step=self.step(recipe) if counts else StepBytes(0),
            evaluating=self.evaluating(recipe) if counts else 0,
            micro_batches_per_pass=per_pass,
            learning=self._learning(recipe) if counts else 0,
        )

    def stacks(self, recipe: Recipe, first: Collection[str] = ()) -> dict[str, int]:
        """MoE layer to the bytes of its stacks; where a budget leaves them open, those of `first` are int8 first."""
        return stack_bytes(self.shapes, recipe.quantization.experts, self.itemsize, first)

    def _learning(self, recipe: Recipe) -> int:
        """What a multi-token-prediction head holds while it learns from a batch, the data's or its own answers'."""
        numbers, shape, batch = self.shapes.numbers, self.shape_for(recipe), recipe.training.per_device_train_batch_size
        if not recipe.mtp.enabled or "head_parameters" not in numbers:
            return 0
        head = numbers["head_parameters"], numbers["hidden_size"], numbers["vocab_size"]
        layers, device, most = recipe.mtp.num_mtp_layers, self.device.kind, recipe.training.max_length
        assert isinstance(most, int)
        depth, answer = max(recipe.mtp.depth, layers), recipe.eval.max_new_tokens
        if not recipe.mtp.reads_data:
            longest = (shape.prompt or most) + answer
            learning = own_step_bytes(
                *head, tokens=batch * most, length=longest, answer=answer, depth=depth, layers=layers, device=device
            )
            states = 4 * most_answers(recipe) * longest * numbers["hidden_size"]
            return learning + (min(states, MOST_STATES) if shape.prompt and device == "cpu" else 0)
        labelled = batch * shape.labelled
        return head_step_bytes(
            *head, batch=batch, length=shape.length, labelled=labelled, depth=depth, layers=layers, device=device
        )

    def _resident(self) -> dict[str, str]:
        return spread(dict.fromkeys(self.layers, 0), 0, "resident")

    def fits(self, recipe: Recipe, placement: Mapping[str, str] | None = None) -> bool:
        """Whether the device has the bytes. What stands is looked at first: counting a step may take seconds."""
        placement, memory = placement or self._resident(), self.device.free
        return self._bytes(recipe, placement, counts=False).total <= memory and (
            self._bytes(recipe, placement).total <= memory
        )

    def place(self, recipe: Recipe) -> dict[str, str]:
        """MoE layer to resident, host or disk: what the recipe says, or what fits with the least traffic."""
        wanted, sizes = recipe.placement, self.stacks(recipe)
        if wanted.experts == "resident" or recipe.quantization.experts == "none":
            return spread(sizes, 0, "resident")
        if wanted.share is not None:
            count = share_of(sizes, wanted.share)
            return spread(sizes, count, self._place(wanted.experts, sizes, count))
        if self.fits(recipe):
            return self._resident()
        everything = spread(sizes, len(sizes), self._place(wanted.experts, sizes, len(sizes)))
        if not self.fits(recipe, everything):
            return self._resident() if wanted.experts == "auto" else everything
        return self._fewest_streamed(recipe, sizes)

    def _fewest_streamed(self, recipe: Recipe, sizes: Mapping[str, int]) -> dict[str, str]:
        """The fewest layers whose copies computation hides well; else those that cross the bus least often.

        More layers streamed leave room for more micro-batches in each pass. On a card without known rates nobody knows
        what is hidden.
        """
        micro, found = recipe.training.gradient_accumulation_steps, []
        for placement, per_pass in self._streamings(recipe, sizes):
            count = len(streamed(placement))
            duration = self.duration(recipe, placement, per_pass)
            if duration is not None and duration.hides_copies:
                return placement
            found.append((count * math.ceil(micro / per_pass), count, placement))
        return min(found, key=lambda each: each[:2])[2]

    def _streamings(self, recipe: Recipe, sizes: Mapping[str, int]) -> Iterator[tuple[dict[str, str], int]]:
        """Placements that fit, fewest layers streamed first, each with the most micro-batches that fit in a pass."""
        most = most_micro_batches_per_pass(recipe)
        beside = [self._bytes(recipe, self._resident(), count) for count in range(1, most + 1)]
        rests = [counted.total - counted.experts for counted in beside]
        for count in range(1, len(sizes) + 1):
            placement = spread(sizes, count, self._place(recipe.placement.experts, sizes, count))
            kind = recipe.quantization.experts
            room = self.device.free - sum(room_for_stacks(self.shapes, kind, self.itemsize, placement))
            if per_pass := sum(rest <= room for rest in rests):
                yield placement, per_pass

    def duration(self, recipe: Recipe, placement: Mapping[str, str], per_pass: int) -> Duration | None:
        """Of an optimizer step on a card whose rates are known, so many micro-batches in each pass."""
        if self.device.card is None or not self.counts_steps:
            return None
        shape, sizes = self.shape_for(recipe), self._bytes(recipe, placement, per_pass)
        stacks = self.stacks(recipe, streamed(placement))
        return step_duration(
            self.shapes,
            recipe,
            self.device.card,
            sizes,
            stacks,
            placement,
            sizes.adapter // 4,
            shape,
            per_pass,
        )

    def step(self, recipe: Recipe) -> StepBytes:
        """What a training step holds."""
        return self._answer(recipe, "train")

    def evaluating(self, recipe: Recipe) -> int:
        """Most bytes of a pass over held-out examples and of answers, 0 where there are none or nobody has looked.

        Where the model writes what it learns from, of those answers too.
        """
        if not self.counts_steps or (self.shape is None and rollout_options(recipe) is None):
            return 0
        shape = self.shape_for(recipe)
        kinds = {"rollouts": shape.length} if rollout_options(recipe) else {}
        kinds |= {"loss": shape.held_out, "generate": shape.prompt}
        peaks = {kind: self._answer(recipe, kind).peak for kind, longest in kinds.items() if longest}
        if "rollouts" in peaks:
            peaks["rollouts"] += self._drafting(recipe)
        return max(peaks.values(), default=0)

    def _drafting(self, recipe: Recipe) -> int:
        """What a multi-token-prediction head that drafts the answers adds to their writing."""
        options, numbers = rollout_options(recipe), self.shapes.numbers
        if options is None or not recipe.mtp.enabled:
            return 0
        length, rows = self.shape_for(recipe).length, options.at_once(recipe.training)
        sizes = numbers["hidden_size"], numbers["vocab_size"]
        return drafting_bytes(*sizes, rows=rows, length=length, count=recipe.mtp.depth)

    def shape_for(self, recipe: Recipe) -> StepShape:
        """What the data need, and no more than the recipe's length."""
        length = recipe.training.max_length
        assert isinstance(length, int)
        if self.shape is None:
            return StepShape(length, length - 1 if length > 1 else 1)
        return self.shape.within(length)

    def _answer(self, recipe: Recipe, kind: str) -> StepBytes:
        spec = step_spec(
            recipe,
            self.shape_for(recipe),
            device=self.device.kind,
            dtype=self.dtype,
            backend=self.backend,
            kind=kind,
            shared_length=self.shapes.numbers.get("shared_length", 0),
        )
        answers = [self._held_by(replace(spec, experts=kind), recipe) for kind in self._kinds(recipe)]
        return StepBytes(*(max(sizes) for sizes in zip(*map(astuple, answers), strict=True)))

    def _kinds(self, recipe: Recipe) -> list[str]:
        """What stacks are in, as far as a step's bytes are asked for; of kept kinds, the one that most are in."""
        if recipe.quantization.budget is not None:
            return sorted(set(self.shapes.stacks.values()) or {"int4", "int8"})
        counts = Counter(self.shapes.stacks.values()).most_common(1)
        return [kind for kind, _ in counts] or [recipe.quantization.experts]

    def _held_by(self, spec: StepSpec, recipe: Recipe) -> StepBytes:
        if spec not in self._held:
            self._held[spec] = cached_bytes(spec, self._config, self._record) or self._rehearse(recipe, spec)
        return self._held[spec]

    def _rehearse(self, recipe: Recipe, spec: StepSpec) -> StepBytes:
        try:
            held = rehearsed(self._skeleton(), spec)
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError) as error:
            if cannot_pack(error):
                raise PackingError(first_sentence(error)) from None
            # A family whose forward asks tensors for numbers cannot be rehearsed; it can still be trained.
            self.note = f"activations estimated: this family's step cannot be simulated ({first_line(error)[:80]})"
            return _estimate(self.shapes.numbers, spec, self.itemsize)
        cache_bytes(spec, self._config, held)
        return held

    def _place(self, wanted: str, sizes: Mapping[str, int], count: int) -> str:
        if wanted != "auto":
            return wanted
        if self.device.kind == "cpu":
            return "disk"
        need = count * max(sizes.values(), default=0)
        has_room = self.device.host_memory is None or need <= _HOST_SHARE * self.device.host_memory
        return "host" if has_room else "disk"


def _estimate(numbers: Mapping[str, int], spec: StepSpec, itemsize: int) -> StepBytes:
    """By rule of thumb: 34 values a token and hidden unit in a layer (Korthikanti et al. 2022), 2 where recomputed."""
    tokens, layers = spec.length * spec.batch, numbers["num_hidden_layers"]
    a_layer = tokens * numbers["hidden_size"] * itemsize
    kept = 0 if spec.kind != "train" else layers * (2 if spec.checkpointing else 34)
    return StepBytes(a_layer * (kept + 34) + 12 * tokens * numbers["vocab_size"], a_layer * kept)
