"""Error compensation on whole models: what is written, what it is worth, what it keeps in memory, and on which rows."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.harness.families import Family, build, families, tiny_config
from tests.parity.test_every_family import REFUSED
from toolkit import run as job
from toolkit.architecture import describe
from toolkit.errors import ModelError, RecipeError
from toolkit.plan import make_plan
from toolkit.quant import dequantize_state, load_int8
from toolkit.quant.gptq.calibrate import calibration_examples, compensate_model, make_batches
from toolkit.quant.gptq.observe import Batch, decoder_layers, observe, walk
from toolkit.quant.source import SourceWeights
from toolkit.recipe import load

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
CPU = torch.device("cpu")
SWEPT = [family for family in families() if family.model_type not in REFUSED]
typical = pytest.mark.parametrize("checkpoint", ["qwen2_moe", "deepseek_v3", "gpt_oss"], indirect=True)
"""A shared expert and dense layers; latent attention and grouped routing; transposed stacks with biases."""


def examples(count: int = 24, most: int = 97) -> list[list[int]]:
    """Token ids below `most`, of different lengths."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 23, (count,), generator=generator).tolist()
    return [torch.randint(3, most, (length,), generator=generator).tolist() for length in lengths]


IDS = torch.tensor(next(example for example in examples(40) if len(example) >= 12)[:12])[None]


def plain_logits(model: PreTrainedModel, folder: Path) -> torch.Tensor:
    """Of plain transformers on the same, multiplied-out weights."""
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    twin.load_state_dict(dequantize_state(model))
    with torch.no_grad():
        return twin.eval()(IDS).logits


@pytest.mark.parametrize("family", SWEPT, ids=lambda family: family.model_type)
def test_every_family_is_compensated_and_no_part_is_worse(family: Family, tmp_path: Path) -> None:
    build(tiny_config(family.model_type)).save_pretrained(tmp_path)
    model, _ = load_int8(str(tmp_path))
    architecture = describe(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = compensate_model(model, str(tmp_path), examples(6, most=80))
    beyond_text = {name for layer in architecture.layers if not layer.sees_text for name in layer.stacks}
    int8 = {name for name, value in before.items() if value.dtype == torch.int8}
    reached = {name for name in int8 if name not in beyond_text and "vision" not in name}
    assert {part.part for part in report.parts if part.rows} >= {name.removesuffix(".weight") for name in reached}
    assert all(part.compensated <= part.rounded for part in report.parts)
    assert report.compensated < 0.9 * report.rounded
    after = model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert reached <= changed <= int8 | {f"{name}_scale" for name in int8}


@typical
def test_a_compensated_model_computes_what_its_weights_say(checkpoint: Path) -> None:
    model, _ = load_int8(str(checkpoint))
    report = compensate_model(model, str(checkpoint), examples())
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain_logits(model, checkpoint), rtol=0, atol=1e-4)
    assert [expert.compensated for expert in report.worst] == sorted(
        (e.compensated for e in report.worst), reverse=True
    )
    assert json.loads(json.dumps(report.to_dict()))["compensated"] == report.compensated


@typical
def test_what_it_reports_is_what_the_weights_say(checkpoint: Path) -> None:
    """The errors of a layer's linears, from its inputs themselves and both checkpoints' weights."""
    model, _ = load_int8(str(checkpoint))
    report = compensate_model(model, str(checkpoint), examples())
    part = next(part for part in report.parts if part.experts == 1 and part.layer == report.parts[0].layer)
    rows: list[torch.Tensor] = []
    linear = model.get_submodule(part.part)
    handle = linear.register_forward_pre_hook(lambda module, args: rows.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for example in examples():
            model(torch.tensor([example]))
    handle.remove()
    x = torch.cat(rows)
    original = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).get_submodule(part.part).weight
    written = dequantize_state(model)[f"{part.part}.weight"]
    assert part.rows == len(x)
    error = (x @ (original - written).t()).norm() / (x @ original.t()).norm()
    # The first layer's inputs do not depend on what is compensated, unless the part stands behind another one.
    torch.testing.assert_close(error.item(), part.compensated, rtol=0.05, atol=0)


