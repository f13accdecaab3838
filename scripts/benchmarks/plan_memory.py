#!/usr/bin/env python3
"""Planned against measured peak memory of training on a CPU: families, lengths, ranks, checkpointing, streaming.

    .venv/bin/python scripts/benchmarks/plan_memory.py [--only NUMBER …] [--json FILE] [--table FILE] [--again FILE]

Each row is a process of its own, forked from one that has only loaded the libraries: it plans, builds a model of 60 to
400 MB in int8 with random numbers, trains two steps as `onecard train` does, and reads its anonymous memory (RssAnon)
every 5 ms. What Python and the libraries held before the model was built is subtracted; nothing else is.

MALLOC_MMAP_THRESHOLD_ is set to glibc's own initial value, which keeps glibc from raising it as it goes: what is freed
is then given back, and RssAnon is what the run holds, as `torch.cuda.max_memory_allocated` is on a card. `--holes`
leaves glibc alone; the plan has `slack` for that. Streamed cases read their stacks from an int8 file that another
process has written; what stays is copied out of the file's mapping, since mapped pages are nobody's anonymous memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from plan_cases import CASES, FAMILIES, SIZES, Case

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "recipes" / "quickstart" / "nano-qwen3moe-2m"

PROMPT = 32
"""Tokens of the prompts that a model answers for its head; an answer has as many."""


def run(case: Case, again: dict[str, Any] | None = None) -> dict[str, Any]:
    """Plan and train one case in this process; with the row of an earlier run, plan it anew."""
    with tempfile.TemporaryDirectory() as folder:
        _config(case).save_pretrained(Path(folder) / "model")
        recipe, planned, placement, note = _plan(case, str(Path(folder) / "model"))
        measured, before = (again["measured"], again["before"]) if again else _measure(case, folder, recipe, placement)
    return {
        "family": case.family, "length": case.length, "case": case.text, "planned": planned.run, "measured": measured,
        "error": planned.run / measured - 1, "note": note, "before": before, "bytes": vars(planned),
    }  # fmt: skip


def _plan(case: Case, name: str) -> tuple[Any, Any, Any, str]:
    """Recipe, bytes, placement (None where all is resident) and the plan's note."""
    from toolkit.plan.budget import Budget
    from toolkit.plan.devices import this_device
    from toolkit.plan.steps import StepShape
    from toolkit.recipe import parse

    recipe = parse(
        f"model: {{model_name_or_path: '{name}'}}\ndata: {{train: none}}\n"
        f"lora: {{r: {case.r}, router: {str(case.router).lower()}, target_modules: {case.target_modules}}}\n"
        f"training: {{method: {case.method}, max_length: {case.length}, optim: {case.optim}, "
        f"packing: {str(case.packing).lower()}, "
        f"gradient_checkpointing: {str(case.checkpointing).lower()}, max_steps: 2, "
        f"per_device_train_batch_size: {case.batch}, gradient_accumulation_steps: {case.accumulation}}}\n"
        + (f"placement: {{experts: disk, share: {case.share}}}\n" if case.share else "")
        + (f"mtp: {{enabled: true, depth: {case.drafts}, {_learns(case)}}}\n" if case.drafts else "")
    )
    shape = StepShape(case.length, case.answered, prompt=PROMPT if case.answers else 0)
    if recipe.training.sides == 2:
        shape = replace(shape, pair=case.length + case.answered + 1, pair_labelled=2 * case.answered)
    device = this_device(use_cpu=True)
    budget = Budget(name, "main", device, "float32", "onecard_per_expert", "auto", True, shape)
    placement = budget.place(recipe) if case.share else None
    return recipe, budget.bytes(recipe, placement), placement, budget.note


def _learns(case: Case) -> str:
    return f"stage: after, own_answers: {case.answers}" if case.answers else "stage: with, own_answers: 0"


