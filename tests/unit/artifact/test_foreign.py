"""`verify` of other toolkits' adapters: every layout is followed to the experts it moves, and misfits are named.

Stock PEFT writes the adapter; the other layouts are its tensors under the names and shapes that those toolkits write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.faults.conftest import Run, onecard
from tests.harness.families import tiny_config
from tests.unit.artifact.conftest import BASE
from toolkit.adapters.layouts import per_expert, read_factors
from toolkit.checkpoint.config import skeleton
from toolkit.errors import ModelError
from toolkit.export.foreign import FUSED, ForeignReport, verify_foreign

__all__ = ["onecard"]

Tensors = dict[str, torch.Tensor]
WEIGHTS = "adapter_model.safetensors"
EXPERTS = "base_model.model.model.layers.{}.mlp.experts"


@pytest.fixture(scope="module")
def stock(adapted: PeftModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As stock PEFT writes it: experts, routers and attention of four layers."""
    folder = tmp_path_factory.mktemp("stock")
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_by_one(stock: Path) -> Tensors:
    """The same with linears for experts, as they are trained where a toolkit has such modules."""
    return per_expert(read_factors(stock, skeleton(str(BASE))), skeleton(str(BASE)))[0]


@pytest.fixture
def written(stock: Path, tmp_path: Path) -> Callable[[Tensors], Path]:
    """A folder with these tensors and PEFT's configuration."""

    def write(tensors: Tensors, name: str = WEIGHTS) -> Path:
        config = json.loads((stock / "adapter_config.json").read_bytes())
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / name)
        return tmp_path

    return write


def is_whole(report: ForeignReport) -> bool:
    """Whether all is moved and nothing is left over."""
    return (
        report.problem is None
        and report.slots == (96, 96)
        and report.routers == (4, 4)
        and report.linears == (16, 16)
        and not report.misfits
    )


RENAMED: dict[str, Callable[[str], str]] = {
    "ms-swift": lambda key: key.removeprefix("base_model.model."),
    "adapter's name inside": lambda key: key.replace(".weight", ".default.weight"),
    "compiled": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "KTransformers": lambda key: key.replace(".lora_", ".orig_module.lora_"),
    "text model of a multimodal one": lambda key: key.replace(".model.layers", ".model.language_model.layers"),
    "the same, as servers have it": lambda key: key.replace(".model.layers", ".language_model.model.layers"),
}


@pytest.mark.parametrize("name", RENAMED)
def test_names_of_every_toolkit_lead_to_the_same_experts(
    name: str, stock: Path, one_by_one: Tensors, written: Callable[..., Path]
) -> None:
    for tensors, layout in ((load_file(stock / WEIGHTS), "PEFT's fused"), (one_by_one, "linears")):
        report = verify_foreign(written({RENAMED[name](key): each for key, each in tensors.items()}), str(BASE))
        assert is_whole(report), report
        assert [each.moved for each in report.layers] == [8] * 4
        assert report.layouts[0].startswith(layout)


def test_stock_peft_is_whole_and_ktransformers_file_is_read(
    stock: Path, one_by_one: Tensors, written: Callable[..., Path]
) -> None:
    report = verify_foreign(stock, str(BASE))
    assert is_whole(report)
    assert any("PEFT's fused layout" in line for line in report.servers["llama.cpp"])
    fused, rest = Tensors(), Tensors()
    groups: dict[str, dict[int, torch.Tensor]] = {}
    for key, tensor in one_by_one.items():
        if match := re.search(r"(layers\.\d+)\.mlp\.experts\.(\d+)\.(\w+)_proj\.lora_([AB])", key):
            groups.setdefault(f"{match[1]}.experts.{match[3]}_lora_{match[4].lower()}", {})[int(match[2])] = tensor
        else:
            rest[key] = tensor
    fused = {key: torch.stack([found[each] for each in sorted(found)]) for key, found in groups.items()}
    written(rest)
    report = verify_foreign(written(fused, FUSED), str(BASE))
    assert is_whole(report), report
    assert report.layouts == ("KTransformers' fused file",)
    assert report.servers["llama.cpp"] == [f"{FUSED} is not read"]


def test_servers_find_keys_in_their_own_ways(one_by_one: Tensors, written: Callable[..., Path]) -> None:
    bare = {key.removeprefix("base_model.model."): each for key, each in one_by_one.items()}
    found = verify_foreign(written(bare), str(BASE)).servers
    for server, keys in (("vLLM 0.33.0", len(bare)), ("SGLang 0.5.23", 0), ("llama.cpp", len(bare))):
        assert sum("is no" in line for line in found[server]) == keys, server


