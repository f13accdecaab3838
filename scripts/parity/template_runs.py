#!/usr/bin/env python3
"""Is a run the same from data to chat under published chat templates, and the day after? A table of steps.

    .venv/bin/python scripts/parity/template_runs.py [TEMPLATE …]

The embedded model gets the tokenizer of one of TRL's templates. Through the command it is trained without a stop, and
again with a stop on day one and the rest on day two; the adapters must be equal byte for byte. On day two the run is
evaluated, verified, and asked by `generate` and `chat`; what its model was asked is held against a rendering that
knows nothing of ours. Answers that a model of 2 M parameters does not write, thoughts and calls, are dictated.

Exits with 1 where a step of a template fails.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers.utils import logging

from scripts.parity.template_days import Days
from scripts.parity.template_families import Family
from scripts.parity.template_masks import trl_families
from scripts.parity.template_renderer import TODAY
from scripts.parity.template_run_case import KINDS, OPTIONS, Case, Failed, Row, make_checkpoint, require, rows_of, write
from toolkit.data import ChatForm, Dialogue, build_batches
from toolkit.errors import DataError

__all__ = ["NAMES", "STEPS", "main", "run_family"]

NAMES = (
    "gptoss",
    "glm4moe",
    "qwen3",
    "qwen3_5_think",
    "qwen3_5_think/shut",
    "gemma4_v5",
    "deepseekv3",
    "lfm2_2_5_v2",
    "nemotron_3_nano",
    "phi3_5",
    "llama3_1",
)
TOMORROW = TODAY + datetime.timedelta(days=1)
_NEEDS = {"thought": r"reasoning_content|thinking", "call": r"tool_calls"}
"""A template that reads these takes such conversations."""


def _data(case: Case) -> None:
    """Write the kinds of conversations that the template takes; what it reads, it must take."""
    make_checkpoint(case)
    rows: list[Row] = []
    for kind in KINDS:
        try:
            build_batches(
                case.tokenizer,
                train=str(write(case.folder / "kind.jsonl", rows_of(kind))),
                stop_token_ids=case.stops,
                chat_template_kwargs=case.options,
                date=TODAY,
                max_length=4096,
            )
        except DataError as error:
            known = kind in _NEEDS and not re.search(_NEEDS[kind], case.family.template)
            known |= kind == "thought" and bool(case.options)
            require(known, f"{kind}: {error}")
            case.notes.append(f"no {kind}")
            continue
        case.kinds.append(kind)
        rows += rows_of(kind)
    write(case.folder / "rows.jsonl", rows)
    kwargs = f", chat_template_kwargs: {json.dumps(case.options)}" if case.options else ""
    case.recipe.write_text(
        f"""\
model: {{model_name_or_path: {case.folder}/model}}
lora: {{r: 2}}
data: {{train: {case.folder}/rows.jsonl, validation_size: 5{kwargs}}}
training:
  {{output_dir: {case.run}, max_steps: 6, save_steps: 2, learning_rate: 1e-2, max_length: 1024, use_cpu: true,
   warmup_steps: 0, gradient_checkpointing: false}}
