"""Planning: devices, placement, what fits and what would, without a weight or a connection."""

from __future__ import annotations

import itertools
import json
import resource
from pathlib import Path
from typing import Any

import pytest

from toolkit.errors import RecipeError, ResourceError
from toolkit.offload.place import resident_bytes, share_of, spread, streamed
from toolkit.plan import (
    Device,
    Plan,
    StepShape,
    choose_device,
    device_memory,
    devices,
    free_memory,
    make_plan,
    parse_bytes,
)
from toolkit.plan.budget import Budget
from toolkit.plan.cards import CARDS
from toolkit.plan.duration import Duration
from toolkit.plan.shapes import published
from toolkit.plan.steps import StepBytes, step_spec, trained_rows
from toolkit.recipe import Recipe, parse

MODEL = "allenai/OLMoE-1B-7B-0924-Instruct"


def recipe(**sections: dict[str, Any]) -> Recipe:
    text = json.dumps({"model": {"model_name_or_path": MODEL}, "data": {"train": "none"}, **sections})
    return parse(text)


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's bytes by a rule that is quick: its own tests rehearse."""

    def step(self: Budget, wanted: Recipe) -> StepBytes:
        assert isinstance(wanted.training.max_length, int)
        assert isinstance(wanted.lora.r, int)
        kept = 1 if wanted.training.gradient_checkpointing else 8
        saved = kept * wanted.training.max_length * (1 << 18)
        return StepBytes(saved + wanted.lora.r * (40 << 20), saved, saved)

    monkeypatch.setattr(Budget, "step", step)


@pytest.mark.parametrize(("text", "size"), [("12GiB", 12 << 30), ("12 gb", 12 << 30), ("1.5g", 3 << 29)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-3g", "0", "12 apples"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="is not a size; write 12GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("name", "card"), [("rtx-3060", "rtx-3060-12gb"), ("RTX 4090", "rtx-4090"), ("5090", "rtx-5090")]
)
def test_cards_are_found_as_people_write_them(name: str, card: str) -> None:
    assert choose_device(name).card is CARDS[card]


def test_an_unknown_card_is_one_line_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"--device: rtx-4900 is not known; did you mean .*rtx-4090"):
        choose_device("rtx-4900")


def test_memory_takes_the_place_of_the_cards() -> None:
    assert choose_device("rtx-4090", "12GiB").memory == 12 << 30
    assert choose_device(None, "12GiB").kind == "cuda"