def _measure(case: Case, folder: str, recipe: Any, placement: Any) -> tuple[int, int]:
    """Bytes at the highest beyond what was there before, and those."""
    import torch
    from datasets import Dataset
    from rich.console import Console
    from transformers import AutoTokenizer

    from toolkit.adapters import attach_lora
    from toolkit.labels import IGNORED
    from toolkit.mtp.build import new_head
    from toolkit.mtp.training import HeadTraining
    from toolkit.ops.sink_attention import attend_with_sinks
    from toolkit.training import RunContext, train_adapter
    from toolkit.training.memory import anonymous_memory, peak_of

    generator = torch.Generator().manual_seed(1)
    count = 2 * case.batch * case.accumulation * recipe.training.sides
    ids = torch.randint(3, 2000, (count, case.length), generator=generator)
    if recipe.training.sides == 2:  # of one prompt
        ids[1::2, : case.length - case.answered] = ids[::2, : case.length - case.answered]
    labels = ids.masked_fill(torch.arange(case.length) < case.length - case.answered - (case.method == "sft"), IGNORED)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    if placement:
        number = str(CASES.index(case))
        subprocess.run([sys.executable, __file__, "--write", folder, "--only", number], check=True)

    before = anonymous_memory()
    model = _streamed(folder, placement) if placement else _resident(_config(case))
    attend_with_sinks(model)
    adapted = attach_lora(model, **recipe.lora.model_dump(exclude={"adapter_name_or_path"}))
    arguments = recipe.training.model_dump(exclude={"output_dir"})
    head = HeadTraining(new_head(adapted.get_base_model()), adapted, depth=case.drafts) if case.drafts else None
    result = train_adapter(
        adapted,
        tokenizer,
        data,
        None,
        RunContext(
            folder=Path(folder) / "checkpoints",
            metrics=Path(folder) / "metrics.jsonl",
            arguments={**arguments, "save_steps": 1000, "report_to": [], "run_name": "x"},
            device="cpu",
            dtype="float32",
            train_router=case.router,
            console=Console(quiet=True),
            probes=False,
            head=None if case.answers else head,
            preference=_preference(case, Path(folder), recipe),
        ),
    )
    with peak_of("cpu") as peak:
        if head is not None and case.answers:
            _own_answers(case, head, tokenizer)
    return max(result.peak_memory, peak.bytes) - before, before


def _preference(case: Case, folder: Path, recipe: Any) -> Any:
    """What the method is told beside its pairs; None for single answers."""
    from toolkit.training import Preference

    if case.method == "sft":
        return None
    options = getattr(recipe, case.method).model_dump()
    return Preference(options, folder / "reference.safetensors", {"start": ""}, method=case.method)


def _own_answers(case: Case, head: Any, tokenizer: Any) -> None:
    """To prompts of random tokens."""
    import torch

    from toolkit.evaluate import answer_ids
    from toolkit.mtp.own_answers import OwnHidden, learn_own_answers

    generator, hidden = torch.Generator().manual_seed(2), OwnHidden(head.model)
    prompts = torch.randint(3, 2000, (case.answers, PROMPT), generator=generator).tolist()
    head.model.eval()
    with hidden.writing(prompts) as written:
        answers = answer_ids(head.model, tokenizer, prompts, max_new_tokens=PROMPT, batch_size=32, written=written)
    learn_own_answers(head, prompts, answers, tokens=case.length * case.batch, source=hidden)


def _config(case: Case) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[case.family](**{**SIZES, **FAMILIES[case.family], **case.config})


def _resident(config: Any) -> Any:
    """The int8 model with random numbers, all in memory."""
    import torch

    from toolkit.architecture import auto_class
    from toolkit.quant.quantizer import Int8Config, Int8Quantizer

    with torch.device("meta"):
        model = auto_class(config).from_config(config, experts_implementation="onecard_per_expert")
    model.requires_grad_(False)
    Int8Quantizer(Int8Config())._process_model_before_weight_loading(model)
    _fill(model)
    return model


def _write(case: Case, folder: str) -> None:
    """The case's model in fp32, and its int8 file."""
    import torch

    from toolkit.architecture import auto_class
    from toolkit.offload.cache import int8_folder

    name = str(Path(folder) / "model")
    auto_class(_config(case)).from_config(_config(case)).save_pretrained(name)
    int8_folder(name, dtype=torch.float32, root=Path(folder) / "cache")


