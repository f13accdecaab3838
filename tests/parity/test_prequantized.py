"""Int8 checkpoints: written layer by layer or by `save_pretrained`, they open to the same bits everywhere."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from tests.faults.conftest import QUICKSTART
from tests.parity.conftest import EMBEDDED
from toolkit.checkpoint.identity import identify_base
from toolkit.cli import main
from toolkit.errors import HubError, ModelError, RecipeError, ResourceError
from toolkit.quant import load_int8, quantize_checkpoint, save

IDS = torch.randint(3, 97, (3, 19), generator=torch.Generator().manual_seed(5))


def assert_same(first: nn.Module, second: nn.Module) -> None:
    """The same parameters and the same logits, bit for bit."""
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    with torch.no_grad():
        assert torch.equal(first(IDS).logits, second(IDS).logits)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def onecard(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command in this process; gives its exit code."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["onecard", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0)

    return run


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard for each layer, as large models have."""
    monkeypatch.setattr(save, "_SMALL", 1)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's int8 form, with its tokenizer."""
    folder = tmp_path_factory.mktemp("stored") / "int8"
    quantize_checkpoint(str(EMBEDDED), folder)
    return folder


@pytest.fixture
def damaged(stored: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(stored, tmp_path / "damaged")


@pytest.mark.usefixtures("small_shards")
def test_what_is_written_opens_bit_identically_here_and_in_transformers(checkpoint: Path, tmp_path: Path) -> None:
    written = quantize_checkpoint(str(checkpoint), tmp_path / "int8")
    assert written.shards == len(list((tmp_path / "int8").glob("*.safetensors"))) > 2
    assert written.left_out == ()
    rounded, coverage = load_int8(str(checkpoint))
    mapped, again = load_int8(str(tmp_path / "int8"))
    assert again == coverage
    assert_same(mapped, rounded)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert_same(plain, rounded)
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "onecard_int8"
    assert str(tmp_path) not in json.dumps(config)


def test_save_pretrained_of_an_int8_model_writes_the_same_tensors(checkpoint: Path, tmp_path: Path) -> None:
    rounded, _ = load_int8(str(checkpoint))
    rounded.save_pretrained(tmp_path / "saved")
    quantize_checkpoint(str(checkpoint), tmp_path / "written")
    saved, written = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "written"))
    assert saved.keys() == written.keys()
    assert all(torch.equal(saved[name], written[name]) for name in saved)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), rounded)


REGISTERED = [
    "import transformers, toolkit",
    "import toolkit, transformers; toolkit.register()",
    "import toolkit; toolkit.register(); toolkit.register()",
    "import toolkit.quant, transformers",
]


