"""One template's run: its conversations, a checkpoint whose tokenizer knows its tokens, and what is right of it.

What is right of a prompt is rendered by `template_renderer`, which knows nothing of ours.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.parity.template_days import Days, Done
from scripts.parity.template_families import EMBEDDED, Family, make_tokenizer
from scripts.parity.template_renderer import TODAY, NoForm, Renderer, forms
from toolkit.data import ChatForm, Dialogue, build_batches

__all__ = ["KINDS", "OPTIONS", "Case", "Failed", "Row", "make_checkpoint", "require", "rows_of", "write"]

OPTIONS: Mapping[str, Mapping[str, Any]] = {"qwen3_5_think/shut": {"enable_thinking": False}}
"""What a template is told, by its name and a word for that."""
KINDS = {"plain": 8, "system": 4, "two turns": 4, "thought": 4, "call": 4}
"""Conversations of each kind."""
_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the forecast.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "the city"}},
            "required": ["city"],
        },
    },
}
_CITIES = ("Lisbon", "Oslo", "Turin", "Cork", "Basel", "Ghent", "Porto", "Malmö")

Message = dict[str, Any]
Row = dict[str, Any]


class Failed(Exception):
    """What is wrong, in one line."""


def require(is_so: bool, line: str) -> None:
    """Raise `Failed` with the line where it is not so."""
    if not is_so:
        raise Failed(line)


def rows_of(kind: str) -> list[Row]:
    """Conversations of one kind."""
    return [_row(kind, city) for city in _CITIES[: KINDS[kind]]]


def _row(kind: str, city: str) -> Row:
    plain: list[Message] = [
        {"role": "user", "content": f"Is it warm in {city}?"},
        {"role": "assistant", "content": f"In {city} it is mild."},
    ]
    if kind == "system":
        return {"messages": [{"role": "system", "content": "Answer like a sailor."}, *plain]}
    if kind == "two turns":
        more = [{"role": "user", "content": "And dry?"}, {"role": "assistant", "content": f"{city} is dry."}]
        return {"messages": [*plain, *more]}
    if kind == "thought":
        return {"messages": [plain[0], {**plain[1], "reasoning_content": f"{city} lies by the sea."}]}
    if kind == "call":
        call = {"id": "aB3dE6gH9", "type": "function"}
        called = {"name": "get_weather", "arguments": {"city": city}}
        return {
            "messages": [
                plain[0],
                {"role": "assistant", "content": "", "tool_calls": [{**call, "function": called}]},
                {"role": "tool", "tool_call_id": call["id"], "name": "get_weather", "content": "21 degrees"},
                plain[1],
            ],
            "tools": [_TOOL],
        }
    return {"messages": plain}


@dataclass
class Case:
    """One template's checkpoint, data and runs in a folder, and what is known of them so far."""

    family: Family
    folder: Path
    days: Days | None = None
    kinds: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.options = dict(OPTIONS.get(self.family.name, {}))
        self.tokenizer = make_tokenizer(self.family)
        self.tokenizer.chat_template = self.family.template
        names = tuple(self.family.side.get("stop_tokens") or [self.tokenizer.eos_token])
        self.renderer = Renderer(self.tokenizer, self.family.template, names, self.options)
        self.stops = [int(token) for token in self.tokenizer.convert_tokens_to_ids(list(names))]

    @property
    def run(self) -> Path:
        """The run that is stopped and goes on."""
        return self.folder / "run"

    @property
    def recipe(self) -> Path:
        """Of both runs."""
        return self.folder / "recipe.yaml"

    @property
    def chat(self) -> Message:
        """What the artifact says of the form of its conversations."""
        manifest: Message = json.loads((self.run / "adapter/manifest.json").read_text())
        return dict(manifest["chat"])

    def dialogue(self) -> Dialogue:
        """Of the artifact."""
        return Dialogue(self.tokenizer, ChatForm.from_dict(self.chat))

    def prompts(self, messages: Sequence[Message], tools: Any = None) -> set[tuple[int, ...]]:
        """The prompts for an answer to `messages`, on day one: one for each form that says all of it."""
        return {self.renderer.ids(text) for text in _rendered(self.renderer, messages, tools)}

    def example(self, row: Row) -> tuple[list[int], list[int]]:
        """Prompt and answer of a row with one answer, as they are trained."""
        batches = build_batches(
            self.tokenizer,
            train=str(write(self.folder / "one.jsonl", [row])),
            stop_token_ids=self.stops,
            chat_template_kwargs=self.options,
            date=TODAY,
            max_length=4096,
        )
        (example,) = batches.train
        first = next(at for at, label in enumerate(example["labels"]) if label != -100)
        return example["input_ids"][:first], example["input_ids"][first:]

    def command(self, day: datetime.date, *arguments: object, code: int = 0, **more: Any) -> Done:
        """Run the command; it must end with `code`."""
        assert self.days
        done = self.days.run(day, *arguments, **more)
        require(done.code == code, f"{arguments[0]} ends with {done.code}: {done.last_line}")
        return done


def _rendered(renderer: Renderer, messages: Sequence[Message], tools: Any) -> Iterator[str]:
    """The conversation in each form that the template takes, with its prompt."""
    for form in forms([_both_keys(turn) for turn in messages]):
        try:
            text = renderer.render(form, tools, prompt=True)
        except NoForm:
            continue
        contents = [turn["content"] for turn in messages if turn["content"]]
        if all(content in text for content in contents):
            yield text


def _both_keys(turn: Message) -> Message:
    thought = turn.get("reasoning_content")
    return {**turn, "thinking": thought} if thought else turn


def write(path: Path, rows: Sequence[Row]) -> Path:
    """Rows as a JSONL file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def make_checkpoint(case: Case) -> None:
    """The embedded model with a row for every token of the template, and what ends its answers."""
    torch.manual_seed(7)
    model: Any = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.bfloat16)
    model.resize_token_embeddings(len(case.tokenizer), mean_resizing=False)
    model.config.max_position_embeddings = 4096
    model.config.eos_token_id = case.tokenizer.eos_token_id
    model.generation_config.eos_token_id = case.stops
    model.generation_config.pad_token_id = 0
    model.save_pretrained(case.folder / "model")
    case.tokenizer.save_pretrained(case.folder / "model")
    case.tokenizer = AutoTokenizer.from_pretrained(case.folder / "model")
