"""What training examples have to be, worked out anew from a template, a tokenizer and a row, with nothing of ours.

For each trained turn: the tokens that inference feeds, and those that the model has to write after them, through the
first token that ends generation. Where the template has no such form for a row, the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.parity.template_losses import Need, losses
from scripts.parity.template_renderer import WORD, Message, NoForm, Renderer, forms, thought_of

__all__ = ["Exact", "Reference", "Turn", "reference_for"]


_SHUT: tuple[Mapping[str, Any], ...] = ({"enable_thinking": False, "thinking": False},)
_OPENER = re.compile(
    r"(?:<(?!/)[^<>\s]*(?:think|thought|reason)[^<>\s]*>|\[THINK\]|<\|channel>thought)\s*$", re.IGNORECASE
)

_EMPTY = re.compile(r"<(\w*(?:think|thought|reason)\w*)>\s*</\1>\s*$", re.IGNORECASE)


_INLINE = f"<think> {WORD} </think> "


@dataclass(frozen=True)
class Turn:
    """One trained turn: its place in the row, what stands before it, and what may be trained after that."""

    index: int
    prompt: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Exact:
    """One right form of a row. A `lossy` one leaves out what the row says, so refusing the row is as right."""

    turns: tuple[Turn, ...]
    needs: tuple[Need, ...] = ()
    lossy: bool = False


@dataclass(frozen=True)
class Reference:
    """The right forms of a row, the first being the template's own; or none, and why."""

    forms: tuple[Exact, ...]
    why: str = ""

    @property
    def renderable(self) -> bool:
        """Whether some form says all that the row says."""
        return any(not form.lossy for form in self.forms)


def reference_for(
    renderer: Renderer,
    messages: Sequence[Message],
    tools: Any,
    kwargs: Mapping[str, Any],
    *,
    last: bool = False,
    thoughts: bool = True,
) -> Reference:
    """The right forms of one row.

    Args:
        renderer: the template.
        messages: the row's turns; `train: false` on one leaves it out.
        tools: its tool schemas.
        kwargs: template options of this row.
        last: train the last answer alone.
        thoughts: keep the row's thoughts.
    """
    wanted = [i for i, turn in enumerate(messages) if turn["role"] == "assistant" and turn.get("train") is not False]
    wanted = wanted[-1:] if last else wanted
    begun = wanted[:1] == [0]  # nothing can be fed before it
    wanted = wanted[begun:]
    plain = [{key: value for key, value in turn.items() if key != "train"} for turn in messages]
    if not thoughts:
        plain = [{**_moved(turn), "reasoning_content": ""} if turn["role"] == "assistant" else turn for turn in plain]
        plain = list(map(_unthought, plain))
    found: list[Exact] = []
    why: list[str] = []
    for form, needs in _row_forms(plain):
        try:
            exact = _exact(renderer, form, tools, kwargs, wanted)
        except NoForm as reason:
            why.append(str(reason))
            continue
        exact = Exact(exact.turns, (*needs, *exact.needs), exact.lossy or bool(needs))
        if all(exact.turns != other.turns for other in found):
            found.append(exact)
        if not exact.lossy:
            break
    for same in (list(map(_moved, plain)), list(map(_unthought, plain))):
        found += _also(renderer, forms(same), tools, kwargs, wanted) if same != plain else []
    if any(isinstance(turn.get("content"), list) for turn in plain):
        found += _also(renderer, [plain], tools, kwargs, wanted)
    if begun:
        found = [Exact(form.turns, (*form.needs, _BEGUN), form.lossy) for form in found]
    found.sort(key=lambda each: each.lossy)
    return Reference(tuple(found), why[0] if why and not found else "")


