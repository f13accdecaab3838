"""The parity script's own judgement: it must be able to fail, on each of its lines."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from tests.unit.artifact.conftest import BASE

SCRIPTS = Path(__file__).parents[3] / "scripts" / "parity"
STOCK_SIDE = runpy.run_path(str(SCRIPTS / "stock_side.py"), run_name="stock_side")
STOCK_PEFT = runpy.run_path(str(SCRIPTS / "stock_peft.py"), run_name="stock_peft")


def judged(change: Callable[[dict[str, Any], dict[str, Any]], Any], ours_loss: float = 2.0) -> list[bool]:
    """Whether each line holds, where both sides agree but for `change(report, theirs)`."""
    torch.manual_seed(0)
    ours, made, plain = torch.randn(3, 5), torch.randn(3, 5), torch.randn(3, 5)
    theirs = {"theirs.0": ours.clone(), "plain.0": plain, "made.0": made.clone()}
    report = {"strangers": [], "keys": {"missing": [], "unexpected": [], "matched": ["k"]}, "loss": 2.0}
    change(report, theirs)
    return [line.ok for line in STOCK_PEFT["compare"](report, theirs, [ours], [made], ours_loss)]


def test_agreement_holds_everywhere() -> None:
    assert judged(lambda report, theirs: None) == [True] * 7


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda report, theirs: report["strangers"].append("toolkit"), 0),
        (lambda report, theirs: report["keys"]["missing"].append("k"), 1),
        (lambda report, theirs: report["keys"]["unexpected"].append("k"), 2),
        (lambda report, theirs: report["keys"]["matched"].clear(), 2),
        (lambda report, theirs: theirs.update({"plain.0": theirs["theirs.0"] + 1e-3}), 3),
        (lambda report, theirs: theirs["theirs.0"][1, 2].add_(2e-4), 4),
        (lambda report, theirs: theirs["theirs.0"][1, 2].fill_(torch.nan), 4),
        (lambda report, theirs: theirs["made.0"][1, 2].add_(2e-4), 5),
        (lambda report, theirs: report.update({"loss": 2.02}), 6),
    ],
)
def test_each_line_can_fail(change: Callable[[dict[str, Any], dict[str, Any]], Any], line: int) -> None:
    verdicts = judged(change)
    assert not verdicts[line]


def test_the_stock_side_loads_counts_keys_and_makes_an_adapter(
    pristine: Path, adapted: PeftModel, tmp_path: Path
) -> None:
    prompts = [[5, 6, 7, 8], [9, 10, 11]]
    state = {name: tensor.float() for name, tensor in plain_model().state_dict().items()}
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "weights.safetensors")
    job = {
        "base": str(BASE),
        "revision": "main",
        "weights": str(tmp_path / "weights.safetensors"),
        "adapter": str(pristine),
        "made": str(tmp_path / "made"),
        "prompts": prompts,
        "rows": [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}],
        "out": str(tmp_path),
    }
    report = STOCK_SIDE["run"](job)
    assert {kind: len(names) for kind, names in report["keys"].items()} == {
        "missing": 0,
        "unexpected": 0,
        "matched": 56,
    }
    assert json.loads((tmp_path / "report.json").read_text()) == report
    with torch.no_grad():
        output = adapted(torch.tensor([[1, 2, 3, 4]]), labels=torch.tensor([[-100, -100, 3, 4]]))
        assert report["loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    found = load_file(tmp_path / "logits.safetensors")
    expected = STOCK_SIDE["logits"](adapted, prompts)
    assert all(torch.equal(found[f"theirs.{i}"], tensor) for i, tensor in enumerate(expected))
    again = PeftModel.from_pretrained(plain_model(), tmp_path / "made")
    assert torch.equal(STOCK_SIDE["logits"](again, prompts)[0], found["made.0"])
    assert not torch.equal(found["made.0"], found["theirs.0"])


def plain_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_a_renamed_tensor_is_missing_and_unexpected(artifact: Path) -> None:
    tensors = load_file(artifact / "adapter_model.safetensors")
    name = next(name for name in tensors if ".gate.lora_A" in name)
    tensors[name.replace(".gate.", ".router.")] = tensors.pop(name)
    save_file(tensors, artifact / "adapter_model.safetensors")
    _, keys = STOCK_SIDE["with_adapter"](plain_model(), str(artifact))
    assert (keys["missing"], keys["unexpected"]) == ([name], [name.replace(".gate.", ".router.")])


def test_weights_that_do_not_name_every_parameter_are_refused() -> None:
    model = plain_model()
    state = dict(model.state_dict())
    state.pop("model.norm.weight")
    with pytest.raises(SystemExit, match=r"model\.norm\.weight"):
        STOCK_SIDE["put_weights"](model, state)


def test_only_assistant_turns_are_labelled(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "What is a fern?"}, {"role": "assistant", "content": "plant"}]
    (row,) = STOCK_PEFT["encode_rows"](tokenizer, [messages])
    labelled = tokenizer.decode([token for token in row["labels"] if token != -100])
    assert labelled == "plant<|im_end|>"
    assert len(row["labels"]) == len(row["input_ids"])
