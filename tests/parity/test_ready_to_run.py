"""The scripts that prove merged files in other programs tell a file that these compute alike from one that they do not.

llama.cpp, mlx-lm and compressed-tensors are not installed where the tests run: what they would compute is computed here
from the files that the scripts export.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.parity import merged_checkpoints, merged_gguf
from scripts.parity.layouts import NANO
from scripts.parity.llama_cpp import TOKENS
from scripts.parity.rounded_inputs import rounded_logits
from tests.harness.as_gguf import write_gguf
from toolkit.export.survival import looked_at, streamed_logits


def computed(checkpoint: Path, tokens: list[int], off: float) -> np.ndarray[Any, Any]:
    batch, _ = looked_at([tokens])
    found: np.ndarray[Any, Any] = streamed_logits(checkpoint, batch).numpy() + off
    return found


def test_a_merged_gguf_file_is_judged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def convert(command: list[str]) -> None:
        job = json.loads(Path(command[-1]).read_text())
        for files in job["models"].values():
            write_gguf(Path(f"{files['base']}.gguf"), AutoModelForCausalLM.from_pretrained(files["base"]))

    def side(command: list[str], path: Path, verb: str, name: str) -> bool:
        job = json.loads(path.read_text())
        files, out = job["models"][name], Path(job["out"])
        if verb == "words":
            tokenizer = AutoTokenizer.from_pretrained(NANO)
            found = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in job["texts"]]
            (out / f"{name}.words.json").write_text(json.dumps(found))
        elif files["base"]:
            np.savez(out / f"{name}.npz", base=computed(Path(files["base"]), job["tokens"], 0.0))
        else:
            file, (size, tokens) = Path(f"{files['merged']}.gguf"), (job["texts of"], job["tokens"])
            texts, _ = looked_at([tokens[first : first + size] for first in range(0, len(tokens), size)])
            apart = rounded_logits(file, texts).numpy()
            np.savez(out / f"{name}.npz", merged=computed(file, tokens, 0.0), **{"merged apart": apart})
        return True

    monkeypatch.setattr(merged_gguf, "other_side", lambda folder: (sys.executable, folder))
    monkeypatch.setattr(merged_gguf, "_run", convert)
    monkeypatch.setattr(merged_gguf, "_side", side)
    assert merged_gguf.main(["qwen3_moe", "--json", str(tmp_path / "figures.json")]) == 0
    assert "\n1 of 1 families are the same in llama.cpp, off: none\n" in capsys.readouterr().out
    row = json.loads((tmp_path / "figures.json").read_text())["qwen3_moe"]
    assert row["words"] is True
    assert row["loss"]["base"] > row["loss"]["adapter"]
    for layout in ("f32", "over"):
        assert row["loss"][layout] == pytest.approx([row["loss"]["adapter"]] * 2, abs=1e-4)
    assert row["q8_0"] < 1e-6 < 1e-3 < row["q8_0 as read"]
    for changed in ({"f32": 0.1}, {"over": 0.1}, {"q8_0": 0.02}, {"q4_k_m": 0.02}, {"words": False}, {"over": "no"}):
        assert merged_gguf._verdict({**row, **changed}) == "off"
    for changed in ({"base": 1.0}, dict.fromkeys(merged_gguf.LAYOUTS, "no")):
        assert merged_gguf._verdict({**row, **changed}) == "not run"


def test_merged_checkpoints_are_judged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    off = {"fp8": 0.0, "int8": 0.0, "int4": 0.1, "8bit": 0.0}

    def read(layout: str, models: dict[str, str], scratch: Path, environments: Path) -> None:
        for name, folder in models.items():
            if (quant := name.split()[1]) not in off:
                (scratch / f"{name}.txt").write_text("ValueError: not loaded")
                continue
            np.savez(scratch / f"{name}.npz", logits=computed(Path(folder), TOKENS, off[quant]))

    monkeypatch.setattr(merged_checkpoints, "_read", read)
    assert merged_checkpoints.main(["qwen3_moe", "gpt_oss", "--json", str(tmp_path / "figures.json")]) == 1
    said = capsys.readouterr().out
    assert "| qwen3_moe fp8 | 0.0e+00 | " in said
    (losses,) = re.findall(r"\n\| qwen3_moe \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) / ([\d.]+) \| .* / nan \|\n", said)
    base, adapter, ours, theirs = map(float, losses)
    assert base > ours == theirs > adapter
    assert "- qwen3_moe 4bit: ValueError: not loaded" in said
    assert "- gpt_oss int8: merged-vllm: this family's files hold all experts of a layer in one tensor" in said
    assert "4 of 7 files read alike; not: qwen3_moe int4, qwen3_moe 4bit, gpt_oss 4bit" in said
