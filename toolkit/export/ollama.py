"""The Modelfile of an export: the trained chat template in Ollama's own language, the system prompt, and every stop.

Ollama does not run a checkpoint's Jinja: it looks for a template of its own that is near to it, and takes the bare
prompt where it knows none, without a word. Here the text around each turn is read off conversations that Jinja has
written, put into Go's template language, and compared with Jinja on other conversations; where they differ, none is
given. Rules of both files: ollama's `docs/modelfile.mdx`, `docs/template.mdx` and `parser/parser.go`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from toolkit.artifact.manifest import TEMPLATE

__all__ = ["Turns", "modelfile", "turns_of"]

_QUOTES = '"""'
_SYSTEM, _USER, _ANSWER, _NEXT = "«system»", "«user»", "«answer»", "«next»"
Message = Mapping[str, str]


@dataclass(frozen=True)
class Turns:
    """The text around each turn: before a conversation without a system prompt (`start`), around a system prompt,
    before a question, between question and answer, after an answer, and before the answer that is asked for (`cue`).
    """

    start: str
    before_system: str
    after_system: str
    before_question: str
    before_answer: str
    after_answer: str
    cue: str

    def go(self) -> str:
        """In Go's template language, with the variables that Ollama gives."""
        start = f"{{{{ if not .System }}}}{self.start}{{{{ end }}}}" if self.start else ""
        return (
            f"{start}{{{{ range .Messages }}}}"
            f'{{{{ if eq .Role "system" }}}}{self.before_system}{{{{ .Content }}}}{self.after_system}'
            f'{{{{ else if eq .Role "user" }}}}{self.before_question}{{{{ .Content }}}}'
            f'{{{{ else if eq .Role "assistant" }}}}{self.before_answer}{{{{ .Content }}}}{self.after_answer}'
            f"{{{{ end }}}}{{{{ end }}}}{self.cue}"
        )

    def write(self, messages: Sequence[Message]) -> str:
        """A conversation as that template writes it."""
        around = {
            "system": (self.before_system, self.after_system),
            "user": (self.before_question, ""),
            "assistant": (self.before_answer, self.after_answer),
        }
        has_system = any(message["role"] == "system" for message in messages)
        turns = [f"{around[m['role']][0]}{m['content']}{around[m['role']][1]}" for m in messages]
        return "".join([*([] if has_system else [self.start]), *turns, self.cue])


def turns_of(artifact: Path, chat: Mapping[str, Any]) -> Turns | None:
    """Of an artifact's chat template; None where it has none, or one that says more than turns can.

    Args:
        chat: how conversations are written, as `write_artifact` takes it.
    """
    if chat.get("form", "chat") != "chat" or not (artifact / TEMPLATE).is_file():
        return None
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    begin = tokenizer.bos_token or ""
    adds_begin = bool(begin) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]

    def write(messages: Sequence[Message]) -> str:
        options = chat.get("chat_template_kwargs") or {}
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True, **options
        )
        return text.removeprefix(begin) if adds_begin else text  # which the file says is to be added anyway

    try:
        turns = _read_off(write)
        return turns if turns is not None and _is_same(turns, write) else None
    except (TemplateError, ValueError, TypeError, KeyError):  # some want a system prompt, some refuse one
        return None


def _read_off(write: Callable[[Sequence[Message]], str]) -> Turns | None:
    question, answer = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}
    system, following = {"role": "system", "content": _SYSTEM}, {"role": "user", "content": _NEXT}
    start, cue = _cut(write([question]), _USER)
    before_system, between, _ = _cut(write([system, question]), _SYSTEM, _USER)
    _, before_answer, after, _ = _cut(write([question, answer, following]), _USER, _ANSWER, _NEXT)
    shared = _common_end(start, between, after)
    start, after_system, after_answer = (text.removesuffix(shared) for text in (start, between, after))
    turns = Turns(start, before_system, after_system, shared, before_answer, after_answer, cue)
    texts = vars(turns).values()
    return None if any("{{" in text or "}}" in text or _QUOTES in text for text in texts) else turns


def _common_end(*texts: str) -> str:
    shortest = min(texts, key=len)
    ends = (shortest[number:] for number in range(len(shortest) + 1))
    return next(end for end in ends if all(text.endswith(end) for text in texts))


def _cut(text: str, *marks: str) -> list[str]:
    """Raises `ValueError` where a mark is not there once, in this order."""
    found = []
    for mark in marks:
        before, there, text = text.partition(mark)
        if not there or mark in text:
            raise ValueError(mark)
        found.append(before)
    return [*found, text]


def _is_same(turns: Turns, write: Callable[[Sequence[Message]], str]) -> bool:
    """On conversations of one to three questions, with a system prompt and without, with other texts."""
    for count in (1, 2, 3):
        for has_system in (False, True):
            messages = [{"role": "system", "content": "Be brief.\nBe kind."}] if has_system else []
            for number in range(count):
                messages.append({"role": "user", "content": f"Question {number}?\n\nIt has two parts."})
                messages.append({"role": "assistant", "content": f"Answer {number}."})
            if turns.write(messages[:-1]) != write(messages[:-1]):
                return False
    return True


def modelfile(begins: Sequence[str], ends: Sequence[str], chat: Mapping[str, Any], turns: Turns | None = None) -> str:
    """The text for `ollama create`.

    Args:
        begins: its first lines, which name the files. ends: texts of the tokens that end an answer.
        chat: how conversations are written, as `write_artifact` takes it. turns: of the chat template.
    """
    lines = [*begins]
    if chat.get("form") == "text":
        lines += ['TEMPLATE """{{ .Prompt }}"""']  # plain prompts, without the base's chat template
    elif turns is not None and not turns.go().endswith('"'):
        lines += [f"TEMPLATE {_QUOTES}{turns.go()}{_QUOTES}"]
    elif chat:
        lines += ["# The chat template says more than a TEMPLATE here can. Look at what Ollama takes: ollama show"]
    if _QUOTES in (chat.get("system_prompt") or ""):
        lines += ["# The system prompt holds three quotes, which cannot be written here; export.json has it."]
    elif chat.get("form") != "text" and chat.get("system_prompt"):
        lines += [f"SYSTEM {_quoted(chat['system_prompt'])}"]
    return "\n".join([*lines, *(f"PARAMETER stop {_quoted(text)}" for text in ends)]) + "\n"


def _quoted(text: str) -> str:
    """Ollama reads no escapes: a text with quotes or line ends stands between three quotes."""
    return f'"{text}"' if not {'"', "\n"} & set(text) else f"{_QUOTES}{text}{_QUOTES}"
