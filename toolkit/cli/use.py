"""Verbs that use a run or an artifact: eval, report, generate, chat, serve."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit.cli.options import (
    Base,
    Dtype,
    Json,
    Overrides,
    RunPath,
    artifact_of,
    emit,
    next_commands,
    opened_as,
    plain_console,
    quiet_console,
    reopen,
    run_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from peft import PeftModel
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from toolkit.mtp.decode import Speculator
    from toolkit.plan import Plan

__all__ = ["chat", "evaluate", "generate", "report", "serve"]

_LOOKED_UP = 4
"""Tokens drafted by prompt lookup."""

Mtp = Annotated[
    bool, typer.Option("--mtp", help="Draft with the artifact's multi-token-prediction head, or prompt lookup.")
]


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
    from toolkit import run as job
    from toolkit.mtp.head_file import HEAD_FILE
    from toolkit.report import terminal as show

    console = quiet_console()
    made, model, tokenizer = reopen(run, overrides, base, console, as_trained=True)
    batches = job.build_batches(tokenizer, made)
    comparison = job.evaluate(model, tokenizer, batches, made)
    if comparison is None:
        from toolkit.errors import DataError

        raise DataError(f"{run}: its recipe holds out no examples; add data.validation_size=0.1")
    show.comparison(console, comparison.to_dict())
    artifact = artifact_of(run)
    head = job.reopen_head(model, made, artifact) if (artifact / HEAD_FILE).is_file() else None
    drafting = job.evaluate_head(model, head, batches, made, console)
    if drafting:
        show.drafting(console, drafting)
    again = opened_as(run, base)
    next_commands(console, ["chat", *again, "--compare"], ["push", run, "OWNER/NAME"])
    emit({**comparison.to_dict(), **({"mtp": drafting} if drafting else {})}, json_)


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
    next_commands(console, ["chat", *opened_as(run, base), "--compare"], ["push", run, "OWNER/NAME"])
    emit({"lm_eval": found}, json_)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    serve: Annotated[bool, typer.Option("--serve", help="Show it live on this machine until interrupted.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of --serve; 0 takes a free one.")] = 0,
    json_: Json = False,
) -> None:
    """The run's page, one file that opens offline: outcome, curves, experts, memory, recipe."""
    from toolkit.report.page import write_page
    from toolkit.report.serve import page_server

    run = run_of(run) or run
    if not serve:
        page = write_page(run)
        if json_:
            emit({"page": str(page), "bytes": page.stat().st_size}, json_)
        else:
            print(page)
        next_commands(plain_console(), ["report", run, "--serve"], ["chat", run, "--compare"])
        return
    with page_server(run, port) as server:
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            next_commands(plain_console(), ["report", run])


def generate(
    run: RunPath,
    prompt: Annotated[str, typer.Option(help="What the user says; - reads stdin.")],
    base: Base = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    mtp: Mtp = False,
    dtype: Dtype = None,
    json_: Json = False,
) -> None:
    """One answer of the adapted model, to stdout."""
    from toolkit import run as job
    from toolkit.errors import RecipeError

    # The last line break is the shell's; other white space may be what the model was trained to see.
    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    if not text.strip():
        raise RecipeError("--prompt: is empty; give the question, or - to read it from stdin")
    console = quiet_console()
    made, model, tokenizer = reopen(run, _in(dtype), base, console)
    dialogue = job.dialogue(tokenizer, made, artifact_of(run))
    reply_to = _writer(run, made, model, tokenizer, max_new_tokens, temperature, mtp, console)
    ids = dialogue.prompt_ids([{"role": "user", "content": text}])
    written, figures = reply_to(ids)
    reply = dialogue.read(written, ids)
    if json_:
        parts = {"thought": reply.thought, "calls": list(reply.calls)}
        told = {name: part for name, part in parts.items() if part}
        emit({"prompt": text, "answer": reply.text, **told, **({"mtp": figures} if mtp else {})}, json_)
    else:
        if reply.thought:
            console.print(f"thought: {reply.thought}", style="dim", markup=False)
        print(reply.judged)
    next_commands(console, ["chat", *opened_as(run, base), "--compare"])


