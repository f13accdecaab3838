"""The whole job through the command on a handful of steps, and every verb on what it leaves behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

from tests.faults.conftest import MODEL, Run, onecard, recipe
from toolkit import __version__
from toolkit.cli.command import _explain

__all__ = ["onecard", "recipe"]


def test_train_then_every_verb_that_reads_a_run(
    onecard: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, err = onecard("train", recipe, "--json")
    assert status == 0, err
    summary = json.loads(out)
    counts = summary["counts"]
    for part in ("expert stacks int8", "linears 8-bit", "expert stacks adapted", "routers adapted", "adapters moved"):
        done, total = counts[part]
        assert done == total > 0, part
    assert summary["training"]["steps"] == 3
    assert 3 * 200 < summary["training"]["tokens"] <= 3 * 256
    assert {"base", "adapted"} <= summary["results"].keys()
    assert len(summary["samples"]) == 2
    for words in (
        "coverage",
        "exact match",
        "8 held-out examples",
        str(tmp_path / "run" / "adapter"),
        "onecard verify",
    ):
        assert words in err
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        "recipe.yaml", "plan.json", "chat.json", "metrics.jsonl", "checkpoints", "adapter", "summary.json",
        "experts.json", "report.html",
    }  # fmt: skip
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in metrics if "loss" in entry] == [1, 2, 3]
    assert all(entry["tokens_per_second"] > 0 for entry in metrics if "loss" in entry)

    assert onecard("verify", run)[0] == 0
    assert onecard("verify", run / "adapter", "--base", MODEL)[0] == 0
    status, out, _ = onecard("eval", run, "--json")
    assert status == 0
    assert json.loads(out) == {k: v for k, v in summary["results"].items() if k != "training"}
    status, out, _ = onecard("generate", run, "--prompt", "Which category is it: oak - a tree?", "--max-new-tokens", 4)
    assert status == 0
    assert out.strip()
    again = onecard("generate", run / "adapter", "--base", MODEL, "--max-new-tokens", 4, "--json", "--prompt",
                    "Which category is it: oak - a tree?")  # fmt: skip
    assert json.loads(again[1])["answer"] == out.strip()
    answers = iter(["Which category is it: oak - a tree?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    assert onecard("chat", run, "--max-new-tokens", 4)[1] == out
    seen: list[torch.dtype] = []

    def answer_ids(model: torch.nn.Module, *_: object, **__: object) -> list[list[int]]:
        seen.append(next(model.parameters()).dtype)
        return [[]]

    monkeypatch.setattr("toolkit.evaluate.answer_ids", answer_ids)
    for asked in ((), ("--dtype", "bfloat16")):
        assert onecard("generate", run, "--prompt", "x", *asked)[0] == 0
    assert seen == [torch.float32, torch.bfloat16]
    assert onecard("chat", run, "--dtype", "fp8")[0] == 2
    monkeypatch.undo()

    status, _, err = onecard("generate", run / "adapter", "--prompt", "x")
    assert status == 4
    assert "--base FOLDER" in err
    status, _, err = onecard("train", recipe)
    assert status == 0
    assert "already finished" in err
    assert "exact match" in err


def test_a_run_that_was_cut_off_goes_on_to_the_same_numbers(onecard: Run, recipe: Path, tmp_path: Path) -> None:
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    same = ["training.max_steps=4", "training.save_steps=2", "eval.enabled=false"]
    assert onecard("train", recipe, *same, f"training.output_dir={whole}")[0] == 0
    assert onecard("train", recipe, *same, f"training.output_dir={halved}")[0] == 0
    for name in ("adapter", "checkpoints/checkpoint-4"):
        for path in sorted((halved / name).iterdir()):
            path.unlink()
        (halved / name).rmdir()
    (halved / "summary.json").unlink()
    status, _, err = onecard("train", recipe, *same, f"training.output_dir={halved}")
    assert status == 0, err
    assert "resuming from checkpoint-2" in err
    weights = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (whole, halved)]
    assert weights[0] == weights[1]


def test_a_run_that_was_cut_off_after_its_last_step_keeps_its_figures(
    onecard: Run, recipe: Path, tmp_path: Path
) -> None:
    rare = ["training.logging_steps=100", "training.save_steps=1", "data.validation=null"]

    def last_line() -> dict[str, float]:
        assert onecard("train", recipe, *rare)[0] == 0
        line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
        return {name: line[name] for name in line if "mean_token_accuracy" in name or name in ("entropy", "train_loss")}

    whole = last_line()
    (tmp_path / "run" / "summary.json").unlink()
    assert last_line() == whole
    assert len(whole) == 3


def test_the_same_recipe_gives_the_same_bytes(onecard: Run, recipe: Path, tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("one", "two")]
    for run in runs:
        assert onecard("train", recipe, f"training.output_dir={run}")[0] == 0
    first, second = ({path.name: path.read_bytes() for path in (run / "adapter").iterdir()} for run in runs)
    assert {"README.md", "experts.png", "loss.png", "manifest.json"} <= first.keys()
    assert first == second
    assert not re.search(rb"_per_second|runtime", first["manifest.json"] + first["README.md"])


def test_plan_and_preview_load_no_weights_and_write_nothing(onecard: Run, recipe: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    status, out, err = onecard("plan", recipe, "--json")
    assert status == 0
    plan = json.loads(out)
    assert plan["moe_layers"] == 4
    assert plan["bytes"]["total"] == sum(size for name, size in plan["bytes"].items() if name != "total")
    assert "MiB" in err
    status, out, err = onecard("preview", recipe, "--json")
    assert status == 0
    assert json.loads(out)["splits"]["train"]["kept"] == 48
    assert "Which category is it" in err
    assert sorted(tmp_path.rglob("*")) == before


def test_schema_init_and_doctor(onecard: Run, tmp_path: Path) -> None:
    assert json.loads(onecard("schema")[1])["title"] == "Recipe"
    path = tmp_path / "mine.yaml"
    assert onecard("init", path)[0] == 0
    text = path.read_text()
    status, _, err = onecard("init", path)
    assert status == 2
    assert "already exists" in err
    assert path.read_text() == text
    status, out, err = onecard("doctor", "--json")
    assert status == 0
    assert json.loads(out)["versions"]["onecard"] == __version__
    assert "memory" in err


def test_public_verbs_stay_verbs_once_their_rooms_are_imported() -> None:
    """A submodule of the same name would take a verb's place in the package as soon as it is imported."""
    code = (
        "import pkgutil, importlib, toolkit\n"
        "for room in pkgutil.iter_modules(toolkit.__path__): importlib.import_module(f'toolkit.{room.name}')\n"
        "verbs = [n for n in toolkit.__all__ if n.islower()]\n"
        "assert verbs and all(callable(getattr(toolkit, n)) for n in verbs), verbs\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_python_without_docstrings_is_told_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-OO", "-m", "toolkit", "doctor"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "PYTHONOPTIMIZE=2" in done.stderr


def test_a_full_disk_that_a_library_meets_is_one_line() -> None:
    with pytest.raises(Exception, match="os error 28") as failed:
        Tokenizer(BPE()).save("/dev/full")
    said, code = _explain(failed.value)
    assert code == 5
    assert said.startswith("the system: No space left on device")
    assert "free space" in said


def test_a_run_that_is_not_finished_is_told_from_a_damaged_artifact(onecard: Run, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert "run is not a complete artifact" in onecard("verify", tmp_path / "run")[2]
    (tmp_path / "run" / "recipe.yaml").write_text("model: {}")
    status, _, err = onecard("verify", tmp_path / "run")
    assert status == 4
    assert "run is a run that is not finished; the same onecard train goes on" in err
