"""What a model wrote is read into thought, text and calls, the same when it is sent as it is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import trl

from toolkit.data import Answer, ChatForm, Dialogue, InvalidRow
from toolkit.data.answers import Marks
from toolkit.data.conversation import text_of, thought_of
from toolkit.data.formats import SHAPES, Example
from toolkit.data.turns import Turn

PUBLISHED = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = sorted(p for p in PUBLISHED.glob("*.jinja") if not p.stem.endswith("_training"))
STOPS = {
    "glm4moe": ("<|endoftext|>", "<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|call|>"),
    "gemma4": ("<eos>", "<turn|>", "<|tool_response>"),
}
ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|END_OF_TURN_TOKEN|>",
    "<｜end▁of▁sentence｜>",
    "<turn|>",
    "</s>",
)
SCHEMA = {"type": "function", "function": {"name": "weather", "description": "W", "parameters": {"type": "object"}}}


def called(*cities: Any) -> list[dict[str, Any]]:
    """Calls for cities, or with other arguments; ids of nine letters, which some templates insist on."""
    functions = [{"name": "weather", "arguments": {"city": c} if isinstance(c, str) else c} for c in cities]
    return [{"id": f"12345678{i}", "type": "function", "function": each} for i, each in enumerate(functions)]


def result(number: int) -> dict[str, Any]:
    return {"role": "tool", "content": "sunny", "tool_call_id": f"12345678{number}", "name": "weather"}


USER = {"role": "user", "content": "q"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "plain": [USER, {"role": "assistant", "content": "an answer"}],
    "thought": [USER, {"role": "assistant", "content": "an answer", "reasoning_content": "for a reason"}],
    "call": [USER, {"role": "assistant", "content": "", "tool_calls": called("Rome")}, result(0),
             {"role": "assistant", "content": "It is sunny"}],
    "two calls": [USER, {"role": "assistant", "content": "", "tool_calls": called("Rome", "Oslo")}],
    "thought and call": [USER, {"role": "assistant", "content": "", "reasoning_content": "need it",
                                "tool_calls": called("Rome")}],
    "call without arguments": [USER, {"role": "assistant", "content": "", "tool_calls": called({})}],
    "with and without": [USER, {"role": "assistant", "content": "", "tool_calls": called({}, "Rome", {})}],
    "without and with": [USER, {"role": "assistant", "content": "", "tool_calls": called("Rome", {}, "Oslo")}],
}  # fmt: skip


def dialogue_under(template: Path, tokenizer_with: Any, *, known: bool) -> Dialogue:
    """A dialogue under a published template; unless `known`, nobody recognises it."""
    text = template.read_text() + ("" if known else "{# #}")
    special = set(re.findall(r"<[|｜][^\s<>]+?[|｜]>|<\|[a-z_\"]+>|<[a-z_]+\|>|</s>|<eos>|<turn\|>", text))
    stops = next((tokens for name, tokens in STOPS.items() if template.stem.startswith(name)), ())
    end = stops[0] if stops else next(token for token in ENDS if token in text or token == "</s>")
    tok = tokenizer_with(
        *sorted(special | {*stops, end, "<end_of_turn>", "<start_of_turn>", "<end_of_utterance>"}), eos=end
    )
    return Dialogue(tok, ChatForm(stop_token_ids=tuple(tok.convert_tokens_to_ids(stops))), chat_template=text)


def turns_of(dialogue: Dialogue, messages: list[dict[str, Any]]) -> list[tuple[Example, Turn]]:
    """The row as an example, with each of its answers; none where the template has no calls, or no thoughts."""
    example = SHAPES["messages"].parse({"messages": json.loads(json.dumps(messages)), "tools": [SCHEMA]})
    wanted = [i for i, turn in enumerate(example.messages) if turn["role"] == "assistant"]
    try:
        return [(example, turn) for turn in dialogue.reader.read(example, wanted)]
    except InvalidRow:
        return []


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_every_part_of_an_answer_is_read_back(template: Path, tokenizer_with: Any) -> None:
    dialogue, read = dialogue_under(template, tokenizer_with, known=False), 0
    for example, turn in (found for messages in ROWS.values() for found in turns_of(dialogue, messages)):
        said = example.messages[turn.index]
        prompt, ids = (dialogue.tokens.of([text])[0] for text in (turn.prompt, turn.target))
        found = dialogue.read(ids, prompt)
        assert found.text == text_of(said.get("content")).strip()
        assert found.thought == thought_of(said).strip()
        assert [dict(call) for call in found.calls] == [call["function"] for call in said.get("tool_calls", [])]
        read += 1
    assert read, "nothing was read"


def test_what_a_template_is_known_for_is_used(tokenizer_with: Any) -> None:
    template = PUBLISHED / "gptoss.jinja"
    dialogue = dialogue_under(template, tokenizer_with, known=True)
    assert dialogue._answers._described is not None
    text = "<|channel|>analysis<|message|>for a reason<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
    prompt = dialogue.prompt_ids([USER])
    assert dialogue.read(dialogue.tokens.of([text])[0], prompt) == Answer("4", "for a reason")


def test_text_that_a_description_misses_beside_calls_is_kept(tokenizer_with: Any) -> None:
    dialogue = dialogue_under(PUBLISHED / "glm4moe.jinja", tokenizer_with, known=True)
    assert dialogue._answers._described is not None
    said = [USER, {"role": "assistant", "content": "Look:", "tool_calls": called("Rome", "Oslo")}]
    [turn] = dialogue.reader.read(SHAPES["messages"].parse({"messages": said, "tools": [SCHEMA]}), [1])
    prompt, ids = (dialogue.tokens.of([text])[0] for text in (turn.prompt, turn.target))
    assert dialogue.read(ids, prompt) == Answer("Look:", "", tuple(call["function"] for call in called("Rome", "Oslo")))


def test_a_thought_that_was_cut_off_is_no_answer(tokenizer_with: Any) -> None:
    dialogue = dialogue_under(PUBLISHED / "qwen3_5_think.jinja", tokenizer_with, known=False)
    prompt = dialogue.prompt_ids([USER])
    assert dialogue.read(dialogue.tokens.of(["let me see"])[0], prompt) == Answer("", "let me see")
    whole = dialogue.read(dialogue.tokens.of(["let me see\n</think>\n\n4<|im_end|>"])[0], prompt)
    assert whole == Answer("4", "let me see")
    assert whole.judged == "4"


def test_text_that_only_looks_like_a_call_stays_text(tokenizer_with: Any) -> None:
    dialogue = dialogue_under(PUBLISHED / "qwen3.jinja", tokenizer_with, known=False)
    broken = '<tool_call>\n{"name": "weather", "arguments": {"city": '
    read = dialogue.read(dialogue.tokens.of([f"{broken}<|im_end|>"])[0], dialogue.prompt_ids([USER]))
    assert read == Answer(broken.strip())


@pytest.mark.parametrize(
    ("template", "text", "calls"),
    [
        ("glm4moe", "<tool_call>get_time</tool_call>", ["get_time"]),
        ("glm4moe", "<tool_call>get_time\n</tool_call>\n<tool_call>\nget_date </tool_call>", ["get_time", "get_date"]),
        ("glm4moe", "<tool_call>get_time", []),
        ("qwen3_5_nothink", "<tool_call><function=get_time></function></tool_call>", ["get_time"]),
        ("qwen3_5_nothink", "<tool_call>\n<function=get_time>\n</tool_call>", []),
        ("gemma4_v4", "<|tool_call>call:get_time{}<tool_call|>", ["get_time"]),
        ("lfm2_v2", "<|tool_call_start|>[get_time(), get_date()]<|tool_call_end|>", ["get_time", "get_date"]),
        ("lfm2_v2", "Call get_time() or print(a='b').", []),
    ],
)
def test_calls_without_arguments(template: str, text: str, calls: list[str], tokenizer_with: Any) -> None:
    dialogue = dialogue_under(PUBLISHED / f"{template}.jinja", tokenizer_with, known=False)
    options = {"enable_thinking": False} if template == "glm4moe" else {}
    read = dialogue.read(dialogue.tokens.of([text])[0], dialogue.prompt_ids([USER], None, options))
    assert read.calls == tuple({"name": name, "arguments": {}} for name in calls)
    assert read.text == ("" if calls else text)


def test_an_answer_becomes_a_turn_that_the_template_takes(tokenizer_with: Any) -> None:
    dialogue = dialogue_under(PUBLISHED / "gptoss.jinja", tokenizer_with, known=True)
    first = Answer("It is four.", "two and two")
    again = [USER, first.message(), {"role": "user", "content": "Sure?"}]
    prompt = dialogue.tokens.decode(dialogue.prompt_ids(again))
    assert "<|channel|>final<|message|>It is four.<|end|>" in prompt
    assert "two and two" not in prompt, "earlier thoughts are not fed"


LONG = {"content": "It is 4, as 2 < 3 and {so on}.\n\nIs it? Yes.", "reasoning_content": "Two:\n\n- 2 < 3\n- so 4"}
CALLS = {"content": "Look:", "tool_calls": called("Rome", "Oslo")}
MORE = {
    "long": [USER, {"role": "assistant", **LONG}],
    "long and plain": [USER, {"role": "assistant", "content": LONG["content"]}],
    "text and calls": [USER, {"role": "assistant", **CALLS}],
}


def sent(dialogue: Dialogue, text: str, prompt: list[int], size: int = 1) -> list[Answer]:
    """What is sent of a text that comes `size` tokens at a time; the last is what its end sends."""
    stream, ids = dialogue.stream(prompt), dialogue.tokens.of([text])[0]
    parts = [dialogue.tokens.decode(ids[at : at + size]) for at in range(0, len(ids), size)]
    assert "".join(parts) == text
    return [*map(stream.feed, parts), stream.end()]


def joined(pieces: list[Answer]) -> Answer:
    assert not any(piece.calls for piece in pieces[:-1])
    return Answer("".join(p.text for p in pieces), "".join(p.thought for p in pieces), pieces[-1].calls)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_what_is_sent_is_what_is_read(template: Path, tokenizer_with: Any) -> None:
    dialogue, read = dialogue_under(template, tokenizer_with, known=False), 0
    for kind, messages in {**ROWS, **MORE}.items():
        for _, turn in turns_of(dialogue, messages):
            prompt = dialogue.tokens.of([turn.prompt])[0]
            whole = dialogue.read(dialogue.tokens.of([turn.target])[0], prompt)
            for size in (1, 3):
                pieces = sent(dialogue, turn.target, prompt, size)
                assert joined(pieces) == whole
                words = [piece for piece in pieces[:-1] if piece.text or piece.thought]
                assert len(words) > 5 or "long" not in kind or size > 1, "it is sent while it is written"
            read += 1
    assert read, "nothing was read"


@pytest.mark.parametrize("ended", ["", "<|im_end|>"])
@pytest.mark.parametrize(
    ("template", "text", "read"),
    [
        ("qwen3", "<think>\nlet me see\n</think>\n\n4", Answer("4", "let me see")),
        ("qwen3", "<think>\nlet me", Answer("", "let me")),
        ("qwen3", "no thought < and </thi", Answer("no thought < and </thi")),
        ("qwen2_5", "<think>\nlet me see\n</think>\n\n4", Answer("4", "let me see")),
        ("qwen2_5", "<think>let me", Answer("", "let me")),
        ("qwen2_5", "a <think> in words", Answer("a <think> in words")),
        ("qwen2_5", '<tool_call>\n{"name": "weather', Answer('<tool_call>\n{"name": "weather')),
        ("qwen3_5_think", "let me see\n</think>\n\n4 <tool", Answer("4 <tool", "let me see")),
        ("qwen3_5_think", "let me see", Answer("", "let me see")),
    ],
)
def test_cut_off_answers_and_those_that_look_like_marks(
    template: str, text: str, read: Answer, ended: str, tokenizer_with: Any
) -> None:
    dialogue = dialogue_under(PUBLISHED / f"{template}.jinja", tokenizer_with, known=False)
    prompt = dialogue.prompt_ids([USER])
    assert joined(sent(dialogue, text + ended, prompt)) == read
    assert dialogue.read(dialogue.tokens.of([text + ended])[0], prompt) == read


def test_nothing_that_was_sent_is_taken_back(tokenizer_with: Any) -> None:
    """The end of a thought that nobody opened: read whole, a thought; its words have been sent as text, though."""
    dialogue = dialogue_under(PUBLISHED / "qwen2_5.jinja", tokenizer_with, known=False)
    text, prompt = "let me see\n</think>\n\n4", dialogue.prompt_ids([USER])
    assert dialogue.read(dialogue.tokens.of([text])[0], prompt) == Answer("4", "let me see")
    assert joined(sent(dialogue, text, prompt)) == Answer(text)


def test_text_without_a_template_is_sent_as_it_is(tokenizer: Any) -> None:
    dialogue = Dialogue(tokenizer, ChatForm("text"))
    pieces = sent(dialogue, " <think>a</think> b <tool_call> <|im_end|>", [1])
    assert joined(pieces) == Answer("<think>a</think> b <tool_call>")


def test_only_the_end_of_a_text_is_held() -> None:
    marks = Marks(["<a>\n<b>", "end of turn"])
    held = {"x <a": 2, "x <a><b": 5, "<a>\n <b": 7, "<b": 2, "<": 1, "end of": 6}
    assert {text: marks.held(text) for text in held} == held
    assert not any(map(marks.held, ("x <a>y", "end off", "x", "")))


def test_a_refusal_names_trls_template_for_training_where_that_takes_the_row(tokenizer_with: Any) -> None:
    def refusal(name: str) -> str:
        dialogue = dialogue_under(PUBLISHED / f"{name}.jinja", tokenizer_with, known=True)
        said = [USER, {"role": "assistant", "content": "it writes </think> after a thought"}]
        with pytest.raises(InvalidRow) as caught:
            dialogue.turns(SHAPES["messages"].parse({"messages": said}), [1])
        return str(caught.value)

    told = refusal("deepseek_r1_distill")
    assert told.startswith("turn 2 (assistant) says </think> among its words")
    path = PUBLISHED / "deepseek_r1_distill_training.jinja"
    assert told.endswith(f"TRL's template for training takes it: data.chat_template_path: {path}")
    assert "TRL" not in refusal("glm4moe")
