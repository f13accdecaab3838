"""The command: verbs that call the flow and print. People read stderr, programs stdout; imports stay inside verbs.

Every error is one line with the exit code of its class (`toolkit.errors`); `--debug` anywhere shows the traceback.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from toolkit.plan import Plan
    from toolkit.recipe import Recipe

__all__ = ["app", "main"]

app = typer.Typer(
    name="onecard",
    help="Fine-tune open Mixture-of-Experts models in 8-bit on one card. Start: onecard train recipes/quickstart.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe YAML.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Override the recipe.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
Base = Annotated[str | None, typer.Option(help="The base checkpoint, where the artifact names none that is here.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder or an artifact.")]


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None, json_: Json = False) -> None:
    """The main job: plan, load, attach, train, compare, package. Rerun the same command to resume."""
    from toolkit import flow
    from toolkit.packaging import check_token, push_artifact
    from toolkit.plan import make_plan
    from toolkit.recipe import dump
    from toolkit.report import terminal as show
    from toolkit.training import check_writable, open_run, write_text

    console = _quiet_console()
    parsed = _load_recipe(recipe, overrides, console)
    check_writable(Path(parsed.training.output_dir))
    if parsed.hub.push_to_hub:
        check_token(parsed.hub.hub_token)
    made = make_plan(parsed)
    tokenizer = flow.load_tokenizer(made)
    batches = flow.build_batches(tokenizer, made)
    run = open_run(made.folder, dump(parsed))
    if finished := run.read_summary():
        console.print(f"{run.path}: already finished; set training.output_dir to another folder to train again")
    else:
        write_text(run.plan, json.dumps(made.to_dict(), indent=2))
        show.plan(console, made)
        show.data(console, batches.report)
        model, tokenizer = flow.load(made)
        if compensated := flow.compensate(model, batches, made, run.compensated):
            show.compensation(console, compensated)
        model = flow.attach(model, made)
        show.reached(console, flow.coverage(model, made))
        result = flow.train(model, tokenizer, batches, made, console)
        finished = show.summarize(result, made, batches, flow.package(result, made), compensated)
        write_text(run.summary, json.dumps(finished, indent=2))
    show.summary(console, finished)
    _emit(finished, json_)
    if parsed.hub.push_to_hub:
        target = str(parsed.hub.hub_model_id)
        print(push_artifact(run.adapter, target, private=parsed.hub.hub_private_repo, token=parsed.hub.hub_token))


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|MODEL", help="A recipe YAML; with --audit, a model too.")],
    overrides: Overrides = None,
    audit: Annotated[bool, typer.Option("--audit", help="What the checkpoint is made of, from its headers.")] = False,
    json_: Json = False,
) -> None:
    """What a run will load, adapt and need, from the config alone."""
    from toolkit.plan import audit as take_stock
    from toolkit.plan import make_plan
    from toolkit.report import terminal as show

    console = _quiet_console()
    if audit and not recipe.endswith((".yaml", ".yml")):
        found = take_stock(recipe)
    else:
        parsed = _load_recipe(Path(recipe), overrides, console)
        if not audit:
            made = make_plan(parsed)
            show.plan(console, made)
            _emit(made.to_dict(), json_)
            return
        found = take_stock(parsed.model.model_name_or_path, revision=parsed.model.revision)
    show.audit(console, found)
    _emit(found.to_dict(), json_)


@app.command()
def preview(
    recipe: RecipePath,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option(min=0, help="Examples shown.")] = 3,
    json_: Json = False,
) -> None:
    """The first examples as tokens with the loss mask, a length histogram, drop counts."""
    from toolkit import flow
    from toolkit.data import render_preview
    from toolkit.plan import make_plan

    console = _quiet_console()
    made = make_plan(_load_recipe(recipe, overrides, console))
    tokenizer = flow.load_tokenizer(made)
    batches = flow.build_batches(tokenizer, made)
    render_preview(console, batches, tokenizer, count)
    _emit(batches.report.to_dict(), json_)


@app.command("eval")
def evaluate(run: RunPath, overrides: Overrides = None, base: Base = None, json_: Json = False) -> None:
    """Base against adapted on the held-out examples of the run's recipe."""
    from toolkit import flow
    from toolkit.report import terminal as show

    console = _quiet_console()
    made, model, tokenizer = _reopen(run, overrides, base, console, as_trained=True)
    batches = flow.build_batches(tokenizer, made)
    comparison = flow.evaluate(model, tokenizer, batches, made)
    if comparison is None:
        from toolkit.errors import DataError

        raise DataError(f"{run}: its recipe holds out no examples; add data.validation_size=0.1")
    show.comparison(console, comparison.to_dict())
    _emit(comparison.to_dict(), json_)