@pytest.mark.parametrize("imports", REGISTERED)
def test_plain_from_pretrained_needs_one_call_and_keeps_the_dtype(stored: Path, imports: str) -> None:
    program = f"""
{imports}
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(stored)!r}, dtype=torch.bfloat16)
assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.int8
assert model.model.layers[0].mlp.experts.gate_up_proj_scale.dtype == torch.float32
assert model.model.embed_tokens.weight.dtype == torch.bfloat16
assert not hasattr(model.config, "transformers_weights")
print(model(torch.arange(5)[None]).logits.isfinite().all().item())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize("imports", ["import transformers", "import toolkit"])
def test_without_it_transformers_refuses_and_says_what_is_missing(stored: Path, imports: str) -> None:
    program = f"{imports}\nfrom transformers import AutoModelForCausalLM as M\nM.from_pretrained({str(stored)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("call toolkit.register() before from_pretrained")


def test_the_card_says_first_what_it_needs(stored: Path) -> None:
    _, head, text = (stored / "README.md").read_text().split("---\n")
    assert "license" not in head
    assert "toolkit.register()" in "\n".join(text.splitlines()[:9])
    assert text.startswith(f"# {EMBEDDED.name} in int8\n")


def test_weights_are_mapped_from_the_files_and_not_copied(stored: Path) -> None:
    model, _ = load_int8(str(stored))
    addresses = [p.data_ptr() for name, p in model.named_parameters() if p.dtype == torch.int8]
    weights = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(stored) in line]
    spans = [tuple(int(edge, 16) for edge in fields[0].split("-")) for fields in weights]
    assert all(any(first <= address < last for first, last in spans) for address in addresses)


def test_the_same_checkpoint_gives_the_same_bytes_and_carries_its_tokenizer(stored: Path, tmp_path: Path) -> None:
    quantize_checkpoint(str(EMBEDDED), tmp_path / "again")
    files = content(stored)
    assert content(tmp_path / "again") == files
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert files[name] == (EMBEDDED / name).read_bytes()
    identity = identify_base(str(stored))
    assert identity.name == "int8"
    assert identity.weights_sha256 != identify_base(str(EMBEDDED)).weights_sha256


def test_training_starts_from_it_and_ends_where_the_original_ends(
    stored: Path, tmp_path: Path, onecard: Callable[..., int]
) -> None:
    results = []
    for name, model in (("float", EMBEDDED), ("int8", stored)):
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(
            f"model: {{model_name_or_path: {model}}}\nlora: {{r: 2}}\n"
            f"data: {{train: {QUICKSTART}/data/category.train.jsonl, max_samples: 24}}\n"
            f"training: {{output_dir: {tmp_path}/{name}, max_steps: 2, learning_rate: 1e-3, max_length: 128, "
            "use_cpu: true}\neval: {enabled: false}\n"
        )
        assert onecard("train", recipe) == 0
        results.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_verb_writes_a_folder_and_never_over_one(
    tmp_path: Path, onecard: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "int8")
    assert onecard("quantize", EMBEDDED, out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["shards"] == 1
    before = content(tmp_path / "int8")
    for model, folder, code in ((EMBEDDED, out, 2), (out, f"{out}2", 4), ("./nowhere", f"{out}2", 4)):
        assert onecard("quantize", model, folder) == code
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert content(tmp_path / "int8") == before
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]


def test_nothing_is_left_where_the_work_fails(checkpoint: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(str(checkpoint), tmp_path / "int8", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_cleared_and_a_live_one_is_left_alone(stored: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".int8.partial"
    partial.mkdir()
    (partial / "model-00001-of-00009.safetensors").write_text("half")
    lock = os.open(partial, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(ResourceError, match="another onecard is writing it"):
        quantize_checkpoint(str(EMBEDDED), tmp_path / "int8")
    os.close(lock)
    quantize_checkpoint(str(EMBEDDED), tmp_path / "int8")
    assert content(tmp_path / "int8") == content(stored)
    assert not partial.exists()


def test_what_cannot_be_written_or_read_is_said_in_a_line(stored: Path, tmp_path: Path) -> None:
    for model, out, error, words in (
        (str(EMBEDDED), stored, RecipeError, "already exists"),
        (str(stored), tmp_path / "twice", ModelError, "int8 already"),
        (str(EMBEDDED), Path("/proc/int8"), ResourceError, "cannot be written"),
        ("nobody/nothing", tmp_path / "hub", HubError, "cannot be downloaded"),
    ):
        with pytest.raises(error, match=words) as caught:
            quantize_checkpoint(model, out)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="stored with experts int8 and linears int8, not int8 and none"):
        load_int8(str(stored), linears="none")


@pytest.mark.parametrize("part", ["experts.down_proj", "experts.gate_up_proj_scale", "q_proj.weight_scale"])
def test_an_int8_checkpoint_that_lacks_a_part_names_it(damaged: Path, part: str) -> None:
    tensors = load_file(damaged / "model.safetensors")
    name = next(name for name in tensors if name.endswith(part))
    for spoilt in ({key: value for key, value in tensors.items() if key != name}, {**tensors, name: tensors[name][1:]}):
        save_file(spoilt, damaged / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=name) as caught:
            load_int8(str(damaged))
        assert "\n" not in str(caught.value)


def test_a_damaged_or_missing_shard_is_one_line(damaged: Path) -> None:
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    for read in (lambda: load_int8(str(damaged)), lambda: quantize_checkpoint(str(damaged), f"{damaged}-again")):
        with pytest.raises(ModelError) as caught:
            read()
        assert "\n" not in str(caught.value)
    weights.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors") as caught:
        load_int8(str(damaged))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("small_shards")
def test_a_float_checkpoint_with_a_shard_missing_or_a_wrong_shape_leaves_nothing(tmp_path: Path) -> None:
    folder = shutil.copytree(EMBEDDED, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if key.endswith("o_proj.weight"))
    wrong = {**tensors, name: tensors[name][:, 1:].contiguous()}
    lacking = {key: value for key, value in tensors.items() if key != name}
    for spoilt, words in ((wrong, f"{name} is "), (lacking, f"lacks {name}")):
        save_file(spoilt, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=words):
            quantize_checkpoint(str(folder), tmp_path / "int8")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks the weights file model\.safetensors"):
        quantize_checkpoint(str(folder), tmp_path / "int8")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
