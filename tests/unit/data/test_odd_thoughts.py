"""Thoughts where none belong, and options that are none: told or refused, in one line, never dropped without a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import Run, onecard, recipe
from tests.faults.test_wrong_input import fails
from toolkit.data import Batches
from toolkit.errors import DataError
from toolkit.labels import IGNORED

__all__ = ["onecard", "recipe"]

ASKED = {"role": "user", "content": "hi there"}
ANSWER = {"role": "assistant", "content": "good day"}
SHOWS_THOUGHTS = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}
{%- endif %}{{- m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""

PREFILLS = """\
{%- for m in messages[:-1] if m.role == 'user' or not loop.last %}{{ '<|im_start|>' + m.role + '\n' }}
{{- m.content.split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}
{%- set last = messages[-1] %}
{%- if last.role == 'user' %}{{ '<|im_start|>user\n' + last.content + '<|im_end|>\n' }}{% endif %}
{%- if add_generation_prompt or last.role == 'assistant' %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}
{%- if last.role == 'assistant' %}{{ last.content + '<|im_end|>\n' }}{% endif %}"""
"""It writes a last answer behind the opening of a thought, as it stands."""


def row(*turns: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": list(turns), **columns}


def notices(batches: Batches) -> list[str]:
    return [text for text, count in batches.report.notices.items() if count]


@pytest.mark.parametrize("thought", [5, ["because"], {"steps": 1}, True])
@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_that_is_no_text_is_refused(build: Callable[..., Batches], key: str, thought: Any) -> None:
    with pytest.raises(DataError, match=rf"data\.jsonl:1: messages\[1\]: {key} is .*; a thought is text"):
        build([row(ASKED, {**ANSWER, key: thought})])
    build([row(ASKED, {**ANSWER, key: None})])


TOLD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "of a user": ({"thinking": "because"}, {}, "a turn that is not the assistant's"),
    "two keys": ({}, {"reasoning_content": "one", "thinking": "two"}, "two different thoughts; the first of reasoning"),
    "key and tags": ({}, {"reasoning": "one", "content": "<think>two</think>ok"}, "both are trained"),
    "not closed": ({}, {"content": "<think>because"}, "does not close it"),
}


@pytest.mark.parametrize(("asked", "answer", "words"), TOLD.values(), ids=TOLD)
def test_odd_thoughts_are_told(build: Callable[..., Batches], asked: Any, answer: Any, words: str) -> None:
    rows = [row({**ASKED, **asked}, {**ANSWER, **answer})]
    told = [notice for notice in notices(build(rows, chat_template=SHOWS_THOUGHTS)) if words in notice]
    assert len(told) == 1
    kept_out = notices(build(rows, chat_template=SHOWS_THOUGHTS, thoughts="drop"))
    assert not [notice for notice in kept_out if words in notice]


def test_the_same_thought_under_two_keys_is_not_odd(build: Callable[..., Batches]) -> None:
    answer = {**ANSWER, "reasoning_content": "because", "thinking": "because "}
    assert notices(build([row(ASKED, answer)], chat_template=SHOWS_THOUGHTS)) == []


def test_an_empty_thought_that_only_the_prompt_has_is_fed(
    build: Callable[..., Batches], trained: Callable[..., list[str]], tokenizer: Any
) -> None:
    rows = [row(ASKED, ANSWER, ASKED, ANSWER)]
    batches = build(rows, chat_template=SHOWS_THOUGHTS, chat_template_kwargs={"enable_thinking": False})
    # The first answer stands without the empty thought before the second.
    assert [trained(batches, index) for index in range(len(batches.train))] == [["good day<|im_end|>"]] * 2
    assert all("<think>\n\n</think>\n\ngood" in tokenizer.decode(each["input_ids"]) for each in batches.train)
    assert any("training uses inference's prompt" in notice for notice in notices(batches))
    thinks = [row(ASKED, {**ANSWER, "reasoning_content": "because"})]
    with pytest.raises(DataError, match="leaves out the thought"):
        build(thinks, chat_template=SHOWS_THOUGHTS, chat_template_kwargs={"enable_thinking": False})


@pytest.mark.parametrize("option", ["messages", "tools", "add_generation_prompt", "chat_template", "max_length"])
def test_what_is_no_option_of_a_template_is_refused(build: Callable[..., Batches], option: str) -> None:
    with pytest.raises(DataError, match=rf"^data\.chat_template_kwargs: {option} cannot be set here; remove it$"):
        build([row(ASKED, ANSWER)], chat_template_kwargs={option: 1})


def test_no_template_for_the_thoughts_names_both_ways_out(build: Callable[..., Batches]) -> None:
    with pytest.raises(DataError, match=r"data\.chat_template_path, or leave .* data\.thoughts: drop"):
        build([row(ASKED, {**ANSWER, "reasoning_content": "because"})])


BAD: dict[str, tuple[list[dict[str, Any]], list[str], int, str]] = {
    "an option that is no mapping": ([], ["data.chat_template_kwargs=false"], 2, "data.chat_template_kwargs"),
    "a misspelt field": ([], ["data.chat_template_kwarg={a: 1}"], 2, "did you mean chat_template_kwargs?"),
    "another choice of turns": ([], ["data.train_on=first"], 2, "data.train_on: should be 'all' or 'last'"),
    "tools that are no JSON": ([row(ASKED, ANSWER, tools="[{look}")], [], 3, "tools: text that is not JSON"),
    "a mark as text": ([row(ASKED, {**ANSWER, "train": "false"})], [], 3, "train is 'false'"),
    "half a weight": ([row(ASKED, {**ANSWER, "weight": 0.5})], [], 3, "weight is 0.5"),
    "tool turns alone": ([row({"role": "tool", "content": "r"})], [], 3, "no assistant turn"),
    "a row's options that are a list": ([row(ASKED, ANSWER, chat_template_kwargs=[1])], [], 3, "an object is expected"),
    "an answer that is a number": ([row(ASKED, {**ANSWER, "content": 42})], [], 3, "content is int 42"),
    "a row of 2 MB": ([row({**ASKED, "content": "word " * 400_000}, ANSWER)], [], 3, "longer than max_length: 1"),
}


@pytest.mark.parametrize(("rows", "overrides", "code", "words"), BAD.values(), ids=BAD)
def test_preview_says_in_a_line_what_cannot_be_used(
    onecard: Run, recipe: Path, tmp_path: Path, rows: list[Any], overrides: list[str], code: int, words: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows or [row(ASKED, ANSWER)]))
    fails(onecard("preview", recipe, f"data.train={path}", *overrides), code, words)


TEMPLATES: dict[str, tuple[str, str]] = {
    "a tag that closes another": ("{# a #}\n" * 6 + "{% if messages %}\n{% endfor %}", "chat template, line 8: "),
    "no such filter": ("{% for m in messages %}{{ m.content | nosuch }}{% endfor %}", "'nosuch'; it is not valid"),
    "no system turns": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}",
        "rows.jsonl:1: the chat template refuses it: No system role",
    ),
}


@pytest.mark.parametrize(("template", "words"), TEMPLATES.values(), ids=TEMPLATES)
def test_preview_names_what_is_wrong_with_a_template(
    onecard: Run, recipe: Path, tmp_path: Path, template: str, words: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row({"role": "system", "content": "be kind"}, ASKED, ANSWER)))
    (tmp_path / "chat.jinja").write_text(template)
    overrides = [f"data.train={tmp_path}/rows.jsonl", f"data.chat_template_path={tmp_path}/chat.jinja"]
    fails(onecard("preview", recipe, *overrides), 3, words)


@pytest.mark.parametrize(
    ("answer", "trained", "words"),
    [
        ({}, "\n</think>\n\ngood day<|im_end|>", "an empty one is closed before it"),
        ({"reasoning_content": "because"}, "because\n</think>\n\ngood day<|im_end|>", "it is opened once"),
    ],
)
def test_a_thought_that_the_prompt_opens_is_opened_once_and_closed(
    build: Callable[..., Batches], tokenizer: Any, answer: dict[str, str], trained: str, words: str
) -> None:
    batches = build([row(ASKED, {**ANSWER, **answer})], chat_template=PREFILLS)
    (example,) = batches.train
    assert tokenizer.decode([label for label in example["labels"] if label != IGNORED]) == trained
    assert tokenizer.decode(example["input_ids"]).count("<think>") == 1
    assert [notice for notice in notices(batches) if words in notice]


TRIMS = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' + m.content.lstrip('\\n') }}
{%- else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}"""
"""What it cuts before an answer it writes itself, as the end of an empty thought."""


@pytest.mark.parametrize(
    ("answer", "told"), [("\n\nlate", True), ("\nlate ", True), ("  late", False), ("late ", False)]
)
def test_white_space_that_only_seems_to_be_rendered_is_told(
    build: Callable[..., Batches], answer: str, told: bool
) -> None:
    batches = build([row(ASKED, {**ANSWER, "content": answer})], chat_template=TRIMS)
    assert ("the chat template strips white space around messages" in notices(batches)) is told


@pytest.mark.parametrize("more", [{}, {"cache_control": {"type": "ephemeral"}}, {"citations": []}])
def test_what_a_text_part_says_beside_its_text_is_told(build: Callable[..., Batches], more: dict[str, Any]) -> None:
    parts = [{"type": "text", "text": "hi there", **more}]
    found = notices(build([row({**ASKED, "content": parts}, ANSWER)]))
    assert any(text.startswith("text parts hold more than their text") for text in found) is bool(more)