@app.command()
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

    made, model, tokenizer = _reopen(run, None, base, _quiet_console())
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = encode_chat(tokenizer, [{"role": "user", "content": text}], made.recipe.data.system_prompt)
    reply = answer(model, tokenizer, [ids], max_new_tokens=max_new_tokens, temperature=temperature)[0]
    if json_:
        _emit({"prompt": text, "answer": reply}, json_)
    else:
        print(reply)


@app.command()
def chat(
    run: RunPath,
    base: Base = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
) -> None:
    """Talk to the adapted model; an empty line ends it."""
    from toolkit.evaluate import answer, encode_chat

    made, model, tokenizer = _reopen(run, None, base, _quiet_console())
    messages: list[dict[str, str]] = []
    while line := _ask():
        messages.append({"role": "user", "content": line})
        ids = encode_chat(tokenizer, messages, made.recipe.data.system_prompt)
        reply = answer(model, tokenizer, [ids], max_new_tokens=max_new_tokens, temperature=temperature)[0]
        messages.append({"role": "assistant", "content": reply})
        print(reply, flush=True)


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="An adapter folder.")],
    base: Annotated[str | None, typer.Option(help="Also check that it fits this base.")] = None,
    json_: Json = False,
) -> None:
    """Layout, hashes, finiteness, whether every adapter moved, and base match."""
    from dataclasses import asdict

    from toolkit.errors import ModelError
    from toolkit.packaging import verify_artifact
    from toolkit.report import terminal as show

    console = _quiet_console()
    report = verify_artifact(_artifact_of(artifact), base=base)
    show.checks(console, report)
    _emit({**asdict(report), "ok": report.ok}, json_)
    if failed := [check for check in report.checks if not check.ok]:
        raise ModelError(f"{artifact}: {len(failed)} of {len(report.checks)} checks failed: {failed[0].detail}")


@app.command()
def push(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="An adapter folder or a run.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name on the Hub.")],
    public: Annotated[bool, typer.Option("--public", help="Create the repository public.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Verify and list the files, send nothing.")] = False,
) -> None:
    """Upload an artifact in one commit; the repository is private unless told."""
    from toolkit.packaging import push_artifact

    console = _quiet_console()
    folder = _artifact_of(artifact)
    if dry_run:
        console.print("\n".join(sorted(path.name for path in folder.iterdir())), highlight=False)
    url = push_artifact(folder, repo_id, private=not public, revision=revision, create_pr=create_pr, dry_run=dry_run)
    print(url)


@app.command("quantize")
def write_int8(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder or owner/name on the Hub.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; must not exist.")],
    revision: Annotated[str, typer.Option(help="Branch, tag or commit on the Hub.")] = "main",
    recipe: Annotated[Path | None, typer.Option(help="Compensate rounding errors on this recipe's examples.")] = None,
    json_: Json = False,
) -> None:
    """Write an int8 checkpoint, one layer in memory at a time; it loads at disk speed, here and in transformers.

    With a recipe, the int8 model is in memory too, and the checkpoint is used with error_compensation: none.
    """
    from toolkit.quant import quantize_checkpoint, refuse_existing

    console = _quiet_console()
    refuse_existing(out)
    compensated = _compensated(recipe, model, revision, console) if recipe else None
    with console.status("reading") as status:
        options: dict[str, Any] = {"revision": revision, "compensated": compensated}
        done = quantize_checkpoint(model, out, **options, progress=lambda n, of: status.update(f"{n} of {of}"))
    console.print(f"{out}: {done.shards} shards, {done.source_bytes / 1e9:.2f} GB became {done.bytes / 1e9:.2f} GB")
    if done.left_out:
        console.print(f"note: {len(done.left_out)} tensors that the model does not use left out: {done.left_out[0]}, …")
    _emit(done.to_dict(), json_)


