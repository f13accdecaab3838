"""Verbs that use a run or an artifact: eval, generate, chat, serve."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from toolkit.cli.options import Base, Json, Overrides, RunPath, emit, quiet_console, reopen

__all__ = ["chat", "evaluate", "generate", "serve"]


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
    compare: Annotated[bool, typer.Option("--compare", help="The base answers too.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
) -> None:
    """Talk to the adapted model; /adapter NAME|FOLDER switches, /reset forgets, /quit or an empty line ends."""
    from toolkit.serving import Conversation, talk

    console = quiet_console()
    made, model, tokenizer = reopen(run, None, base, console)
    conversation = Conversation(model, tokenizer, made.recipe.data.system_prompt, max_new_tokens, temperature)

    def tell(text: str) -> None:
        print(text, end="", flush=True)

    talk(conversation, iter(_ask, ""), tell, lambda line: console.print(line, markup=False), compare=compare)


def serve(
    run: RunPath,
    base: Base = None,
    host: Annotated[str, typer.Option(help="Address to listen on; only this machine reaches localhost.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
) -> None:
    """Serve the adapted model, OpenAI-compatible, by transformers' own server."""
    from toolkit.serving import require_server
    from toolkit.serving import serve as run_server

    require_server()
    console = quiet_console()
    _, model, tokenizer = reopen(run, None, base, console)
    name = run.resolve().parent.name if run.name == "adapter" else run.resolve().name
    console.print(f"http://{host}:{port}/v1  model {name}; Ctrl-C ends", markup=False)
    run_server(model, tokenizer, name, host=host, port=port)


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
