"""Training examples under published and made-up chat templates, against a reference that knows nothing of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from scripts.parity.template_cases import CASES, Case
from scripts.parity.template_families import Family, find_families, special_tokens_in
from scripts.parity.template_judge import (
    FAILURES,
    UNTRAINED,
    Outcome,
    counts,
    judge,
    judge_family,
    reference_of,
    renderer_for,
)
from scripts.parity.template_masks import measured, trl_examples, trl_families
from scripts.parity.template_reference import Exact
from scripts.parity.template_renderer import Renderer
from scripts.parity.templates import LEAST, passes

OWN = Path(__file__).parent / "templates"
FAMILIES = {family.name: family for family in [*trl_families(), *find_families(str(OWN))]}
BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("name", FAMILIES)
def test_examples_are_what_inference_feeds_and_the_model_answers(name: str) -> None:
    cells = judge_family(FAMILIES[name], CASES)
    wrong = [f"{cell.case}: {cell.status}: {cell.line}" for cell in cells if cell.status in FAILURES]
    assert not wrong, "\n".join(wrong)
    tally = counts(cells)
    rest = [f"{cell.case}: {cell.status}: {cell.line}" for cell in cells if cell.renderable and cell.status != "exact"]
    assert tally["exact of renderable"] >= LEAST * tally["renderable"], "\n".join(rest)


def test_the_matrix_is_wide() -> None:
    assert len(FAMILIES) >= 55
    assert {"glm4moe", "gptoss", "qwen3", "qwen3_5_think", "channels", "no_closer"} <= set(FAMILIES)


@cache
def _renderer(name: str) -> Renderer:
    return renderer_for(FAMILIES[name])[0]


def _right(form: Exact) -> Outcome:
    """The right examples of a row, one a turn."""
    turns = [(turn.prompt, turn.targets[0]) for turn in form.turns]
    return Outcome(tuple((p + t, (UNTRAINED,) * len(p) + t) for p, t in turns))


def _changed(outcome: Outcome, change: Callable[[list[int], list[int]], object]) -> Outcome:
    """`outcome` with its last example's tokens and labels changed in place."""
    *others, (ids, labels) = outcome.examples
    new_ids, new_labels = list(ids), list(labels)
    change(new_ids, new_labels)
    return replace(outcome, examples=(*others, (tuple(new_ids), tuple(new_labels))))


def _end_untrained(ids: list[int], labels: list[int]) -> None:
    labels[-1] = UNTRAINED


def _prompt_trained(ids: list[int], labels: list[int]) -> None:
    first = next(at for at, label in enumerate(labels) if label != UNTRAINED)
    labels[first - 1] = ids[first - 1]


def _begun_twice(ids: list[int], labels: list[int]) -> None:
    ids.insert(0, ids[0])
    labels.insert(0, UNTRAINED)


def _line_end_after(ids: list[int], labels: list[int]) -> None:
    ids.append(ids[0])
    labels.append(UNTRAINED)


def _shifted(ids: list[int], labels: list[int]) -> None:
    labels.insert(0, labels.pop())


def _other_token(ids: list[int], labels: list[int]) -> None:
    ids[-2], labels[-2] = ids[-3], labels[-3]


@pytest.mark.parametrize(
    "change", [_end_untrained, _prompt_trained, _begun_twice, _line_end_after, _shifted, _other_token]
)
@pytest.mark.parametrize("name", ["qwen2_5", "glm4moe", "gptoss", "gemma3", "llama3_1"])
def test_the_judge_calls_wrong_examples_silent(name: str, change: Callable[[list[int], list[int]], object]) -> None:
    renderer, case = _renderer(name), BY_NAME["plain"]
    reference = reference_of(renderer, case)
    right = _right(reference.forms[0])
    assert judge(renderer, case, reference, right).status == "exact"
    cell = judge(renderer, case, reference, _changed(right, change))
    assert cell.status == "silent"
    assert cell.line


def test_the_judge_misses_no_turn_and_no_second_example() -> None:
    renderer, case = _renderer("last_thought"), BY_NAME["thoughts"]
    reference = reference_of(renderer, case)
    right = _right(reference.forms[0])
    assert judge(renderer, case, reference, right).status == "exact"
    for wrong in (right.examples[:1], (*right.examples, right.examples[-1])):
        assert judge(renderer, case, reference, Outcome(wrong)).status == "silent"


def test_the_judge_wants_one_example_where_one_is_enough() -> None:
    renderer, case = _renderer("qwen2_5"), BY_NAME["turns"]
    reference = reference_of(renderer, case)
    cell = judge(renderer, case, reference, _right(reference.forms[0]))
    assert cell.status == "silent"
    assert "one holds the same" in cell.line


