"""A GGUF file in the place of a checkpoint: every verb gives what the same weights give as a plain checkpoint."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.faults.conftest import QUICKSTART, Run, onecard
from tests.parity.conftest import EMBEDDED
from tests.unit.documentation.commands import ROOT, shown_in
from toolkit.artifact import read_manifest
from toolkit.artifact.privacy import base_texts
from toolkit.checkpoint.identity import config_sha256, files_of, identify_base, license_of
from toolkit.checkpoint.weights import PackedSlice
from toolkit.errors import ModelError
from toolkit.offload.attach import load_streamed
from toolkit.offload.cache import int8_folder
from toolkit.plan.audit import audit
from toolkit.quant import load_int8
from toolkit.quant.source import SourceWeights

gguf = pytest.importorskip("gguf")

from tests.harness.as_gguf import Tensors, as_llama_cpp, tiny, write_gguf  # noqa: E402
from toolkit.checkpoint.formats.gguf import read_gguf  # noqa: E402

__all__ = ["onecard"]

IDS = torch.randint(3, 97, (3, 19), generator=torch.Generator().manual_seed(5))
KINDS = gguf.GGMLQuantizationType


def embedded() -> tuple[PreTrainedModel, Tensors]:
    """The embedded model and its tensors as the converter writes them: a tied head has none."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    return model, {name: value for name, value in as_llama_cpp(model).items() if name != "output.weight"}


def write(path: Path, **options: Any) -> Path:
    """Stacks, embedding and most attention in Q8_0, queries in F16, norms and routers in F32; with a tokenizer."""
    model, tensors = embedded()
    halves = {name: (value.astype("float16"), KINDS.F16) for name, value in tensors.items() if "attn_q.weight" in name}
    path.parent.mkdir(exist_ok=True)
    return write_gguf(path, model, tensors, KINDS.Q8_0, raw=halves, **{"vocabulary": EMBEDDED, **options})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file, in a folder of its own."""
    return write(tmp_path_factory.mktemp("source") / "nano-Q8_0.gguf")


@pytest.fixture(scope="module")
def twin(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same numbers as a plain fp32 checkpoint, multiplied out by the gguf library."""
    folder = tmp_path_factory.mktemp("twin") / "plain"
    found = read_gguf(source)
    model, _ = embedded()
    state = model.state_dict()
    with torch.no_grad():
        for name, packed in found.weights.items():
            keys = [part.key for part in packed.parts.values()]
            whole = [torch.from_numpy(_plain(found.slices[key][...], found.file.tensors[key].kind)) for key in keys]
            state[name].copy_(torch.cat(whole, 1) if "gate_up" in name else whole[0])
    model.config.router_aux_loss_coef = found.config.router_aux_loss_coef  # of which the file says nothing
    model.save_pretrained(folder)
    for path in EMBEDDED.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            shutil.copyfile(path, folder / path.name)
    return folder


def _plain(blocks: torch.Tensor, kind: str) -> Any:
    return gguf.quants.dequantize(blocks.numpy(), KINDS[kind]) if kind == "Q8_0" else blocks.float().numpy()


def recipe_of(model: Path, folder: Path) -> Path:
    """Two steps from it into that folder."""
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(
        f"model: {{model_name_or_path: {model}}}\nlora: {{r: 2}}\n"
        f"data: {{train: {QUICKSTART}/data/category.train.jsonl, max_samples: 24}}\n"
        f"training: {{output_dir: {folder}, max_steps: 2, learning_rate: 1e-3, max_length: 128, use_cpu: true}}\n"
        "eval: {enabled: false}\n"
    )
    return recipe


def train(onecard: Run, model: Path, folder: Path, *more: str) -> Path:
    """Two steps from it; the run's folder."""
    code, _, told = onecard("train", recipe_of(model, folder), *more)
    assert code == 0, told
    return folder


