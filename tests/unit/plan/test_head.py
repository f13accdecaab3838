"""What a plan counts of a multi-token-prediction head: its parameters to the last one, and what it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from tests.harness.families import build
from tests.parity.conftest import COMMON, EMBEDDED, FAMILIES
from toolkit.mtp.build import new_head
from toolkit.mtp.cost import HEAD_BYTES, head_step_bytes, own_step_bytes
from toolkit.plan import Plan, make_plan
from toolkit.quant import load_int8
from toolkit.recipe import parse


def planned(model: Path, **mtp: Any) -> Plan:
    recipe = parse(
        f"model: {{model_name_or_path: '{model}'}}\ndata: {{train: none}}\n"
        "training: {max_length: 64, use_cpu: true}\n"
        f"mtp: {{{', '.join(f'{key}: {value}' for key, value in mtp.items())}}}\n"
    )
    return make_plan(recipe)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_the_parameters_of_a_new_head_are_counted_to_the_last(family: str, tmp_path: Path) -> None:
    build(CONFIG_MAPPING[family](**{**COMMON, **FAMILIES[family]})).save_pretrained(tmp_path)
    head = new_head(load_int8(str(tmp_path))[0])
    expected = HEAD_BYTES * sum(p.numel() for p in head.parameters())
    assert planned(tmp_path, enabled="true", stage="with").bytes.mtp == expected
    after = planned(tmp_path, enabled="true").bytes
    assert after.mtp in {expected, expected // 4}  # before it learns there is no gradient and no moment


def test_what_it_holds_while_it_learns_is_planned() -> None:
    beside = {"enabled": "true", "stage": "with"}
    without, one, three = (planned(EMBEDDED, **mtp).bytes for mtp in ({}, beside, {**beside, "depth": 3}))
    assert without.mtp == 0
    assert without.activations <= one.activations < three.activations
    assert one.total > without.total + one.mtp - 1


def test_afterwards_it_has_the_room_of_the_steps() -> None:
    """What it holds while it learns from own answers counts only where the steps hold less."""
    without, after, beside = (
        planned(EMBEDDED, **mtp).bytes
        for mtp in ({}, {"enabled": "true"}, {"enabled": "true", "stage": "with", "own_answers": 0})
    )
    assert without.total < after.total < beside.total
    sizes = {"tokens": 4096, "answer": 32, "layers": 1, "device": "cpu"}
    short, long, far = (
        own_step_bytes(1 << 20, 256, 4096, length=length, depth=depth, **sizes)
        for length, depth in ((64, 1), (2048, 1), (64, 3))
    )
    assert long < short < far  # fewer rows of long prompts


def test_repeated_layers_hold_more_than_layers_of_their_own() -> None:
    sizes = {"batch": 1, "length": 512, "labelled": 100, "device": "cpu"}
    repeated, own = (head_step_bytes(1 << 20, 256, 4096, depth=3, layers=layers, **sizes) for layers in (1, 3))
    assert repeated - own == 22 * 512**2 * (2 + 3)