def _streamed(folder: str, placement: Any) -> Any:
    """The same with streamed stacks; nothing else is left mapped."""
    from toolkit.offload.attach import load_streamed

    model, _ = load_streamed(str(Path(folder) / "model"), placement, cache=Path(folder) / "cache",
                             experts_implementation="onecard_per_expert")  # fmt: skip
    for parameter in model.parameters():
        if parameter.stride() != (0,) * parameter.dim() or not parameter.dim():
            parameter.data = parameter.data.clone()
    return model


def _fill(model: Any) -> None:
    """Numbers in an empty model, none of them large."""
    import torch

    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dtype == torch.int8:
                parameter.random_(-90, 90, generator=generator)
            elif name.endswith("_scale"):
                parameter.fill_(4e-4)
            elif parameter.dim() == 1:
                parameter.fill_(1.0 if "norm" in name else 0.0)
            else:
                parameter.normal_(0, 0.02, generator=generator)
        for buffer in model.buffers():
            buffer.zero_() if not buffer.is_floating_point() else buffer.fill_(0.01)


def main() -> None:
    """Every case in a process of its own, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, nargs="*")
    parser.add_argument("--holes", action="store_true", help="With glibc's settings untouched.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, help="Markdown.")
    parser.add_argument("--again", type=Path, help="A file of --json: plan its rows anew, measure nothing.")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write:
        _write(CASES[given.only[0]], given.write)
        return
    settings = {} if given.holes else {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
    if {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")} != settings:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        os.execve(sys.executable, [sys.executable, *sys.argv], {**kept, **settings})
    _load_libraries()
    rows = []
    known = (
        {(row["family"], row["length"], row["case"]): row for row in json.loads(given.again.read_text())}
        if given.again
        else {}
    )
    for number in given.only or range(len(CASES)):
        case = CASES[number]
        earlier = known.get((case.family, case.length, case.text))
        if given.again and earlier is None:
            continue
        row = _in_a_process(case, earlier)
        if isinstance(row, str):
            print(f"{number} {CASES[number]} failed: {row}", flush=True)
            continue
        rows.append(row)
        print(
            f"{number:3} {row['family']:12} {row['length']:5} {row['case']:50} planned {row['planned'] / 2**20:7.1f} "
            f"measured {row['measured'] / 2**20:7.1f} {row['error']:+.1%} {row['note']}",
            flush=True,
        )
        if given.json:
            given.json.write_text(json.dumps(rows, indent=1) + "\n")
        if given.table:
            given.table.write_text(table(rows))


def _load_libraries() -> None:
    """Once, for all the processes that are forked from here."""
    import bitsandbytes  # noqa: F401
    import torch

    import toolkit.offload.attach
    import toolkit.rehearsal
    import toolkit.training  # noqa: F401

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def _in_a_process(case: Case, earlier: dict[str, Any] | None) -> dict[str, Any] | str:
    """The case's row, or why there is none."""
    here, there = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=_answer, args=(case, earlier, there))
    process.start()
    there.close()
    try:
        row: dict[str, Any] | str = here.recv()
    except EOFError:
        row = "the process died"
    process.join()
    return row


def _answer(case: Case, earlier: dict[str, Any] | None, there: Any) -> None:
    try:
        there.send(run(case, earlier))
    except Exception as error:
        there.send(f"{type(error).__name__}: {error}")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    lines = ["| family | tokens | adapter, optimizer, activations | planned MiB | measured MiB | error |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in rows:
        sizes = " | ".join(f"{row[key] / 2**20:.1f}" for key in ("planned", "measured"))
        lines.append(f"| {row['family']} | {row['length']} | {row['case']} | {sizes} | {row['error']:+.1%} |")
    within = sum(abs(row["error"]) <= 0.05 for row in rows)
    lines.append(f"\n{within} of {len(rows)} within 5%.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