def chat(
    run: RunPath,
    base: Base = None,
    compare: Annotated[bool, typer.Option("--compare", help="The base answers too.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    mtp: Mtp = False,
    dtype: Dtype = None,
) -> None:
    """Talk to the adapted model; /help lists what can be switched on the way, /quit or an empty line ends."""
    from rich.console import Console

    from toolkit import run as job
    from toolkit.serving import Conversation, Screen, talk

    console = quiet_console()
    made, model, tokenizer = reopen(run, _in(dtype), base, console)
    dialogue = job.dialogue(tokenizer, made, artifact_of(run))
    if dialogue.form.form == "text":
        console.print("trained on plain text: each line is sent without the earlier ones")
    conversation = Conversation(
        model,
        dialogue,
        max_new_tokens,
        temperature,
        make_drafts=partial(_drafts, run, made, model, max_new_tokens, temperature, console),
        drafting=mtp,
        compare=compare,
    )

    def tell(text: str) -> None:
        print(text, end="", flush=True)

    if sys.stdin.isatty():
        console.print("/help lists commands; an empty line ends", style="dim")
    talk(conversation, iter(_ask, ""), Screen(tell, lambda line: console.print(line, markup=False), Console()))
    next_commands(console, ["eval", *opened_as(run, base)], ["push", run, "OWNER/NAME"])


def serve(
    run: RunPath,
    base: Base = None,
    host: Annotated[str, typer.Option(help="Address to listen on; only this machine reaches localhost.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    dtype: Dtype = None,
) -> None:
    """Serve the adapted model, OpenAI-compatible, by transformers' own server."""
    from toolkit import run as job
    from toolkit.serving import require_server
    from toolkit.serving import serve as run_server

    require_server()
    console = quiet_console()
    made, model, tokenizer = reopen(run, _in(dtype), base, console)
    name = run.resolve().parent.name if run.name == "adapter" else run.resolve().name
    url = f"http://{host}:{port}/v1"
    console.print(f"{url}  model {name}; Ctrl-C ends", markup=False)
    body = '{"messages": [{"role": "user", "content": "hello"}], "max_tokens": 32}'
    console.print(f"  curl {url}/chat/completions -H 'content-type: application/json' -d '{body}'", markup=False)
    run_server(model, tokenizer, job.dialogue(tokenizer, made, artifact_of(run)), name, host=host, port=port)
    next_commands(console, *(["export", run, "--format", each] for each in ("per-expert", "gguf")))


def _in(dtype: str | None) -> list[str] | None:
    return [f"model.dtype={dtype}"] if dtype else None


def _writer(
    run: Path,
    made: Plan,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float,
    mtp: bool,
    console: Console,
) -> Callable[[list[int]], tuple[list[int], dict[str, Any]]]:
    """What writes the answer's tokens for a prompt's and, with drafts, says their figures."""
    from toolkit.evaluate import answer_ids

    if not mtp:
        return lambda ids: (
            answer_ids(model, tokenizer, [ids], max_new_tokens=max_new_tokens, temperature=temperature)[0],
            {},
        )
    writer = _drafts(run, made, model, max_new_tokens, temperature, console)

    def reply(ids: list[int]) -> tuple[list[int], dict[str, Any]]:
        (written,) = writer.generate([ids])
        if writer.counts.switched_off:
            console.print("drafts cost more time than they save here: switched off")
        return written, {"tau": writer.counts.tokens_per_pass, "acceptance": writer.counts.rates()}

    return reply


def _drafts(
    run: Path, made: Plan, model: PeftModel, max_new_tokens: int, temperature: float, console: Console
) -> Speculator:
    """What decodes with the artifact's head, or with what followed the same words before where it has none."""
    from toolkit import run as job
    from toolkit.mtp.drafts import speculator
    from toolkit.mtp.head_file import HEAD_FILE

    artifact = artifact_of(run)
    head = job.reopen_head(model, made, artifact) if (artifact / HEAD_FILE).is_file() else None
    if head is None:
        console.print(f"{artifact}: no multi-token-prediction head; drafting by prompt lookup", markup=False)
    count = max(made.recipe.mtp.depth, len(head.layers)) if head else _LOOKED_UP
    return speculator(model, head, count=count, max_new_tokens=max_new_tokens, temperature=temperature)


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