eval: {{max_samples: 5, max_new_tokens: 6, batch_size: 5}}
"""
    )


def _whole(case: Case) -> None:
    """Train without a stop, on day one."""
    case.command(TODAY, "train", case.recipe, f"training.output_dir={case.folder}/whole")
    if _rendered_on(case, TODAY) != _rendered_on(case, TOMORROW):
        case.notes.append("prints the date")


def _rendered_on(case: Case, day: datetime.date) -> list[int]:
    dialogue = Dialogue(case.tokenizer, ChatForm(date=day.isoformat(), chat_template_kwargs=case.options))
    return dialogue.prompt_ids(rows_of("plain")[0]["messages"][:1])


def _stopped(case: Case) -> None:
    """Stop it on day one, once a checkpoint is there."""
    case.command(TODAY, "train", case.recipe, until=case.run / "checkpoints/checkpoint-2", code=75)
    require(not (case.run / "summary.json").exists(), "it had ended before it was stopped")


def _resumed(case: Case) -> None:
    """Go on, on day two, to the same files as without a stop."""
    done = case.command(TOMORROW, "train", case.recipe)
    require("resuming from checkpoint-" in done.err, f"does not say that it resumes: {done.last_line}")
    one, other = (
        {path.name: path.read_bytes() for path in sorted((run / "adapter").iterdir())}
        for run in (case.folder / "whole", case.run)
    )
    differ = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    require(not differ, f"other bytes than without a stop: {', '.join(differ)}")


def _evaluated(case: Case) -> None:
    """`eval` says what the summary says."""
    done = case.command(TOMORROW, "eval", case.run, "--json")
    told, results = json.loads(done.out), json.loads((case.run / "summary.json").read_text())["results"]
    differ = [name for name in told if told[name] != results.get(name)]
    require({"base", "adapted"} <= told.keys() and not differ, f"eval and summary differ in {', '.join(differ)}")


def _packaged(case: Case) -> None:
    """The artifact verifies, and says date, options and ends."""
    case.command(TOMORROW, "verify", case.run)
    case.command(TOMORROW, "verify", case.run / "adapter", "--base", case.folder / "model")
    told = json.loads((case.run / "adapter/generation_config.json").read_text())["eos_token_id"]
    _, written = case.example(rows_of("plain")[0])
    wanted = {*case.stops, written[-1]}
    require(wanted <= set(told), f"generation_config.json ends at {told}, not at {sorted(wanted - set(told))}")
    require(told == case.chat["stop_token_ids"], "manifest and generation_config.json end answers otherwise")
    require(case.chat.get("date") == TODAY.isoformat(), f"the manifest's date is {case.chat.get('date')}")
    require(case.chat.get("chat_template_kwargs", {}) == case.options, "the manifest has other template options")


def _generated(case: Case) -> None:
    """`generate` feeds day one's prompt; its own answer, and one that is dictated, part by part."""
    for kind in ("plain", "thought", "call"):
        if kind not in case.kinds:
            continue
        row = rows_of(kind)[0]
        asked, said = row["messages"][:2]
        prompt, written = case.example({"messages": [asked, said]})
        require(tuple(prompt) in case.prompts([asked]), f"{kind}: trained after another prompt than is rendered")
        command = ("generate", case.run, "--json", "--max-new-tokens", 4, "--prompt", asked["content"])
        for answers in ((), (written,)) if kind == "plain" else ((written,),):
            done = case.command(TOMORROW, *command, answers=answers)
            (heard,) = done.asked
            require(heard[1] == prompt, f"{kind}: fed {_shown(case, heard[1])}, trained after {_shown(case, prompt)}")
        told = json.loads(done.out)
        wanted = {"prompt": asked["content"], "answer": said["content"]}
        wanted |= {"thought": said["reasoning_content"]} if kind == "thought" else {}
        wanted |= {"calls": [said["tool_calls"][0]["function"]]} if kind == "call" else {}
        require(told == wanted, f"{kind}: told {json.dumps(told)}")


def _alone(case: Case) -> None:
    """The artifact without its run asks the same."""
    asked = rows_of("plain")[0]["messages"][0]
    prompt, _ = case.example(rows_of("plain")[0])
    alone = Path(shutil.copytree(case.run / "adapter", case.folder / "alone"))
    base = ("--base", case.folder / "model", "--max-new-tokens", 4, "--prompt", asked["content"])
    (heard,) = case.command(TOMORROW, "generate", alone, *base).asked
    require(heard[1] == prompt, f"fed {_shown(case, heard[1])}, trained after {_shown(case, prompt)}")


def _shown(case: Case, ids: Sequence[int]) -> str:
    return repr(case.tokenizer.decode(ids)[-120:])