@pytest.mark.parametrize(
    ("name", "case", "told"),
    [
        ("no_thoughts", "thought", "the thought is left out"),
        ("drops_system", "system again", "a later system turn is left out"),
        ("opened_thought", "plain", "an empty thought is closed"),
        ("model_role", "white space", "white space around answers is trimmed"),
    ],
)
def test_the_judge_wants_what_a_template_changes_to_be_told(name: str, case: str, told: str) -> None:
    renderer = _renderer(name)
    reference = reference_of(renderer, BY_NAME[case])
    right = _one_if_enough(renderer, BY_NAME[case], _right(reference.forms[0]))
    assert judge(renderer, BY_NAME[case], reference, right).status == "silent"
    assert judge(renderer, BY_NAME[case], reference, replace(right, notices=("3 examples",))).status == "silent"
    assert judge(renderer, BY_NAME[case], reference, replace(right, notices=(told,))).status in {"exact", "noticed"}


def _one_if_enough(renderer: Renderer, case: Case, outcome: Outcome) -> Outcome:
    """The examples of several turns as one, where each begins with the one before it."""
    merged = [outcome.examples[0]]
    for ids, labels in outcome.examples[1:]:
        before, old = merged[-1]
        if ids[: len(before)] == before:
            merged[-1] = (ids, (*old, *labels[len(before) :]))
        else:
            merged.append((ids, labels))
    return replace(outcome, examples=tuple(merged))


def test_the_judge_tells_refusals_from_crashes() -> None:
    renderer = _renderer("qwen2_5")
    plain, thought = BY_NAME["plain"], BY_NAME["thought"]
    refusal = Outcome(refusal="no")
    assert judge(renderer, plain, reference_of(renderer, plain), refusal).status == "refused"
    assert judge(renderer, thought, reference_of(renderer, thought), refusal).status == "n/a"
    crash = judge(renderer, plain, reference_of(renderer, plain), replace(refusal, crashed=True))
    assert crash.status == "crashed"
    assert not passes([crash])


def test_a_notice_of_exact_rows_explains_no_difference() -> None:
    def make(renderer: Renderer, case: Case) -> Outcome:
        right = replace(_right(reference_of(renderer, case).forms[0]), notices=("1 row read",))
        return right if case.name == "plain" else _changed(right, _end_untrained)

    cells = judge_family(FAMILIES["qwen2_5"], [BY_NAME["plain"], BY_NAME["unicode"]], make)
    assert [cell.status for cell in cells] == ["exact", "silent"]


def test_targets_end_as_the_families_do() -> None:
    ends = {
        ("no_closer", "call"): ["<|observation|>", "<|user|>"],
        ("channels", "call"): ["<|call|>", "<|return|>"],
        ("model_role", "call"): ["<start_function_response>", "<end_of_turn>"],
        ("last_eos", "turns"): ["<|endoftext|>"] * 3,
        ("whole_eos", "plain"): ["<|end|>"],
        ("call_ids", "plain"): ["<|close|>"],
        ("gptoss", "call"): ["<|call|>", "<|return|>"],
        ("cohere2", "plain"): ["<|END_OF_TURN_TOKEN|>"],
    }
    for (name, case), wanted in ends.items():
        turns = reference_of(_renderer(name), BY_NAME[case]).forms[0].turns
        assert [_renderer(name).tokenizer.convert_ids_to_tokens(turn.targets[0][-1]) for turn in turns] == wanted, name


def test_ends_that_are_in_no_list_are_learnt() -> None:
    wanted = {
        "channels": (["<|return|>"], ["<|call|>", "<|return|>"]),
        "no_closer": (["<|endoftext|>"], ["<|observation|>", "<|user|>"]),
        "model_role": (["<eos>"], ["<start_function_response>", "<end_of_turn>"]),
    }
    for name, (stops, ends) in wanted.items():
        family = replace(FAMILIES[name], side={**FAMILIES[name].side, "stop_tokens": stops})
        renderer, _ = renderer_for(family)
        turns = reference_of(renderer, BY_NAME["call"]).forms[0].turns
        assert [renderer.tokenizer.convert_ids_to_tokens(turn.targets[0][-1]) for turn in turns] == ends, name


def test_special_tokens_are_found_by_their_look() -> None:
    special, kept = special_tokens_in("<|im_start|>{{ '<think>' }}[INST]</s><｜User｜> <b> [x] a < b<|'+role")
    assert {"<|im_start|>", "[INST]", "</s>", "<｜User｜>"} <= set(special)
    assert kept == ["<think>"]
    assert not {"<b>", "[x]"} & set(special)


def test_a_template_without_a_side_file_stops_at_what_closes_a_turn() -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|close|>{% endfor %}"
    renderer, said = renderer_for(Family("bare", template + "{% if add_generation_prompt %}<|assistant|>{% endif %}"))
    assert renderer.stops == ("<|close|>",)
    assert "guessed" in said


def test_what_trl_trains_is_measured() -> None:
    renderer, case = _renderer("qwen2_5"), BY_NAME["turns"]
    renderer.tokenizer.chat_template = renderer.template
    form = reference_of(renderer, case).forms[0]
    theirs = measured(form, trl_examples(renderer, case))
    assert theirs["rows"] == 1
    assert theirs["history"] == theirs["ender"] == 3
    assert theirs["trained"] == measured(form, _right(form))["trained"] + theirs["over"]
