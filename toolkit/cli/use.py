"""Verbs that use a run or an artifact: eval, report, generate, chat."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.options import Base, Json, Overrides, RunPath, emit, quiet_console, reopen

__all__ = ["chat", "evaluate", "generate", "report"]


def evaluate(run: RunPath, overrides: Overrides = None, base: Base = None, json_: Json = False) -> None:
    """Base against adapted on the held-out examples of the run's recipe."""
    from toolkit import flow
    from toolkit.report import terminal as show

    console = quiet_console()
    made, model, tokenizer = reopen(run, overrides, base, console, as_trained=True)
    batches = flow.build_batches(tokenizer, made)
    comparison = flow.evaluate(model, tokenizer, batches, made)
    if comparison is None:
        from toolkit.errors import DataError

        raise DataError(f"{run}: its recipe holds out no examples; add data.validation_size=0.1")
    show.comparison(console, comparison.to_dict())
    emit(comparison.to_dict(), json_)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    serve: Annotated[bool, typer.Option("--serve", help="Show it live on this machine until interrupted.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of --serve; 0 takes a free one.")] = 0,
) -> None:
    """The run's page, one file that opens offline: outcome, curves, experts, memory, recipe."""
    from toolkit.report import page_server, write_page

    if not serve:
        print(write_page(run))
        return
    with page_server(run, port) as server:
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)


def generate(
    run: RunPath,
    prompt: Annotated[str, typer.Option(help="What the user says; - reads stdin.")],
    base: Base = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    json_: Json = False,
) -> None:
    """One answer of the adapted model, to stdout."""
    from toolkit.evaluate import answer, encode_chat

    made, model, tokenizer = reopen(run, None, base, quiet_console())
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = encode_chat(tokenizer, [{"role": "user", "content": text}], made.recipe.data.system_prompt)
    reply = answer(model, tokenizer, [ids], max_new_tokens=max_new_tokens, temperature=temperature)[0]
    if json_:
        emit({"prompt": text, "answer": reply}, json_)
    else:
        print(reply)


def chat(
    run: RunPath,
    base: Base = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
) -> None:
    """Talk to the adapted model; an empty line ends it."""
    from toolkit.evaluate import answer, encode_chat

    made, model, tokenizer = reopen(run, None, base, quiet_console())
    messages: list[dict[str, str]] = []
    while line := _ask():
        messages.append({"role": "user", "content": line})
        ids = encode_chat(tokenizer, messages, made.recipe.data.system_prompt)
        reply = answer(model, tokenizer, [ids], max_new_tokens=max_new_tokens, temperature=temperature)[0]
        messages.append({"role": "assistant", "content": reply})
        print(reply, flush=True)


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