@pytest.mark.parametrize("count", range(6))
def test_streamed_layers_are_spread_evenly(count: int) -> None:
    layers = {f"layer{number}": 10 + number for number in range(5)}
    placement = spread(layers, count, "host")
    away = [list(layers).index(name) for name in streamed(placement)]
    assert len(away) == count
    assert all(later - earlier in {5 // count, -(-5 // count)} for earlier, later in itertools.pairwise(away))
    stay, slots = resident_bytes(layers, placement)
    assert stay == sum(size for number, size in enumerate(layers.values()) if number not in away)
    assert slots == min(2, count) * max((10 + number for number in away), default=0)
    assert share_of(layers, 0.41) == 3


def test_auto_streams_the_fewest_layers_that_make_it_fit() -> None:
    whole = make_plan(recipe(), device=Device("cuda", "large", 1 << 40))
    assert set(whole.placement.values()) == {"resident"}
    need = whole.bytes.total
    made = make_plan(recipe(), device=Device("cuda", "small", need - (1 << 30)))
    away = streamed(made.placement)
    assert made.fits
    assert {made.placement[name] for name in away} == {"host"}
    budget = Budget(MODEL, "main", Device("cuda", "small", need - (1 << 30)), made.dtype, made.backend, "auto")
    assert not budget.fits(made.recipe, spread(dict.fromkeys(made.placement, 0), len(away) - 1, "host"))


def test_a_processor_streams_from_the_disk_and_a_small_host_too() -> None:
    share = recipe(placement={"share": 0.5})
    cpu = make_plan(share, device=Device("cpu", "cpu", 1 << 40, None, 1 << 40))
    card = make_plan(share, device=Device("cuda", "card", 1 << 40, None, 1 << 30))
    for made in (cpu, card):
        assert sorted(set(made.placement.values())) == ["disk", "resident"]
        assert len(streamed(made.placement)) == 8
        assert made.disk["int8 file"] > 0


def test_micro_batches_that_wait_are_counted_where_layers_are_streamed() -> None:
    def activations(**training: Any) -> int:
        made = make_plan(
            recipe(placement={"share": share}, training=training) if share else recipe(training=training),
            device=Device("cpu", "cpu", 1 << 40, None, 1 << 40),
        )
        return made.bytes.activations

    share = 0.0
    assert activations(gradient_accumulation_steps=4) == activations()
    share = 0.5
    saved = 1024 * (1 << 18)  # as `counted` has it
    assert activations(gradient_accumulation_steps=4) == activations() + 3 * saved


def test_later_micro_batches_have_the_gradients_of_earlier_ones_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(bare: int, micro: int) -> int:
        monkeypatch.setattr(Budget, "step", lambda *_: StepBytes(1 << 30, 0, bare))
        made = make_plan(
            recipe(training={"gradient_accumulation_steps": micro}), device=Device("cpu", "cpu", 1 << 40, None, 1 << 40)
        )
        return made.bytes.gradients + made.bytes.activations

    gradients = make_plan(recipe(), device=Device("cpu", "cpu", 1 << 40)).bytes.gradients
    assert counted(900 << 20, 1) == 1 << 30
    assert counted(900 << 20, 2) == gradients + (900 << 20)
    assert counted(1 << 20, 2) == 1 << 30


def test_as_many_micro_batches_go_together_as_fit_with_the_least_traffic() -> None:
    def planned(memory: int, micro: int = 8) -> Plan:
        training = {"gradient_accumulation_steps": micro, "max_length": 2048}
        return make_plan(recipe(training=training), device=Device("cuda", "card", memory))

    least = planned(1 << 40).bytes.total
    kinds = set()
    for memory in range(least - (5 << 30), least, 1 << 28):
        made = planned(memory)
        away, passes = len(streamed(made.placement)), -(-8 // made.micro_batches_per_pass)
        if not made.fits:
            continue
        kinds.add(made.micro_batches_per_pass)
        budget = Budget(MODEL, "main", Device("cuda", "card", memory), made.dtype, made.backend, "auto")
        for count in range(1, 17):  # no other split moves less
            other = spread(dict.fromkeys(made.placement, 0), count, "host")
            if budget.fits(made.recipe, other):
                assert away * passes <= count * -(-8 // budget.micro_batches_per_pass(made.recipe, other))
    assert len(kinds) > 2


def test_evaluation_is_counted_where_the_data_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, int]] = []

    def answer(self: Budget, wanted: Recipe, kind: str) -> StepBytes:
        found = step_spec(wanted, self.shape_for(wanted), device="cuda", dtype=self.dtype, backend="any", kind=kind)
        asked.append((kind, found.batch, found.length))
        return StepBytes({"loss": 1, "generate": wanted.eval.batch_size}[kind] << 30)

    monkeypatch.setattr(Budget, "_answer", answer)
    device = Device("cuda", "card", 12 << 30)
    held_out = StepShape(512, 511, 400, 100, 60)
    short = recipe(eval={"batch_size": 4, "max_new_tokens": 8}, training={"per_device_eval_batch_size": 6})
    made = make_plan(short, device=device, shape=held_out)
    assert asked[:2] == [("loss", 6, 400), ("generate", 4, 68)]
    assert made.bytes.evaluation == (4 << 30) - made.bytes.gradients - made.bytes.activations
    assert make_plan(short, device=device).bytes.evaluation == 0
    long = make_plan(recipe(eval={"batch_size": 9}, placement={"experts": "resident"}), device=device, shape=held_out)
    assert not long.fits
    assert long.changes[0].what == "eval.batch_size=1 training.per_device_eval_batch_size=1"


def test_a_folder_says_its_own_bytes() -> None:
    """The quickstart's model, which is in bfloat16 in this repository."""
    folder = Path(__file__).parents[3] / "recipes" / "quickstart" / "nano-qwen3moe-2m"
    made = make_plan(recipe(model={"model_name_or_path": str(folder)}), device=Device("cpu", "cpu", 1 << 40))
    assert made.stored is not None
    assert made.stored.is_here
    assert made.stored.dtypes.keys() == {"BF16"}
    assert made.disk["download"] == 0
    elsewhere = make_plan(recipe(), device=Device("cpu", "cpu", 1 << 40))
    assert elsewhere.disk["download"] == pytest.approx(2 * 6.92e9, rel=0.01)


def test_free_memory_obeys_the_limits_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_memory("cpu")
    assert 0 < free <= device_memory("cpu")
    unlimited, used = resource.RLIM_INFINITY, devices._fields("/proc/self/status")
    for limited, field in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        limits = dict.fromkeys((resource.RLIMIT_DATA, resource.RLIMIT_AS), (unlimited, unlimited))
        limits[limited] = (used[field] + (8 << 20), unlimited)
        monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
        assert free_memory("cpu") <= 8 << 20


def test_what_is_to_be_resident_is_never_streamed() -> None:
    made = make_plan(recipe(placement={"experts": "resident"}), device=Device("cuda", "small", 6 << 30))
    assert set(made.placement.values()) == {"resident"}
    assert not made.fits
    assert len(made.changes) == 3
    for change in made.changes:
        sections: dict[str, dict[str, Any]] = {"placement": {"experts": "resident"}}
        for word in change.what.split():
            key, _, value = word.partition("=")
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = value if not value[0].isdigit() else json.loads(value)
        if sections["placement"]["experts"] == "resident":
            sections["placement"] = {"experts": "resident"}
        again = make_plan(recipe(**sections), device=Device("cuda", "small", 6 << 30))
        # The share is printed with two digits, and whole layers are streamed.
        assert again.bytes.total <= change.total * 1.03
    with pytest.raises(ResourceError, match=r"training needs .* GiB, small has 6\.0 GiB; cheapest: "):
        made.require_fit()


def test_a_budget_below_the_minimum_is_one_line() -> None:
    made = make_plan(recipe(), device=Device("cuda", "tiny", 1 << 30))
    assert made.changes == ()
    with pytest.raises(ResourceError, match="take a smaller model or a larger device") as caught:
        made.require_fit()
    assert "\n" not in str(caught.value)


def test_auto_rank_and_length_are_the_largest_that_fit() -> None:
    resident = {"experts": "resident"}
    device = Device("cuda", "card", 14 << 30)
    made = make_plan(recipe(lora={"r": "auto"}, placement=resident), device=device)
    assert made.fits
    assert made.recipe.lora.r in (16, 32)
    above = recipe(lora={"r": 2 * made.recipe.lora.r}, placement=resident)
    assert not make_plan(above, device=device).fits
    assert any(note.startswith("lora.r: ") and "does not" in note for note in made.notes)
    long = make_plan(recipe(training={"max_length": "auto"}, placement=resident), device=Device("cuda", "c", 11 << 30))
    assert long.fits
    assert (
        not make_plan(
            recipe(training={"max_length": long.recipe.training.max_length + 128}, placement=resident),
            device=Device("cuda", "c", 11 << 30),
        ).fits
        or long.recipe.training.max_length == 4096
    )
    needed = make_plan(
        recipe(training={"max_length": "auto"}), device=Device("cuda", "c", 1 << 40), shape=StepShape(700, 10)
    )
    assert needed.recipe.training.max_length == 700
    assert any("enough for the data" in note for note in needed.notes)


def test_time_has_a_limit_that_a_slower_bus_and_more_streaming_raise() -> None:
    card = CARDS["rtx-4090"]
    plans = [
        make_plan(recipe(placement={"share": share}), device=Device("cuda", card.name, 1 << 40, card))
        for share in (0.25, 0.5)
    ]
    bus = [made.duration.bus for made in plans if made.duration]
    assert bus[1] == pytest.approx(2 * bus[0])
    for made in plans:
        assert made.duration is not None
        assert made.duration.estimate > made.duration.limit


def test_a_heads_time_is_in_the_plan() -> None:
    """Its linears over all tokens and its logits where there is a target, once for every depth; or its own answers."""
    card = CARDS["rtx-4090"]
    device = Device("cuda", card.name, 1 << 40, card)

    def duration(labelled: int, **mtp: object) -> Duration:
        made = make_plan(recipe(mtp={"stage": "with", **mtp}), device=device, shape=StepShape(512, labelled))
        assert made.duration is not None
        return made.duration

    def arithmetic(labelled: int, **mtp: object) -> float:
        return duration(labelled, **mtp).arithmetic

    none = arithmetic(512)
    one, few, hard = (
        arithmetic(512, enabled=True),
        arithmetic(128, enabled=True),
        arithmetic(512, enabled=True, loss="ce"),
    )
    assert none < few < hard < one
    assert arithmetic(512, enabled=True, depth=3) - none == pytest.approx(3 * (one - none))
    assert one - few == pytest.approx(3 * 384 / 512 * (one - hard))
    assert arithmetic(512, enabled=True, stage="after") == none < arithmetic(512, enabled=True, own_answers=0)
    answers = [duration(512, enabled=True, own_answers=count).afterwards for count in (0, 64, 128, 256)]
    assert answers[0] == duration(512).afterwards == 0
    assert 0 < answers[1] < answers[2] < answers[3] == duration(512, enabled=True).afterwards


@pytest.mark.parametrize("name", published())
def test_published_shapes_need_no_connection_and_no_path_is_told(name: str) -> None:
    made = make_plan(
        parse(json.dumps({"model": {"model_name_or_path": name}, "data": {"train": "none"}})),
        device=Device("cuda", "card", 1 << 40),
    )
    told = json.dumps(made.to_dict())
    assert "/work" not in told
    assert str(made.folder) not in told
    assert json.loads(told)["bytes"]["total"] == made.bytes.total


def test_prompts_are_counted_once_where_answers_share_them() -> None:
    training = {"method": "grpo", "per_device_train_batch_size": 8, "packing": False, "max_length": 600}
    rewards, options = {"functions": ["exact_match"]}, {"num_generations": 4, "max_completion_length": 100}
    told = recipe(training=training, rewards=rewards, grpo=options)
    shape = StepShape(300, 100)
    assert trained_rows(told, shape, 4096) == (2, 199 + 4 * 101, 400, 4)
    assert trained_rows(told, shape, 299) == (8, 300, 100, 1)
    apart = recipe(training=training, rewards=rewards, grpo={**options, "steps_per_generation": 2})
    assert trained_rows(apart, shape, 4096) == (8, 300, 100, 1)
    pairs = recipe(training={"method": "dpo", "per_device_train_batch_size": 2})
    assert trained_rows(pairs, shape, 4096) == (4, 300, 100, 1)
    assert trained_rows(pairs, StepShape(300, 100, pair=380, pair_labelled=180), 4096) == (2, 380, 180, 2)
