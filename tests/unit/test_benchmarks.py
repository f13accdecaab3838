"""The benchmarks judge fairly: rivals get the same layer, turns are even, and what must not be is complained of."""

from __future__ import annotations

import itertools
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

SCRIPTS = Path(__file__).parents[2] / "scripts" / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks as they import each other."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    known = set(sys.modules)

    def load(name: str) -> ModuleType:
        return import_module(name)

    yield load
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(SCRIPTS)):
            del sys.modules[name]


@pytest.fixture
def layer(script: Any) -> Any:
    """A shape no two of whose sizes are alike, and experts that nobody chooses."""
    return script("expert_arms").Shape(experts=11, hidden=64, intermediate=40, top_k=2, tokens=5, rank=3)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_ours_and_stock_compute_the_same_layer(script: Any, layer: Any, implementation: str) -> None:
    arms, backend = script("expert_arms"), script("toolkit.plan").PER_EXPERT
    ours, stock = arms.ours(layer).results(backend), arms.stock(layer).results(implementation)
    assert ours.keys() == stock.keys()
    for name, want in stock.items():
        assert (ours[name] - want).abs().max() <= 1e-5 * want.abs().max(), name


def test_the_adapter_counts_and_frozen_leaves_it_out(script: Any, layer: Any) -> None:
    stock = script("expert_arms").stock(layer)
    adapted, frozen = stock.step("eager"), stock.step("frozen-eager")
    assert (adapted - frozen).abs().max() > 0.1 * frozen.abs().max()
    assert all(leaf.grad is None for leaf in stock.leaves())


def test_base_flops_are_those_of_a_frozen_step(script: Any, layer: Any) -> None:
    stock = script("expert_arms").stock(layer)
    with FlopCounterMode(display=False) as counted:
        stock.step("frozen-eager")
    assert script("experts").base_flops(layer) == counted.get_total_flops()


def test_shapes_are_read_as_they_are_written(script: Any) -> None:
    experts = script("experts")
    assert [experts.name_of(experts.shape_of(name, 16)) for name in experts.SHAPES] == list(experts.SHAPES)


def test_every_arm_is_first_equally_often_and_the_first_round_does_not_count(script: Any) -> None:
    turns, seen = script("turns"), []
    figures = turns.alternate({name: lambda name=name: seen.append(name) or len(seen) for name in "abc"}, 6)
    assert [len(each) for each in figures.values()] == [6, 6, 6]
    assert min(min(each) for each in figures.values()) > 3
    assert sorted(seen[3::3]) == sorted("abcabc")


@pytest.mark.parametrize("own", [True, False])
def test_a_worker_answers_in_an_environment_of_its_own(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    program = tmp_path / "worker.py"
    program.write_text(
        f"import os, sys\nsys.path.insert(0, {str(SCRIPTS)!r})\nfrom turns import serve\n"
        "def answer(name):\n    print('noise')\n    return {'value': os.environ.get(name), 'half': 1 / len(name)}\n"
        "serve(answer)\n"
    )
    monkeypatch.setenv("PYTHONPATH", "mine")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    turns = script("turns")
    with turns.Worker(sys.executable, program, threads=3, tuned=not own, own=own) as worker:
        kept = turns.KEEP_FREED_MEMORY
        assert worker.ask(name="PYTHONPATH")["value"] == ("mine" if own else None)
        assert worker.ask(name="OMP_NUM_THREADS")["value"] == "3"
        assert worker.ask(name="MALLOC_ARENA_MAX")["value"] is None
        assert worker.ask(name="MALLOC_TOP_PAD_")["value"] == (None if own else kept["MALLOC_TOP_PAD_"])
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            worker.ask(name="")


def test_step_memory_sees_what_a_step_holds_at_its_highest(script: Any, tmp_path: Path) -> None:
    program = tmp_path / "worker.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(SCRIPTS)!r})\nfrom turns import serve, step_memory\n"
        "serve(lambda size: {'bytes': step_memory(lambda: len(b'x' * size))})\n"
    )
    size = 64 << 20
    with script("turns").Worker(sys.executable, program, threads=1, tuned=False) as worker:
        assert 0.9 * size < worker.ask(size=size)["bytes"] < 2 * size


