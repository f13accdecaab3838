"""A budget of bytes for expert stacks: never exceeded, never left unused, planned as what is loaded."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import MODEL
from tests.unit.plan.test_plan import counted, recipe
from tests.unit.quant.test_storage import tiny
from toolkit.errors import ModelError, RecipeError
from toolkit.offload.place import resident_bytes, spread
from toolkit.plan import Plan, choose_device, make_plan
from toolkit.plan.shapes import Shapes
from toolkit.plan.skeletons import shape_of, shapes_of
from toolkit.plan.stacks import Choice, mixture_of, room_for_stacks, stack_bytes, with_budget, with_stacks
from toolkit.quant import load_int8, quantize_checkpoint
from toolkit.recipe.sizes import size_of, size_text

__all__ = ["counted"]

QWEN = "Qwen/Qwen3-30B-A3B-Instruct-2507"


@pytest.fixture(scope="module")
def shapes() -> Shapes:
    """Of the embedded model: four layers."""
    return shapes_of(shape_of(str(MODEL)))


def plan(budget: str, model: str = QWEN, **sections: Any) -> Plan:
    quantization = {"experts": "int4", "budget": budget}
    asked = recipe(model={"model_name_or_path": model}, quantization=quantization, **sections)
    return make_plan(asked, device=choose_device("rtx-5090"))


def test_the_plan_says_how_many_layers_are_int8_before_it_is_known_which() -> None:
    resident = {"experts": "resident"}
    made = plan("20GiB", placement=resident)
    assert made.choice is not None
    assert made.mixture is not None
    count = len(made.choice.by_gain(dict.fromkeys(made.choice.extra, 0.0)))
    assert made.mixture.stacks == {"int4": 96 - 2 * count, "int8": 2 * count}
    assert f"expert stacks int4 {96 - 2 * count}, int8 {2 * count} of 96; " in str(made.mixture)
    assert 4.3 < made.mixture.bits < 8.1
    assert made.bytes.experts <= 20 << 30 < made.bytes.experts + max(made.choice.extra.values())
    assert any("before step 1 the loss is measured with each of 48 layers" in note for note in made.notes)
    assert made.duration is not None
    assert made.duration.beforehand > 0
    assert made.to_dict()["mixture"]["stacks"] == made.mixture.stacks
    chosen = tuple(made.choice.extra)[:count]
    known = make_plan(made.recipe, device=choose_device("rtx-5090"), stacks=made.choice.kinds(chosen))
    assert known.choice is None
    assert known.bytes == made.bytes
    assert known.mixture == replace(made.mixture, is_chosen=True)
    assert known.duration is not None
    assert known.duration.beforehand == 0


def test_too_little_is_refused_with_what_suffices_and_enough_for_all_is_said() -> None:
    with pytest.raises(RecipeError, match=r"quantization.budget: 2GiB: with every layer in int4 .* take \d+MiB; give"):
        plan("2GiB")
    for text, kind, note in (
        ("40GiB", "int8", "holds every expert stack in int8"),
        (smallest(), "int4", "no layer in"),
    ):
        made = plan(text)
        assert made.choice is None
        assert set(made.stacks.values()) == {kind}
        assert any(note in each for each in made.notes)


def smallest() -> str:
    """What the refusal says suffices."""
    try:
        plan("1MiB")
    except RecipeError as error:
        return str(error).partition("take ")[2].partition(";")[0]
    raise AssertionError


def test_a_budget_is_never_exceeded_and_leaves_nothing_out_that_fits(shapes: Shapes) -> None:
    draw = random.Random(0)
    least, most = (sum(stack_bytes(shapes, how, 4).values()) for how in ("int4", "int8"))
    for _ in range(200):
        budget = draw.randint(least, most)
        _, choice, _ = with_budget(shapes, str(budget))
        if choice is None:
            continue
        gains = {layer: draw.gauss(0, 1) for layer in choice.extra}
        chosen = choice.by_gain(gains)
        taken = sum(stack_bytes(with_stacks(shapes, choice.kinds(chosen)), "int4", 4).values())
        assert taken <= budget
        assert all(taken + extra > budget for layer, extra in choice.extra.items() if layer not in chosen)
        assert min(gains[layer] for layer in chosen) >= max(g for layer, g in gains.items() if layer not in chosen)


def test_layers_of_different_sizes_are_taken_by_what_a_byte_gains() -> None:
    draw = random.Random(1)
    for _ in range(200):
        extra = {f"layer {number}": draw.randint(1, 50) for number in range(draw.randint(1, 9))}
        choice = Choice({}, extra, draw.randint(0, 150))
        gains = {layer: draw.choice([-1.0, 0.0, 0.5, 2.0]) for layer in extra}
        chosen = choice.by_gain(gains)
        left = choice.room - sum(extra[layer] for layer in chosen)
        assert left >= 0
        assert all(size > left for layer, size in extra.items() if layer not in chosen)
        assert chosen == choice.by_gain(dict(gains))
        best = max(extra, key=lambda layer: gains[layer] / extra[layer])
        assert best in chosen or extra[best] > choice.room
    equal = Choice({}, dict.fromkeys("abc", 5), 10)
    assert equal.by_gain(dict.fromkeys("abc", 0.1)) == ("a", "b")


@pytest.mark.parametrize("count", range(5))
def test_streamed_layers_need_no_more_than_planned_whichever_are_int8(shapes: Shapes, count: int) -> None:
    least, most = (sum(stack_bytes(shapes, how, 4).values()) for how in ("int4", "int8"))
    open_, choice, _ = with_budget(shapes, str((least + most) // 2))
    assert choice is not None
    layers = tuple(choice.extra)
    placement = spread(dict.fromkeys(layers, 0), count, "host")
    planned = room_for_stacks(open_, "int4", 4, placement)
    found = []
    for first in layers:
        for second in layers:
            if first < second:
                known = with_stacks(shapes, choice.kinds((first, second)))
                assert room_for_stacks(known, "int4", 4, placement) == resident_bytes(
                    stack_bytes(known, "int4", 4), placement
                )
                found.append(room_for_stacks(known, "int4", 4, placement))
    assert planned == (max(staying for staying, _ in found), max(slots for _, slots in found))


@pytest.mark.parametrize("chosen", [(), (1,), (0, 3)])
def test_the_plan_counts_the_bytes_that_are_loaded(chosen: tuple[int, ...]) -> None:
    made = plan("1.2MiB", str(MODEL))
    assert made.choice is not None
    stacks = made.choice.kinds([f"model.layers.{number}.mlp.experts" for number in chosen])
    known = make_plan(made.recipe, device=choose_device(use_cpu=True), stacks=stacks, for_training=False)
    _, coverage = load_int8(str(MODEL), experts="int4", stacks=stacks)
    assert known.bytes.experts == coverage.expert_bytes
    assert known.mixture is not None
    assert known.mixture.stacks == coverage.stacks_stored


def test_a_stack_that_cannot_hold_four_bits_is_int8_from_the_beginning(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "moe_intermediate_size": 96, "intermediate_size": 96, "head_dim": 32}
    folder = tiny(tmp_path / "float", "qwen3_moe", **sizes)
    found = shapes_of(shape_of(str(folder)))
    least, most = (sum(stack_bytes(found, how, 4).values()) for how in ("int4", "int8"))
    open_, choice, _ = with_budget(found, str((least + most) // 2))
    assert choice is not None
    assert mixture_of(open_).stacks == {"int4": 1, "int8": 3}
    stacks = choice.kinds(choice.by_gain(dict.fromkeys(choice.extra, 0.0)))
    _, coverage = load_int8(str(folder), experts="int4", stacks=stacks)
    assert coverage.stacks_stored == {"int4": 1, "int8": 3}
    assert coverage.expert_bytes == sum(stack_bytes(with_stacks(found, stacks), "int4", 4).values())


def test_stacks_of_another_model_are_refused(shapes: Shapes) -> None:
    _, choice, _ = with_budget(shapes, "1.2MiB")
    assert choice is not None
    stacks = choice.kinds(())
    for wrong in (dict(list(stacks.items())[1:]), {**stacks, "another": "int8"}, dict.fromkeys(stacks, "int3")):
        with pytest.raises(ModelError, match="are not this model's"):
            with_stacks(shapes, wrong)
    half = {**stacks, next(iter(stacks)): "int8"}  # a layer is one or the other
    with pytest.raises(ModelError, match="are not this model's"):
        with_stacks(shapes, half)


@pytest.mark.parametrize(
    ("budget", "experts", "words"),
    [
        ("16GiB", "int8", "set experts: int4"),
        ("16GiB", "mxfp4", "set experts: int4"),
        ("16 apples", "int4", "16 apples is not a size; write 12GiB"),
        ("0", "int4", "0 is not a size"),
        ("-3g", "int4", "-3g is not a size"),
        (1.5, "int4", "budget"),
        (True, "int4", "budget"),
    ],
)
def test_wrong_budgets_are_one_line(budget: Any, experts: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        recipe(quantization={"experts": experts, "budget": budget})
    assert "\n" not in str(caught.value)


def test_a_budget_for_what_is_rounded_already_is_refused(tmp_path: Path) -> None:
    quantize_checkpoint(str(MODEL), tmp_path / "int4", experts="int4")
    with pytest.raises(RecipeError, match=r"int4 is rounded already; remove the line, or take the checkpoint"):
        plan("1.2MiB", str(tmp_path / "int4"))


@pytest.mark.parametrize("size", [1, 1023, 1025, (100 << 20) - 1, 100 << 20, 15_247_343_616, 3 << 40])
def test_a_size_that_is_told_is_enough_when_it_is_typed(size: int) -> None:
    assert size <= size_of(size_text(size)) <= size * 1.01 + 1024