@typical
def test_two_runs_give_the_same_bits(checkpoint: Path) -> None:
    models = [load_int8(str(checkpoint))[0] for _ in range(2)]
    reports = [compensate_model(model, str(checkpoint), examples(8)) for model in models]
    assert reports[0] == reports[1]
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@typical
def test_experts_that_see_no_row_stay_sound(checkpoint: Path) -> None:
    """One token reaches few experts: the others are solved on the layer's mean or stay as they are."""
    model, _ = load_int8(str(checkpoint))
    rounded = dequantize_state(model)
    report = compensate_model(model, str(checkpoint), [[5]])
    assert rounded.keys() == dequantize_state(model).keys()
    stacks = [part for part in report.parts if part.experts > 1]
    assert all(0 < part.unseen < part.experts for part in stacks)
    assert all(part.compensated <= part.rounded for part in report.parts)
    original = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).state_dict()
    for name, value in dequantize_state(model).items():
        # However little is known, a weight is never further off than a few levels.
        level = original[name].abs().amax() / 127
        assert (value - original[name]).abs().max() <= 6 * level, name


@typical
def test_one_layer_of_original_weights_is_alive_at_a_time(checkpoint: Path) -> None:
    source = SourceWeights(str(checkpoint))
    truth = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).state_dict()
    alive: list[weakref.ref[torch.Tensor]] = []
    for index in range(2):
        name = f"model.layers.{index}"
        assert not [ref for ref in alive if ref() is not None]
        with source.layer(name) as weights:
            assert weights.keys() == {key for key in truth if key.startswith(f"{name}.") and key in weights}
            for key, value in weights.items():
                assert torch.equal(value, truth[key]), key
            alive = [weakref.ref(value.untyped_storage()) for value in weights.values()]
            del weights, value
        gc.collect()


@typical
def test_between_layers_no_original_weight_is_left(checkpoint: Path) -> None:
    model, _ = load_int8(str(checkpoint))
    architecture = describe(model)
    shapes = {model.get_parameter(name).shape for layer in architecture.layers for name in layer.stacks}
    seen: list[int] = []

    def count(*_: object) -> None:
        found = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter) and o.shape in shapes]
        seen.append(sum(tensor.is_floating_point() and tensor.device.type != "meta" for tensor in found))

    layers = decoder_layers(architecture)
    handles = [m.register_forward_pre_hook(count) for name, m in model.named_modules() if layers.fullmatch(name)]
    compensate_model(model, str(checkpoint), examples(6))
    for handle in handles:
        handle.remove()
    assert len(seen) >= 2 * len(handles)
    assert max(seen) == 0


@typical
def test_walking_gives_each_layer_what_the_model_gives_it(checkpoint: Path) -> None:
    model, _ = load_int8(str(checkpoint))
    layers = decoder_layers(describe(model))
    batch = make_batches(examples(5), CPU)[0]
    wanted: list[torch.Tensor] = []
    modules = [module for name, module in model.named_modules() if layers.fullmatch(name)]
    handles = [module.register_forward_hook(lambda m, args, output: wanted.append(output)) for module in modules]
    with torch.no_grad():
        model(batch.ids)
    for handle in handles:
        handle.remove()
    found = [visit.passes[0][1]() for visit in walk(model, layers, [batch])]
    assert len(found) == len(wanted) == len(modules)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)


@typical
def test_a_model_that_meddles_between_layers_is_refused(checkpoint: Path) -> None:
    model, _ = load_int8(str(checkpoint))
    model.base_model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))
    with pytest.raises(ModelError, match="changes hidden states between decoder layers"):
        compensate_model(model, str(checkpoint), examples(2))


