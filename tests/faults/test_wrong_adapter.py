"""Adapters that are not this base's, parts that were not reached, archives: each is one line and exit code 4."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from scripts.faults.kill_points import moved_artifact
from tests.faults.conftest import MODEL, Run
from tests.faults.test_wrong_input import own_model

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained-looking artifact of the embedded model."""
    place = tmp_path_factory.mktemp("artifact")
    moved_artifact(place)
    return place / "adapter"


@pytest.fixture
def copied(artifact: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(artifact, tmp_path / "adapter")


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 4, nothing for programs, and the last line says it."""
    status, out, err = result
    assert (status, out) == (4, ""), err
    last = err.strip().splitlines()[-1]
    assert last.startswith("onecard: ")
    assert [word for word in words if word not in last] == [], last


def other_base(folder: Path) -> Path:
    """The embedded model with one number changed: everything fits, and nothing is right."""
    weights = own_model(folder) / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


def test_an_adapter_of_another_base_is_no_start(onecard: Run, recipe: Path, tmp_path: Path, artifact: Path) -> None:
    other = other_base(tmp_path / "model")
    start = [f"lora.adapter_name_or_path={artifact}", "eval.enabled=false"]
    refused(onecard("train", recipe, f"model.model_name_or_path={other}", *start), "other weights", str(other))
    status, _, err = onecard("train", recipe, *start, f"training.output_dir={tmp_path}/own")
    assert status == 0, err


def test_an_adapter_of_another_base_is_not_exported(onecard: Run, tmp_path: Path, artifact: Path) -> None:
    from toolkit.errors import ModelError
    from toolkit.export import export_adapter

    other = other_base(tmp_path / "model")
    with pytest.raises(ModelError, match="other weights than the adapter's base"):
        export_adapter(artifact, other, "merged", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    refused(onecard("verify", artifact, "--base", other), "other weights")


def test_what_does_not_say_its_base_passes(copied: Path, tmp_path: Path) -> None:
    from toolkit.artifact import require_base
    from toolkit.quant import quantize_checkpoint

    quantize_checkpoint(str(MODEL), tmp_path / "int8")
    require_base(copied, str(tmp_path / "int8"))
    (copied / "manifest.json").unlink()
    require_base(copied, str(other_base(tmp_path / "model")))


def not_finite(tensors: dict[str, torch.Tensor]) -> None:
    tensors[min(tensors)][0, 0] = float("nan")


def lacking(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[min(tensors)]


def left_over(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.ones(1, 128)


def misshapen(tensors: dict[str, torch.Tensor]) -> None:
    tensors[min(tensors)] = torch.ones(*tensors[min(tensors)].shape[:-1], 3)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (not_finite, "not finite"),
        (lacking, "lacks"),
        (left_over, "layers.9"),
        (misshapen, "does not fit this base model: size mismatch for base_model."),
    ],
)
def test_tensors_that_cannot_be_used_are_no_start(
    onecard: Run, recipe: Path, copied: Path, spoil: Callable[[dict[str, torch.Tensor]], None], words: str
) -> None:
    tensors = load_file(copied / WEIGHTS)
    spoil(tensors)
    save_file(tensors, copied / WEIGHTS, metadata={"format": "pt"})
    refused(onecard("train", recipe, f"lora.adapter_name_or_path={copied}"), words)
    refused(onecard("verify", copied), "checks failed")


@pytest.mark.parametrize(
    ("fields", "extra", "words"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight", "modules_to_save: modules saved whole"),
        ({"trainable_token_indices": [1]}, "model.embed_tokens.token_adapter.trainable_tokens_delta", "rows of tokens"),
        ({"use_dora": True}, "model.layers.0.self_attn.q_proj.lora_magnitude_vector", "use_dora"),
        ({"lora_bias": True}, "model.layers.0.self_attn.q_proj.lora_B.bias", "lora_bias"),
        ({"bias": "all"}, "model.layers.0.self_attn.q_proj.bias", "q_proj.bias: a tensor that is no A or B"),
        ({"init_lora_weights": "pissa_niter_4"}, "", "a base that pissa_niter_4 has changed"),
        ({"layer_replication": [[0, 4], [2, 4]]}, "", "layers used twice"),
        ({}, "model.embed_tokens.lora_embedding_A", "lora_embedding_A: a tensor that is no A or B"),
        ({}, "lm_head.lora_A.weight", "an adapter on the output head"),
    ],
)
def test_what_could_not_be_packaged_is_no_start(
    onecard: Run,
    recipe: Path,
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    extra: str,
    words: str,
) -> None:
    monkeypatch.setattr("toolkit.run.job.load", lambda plan: pytest.fail("the base was loaded"))
    config = json.loads((copied / "adapter_config.json").read_bytes())
    (copied / "adapter_config.json").write_text(json.dumps(config | fields))
    tensors = load_file(copied / WEIGHTS)
    save_file({**tensors, **({f"base_model.model.{extra}": torch.ones(4, 4)} if extra else {})}, copied / WEIGHTS)
    refused(onecard("train", recipe, f"lora.adapter_name_or_path={copied}"), words, "merge it into its base")


def test_an_archive_is_not_opened(onecard: Run, recipe: Path, artifact: Path, tmp_path: Path) -> None:
    packed = tmp_path / "adapter.zip"
    with zipfile.ZipFile(packed, "w") as file:
        file.write(artifact / WEIGHTS, "../../escaped.safetensors")
    tarred = tmp_path / "adapter.tar.gz"
    with tarfile.open(tarred, "w:gz") as file:
        member = tarfile.TarInfo("../escaped")
        member.size = 4
        file.addfile(member, io.BytesIO(b"text"))
    before = sorted(tmp_path.parent.rglob("*"))
    for archive in (packed, tarred):
        refused(onecard("verify", archive), archive.name)
        refused(onecard("train", recipe, f"lora.adapter_name_or_path={archive}"), archive.name)
    new = [path for path in sorted(tmp_path.parent.rglob("*")) if path not in before and tmp_path / "run" not in
           (path, *path.parents)]  # fmt: skip
    assert new == []


def test_experts_that_are_not_int8_end_the_run(onecard: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit.quant.quantizer import Int8Quantizer

    finish = Int8Quantizer._process_model_after_weight_loading

    def one_is_left(self: Any, model: Any, **options: Any) -> Any:
        experts = model.model.layers[1].mlp.experts
        experts.down_proj = nn.Parameter(experts.down_proj.float(), requires_grad=False)
        return finish(self, model, **options)

    monkeypatch.setattr(Int8Quantizer, "_process_model_after_weight_loading", one_is_left)
    refused(onecard("train", recipe), "layers.1.mlp.experts.down_proj", MODEL.name)


def test_adapters_that_were_not_applied_end_the_run(
    onecard: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toolkit.adapters import attach

    make = attach.get_peft_model

    def one_is_left(*arguments: Any, **options: Any) -> Any:
        model = make(*arguments, **options)
        attention = model.get_base_model().model.layers[2].self_attn
        attention.q_proj = attention.q_proj.get_base_layer()
        return model

    monkeypatch.setattr(attach, "get_peft_model", one_is_left)
    refused(onecard("train", recipe), "layers.2.self_attn.q_proj", "PEFT did not adapt it", "1 of ")


def test_adapters_that_never_move_end_the_run(onecard: Run, recipe: Path, tmp_path: Path) -> None:
    refused(onecard("train", recipe, "training.learning_rate=1e-60", "eval.enabled=false"), "adapters moved")
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_name_that_matches_nothing_is_refused_with_the_nearest(onecard: Run, recipe: Path) -> None:
    refused(onecard("train", recipe, "lora.target_modules=[q_prj]"), "q_prj", "did you mean", "q_proj")