@app.command()
def schema() -> None:
    """The recipe's JSON Schema."""
    from toolkit.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="RECIPE", help="The file to write.")] = Path("recipe.yaml"),
) -> None:
    """Write a commented starter recipe."""
    from toolkit.errors import RecipeError
    from toolkit.recipe import starter

    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(starter(str(path)))
    except FileExistsError:
        raise RecipeError(f"{path}: is there already; give another name") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be written ({error.strerror}); give another name") from None
    print(path)


@app.command()
def doctor(json_: Json = False) -> None:
    """What this machine has: card, memory, disk, versions."""
    from toolkit.report import terminal as show

    facts = show.machine()
    show.facts(_quiet_console(), facts)
    _emit(facts, json_)


def main() -> None:
    """Run the command; errors become one line and an exit code."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    # One card is the point; with several visible and no launcher, transformers would split batches over all of them.
    if "LOCAL_RANK" not in os.environ:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if not debug:
        _hush()
    try:
        app(arguments, prog_name="onecard", standalone_mode=True)
    except KeyboardInterrupt:
        _fail("interrupted; rerun the same command to go on from the last checkpoint", 130, debug)
    except Exception as error:
        _fail(*_explain(error), debug)


def _explain(error: Exception) -> tuple[str, int]:
    """What to print for an error, and the exit code."""
    from toolkit.errors import OnecardError, first_line

    if isinstance(error, OnecardError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {first_line(error)}; lower training.max_length or lora.r", 5
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or 'the system'}: {error.strerror}", 5
    return f"unexpected: {type(error).__name__}: {first_line(error)}; --debug shows where", 1


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exc()
    print(f"onecard: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _quiet_console() -> Console:
    """A console on stderr, with the libraries' own progress bars off."""
    import datasets
    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    return Console(stderr=True, highlight=False, soft_wrap=True)


def _hush() -> None:
    """Libraries' warnings are for us; what a person must know is said by the verbs. Before anything is imported."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("peft", "bitsandbytes", "datasets", "trl", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _load_recipe(path: Path, overrides: list[str] | None, console: Console) -> Recipe:
    from toolkit.recipe import load

    return load(path, overrides or (), note=lambda line: console.print(f"note: {line}"))


def _compensated(recipe: Path, model: str, revision: str, console: Console) -> Any:
    """The checkpoint in int8, rounded with error feedback on a recipe's examples."""
    from toolkit import flow
    from toolkit.plan import make_plan
    from toolkit.report import terminal as show

    overrides = [f"model.model_name_or_path={model}", f"model.revision={revision}", "quantization.experts=int8"]
    overrides += ["quantization.linears=int8", "quantization.error_compensation=gptq"]
    made = make_plan(_load_recipe(recipe, overrides, console))
    loaded, tokenizer = flow.load(made)
    if report := flow.compensate(loaded, flow.build_batches(tokenizer, made), made):
        show.compensation(console, report)
    return loaded


def _emit(value: Any, wanted: bool) -> None:
    if wanted:
        print(json.dumps(value, indent=2))


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _artifact_of(path: Path) -> Path:
    """A run's artifact, or the artifact itself."""
    return path / "adapter" if (path / "adapter" / "adapter_config.json").is_file() else path


def _reopen(
    path: Path, overrides: list[str] | None, base: str | None, console: Console, *, as_trained: bool = False
) -> tuple[Plan, Any, Any]:
    """The plan, adapted model and tokenizer of a run folder or artifact."""
    from toolkit import flow
    from toolkit.packaging import reopen_recipe
    from toolkit.plan import make_plan

    recipe = reopen_recipe(path, overrides or [], base, note=lambda line: console.print(f"note: {line}"))
    made = make_plan(recipe)
    model, tokenizer = flow.reopen(made, _artifact_of(path), as_trained=as_trained)
    return made, model, tokenizer