@typical
def test_padding_is_not_looked_at(checkpoint: Path) -> None:
    model, _ = load_int8(str(checkpoint))
    architecture = describe(model)
    rows = examples(6)
    together = make_batches(rows, CPU)
    alone = [Batch(torch.tensor([row]), torch.ones(len(row), dtype=torch.bool)) for row in rows]
    linears = architecture.linear_names("attention")
    layers = decoder_layers(architecture)
    for padded, single in zip(walk(model, layers, together), walk(model, layers, alone), strict=True):
        own = [name for name in linears if name.startswith(f"{padded.name}.")]
        experts = [layer.name for layer in architecture.layers if layer.name.startswith(f"{padded.name}.")]
        first, second = observe(model, padded, own, experts), observe(model, single, own, experts)
        for name in own:
            assert first.linears[name].rows == second.linears[name].rows == sum(map(len, rows))
            scale = second.linears[name].moment.abs().max().item()
            torch.testing.assert_close(
                first.linears[name].moment, second.linears[name].moment, rtol=0, atol=1e-5 * scale
            )
        for name in experts:
            counts = [[len(token) for token, _ in seen.experts[name].by_expert(4)] for seen in (first, second)]
            assert counts[0] == counts[1]


def test_through_the_recipe(tmp_path: Path) -> None:
    overrides = (
        "quantization.error_compensation=gptq",
        "quantization.calibration_samples=32",
        "training.max_steps=2",
        "data.max_samples=200",
        "eval.enabled=false",
        f"training.output_dir={tmp_path / 'run'}",
    )
    plan = make_plan(load(RECIPE, overrides))
    model, tokenizer = job.load(plan)
    batches = job.build_batches(tokenizer, plan)
    report = job.compensate(model, batches, plan)
    assert report is not None
    assert report.examples == 32
    assert report.compensated < 0.7 * report.rounded
    trained = job.train(job.attach(model, plan), tokenizer, batches, plan, Console(quiet=True))
    result = job.judge(trained, batches, plan)
    assert result.training.steps == 2
    artifact = job.package(result, plan)
    base = {name: value for name, value in result.model.get_base_model().state_dict().items() if "lora_" not in name}
    as_trained, _ = job.reopen(plan, artifact, as_trained=True)
    again = as_trained.get_base_model().state_dict()
    assert all(torch.equal(value, again[name]) for name, value in base.items())


def test_fp8_weights_are_multiplied_out_first(tmp_path: Path) -> None:
    """A checkpoint of FP8 blocks: its layers are read as the float weights that it stands for."""
    model = build(tiny_config("deepseek_v3"))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state, truth = load_file(file), {}
    for name in [name for name in state if name.endswith("o_proj.weight")]:
        scale = state[name].abs().max().view(1, 1) / 448
        blocks = (state[name] / scale).to(torch.float8_e4m3fn)
        truth[name] = blocks.float() * scale
        state |= {name: blocks, f"{name}_scale_inv": scale}
    save_file(state, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = SourceWeights(str(tmp_path))
    for name, value in truth.items():
        with source.layer(name.partition(".self_attn")[0]) as weights:
            torch.testing.assert_close(weights[name].float(), value, rtol=1e-6, atol=0)
    int8, _ = load_int8(str(tmp_path))
    report = compensate_model(int8, str(tmp_path), examples(6, most=80))
    assert report.compensated < report.rounded


@typical
def test_nothing_to_compensate_is_said(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="error_compensation needs experts in int8 or int4, or linears in int8"):
        load(RECIPE, ("quantization.error_compensation=gptq", "quantization.experts=none", "quantization.linears=bnb"))
    model, _ = load_int8(str(checkpoint), experts="none", linears="none")
    with pytest.raises(ModelError, match="nothing in int8 to compensate"):
        compensate_model(model, str(checkpoint), examples(2))
    stored, _ = load_int8(str(checkpoint))
    stored.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"int8 already.*take the checkpoint it was made from"):
        compensate_model(stored, str(tmp_path), examples(2))


def test_calibration_stops_at_the_number_of_tokens_whose_inputs_can_be_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.quant.gptq.calibrate.MOST_CALIBRATION_TOKENS", 10)
    rows = [[1] * length for length in (4, 6, 1, 2)]
    assert calibration_examples(rows) == rows[:2]
    assert calibration_examples(rows[1:]) == rows[1:]
    assert calibration_examples([[1] * 11, [1]]) == [[1] * 11]