def _row_forms(messages: list[Message]) -> Iterator[tuple[list[Message], tuple[Need, ...]]]:
    """The row in its equal forms, then with `developer` as `system`, of which the user has to be told."""
    for form in forms(messages):
        yield form, ()
    if any(turn["role"] == "developer" for turn in messages):
        as_system = [{**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in messages]
        for form in forms(as_system):
            yield form, (Need("the developer turn", "developer"),)


def _also(
    renderer: Renderer, same: Iterable[list[Message]], tools: Any, kwargs: Mapping[str, Any], wanted: list[int]
) -> list[Exact]:
    """The whole form of the first of `same`, rows that say the same in other fields, for which the template has one."""
    for form in same:
        try:
            exact = _exact(renderer, form, tools, kwargs, wanted)
        except NoForm:
            continue
        if not exact.lossy:
            return [exact]
    return []


def _moved(turn: Message) -> Message:
    """A thought that stands inside the content, as the field of its own that it is."""
    found = re.fullmatch(r"<think>\s*(.*?)\s*</think>\s*(.*)", str(turn.get("content") or ""), re.DOTALL)
    if turn["role"] != "assistant" or not found:
        return turn
    return {**turn, "reasoning_content": found[1], "content": found[2]}


def _unthought(turn: Message) -> Message:
    """An empty thought is none."""
    return {key: value for key, value in turn.items() if key != "reasoning_content" or value}


def _exact(
    renderer: Renderer, messages: list[Message], tools: Any, kwargs: Mapping[str, Any], wanted: list[int]
) -> Exact:
    turns: list[Turn] = []
    needs: list[Need] = []
    lossy = False
    for index in wanted:
        prompt = renderer.render(messages[:index], tools, prompt=True, **kwargs)
        whole = renderer.render(messages[: index + 1], tools, prompt=False, **kwargs)
        rests, closed = _answers(renderer, prompt, whole, messages[: index + 1], tools, kwargs)
        calls = bool(messages[index].get("tool_calls"))
        targets = [end for rest in rests for end in renderer.ends(rest, calls=calls)]
        lost, rewritten = losses(prompt, targets[0], messages[: index + 1], tools)
        if any(stop in str(messages[index].get("content")) for stop in renderer.stops):
            lost.append(_STOPPED)
        needs += [*closed, *lost, *rewritten]
        lossy |= bool(lost) or _WRITTEN in closed
        turns.append(Turn(index, renderer.ids(prompt), tuple(dict.fromkeys(map(renderer.ids, targets)))))
    return Exact(tuple(turns), tuple(dict.fromkeys(needs)), lossy)


_WRITTEN = Need("the prompt's empty thought, which the history lacks", r"think|thought|reason")
_BEGUN = Need("an answer before any question", "before|first|question|prompt")
_STOPPED = Need("a stop token in the answer", "stop|end|token")
_CLOSED = Need("an empty thought is closed", r"think|thought|reason")


def _answers(
    renderer: Renderer, prompt: str, whole: str, messages: list[Message], tools: Any, kwargs: Mapping[str, Any]
) -> tuple[list[str], list[Need]]:
    """What the model writes after `prompt`; where a thought is open and the row has none, after closing it.

    Raises:
        NoForm: the history with the turn does not begin with the prompt, and no empty thought explains it.
    """
    opener = _OPENER.search(prompt)
    turn = messages[-1]
    thinks = thought_of(turn).strip() or "</think>" in str(turn.get("content") or "")
    if whole.startswith(prompt):
        return [whole[len(prompt) :]], [_CLOSED] if opener and not thinks else []
    base = prompt[: opener.start()] if opener else prompt
    if (shut := _EMPTY.search(prompt)) and whole.startswith(prompt[: shut.start()]) and not thinks:
        return [whole[shut.start() :]], [_WRITTEN]
    if not opener or not whole.startswith(base) or thinks:
        raise NoForm("the history with the turn does not begin with the prompt")
    rest, own = _without_empty(whole[len(base) :], opener[0].strip())
    closings = [own] if own else []
    closings += _closings(renderer, prompt, base, messages, tools, kwargs, rest)
    if not closings:
        raise NoForm("the prompt opens a thought that the template never closes")
    return [closing + rest for closing in dict.fromkeys(closings)], [_CLOSED]


def _without_empty(text: str, opener: str) -> tuple[str, str]:
    """`text` after an empty thought that it begins with, or after its end, and how that is closed."""
    found = re.match(rf"(?:{re.escape(opener)}\s*)?(</{re.escape(opener[1:])}\s*)", text)
    return (text[found.end() :], found[1]) if found else (text, "")


def _closings(
    renderer: Renderer,
    prompt: str,
    base: str,
    messages: list[Message],
    tools: Any,
    kwargs: Mapping[str, Any],
    rest: str,
) -> Iterator[str]:
    """How the template closes a thought: as it renders one, and as its prompt does without thinking."""
    for shown in _thinking(messages[-1]):
        try:
            text = renderer.render([*messages[:-1], shown], tools, prompt=False, **kwargs)
        except NoForm:
            continue
        before, thought, after = text.partition(WORD)
        if thought and _INLINE not in text and before.rstrip().endswith(prompt.rstrip()) and after.endswith(rest):
            yield after[: len(after) - len(rest)]
    for shut in _SHUT:
        try:
            text = renderer.render(messages[:-1], tools, prompt=True, **{**kwargs, **shut})
        except NoForm:
            continue
        if text.startswith(prompt):
            yield from filter(None, [text[len(prompt) :]])
        elif text.startswith(base) and (closed := re.fullmatch(r"\s*(</.*)", text[len(base) :], re.DOTALL)):
            yield closed[1]


def _thinking(turn: Message) -> list[Message]:
    # A template that takes the thought out of the content and writes it anew shows its own way, others only ours.
    return [{**turn, "reasoning_content": WORD}, {**turn, "content": f"{_INLINE}{turn.get('content') or ''}"}]