@pytest.fixture
def runs(onecard: Run, source: Path, twin: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Trained from the file and from its twin."""
    return train(onecard, source, tmp_path / "gguf"), train(onecard, twin, tmp_path / "plain")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_it_trains_verifies_answers_and_merges_as_its_plain_twin(
    onecard: Run, source: Path, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    ours, theirs = runs
    adapters = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in runs]
    assert adapters[0] == adapters[1]
    base = read_manifest(ours / "adapter")["base"]
    assert (base["name"], base["revision"], base["is_int8"]) == (source.name, None, False)
    assert str(source.parent) not in (ours / "adapter" / "manifest.json").read_text()
    card = (ours / "adapter" / "README.md").read_text()
    assert f"cp {source.name} gguf/base.gguf" in card
    assert "from_pretrained(base" not in card

    code, _, told = onecard("verify", ours / "adapter", "--base", source)
    assert code == 0, told
    bare = shutil.copytree(ours / "adapter", tmp_path / "bare")
    answers = [
        onecard("generate", *given, "--prompt", "Which category is it: dog?", "--max-new-tokens", "4")
        for given in ((ours,), (bare, "--base", source), (theirs,))
    ]
    assert [code for code, _, _ in answers] == [0, 0, 0]
    assert answers[0][1] == answers[1][1] == answers[2][1] != ""

    merged = []
    for run in runs:
        out = run.with_suffix(".merged")
        code, result, told = onecard("export", run, "--format", "merged", "--out", out, "--json")
        assert code == 0, told
        merged.append((out, json.loads(result)))
    (from_gguf, result), (from_twin, plain) = merged
    assert result["merged_into"]["as"] == "its gguf weights multiplied out"
    assert plain["merged_into"]["as"] == "itself"
    found, wanted = weights_of(from_gguf), weights_of(from_twin)
    assert found.keys() == wanted.keys()
    kinds = {tensor.dtype for tensor in found.values()}
    assert kinds == {torch.bfloat16, torch.float16, torch.float32}
    for name, tensor in found.items():
        rounding = torch.finfo(tensor.dtype).eps / 2 + 1e-7
        torch.testing.assert_close(tensor.float(), wanted[name], rtol=rounding, atol=2**-25)  # F16's last step, halved
    config = json.loads((from_gguf / "config.json").read_text())
    assert ("quantization_config" in config, config["dtype"]) == (False, "bfloat16")
    first, second = (AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in (from_gguf, from_twin))
    rounded = AutoModelForCausalLM.from_pretrained(from_twin, dtype=torch.bfloat16).float()
    with torch.no_grad():
        off, allowed = ((model(IDS).logits - second(IDS).logits).abs().max() for model in (first, rounded))
    assert off <= 2 * allowed
    tokens = [AutoTokenizer.from_pretrained(each)("an example")["input_ids"] for each in (from_gguf, EMBEDDED)]
    assert tokens[0] == tokens[1]


def test_streamed_experts_are_written_once_and_compute_what_resident_ones_do(source: Path, tmp_path: Path) -> None:
    resident, coverage = load_int8(str(source))
    assert coverage.stacks_stored == {"int8": 8}
    layers = [f"model.layers.{number}.mlp.experts" for number in range(4)]
    streamed, _ = load_streamed(str(source), dict.fromkeys(layers, "disk"), cache=tmp_path)
    with torch.no_grad():
        assert torch.equal(resident(IDS).logits, streamed(IDS).logits)
    (folder,) = (tmp_path / "int8").iterdir()
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert int8_folder(str(source), dtype=torch.float32, root=tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp

    other = tmp_path / "other" / source.name
    other.parent.mkdir()
    whole = source.read_bytes()
    middle = len(whole) // 2
    other.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert int8_folder(str(other), dtype=torch.float32, root=tmp_path) != folder


def test_quantize_writes_what_load_int8_gives_and_the_tokenizer(onecard: Run, source: Path, tmp_path: Path) -> None:
    code, result, told = onecard("quantize", source, tmp_path / "int8", "--json")
    assert code == 0, told
    assert json.loads(result)["source_bytes"] == source.stat().st_size
    ours, theirs = load_int8(str(tmp_path / "int8"))[0], load_int8(str(source))[0]
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    found, wanted = (AutoTokenizer.from_pretrained(each) for each in (tmp_path / "int8", EMBEDDED))
    assert (found("an example")["input_ids"], found.chat_template) == (
        wanted("an example")["input_ids"],
        wanted.chat_template,
    )


def test_compensation_sees_the_weights_of_the_twin(source: Path, twin: Path) -> None:
    ours, theirs = SourceWeights(str(source)), SourceWeights(str(twin))
    name = "model.layers.1"
    with ours.layer(name) as found, theirs.layer(name) as wanted:
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key].float(), wanted[key]) for key in wanted)
    assert ours.stored_as(f"{name}.mlp.experts.down_proj") == {"Q8_0"}


def test_an_audit_and_a_plan_name_the_block_types(onecard: Run, source: Path) -> None:
    taken = audit(str(source))
    parts = {part.name: dict(part.source) for part in taken.parts}
    assert parts["expert stacks"] == {"Q8_0": 8}
    assert parts["attention"] == {"F16": 4, "Q8_0": 12}
    assert parts["routers"] == {"F32": 4}
    assert taken.checkpoint_dtypes == ("F16", "F32", "Q8_0")
    code, result, told = onecard("plan", source, "--json", "training.use_cpu=true")
    assert code == 0, told
    stored = json.loads(result)["stored"]
    assert (stored["is_here"], stored["is_int8"], set(stored["dtypes"])) == (True, False, {"F16", "F32", "Q8_0"})


def test_a_split_file_is_one_base_and_a_folder_leads_to_it(source: Path, tmp_path: Path) -> None:
    whole = identify_base(str(source))
    assert whole == identify_base(str(source.parent))
    write(tmp_path / "parts" / "nano.gguf", split_max_tensors=30)
    first, second = sorted((tmp_path / "parts").glob("*.gguf"))
    base = identify_base(str(second))
    assert base.name == first.name == "nano-00001-of-00002.gguf"
    assert base == identify_base(str(first)) == identify_base(str(first.parent))
    assert base.weights_sha256 != whole.weights_sha256
    with torch.no_grad():
        assert torch.equal(load_int8(str(second))[0](IDS).logits, load_int8(str(source))[0](IDS).logits)


def test_a_config_beside_it_binds_the_run_and_its_licence_is_known(source: Path, tmp_path: Path) -> None:
    path = shutil.copyfile(source, tmp_path / source.name)
    alone = config_sha256(str(path))
    shutil.copyfile(EMBEDDED / "config.json", tmp_path / "config.json")
    assert config_sha256(str(path)) != alone == config_sha256(str(source))
    model, tensors = embedded()
    licensed = write_gguf(tmp_path / "other.gguf", model, tensors, vocabulary=EMBEDDED, licence="apache-2.0")
    assert (license_of(str(licensed)), license_of(str(source))) == ("apache-2.0", None)


def test_the_commands_of_the_page(onecard: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copyfile(source, tmp_path / "model-Q4_K_M.gguf")
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(EMBEDDED, tmp_path / "run")
    shown = [each for each in shown_in(ROOT / "docs" / "gguf-source.md") if each.words[0] == "onecard"]
    shown = [each for each in shown if not each.is_synopsis]
    for command in shown:
        words = [{"RECIPE": recipe, "RUN": tmp_path / "run"}.get(word, word) for word in shlex.split(command.text)]
        code, _, told = onecard(*words[1:])
        assert code == 0, told
    assert len(shown) == 3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").num_parameters() == 2_037_120


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a weight is read."""

    def read(*_: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(PackedSlice, "_rows", read)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("verb", ["plan", "train"])
def test_what_cannot_be_read_is_one_line_before_any_weight(
    verb: str, onecard: Run, source: Path, tmp_path: Path
) -> None:
    write(tmp_path / "parts" / "nano.gguf", split_max_tensors=30)
    (tmp_path / "parts" / "nano-00002-of-00002.gguf").unlink()
    writer = gguf.GGUFWriter(str(tmp_path / "foreign.gguf"), "grok")
    writer.add_tensor("x", IDS.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    mute = write(tmp_path / "mute" / "nano.gguf", vocabulary=None)
    for model, words in (
        (tmp_path / "parts", "missing, of 2 parts; put all parts into one folder"),
        (tmp_path / "foreign.gguf", "GGUF files of architecture grok are not read"),
        (mute, "set model.tokenizer_name_or_path"),
        (tmp_path / "nowhere.gguf", "no such file; a GGUF file of the Hub is not fetched"),
        ("owner/name:model-Q4_K_M.gguf", "no such file; a GGUF file of the Hub is not fetched"),
    ):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"model: {{model_name_or_path: '{model}'}}\n"
            f"data: {{train: {QUICKSTART}/data/category.train.jsonl, max_samples: 24}}\n"
            f"training: {{output_dir: {tmp_path}/run, max_steps: 2, use_cpu: true}}\n"
        )
        code, _, told = onecard(verb, recipe)
        assert code == 4, told
        assert len(told.strip().splitlines()) == 1
        assert words in told


def test_what_the_file_says_is_no_find_and_its_neighbours_are_not_the_models(source: Path, tmp_path: Path) -> None:
    path = shutil.copyfile(source, tmp_path / source.name)
    (tmp_path / "answers.json").write_text(json.dumps("a row of the data that must not leave"))
    assert base_texts(files_of(str(path))) == ((EMBEDDED / "chat_template.jinja").read_text(),)
    (tmp_path / "config.json").write_text("{}")
    assert files_of(str(path)) == tmp_path


def test_a_given_tokenizer_is_the_artifacts_own(onecard: Run, tmp_path: Path) -> None:
    mute = write(tmp_path / "mute" / "nano.gguf", vocabulary=None)
    tokenizer = shutil.copytree(EMBEDDED, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    given = f"model.tokenizer_name_or_path={tokenizer}"
    run = train(onecard, mute, tmp_path / "run", given)
    plain = train(onecard, EMBEDDED, tmp_path / "plain")
    names = ("tokenizer.json", "chat_template.jinja")
    for name in names:
        assert (run / "adapter" / name).read_bytes() == (plain / "adapter" / name).read_bytes()
    shutil.rmtree(tokenizer)
    bare = shutil.copytree(run / "adapter", tmp_path / "bare")
    code, answer, told = onecard("generate", bare, "--base", mute, "--prompt", "a", "--max-new-tokens", "2")
    assert code == 0, told
    assert answer == onecard("generate", run, "--prompt", "a", "--max-new-tokens", "2")[1] != ""


def test_other_weights_are_another_base(onecard: Run, source: Path, runs: tuple[Path, Path], tmp_path: Path) -> None:
    other = shutil.copyfile(source, tmp_path / source.name)
    with other.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x11")
    code, _, told = onecard("generate", runs[0], "--base", other, "--prompt", "a")
    assert (code, "other weights than the adapter's base" in told) == (4, True)


def test_a_file_that_nobody_asks_for_stays_a_folder_of_safetensors(tmp_path: Path) -> None:
    """A GGUF beside a whole checkpoint, as some repositories ship it, changes nothing."""
    folder = shutil.copytree(EMBEDDED, tmp_path / "both")
    write_gguf(folder / "model.gguf", tiny("mixtral"))
    assert identify_base(str(folder)).weights_sha256 == identify_base(str(EMBEDDED)).weights_sha256
    (folder / "model.safetensors").unlink()
    write_gguf(folder / "other.gguf", tiny("mixtral"))
    with pytest.raises(ModelError, match="2 GGUF models there"):
        load_int8(str(folder))
