"""An answer that is sent while it is written becomes the same thought, text and calls as when it is read whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.test_answers import PUBLISHED, ROWS, TEMPLATES, USER, called, dialogue_under, turns_of
from toolkit.data import Answer, ChatForm, Dialogue
from toolkit.data.streamed import Marks

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