def test_what_was_not_trained_is_counted(stock: Path, one_by_one: Tensors, written: Callable[..., Path]) -> None:
    tensors = load_file(stock / WEIGHTS)
    B = tensors[f"{EXPERTS.format(2)}.lora_B.weight"]
    B.view(len(B), -1, 8)[..., 5] = 0
    report = verify_foreign(written(tensors), str(BASE))
    assert report.slots == (95, 96)
    assert [(each.moved, each.partly) for each in report.layers] == [(8, 0), (8, 0), (7, 1), (8, 0)]
    assert report.problem == "moves 95 of the 96 projections of experts"
    some = {key: each for key, each in one_by_one.items() if ".experts.3." not in key and "layers.1.mlp" not in key}
    some[f"{EXPERTS.format(0)}.0.up_proj.lora_B.weight"] = torch.zeros_like(
        one_by_one[f"{EXPERTS.format(0)}.0.up_proj.lora_B.weight"]
    )
    report = verify_foreign(written(some), str(BASE))
    assert report.slots == (3 * 7 * 3 - 1, 96)
    assert [(each.moved, each.partly) for each in report.layers] == [(6, 1), (0, 0), (7, 0), (7, 0)]
    assert report.routers == (3, 4)
    assert "model.layers.0.mlp.experts lacks expert 3 (1 of 8 are missing)" in report.servers["llama.cpp"]


def test_another_base_is_seen_by_names_and_shapes(
    stock: Path, one_by_one: Tensors, written: Callable[..., Path]
) -> None:
    for key, word in (
        ("layers.9.self_attn.q_proj", "nothing in this base is called model.layers.9.self_attn.q_proj"),
        ("layers.0.mlp.experts.8.up_proj", "nothing in this base is called model.layers.0.mlp.experts.8.up_proj"),
        ("layers.0.mlp.experts.7.up_proj", "model.layers.0.mlp.experts.7.up_proj: 4×3 and 5×4, where this base has"),
    ):
        name = f"base_model.model.model.{key}"
        more = {f"{name}.lora_A.weight": torch.ones(4, 3), f"{name}.lora_B.weight": torch.ones(5, 4)}
        report = verify_foreign(written({**one_by_one, **more}), str(BASE))
        assert report.misfits[0].startswith(word)
        assert report.problem is not None
        assert report.problem.startswith("2 of 23")
    cut = {
        key: each[..., :-8] if key.endswith("experts.lora_A.weight") else each
        for key, each in load_file(stock / WEIGHTS).items()
    }
    report = verify_foreign(written(cut), str(BASE))
    assert report.fitting == (48, 56)
    assert "where this base has 8 of" in report.misfits[0]


def test_numbers_and_fields_that_are_none_are_named(
    stock: Path, one_by_one: Tensors, written: Callable[..., Path]
) -> None:
    place = f"{EXPERTS.format(0)}.0.up_proj.lora_"
    for side, tensor, word in (("A", torch.ones(4, 128) * torch.nan, "not finite"), ("B", torch.ones(4), "no A and B")):
        report = verify_foreign(written({**one_by_one, f"{place}{side}.weight": tensor}), str(BASE))
        assert word in report.misfits[0]
    folder = written(one_by_one)
    config = json.loads((folder / "adapter_config.json").read_bytes())
    for fields in ({"r": "many"}, {"target_parameters": [3]}):
        (folder / "adapter_config.json").write_text(json.dumps(config | fields))
        with pytest.raises(ModelError, match=next(iter(fields))):
            verify_foreign(folder, str(BASE))


def test_experts_that_unsloth_splits_are_counted(written: Callable[..., Path], tmp_path: Path) -> None:
    config = tiny_config("gpt_oss")
    config.save_pretrained(tmp_path / "base")
    hidden, width, count = config.hidden_size, config.intermediate_size, config.num_local_experts
    tensors = Tensors()
    for layer in range(config.num_hidden_layers):
        for expert in range(count):
            for name, outputs, inputs in (("gate_up_projs", 2 * width, hidden), ("down_projs", hidden, width)):
                place = f"{EXPERTS.format(layer)}.{name}.{expert}"
                tensors |= {
                    f"{place}.lora_A.weight": torch.ones(2, inputs),
                    f"{place}.lora_B.weight": torch.ones(outputs, 2),
                }
    report = verify_foreign(written(tensors), str(tmp_path / "base"))
    assert report.slots[0] == report.slots[1] > 0
    assert report.problem is None
    assert report.layouts == ("stacks split into linears, as Unsloth does",)


def test_the_command_tells_it_on_one_page(
    onecard: Run, stock: Path, one_by_one: Tensors, written: Callable[..., Path]
) -> None:
    status, out, err = onecard("verify", stock, "--base", BASE, "--json")
    assert status == 0, err
    assert json.loads(out)["slots"] == [96, 96]
    assert "model.layers.0.mlp.experts to model.layers.3.mlp.experts: 8 of 8 experts moved" in err
    linears = {key: each for key, each in one_by_one.items() if "self_attn" in key}
    status, _, err = onecard("verify", written(linears), "--base", BASE)
    assert (status, err.strip().splitlines()[-1].endswith("moves 0 of the 96 projections of experts")) == (4, True)
    assert len(err.splitlines()) < 25
