"""What `write_artifact` writes: stock layout, listed files, equal bytes, and nothing of the machine."""

from __future__ import annotations

import datetime
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.unit.artifact.conftest import BASE, RECIPE
from toolkit.artifact import check_folder, read_manifest
from toolkit.artifact.privacy import figures, portable
from toolkit.checkpoint.identity import identify_base
from toolkit.errors import ModelError, ResourceError

Write = Callable[..., Path]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_artifact_holds_exactly_the_files_of_its_manifest(pristine: Path) -> None:
    assert sorted(bytes_of(pristine)) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "manifest.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert set(read_manifest(pristine)["files"]) == set(bytes_of(pristine)) - {"manifest.json"}
    assert [path.name for path in pristine.parent.iterdir()] == ["adapter"]


def test_stock_peft_loads_it_with_the_same_logits_and_no_key_over(pristine: Path, adapted: PeftModel) -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(model, pristine)
    ids = torch.arange(5, 25).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, adapted(ids).logits)
    assert set(load_file(pristine / "adapter_model.safetensors")) == {
        name.replace(".default", "") for name in loaded.state_dict() if "lora_" in name
    }


def test_equal_inputs_give_equal_bytes(pristine: Path, write: Write, tmp_path: Path, tokenizer: Any) -> None:
    tokenizer(["a", "a longer text that makes the tokenizer remember padding"], padding=True, truncation=True)
    assert bytes_of(write(tmp_path / "again")) == bytes_of(pristine)


def test_nothing_of_the_machine_leaves(write: Write, tmp_path: Path) -> None:
    everything = b"".join(bytes_of(write(tmp_path / "adapter")).values())
    for canary in ("CANARY-ROW", "hf_abcdefghijklmnopqrstuvwxyz", "/home/alice", str(BASE), str(tmp_path), "is_local"):
        assert canary.encode() not in everything
    assert read_manifest(tmp_path / "adapter")["recipe"]["model"]["model_name_or_path"] == "nano"


def test_a_token_in_the_recipes_prose_is_cut_out(write: Write, tmp_path: Path) -> None:
    secret = "hf_" + "S" * 30
    folder = write(tmp_path / "adapter", recipe_yaml=f"data: {{system_prompt: 'Use {secret} to log in'}}")
    assert secret.encode() not in b"".join(bytes_of(folder).values())


def test_a_token_that_no_rule_reaches_stops_the_artifact(write: Write, tokenizer: Any, tmp_path: Path) -> None:
    template, tokenizer.chat_template = tokenizer.chat_template, "{# hf_" + "S" * 30 + " #}"
    try:
        with pytest.raises(ModelError, match=r"chat_template\.jinja.*token"):
            write(tmp_path / "adapter")
    finally:
        tokenizer.chat_template = template
    assert list(tmp_path.iterdir()) == []


def test_the_adapter_config_is_stock_and_portable(pristine: Path) -> None:
    config = json.loads((pristine / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["inference_mode"] is True
    assert config["base_model_name_or_path"] == BASE.name
    assert config["peft_version"]
    assert config["target_modules"] == sorted(config["target_modules"])


def test_a_rerun_replaces_its_own_artifact_and_no_other(write: Write, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter")
    write(folder, results={"adapted": {"loss": 1.0}}, recipe_yaml=RECIPE + "eval: {max_samples: 3}\n")
    assert read_manifest(folder)["results"] == {"adapted": {"loss": 1.0}}
    before = bytes_of(folder)
    with pytest.raises(ModelError, match="other than this run's artifact"):
        write(folder, recipe_yaml=RECIPE.replace("1e-4", "2e-4"))
    assert bytes_of(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json"])
def test_a_folder_with_anything_else_in_it_is_left_alone(write: Write, tmp_path: Path, name: str) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / name).write_text("mine")
    with pytest.raises(ModelError, match="move it away"):
        write(tmp_path / "adapter")
    assert (tmp_path / "adapter" / name).read_text() == "mine"


def test_a_free_folder_is_free_and_leftovers_of_a_killed_run_are_replaced(write: Write, tmp_path: Path) -> None:
    check_folder(tmp_path / "adapter", base=identify_base(str(BASE)), recipe_yaml=RECIPE)
    for left in (".adapter.partial", ".adapter.old"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "half").write_text("half")
    (tmp_path / "adapter").mkdir()
    write(tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_where_nothing_can_be_written_it_says_so(write: Write, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="adapter: cannot be written") as caught:
        write(tmp_path / "file" / "adapter")
    assert "\n" not in str(caught.value)


def test_an_adapter_name_that_is_not_there(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'second'"):
        write(tmp_path / "adapter", adapter_name="second")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/alice/models/nano", "nano"),
        ("~/models/nano/", "nano"),
        ("../../secret project/rows.jsonl", "rows.jsonl"),
        ("C:\\Users\\alice\\rows.jsonl", "rows.jsonl"),
        ("file:///srv/rows.jsonl", "rows.jsonl"),
        ("https://alice:pw@example.com/rows", "https://example.com/rows"),
        (f"see {Path.home()}/x" if len(Path.home().parts) > 1 else "see ~/x", "see ~/x"),
        ("runs/nano", "runs/nano"),
        ("owner/name", "owner/name"),
        ("/no_think", "/no_think"),
        ("either/or", "either/or"),
        ("</s>", "</s>"),
        ("~5 words", "~5 words"),
        ({"system_prompt": "/think in one and/or two words"}, {"system_prompt": "/think in one and/or two words"}),
        ("/srv/hf_abcdefghijklmnopqrstuvwxyz", "[removed]"),
        (math.nan, None),
        (
            {"hub_token": "x", "api_key": "y", "eos_token": "</s>", "max_new_tokens": 3},
            {"eos_token": "</s>", "max_new_tokens": 3},
        ),
        ([{"password": "x"}], [{}]),
        ("write to /tmp please", "write to /tmp please"),
        (f"write to {tempfile.gettempdir()}/mine please", "write to ~/mine please"),
        (f"Work in {Path.cwd()}.", "Work in .."),
        (f"Work in {Path.home()}.old", f"Work in {Path.home()}.old"),
        ({"since": datetime.date(2026, 1, 2), "ids": (1, 2)}, {"since": "2026-01-02", "ids": [1, 2]}),
    ],
)
def test_portable(value: object, expected: object) -> None:
    assert portable(value) == expected


def test_figures_leave_out_what_the_clock_says() -> None:
    said = {"tau": 2.0, "tokens_per_second": 30.3, "plain_tokens_per_second": 2.0, "train_runtime": 1.0, "seconds": 1.0}
    assert figures({"mtp": {"trained": said}}) == {"mtp": {"trained": {"tau": 2.0}}}


def test_figures_keep_numbers_only() -> None:
    results = {"base": {"loss": 1.5, "note": "text"}, "samples": ["a"], "text": {"x": "y"}, "bad": math.inf}
    assert figures(results) == {"base": {"loss": 1.5}, "bad": None}
