"""`verify_artifact` accepts what stock PEFT makes and names each kind of damage in one line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.unit.artifact.conftest import BASE, stock_adapter
from toolkit.artifact import VerifyReport, load_adapter_config, read_manifest, verify_artifact
from toolkit.errors import ModelError

WEIGHTS = "adapter_model.safetensors"
LAYER = "base_model.model.model.layers.0.mlp"


def failures(report: VerifyReport) -> dict[str, str]:
    return {check.name: check.detail for check in report.checks if not check.ok}


def reseal(folder: Path, name: str) -> None:
    """Make the manifest agree with a file that a test has changed, so that only the later checks can notice."""
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / name).read_bytes()
    manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    reseal(folder, WEIGHTS)


def change_json(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))
    if name != "manifest.json":
        reseal(folder, name)


def test_a_good_artifact_passes_every_check(pristine: Path) -> None:
    report = verify_artifact(pristine, base=BASE, strict=True)
    assert report.ok
    assert [check.name for check in report.checks] == [
        "files",
        "hashes",
        "config",
        "layout",
        "finite",
        "moved",
        "base weights",
        "base layout",
    ]
    # 4 layers, each with two expert stacks, one router and four attention linears; A and B.
    assert (report.tensors, report.adapters, report.moved) == (56, 28, 28)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.tensors = 0  # type: ignore[misc]


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
def test_ranks_per_part_are_honoured(write: Callable[..., Path], tmp_path: Path) -> None:
    ranks = {"mlp.experts.down_proj": 3, "mlp.gate.weight": 2, r"layers\.1\.self_attn\.q_proj": 5}
    folder = write(tmp_path / "adapter", model=stock_adapter(ranks))
    assert verify_artifact(folder, base=BASE, strict=True).ok
    change_json(folder, "adapter_config.json", lambda config: config["rank_pattern"].pop("mlp.gate.weight"))
    assert set(failures(verify_artifact(folder, base=BASE))) == {"layout", "base layout"}


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
def test_targets_without_a_path_are_understood(write: Callable[..., Path], tmp_path: Path) -> None:
    """`down_proj` alone is what PEFT matches in every module that has such a parameter."""
    model = stock_adapter({"mlp.experts.down_proj": 3}, parameters=["down_proj", "gate_up_proj", "mlp.gate.weight"])
    folder = write(tmp_path / "adapter", model=model)
    assert verify_artifact(folder, base=BASE, strict=True).ok
    change_json(folder, "adapter_config.json", lambda config: config.update({"rank_pattern": {}}))
    assert "do not fit the ranks" in failures(verify_artifact(folder))["layout"]


def test_a_copy_from_the_hub_keeps_the_hubs_own_files(artifact: Path) -> None:
    (artifact / ".gitattributes").write_text("*.safetensors filter=lfs")
    (artifact / ".cache").mkdir()
    assert verify_artifact(artifact).ok


@pytest.mark.parametrize("position", [4, 5000, -1])
def test_one_flipped_bit_is_found(artifact: Path, position: int) -> None:
    content = bytearray((artifact / WEIGHTS).read_bytes())
    content[position] ^= 1
    (artifact / WEIGHTS).write_bytes(content)
    assert "sha256" in failures(verify_artifact(artifact))["hashes"]
    with pytest.raises(ModelError, match="sha256"):
        verify_artifact(artifact, strict=True)


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json", "manifest.json", "tokenizer.json", "README.md"])
def test_a_missing_file_is_named(artifact: Path, name: str) -> None:
    (artifact / name).unlink()
    assert name in failures(verify_artifact(artifact))["files"]


def test_an_extra_file_is_named(artifact: Path) -> None:
    (artifact / "optimizer.pt").write_bytes(b"x")
    assert "optimizer.pt" in failures(verify_artifact(artifact))["files"]


def test_links_and_folders_are_not_followed(artifact: Path, tmp_path: Path) -> None:
    shutil.move(artifact / WEIGHTS, tmp_path / "elsewhere")
    (artifact / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    assert "not a plain file" in failures(verify_artifact(artifact))["files"]
    (artifact / WEIGHTS).unlink()
    (artifact / WEIGHTS).mkdir()
    assert "not a plain file" in failures(verify_artifact(artifact))["files"]
    (artifact / "manifest.json").unlink()
    (artifact / "manifest.json").symlink_to("/dev/zero")
    assert "not a plain file" in failures(verify_artifact(artifact))["files"]


def test_the_links_of_the_hubs_cache_are_its_own(artifact: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--alice--mine"
    snapshot = cache / "snapshots" / ("a" * 40)
    for folder in (snapshot, cache / "blobs"):
        folder.mkdir(parents=True)
    for path in artifact.iterdir():
        shutil.copy(path, cache / "blobs" / f"hash-of-{path.name}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"hash-of-{path.name}")
    verify_artifact(snapshot, strict=True)
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(artifact / WEIGHTS)
    assert "not a plain file" in failures(verify_artifact(snapshot))["files"]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "sub/adapter.bin", "adapter_model.bin", "a\nb"])
def test_a_manifest_can_only_list_the_files_of_an_artifact(artifact: Path, name: str) -> None:
    change_json(artifact, "manifest.json", lambda m: m["files"].update({name: {"sha256": "0" * 64, "size": 1}}))
    with pytest.raises(ModelError, match="no file of an artifact") as caught:
        verify_artifact(artifact, strict=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": 1}', b'{"format": 99}', b" " * (9 * 2**20)],
)
def test_a_broken_manifest_is_one_line(artifact: Path, content: bytes) -> None:
    (artifact / "manifest.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"manifest\.json: ") as caught:
        read_manifest(artifact)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(artifact)) + 200


@pytest.mark.parametrize(
    ("key", "value"), [("sha256", "short"), ("size", -1), ("size", "1"), ("size", True), ("sha256", None)]
)
def test_a_manifest_with_wrong_types_is_refused(artifact: Path, key: str, value: object) -> None:
    change_json(artifact, "manifest.json", lambda m: m["files"]["README.md"].update({key: value}))
    with pytest.raises(ModelError, match=r"README\.md"):
        read_manifest(artifact)


@pytest.mark.parametrize(
    ("key", "value"),
    [("peft_type", "LOHA"), ("r", 0), ("r", "16"), ("rank_pattern", {"x": -1}), ("modules_to_save", ["lm_head"])],
)
def test_a_config_that_is_no_lora_of_ours_is_refused(artifact: Path, key: str, value: object) -> None:
    change_json(artifact, "adapter_config.json", lambda config: config.update({key: value}))
    with pytest.raises(ModelError, match=key):
        load_adapter_config(artifact)
    assert "config" in failures(verify_artifact(artifact))


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 8, b"\xff" * 100, (8).to_bytes(8, "little") + b"{garbage", (2**60).to_bytes(8, "little") + b"{}"],
)
def test_a_garbage_weights_file_is_one_line(artifact: Path, content: bytes) -> None:
    (artifact / WEIGHTS).write_bytes(content)
    reseal(artifact, WEIGHTS)
    found = failures(verify_artifact(artifact))
    assert "not a safetensors file" in found["tensors"]
    assert not any("\n" in detail for detail in found.values())


def test_a_tensor_that_is_not_finite_is_named(artifact: Path) -> None:
    name = f"{LAYER}.gate.lora_A.weight"
    change_tensors(artifact, lambda tensors: tensors[name].view(-1)[3:4].fill_(torch.nan))
    assert name in failures(verify_artifact(artifact))["finite"]


def test_an_adapter_that_never_moved_is_counted(artifact: Path) -> None:
    name = f"{LAYER}.experts.base_layer.lora_B.weight"
    change_tensors(artifact, lambda tensors: tensors[name].zero_())
    report = verify_artifact(artifact)
    assert "27 of 28" in failures(report)["moved"]
    assert name in failures(report)["moved"]
    assert report.moved == 27


def _rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{LAYER}.gate.lora_A.weight"), "only one of A and B"),
        (lambda t: _rename(t, f"{LAYER}.gate.lora_A.weight", "mlp.gate.lora_A.weight"), "no LoRA tensor"),
        (lambda t: t.update({f"{LAYER}.gate.lora_A.weight": torch.ones(3, 128)}), "do not multiply"),
        (lambda t: t.update({f"{LAYER}.gate.lora_A.weight": torch.ones(4)}), "do not multiply"),
        (
            lambda t: t.update(
                {
                    f"{LAYER}.experts.lora_A.weight": torch.ones(16, 128),
                    f"{LAYER}.experts.lora_B.weight": torch.ones(128, 16),
                }
            ),
            "do not fit the ranks",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if ".gate." in name],
            r"no tensor for the target 'mlp.gate.weight'",
        ),
        (lambda t: [t.pop(name) for name in list(t) if "experts.base_layer" in name], "do not fit the ranks"),
        (lambda t: [t.pop(name) for name in list(t)], "no tensors"),
    ],
)
def test_tensors_that_do_not_follow_from_the_config(
    artifact: Path, change: Callable[[dict[str, torch.Tensor]], Any], said: str
) -> None:
    change_tensors(artifact, change)
    assert said in failures(verify_artifact(artifact))["layout"]


def test_swapped_expert_stacks_are_found_on_the_base(artifact: Path) -> None:
    """Rows fit the ranks either way; only what PEFT makes of the base tells gate_up from down."""

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        inner, outer = f"{LAYER}.experts.base_layer", f"{LAYER}.experts"
        for side in ("lora_A", "lora_B"):
            a, b = f"{inner}.{side}.weight", f"{outer}.{side}.weight"
            tensors[a], tensors[b] = tensors[b], tensors[a]

    change_tensors(artifact, swap)
    assert set(failures(verify_artifact(artifact, base=BASE))) == {"base layout"}


def test_a_pattern_that_is_no_regular_expression(artifact: Path) -> None:
    change_json(artifact, "adapter_config.json", lambda config: config.update({"rank_pattern": {"(": 2}}))
    assert "not a regular expression" in failures(verify_artifact(artifact))["layout"]
    change_json(artifact, "adapter_config.json", lambda config: config.update({"target_modules": "("}))
    assert "not a regular expression" in failures(verify_artifact(artifact))["layout"]


def test_another_base_is_told_by_its_weights(artifact: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(BASE, other)
    assert verify_artifact(artifact, base=other).ok
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert set(failures(verify_artifact(artifact, base=other))) == {"base weights"}


def test_a_base_of_another_shape(artifact: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(BASE, other)
    change_config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**change_config, "num_local_experts": 4}))
    assert "of 56 differ" in failures(verify_artifact(artifact, base=other))["base layout"]


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a folder"):
        verify_artifact(tmp_path / "nothing", strict=True)


def test_verifying_leaves_the_model_alone(pristine: Path, adapted: PeftModel) -> None:
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    verify_artifact(pristine, base=BASE)
    assert all(torch.equal(before[name], tensor) for name, tensor in adapted.state_dict().items())
