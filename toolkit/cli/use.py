"""Verbs that use a run or an artifact: eval, generate, chat."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit.cli.options import Base, Json, Overrides, RunPath, artifact_of, emit, quiet_console, reopen

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["chat", "evaluate", "generate"]

_LOOKED_UP = 4
"""Tokens drafted by prompt lookup."""

Mtp = Annotated[
    bool, typer.Option("--mtp", help="Draft with the artifact's multi-token-prediction head, or by looking back.")
]


def evaluate(run: RunPath, overrides: Overrides = None, base: Base = None, json_: Json = False) -> None:
    """Base against adapted on the held-out examples of the run's recipe."""
    from toolkit import flow
    from toolkit.mtp import HEAD_FILE
    from toolkit.report import terminal as show

    console = quiet_console()
    made, model, tokenizer = reopen(run, overrides, base, console, as_trained=True)
    batches = flow.build_batches(tokenizer, made)
    comparison = flow.evaluate(model, tokenizer, batches, made)
    if comparison is None:
        from toolkit.errors import DataError

        raise DataError(f"{run}: its recipe holds out no examples; add data.validation_size=0.1")
    show.comparison(console, comparison.to_dict())
    artifact = artifact_of(run)
    head = flow.reopen_head(model, made, artifact) if (artifact / HEAD_FILE).is_file() else None
    drafting = flow.evaluate_head(model, head, batches, made, console)
    if drafting:
        show.drafting(console, drafting)
    emit({**comparison.to_dict(), **({"mtp": drafting} if drafting else {})}, json_)


def generate(
    run: RunPath,
    prompt: Annotated[str, typer.Option(help="What the user says; - reads stdin.")],
    base: Base = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    mtp: Mtp = False,
    json_: Json = False,
) -> None:
    """One answer of the adapted model, to stdout."""
    from toolkit.evaluate import encode_chat

    console = quiet_console()
    made, model, tokenizer = reopen(run, None, base, console)
    reply_to = _writer(run, made, model, tokenizer, max_new_tokens, temperature, mtp, console)
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = encode_chat(tokenizer, [{"role": "user", "content": text}], made.recipe.data.system_prompt)
    reply, figures = reply_to(ids)
    if json_:
        emit({"prompt": text, "answer": reply, **({"mtp": figures} if mtp else {})}, json_)
    else:
        print(reply)


def chat(
    run: RunPath,
    base: Base = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    mtp: Mtp = False,
) -> None:
    """Talk to the adapted model; an empty line ends it."""
    from toolkit.evaluate import encode_chat

    console = quiet_console()
    made, model, tokenizer = reopen(run, None, base, console)
    reply_to = _writer(run, made, model, tokenizer, max_new_tokens, temperature, mtp, console)
    messages: list[dict[str, str]] = []
    while line := _ask():
        messages.append({"role": "user", "content": line})
        ids = encode_chat(tokenizer, messages, made.recipe.data.system_prompt)
        reply, _ = reply_to(ids)
        messages.append({"role": "assistant", "content": reply})
        print(reply, flush=True)


def _writer(
    run: Path,
    made: Any,
    model: Any,
    tokenizer: Any,
    max_new_tokens: int,
    temperature: float,
    mtp: bool,
    console: Any,
) -> Callable[[list[int]], tuple[str, dict[str, Any]]]:
    """What turns a prompt into text and, with drafts, their figures."""
    from toolkit import flow
    from toolkit.evaluate import answer, speculator
    from toolkit.mtp import HEAD_FILE

    if not mtp:
        return lambda ids: (
            answer(model, tokenizer, [ids], max_new_tokens=max_new_tokens, temperature=temperature)[0],
            {},
        )
    artifact = artifact_of(run)
    head = flow.reopen_head(model, made, artifact) if (artifact / HEAD_FILE).is_file() else None
    if head is None:
        console.print(f"{artifact}: no multi-token-prediction head; drafting what followed the same words before")
    count = max(made.recipe.mtp.depth, len(head.layers)) if head else _LOOKED_UP
    writer = speculator(model, head, count=count, max_new_tokens=max_new_tokens, temperature=temperature)

    def reply(ids: list[int]) -> tuple[str, dict[str, Any]]:
        was_off = writer.counts.switched_off
        (written,) = writer.generate([ids])
        if writer.counts.switched_off and not was_off:
            console.print("drafts cost more time than they save here: switched off")
        text = str(tokenizer.decode(written, skip_special_tokens=True)).strip()
        return text, {"tau": writer.counts.tokens_per_pass, "acceptance": writer.counts.rates()}

    return reply


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