def _chatted(case: Case) -> None:
    """The second question of a conversation follows the parsed first answer, as the template renders it."""
    kind = "thought" if "thought" in case.kinds else "plain"
    asked, said = rows_of(kind)[0]["messages"]
    _, written = case.example({"messages": [asked, said]})
    again = {"role": "user", "content": "And dry?"}
    done = case.command(
        TOMORROW,
        *("chat", case.run, "--max-new-tokens", 4),
        said=f"{asked['content']}\n{again['content']}\n\n",
        answers=(written, written),
    )
    require(len(done.asked) == 2, f"asked {len(done.asked)} times, not twice")
    fed = tuple(done.asked[1][1])
    require(fed in case.prompts([asked, said, again]), f"the second prompt is {_shown(case, fed)}")
    own = case.command(TOMORROW, "chat", case.run, "--max-new-tokens", 4, said="Hello?\nAnd dry?\n\n")
    require(len(own.asked) == 2, f"own answers: asked {len(own.asked)} times, not twice")


def _tools(case: Case) -> None:
    """A call that was read, and its result, are the history that the template renders for the row."""
    if "call" not in case.kinds:
        return
    row = rows_of("call")[0]
    asked, called, result, _ = row["messages"]
    prompt, written = case.example({**row, "messages": [asked, called]})
    dialogue = case.dialogue()
    require(dialogue.prompt_ids([asked], row["tools"]) == prompt, "asked with tools otherwise than trained")
    answer = dialogue.read(written, prompt)
    require(list(answer.calls) == [called["tool_calls"][0]["function"]], f"read as {answer}")
    fed = tuple(dialogue.prompt_ids([asked, answer.message(), result], row["tools"]))
    require(fed in case.prompts([asked, called, result], row["tools"]), f"the result's prompt is {_shown(case, fed)}")


STEPS: Mapping[str, Callable[[Case], None]] = {
    "data": _data,
    "whole": _whole,
    "stopped": _stopped,
    "resumed": _resumed,
    "eval": _evaluated,
    "package": _packaged,
    "generate": _generated,
    "alone": _alone,
    "chat": _chatted,
    "tools": _tools,
}
"""In their order; the first four need each other."""


def run_family(family: Family, days: Days, folder: Path) -> tuple[dict[str, str], list[str]]:
    """What came of each step, `ok` or a line, and what is special of the template."""
    case = Case(family, folder, days)
    found: dict[str, str] = {}
    for number, (name, step) in enumerate(STEPS.items()):
        if number > 3 and found["resumed"] != "ok":
            break
        try:
            step(case)
            found[name] = "ok"
        except Failed as error:
            found[name] = str(error)
        if number < 3 and found[name] != "ok":
            break
    return {name: found.get(name, "not reached") for name in STEPS}, case.notes


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("templates", nargs="*", default=NAMES, metavar="TEMPLATE")
    names = parser.parse_args(arguments).templates
    families = {family.name: family for family in trl_families()}
    families |= {name: replace(families[name.partition("/")[0]], name=name) for name in OPTIONS}
    if unknown := [name for name in names if name not in families]:
        parser.error(f"{', '.join(unknown)}: TRL has no such template; known: {', '.join(families)}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bad: list[str] = []
    print(f"{'':18}" + "".join(f"{name:>10}" for name in STEPS))
    with Days() as days, tempfile.TemporaryDirectory() as scratch:
        for name in names:
            folder = Path(scratch) / name.replace("/", "-")
            folder.mkdir()
            start = time.monotonic()
            found, notes = run_family(families[name], days, folder)
            shutil.rmtree(folder)
            signs = ("ok" if said == "ok" else "-" if said == "not reached" else "FAILED" for said in found.values())
            took = f"{time.monotonic() - start:.0f} s"
            print(f"{name:18}" + "".join(f"{sign:>10}" for sign in signs), f"  {', '.join([took, *notes])}", flush=True)
            lines = [f"{name}: {step}: {said}" for step, said in found.items() if said not in ("ok", "not reached")]
            print("".join(f"    {line}\n" for line in lines), end="", flush=True)
            bad += lines
    print(f"{len(names)} templates, {len(bad)} failures")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
