"""Verbs that use a run or an artifact: eval, report, generate, chat, serve."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.options import Base, Json, Overrides, RunPath, emit, quiet_console, reopen

__all__ = ["chat", "evaluate", "generate", "report", "serve"]


def evaluate(
    run: RunPath,
    overrides: Overrides = None,
    base: Base = None,
    lm_eval: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness instead, such as arc_easy,piqa.")
    ] = None,
    tasks: Annotated[Path | None, typer.Option(help="A folder with YAML files of lm-eval tasks of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each lm-eval task.")] = None,
    json_: Json = False,
) -> None:
    """Base against adapted on the held-out examples of the run's recipe, or on public benchmarks."""
    if lm_eval:
        _benchmark(run, overrides, base, [name.strip() for name in lm_eval.split(",")], tasks, limit, json_)
        return
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


def _benchmark(
    run: Path,
    overrides: list[str] | None,
    base: str | None,
    names: list[str],
    folder: Path | None,
    limit: int | None,
    json_: bool,
) -> None:
    from toolkit.evaluate import require_harness, run_harness
    from toolkit.report import terminal as show

    require_harness()
    console = quiet_console()
    made, model, tokenizer = reopen(run, overrides, base, console, as_trained=True)
    found = run_harness(model, tokenizer, names, folder=folder, limit=limit, batch_size=made.recipe.eval.batch_size)
    show.benchmarks(console, found)
    emit({"lm_eval": found}, json_)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    serve: Annotated[bool, typer.Option("--serve", help="Show it live on this machine until interrupted.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of --serve; 0 takes a free one.")] = 0,
) -> None:
    """The run's page, one file that opens offline: outcome, curves, experts, memory, recipe."""
    from toolkit.report.page import write_page
    from toolkit.report.serve import page_server

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
