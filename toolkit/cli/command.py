"""The command: verbs that call the flow and print. People read stderr, programs stdout; imports stay inside verbs.

Every error is one line with the exit code of its class (`toolkit.errors`); `--debug` anywhere shows the traceback.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from toolkit.cli import prepare, run, share, use

__all__ = ["app", "main"]

_GARBAGE_AT = 10_000
"""Objects more than before at which Python looks for garbage. Libraries make millions that stay; with Python's own 700
a sixth of a start is looking among them."""

_FROM_RUST = re.compile(r"\(os error (\d+)\)")
"""In what safetensors and tokenizers raise for an error of the system: exceptions that are no OSError."""
_FULL = (errno.EFBIG, errno.ENOSPC, errno.EDQUOT)

app = typer.Typer(
    name="onecard",
    help="Fine-tune open Mixture-of-Experts models in 8-bit on one card. Start: onecard train recipes/quickstart.yaml",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_VERBS: dict[str, Callable[..., None]] = {
    "train": run.train,
    "sweep": run.sweep,
    "plan": run.plan,
    "preview": run.preview,
    "eval": use.evaluate,
    "report": use.report,
    "generate": use.generate,
    "chat": use.chat,
    "serve": use.serve,
    "verify": share.verify,
    "push": share.push,
    "export": share.export,
    "combine": share.combine,
    "quantize": prepare.quantize,
    "schema": prepare.schema,
    "init": prepare.init,
    "doctor": prepare.doctor,
}
for _name, _verb in _VERBS.items():
    app.command(_name)(_verb)


def _tell_version(wanted: bool) -> None:
    if wanted:
        from toolkit import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _all_verbs(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_tell_version, is_eager=True)
    ] = False,
) -> None:
    """Fine-tune open Mixture-of-Experts models in 8-bit on one card. Start: onecard train recipes/quickstart.yaml"""


def main() -> None:
    """Run the command; errors become one line and an exit code."""
    gc.set_threshold(_GARBAGE_AT)
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    # One card is the point; with several visible and no launcher, transformers would split batches over all of them.
    if "LOCAL_RANK" not in os.environ:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    # Read when cuBLAS starts: with it, products come out the same each time (`toolkit.training.train.same_each_time`).
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if not debug:
        _hush()
    if sys.flags.optimize > 1:
        _fail("Python runs without docstrings (-OO or PYTHONOPTIMIZE=2), which transformers reads; unset it", 2, debug)
    try:
        code = app(arguments, prog_name="onecard", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; the same command resumes from the last checkpoint", 130, debug)
    except Exception as error:
        _fail(*_explain(error), debug)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _explain(error: Exception) -> tuple[str, int]:
    """What to print for an error, and the exit code."""
    from toolkit.errors import OnecardError, card_failed, first_line, out_of_memory

    if hasattr(error, "format_message"):
        return _usage(error), 2
    if isinstance(error, OnecardError):
        return f"{error}{_reach(str(error))}", error.exit_code
    if out_of_memory(error):
        return f"out of memory: {first_line(error)[:160]}; lower training.max_length or lora.r", 5
    if card_failed(error):
        again = "the same command resumes a run from its last checkpoint"
        said = first_line(error)[:160]
        return f"the card failed: {said}; {again}; CUDA_LAUNCH_BLOCKING=1 with --debug shows where", 5
    if type(error).__module__.startswith("triton."):
        way = "python scripts/gpu_check.py tells which; without the package triton experts are computed one by one"
        return f"a kernel does not compile for this card: {first_line(error)[:160]}; {way}", 5
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or 'the system'}: {error.strerror}", 5
    if found := _FROM_RUST.search(str(error)):
        advice = "; free space, or give a folder on another disk" if int(found[1]) in _FULL else ""
        return f"the system: {first_line(error)[:160]}{advice}", 5
    return f"unexpected: {type(error).__name__}: {first_line(error)}; --debug shows where", 1


def _usage(error: Any) -> str:
    """What a parser has to say; its class is private to typer."""
    from toolkit.recipe import field_named

    verb = error.ctx.command_path if error.ctx else "onecard"
    said = error.format_message().rstrip(".")
    option = getattr(error, "option_name", None)
    field = field_named(option.lstrip("-").replace("-", "_")) if isinstance(option, str) else None
    return f"{said}; {f'write {field}=VALUE' if field else f'{verb} --help lists what there is'}"


def _reach(message: str) -> str:
    """What to do where a library says no more than that the Hub is out of reach."""
    if "couldn't connect to" not in message:
        return ""
    offline = "; HF_HUB_OFFLINE is set here" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
    return f" Check the name and the connection, or give a folder{offline}"


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exc()
        _print_memory()
    print(f"onecard: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _print_memory() -> None:
    """What torch's allocator holds on the card, where one is in use."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        print(torch.cuda.memory_summary(abbreviated=True), file=sys.stderr)


def _hush() -> None:
    """Libraries' warnings are for us; what a person must know is said by the verbs. Before anything is imported."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("peft", "bitsandbytes", "datasets", "trl", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