def test_a_greedy_worker_that_is_killed_is_left_out(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "worker.py"
    program.write_text(
        f"import os, sys\nsys.path.insert(0, {str(SCRIPTS)!r})\nfrom turns import serve\nfrom pathlib import Path\n"
        "def answer(step):\n    step < 2 or os.kill(os.getpid(), 9)\n"
        "    return {'first': int(Path('/proc/self/oom_score_adj').read_text())}\n"
        "serve(answer)\n"
    )
    turns = script("turns")

    def figures(*may_end: str) -> dict[str, list[float]]:
        count = itertools.count()
        with turns.Worker(sys.executable, program, threads=1, tuned=False, greedy=True) as worker:
            assert worker.ask(step=0)["first"] == 1000
            arms = {"greedy": lambda: worker.ask(step=next(count))["first"], "modest": lambda: 1.0}
            found: dict[str, list[float]] = turns.alternate(arms, 4, may_end)
            return found

    assert figures("greedy") == {"modest": [1.0] * 4}
    assert "greedy: left out, it was killed, most likely since memory ran out" in capsys.readouterr().err
    with pytest.raises(turns.WorkerEndedError):
        figures()


class _Bigrams(nn.Module):
    """Scores of the next token that depend on the last alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 7, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def test_held_out_loss_is_that_of_the_answers_tokens(script: Any) -> None:
    rows = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {"input_ids": [4, 5, 6, 1, 2], "labels": [-100] * 4 + [2]},
    ]
    model = _Bigrams().requires_grad_(False)
    wanted = -torch.stack([model.table.log_softmax(-1)[a, b] for a, b in ((1, 2), (2, 3), (1, 2))]).mean()
    assert script("train_arms").held_out_loss(model, rows) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize(
    ("ours", "difference", "count"), [(2.0, 1e-7, 0), (2.03, 1e-7, 1), (float("nan"), 1e-7, 1), (2.0, 1e-4, 1)]
)
def test_loss_that_differs_is_complained_of(script: Any, ours: float, difference: float, count: int) -> None:
    figures = {"held_out_loss": {"ours": ours, "stock TRL + PEFT": 2.0}, "packing": {"difference": difference}}
    assert len(list(script("train").complaints("x", figures))) == count


def test_preferences_wrong_answers_are_the_models_best_other_categories(script: Any) -> None:
    """Beams of one prompt stand together, best first; prompts are answered by length and come back in order."""
    module = script("preferences")
    words = ["animal", "plant", "person", "none of them"]
    best = {3: ["plant", "animal"], 4: ["none of them", "person"], 5: ["animal", "none of them"]}

    class Tokenizer:
        def pad(self, given: dict[str, list[list[int]]], **how: Any) -> dict[str, torch.Tensor]:
            assert how["padding_side"] == "left"
            width = max(map(len, given["input_ids"]))
            return {"input_ids": torch.tensor([[0] * (width - len(ids)) + ids for ids in given["input_ids"]])}

        def decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> str:
            return words[int(ids[0])]

    class Model:
        def generate(self, input_ids: torch.Tensor, num_return_sequences: int, **how: Any) -> torch.Tensor:
            lengths = (input_ids == 9).sum(1).tolist()
            beams = [best[n] + ["none of them"] * (num_return_sequences - 2) for n in lengths]
            told = torch.tensor([[words.index(word)] for each in beams for word in each])
            return torch.cat([input_ids.repeat_interleave(num_return_sequences, 0), told], 1)

    right = ["animal", "plant", "person"]
    assert module.wrong_answers(Model(), Tokenizer(), [[9] * 5, [9] * 3, [9] * 4], right) == [None, "animal", None]


def test_preferences_are_judged_beside_the_adapter_that_they_start_from(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = script("preferences")
    table = type("Table", (), {"column_names": ["input_ids", "labels"], "__len__": lambda self: 4})()
    first = module.Judged(table, [-1.0, -2.0, -3.0, -2.0], 0.25)
    after = module.Judged(table, [-2.0, -4.0, -2.5, -2.0], 0.5)
    assert after.told(first) == "right answer more probable 50.0%, gained more 100.0%, exact match 50.0% (2 pairs)"
    assert "gained more -, exact match 25.0%" in first.told(first)

    begun: list[tuple[str, Path, list[str]]] = []

    def finished(recipe: str, folder: Path, overrides: list[str]) -> Any:
        begun.append((recipe, folder, overrides))
        return type("Run", (), {"adapter": folder / "adapter"})()

    monkeypatch.setattr(module, "finished", finished)
    monkeypatch.setattr(module, "write_pairs", lambda *given: None)
    monkeypatch.setattr(module, "judged", lambda *given: module.Judged(None, [-1.0], 0.5))
    monkeypatch.setattr(module.Judged, "told", lambda self, first: "judged")
    asked = [str(tmp_path), "dpo.beta=0.3", "--base", "smollm2", "--methods", "dpo", "--seeds", "2"]
    assert module.main(asked) == 0
    assert capsys.readouterr().out.splitlines() == ["seed 2  sft    judged", "seed 2  dpo    judged"]
    (recipe, folder, _), (other, _, told) = begun
    assert (recipe, other) == ("smollm2-moe.yaml", "quickstart-dpo.yaml")
    assert told[-1] == "dpo.beta=0.3"
    assert f"lora.adapter_name_or_path={folder / 'adapter'}" in told
    assert "model.model_name_or_path=models/smollm2-moe" in told
