"""Merged into a quantised source in its own format: only codes change, along the adapter; what is lost is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from tests.unit.artifact.conftest import BASE
from tests.unit.artifact.test_quantised_bases import tensors
from tests.unit.quant.test_foreign_formats import LAYOUTS, WIDE, pair
from tests.unit.quant.test_storage import fp8_pair, mxfp4_pair, rewrite, tiny
from toolkit.adapters import attach_lora
from toolkit.adapters.layouts import read_factors
from toolkit.artifact import write_artifact
from toolkit.checkpoint.config import skeleton
from toolkit.checkpoint.identity import identify_base
from toolkit.errors import DataError, ModelError
from toolkit.export import export_adapter
from toolkit.export.survival import Losses, Survival, _compared, looked_at, streamed_logits
from toolkit.export.write import _require_survival
from toolkit.labels import IGNORED
from toolkit.quant import load_int8, quantize_checkpoint
from toolkit.quant.source import SourceWeights

pytestmark = pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning")
TEXTS = torch.randint(1, 40, (4, 24), generator=torch.Generator().manual_seed(2)).tolist()
Pair = Callable[[Path], tuple[Path, Path]]


def quark_pair(folder: Path) -> tuple[Path, Path]:
    """FP8 with a scale a tensor, under Quark's names, and the floats."""
    plain, stored = tiny(folder / "float", "qwen3_moe"), dict[str, torch.Tensor]()
    for name, weight in load_file(plain / "model.safetensors").items():
        if ".layers." in name and "proj" in name:
            scale = weight.abs().max() / 448
            stored |= {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
        else:
            stored[name] = weight
    return rewrite(plain, folder / "quark", stored, {"quant_method": "quark"}), plain


def divided_pair(folder: Path) -> tuple[Path, Path]:
    """FP8 blocks whose scales divide, as GPTQModel stores them, and the values in floats."""
    blocks, exact, declared = fp8_pair(folder, "qwen3_moe")
    stored = load_file(blocks / "model.safetensors")
    turned = {name: value.reciprocal() if name.endswith("_inv") else value for name, value in stored.items()}
    return rewrite(blocks, folder / "divided", turned, {**declared, "weight_scale_semantics": "inverse"}), exact


PAIRS: dict[str, Pair] = {
    **{layout: (lambda folder, layout=layout: pair(folder, layout, shards=2)) for layout in LAYOUTS if layout != "MLX"},
    "fp8 blocks": lambda folder: fp8_pair(folder, "deepseek_v3")[:2],
    "quark fp8": quark_pair,
    "gptqmodel fp8": divided_pair,
    "mxfp4 stacks": lambda folder: mxfp4_pair(folder, shards=3)[:2],
}


def adapter(base: Path, tokenizer: PreTrainedTokenizerBase, folder: Path, std: float = 0.05, **stored: str) -> Path:
    """On every kind of part, B random; trained on `base`."""
    torch.manual_seed(3)
    model = attach_lora(load_int8(str(base), **stored)[0], r=2, lora_alpha=4, rank_pattern={"experts": 3})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std)
    facts: dict[str, Any] = {"recipe_yaml": "", "results": {}, "coverage": {}}
    return write_artifact(model, tokenizer, folder, base=identify_base(str(base)), **facts)


def along(before: Path, after: Path, artifact: Path) -> tuple[float, float]:
    """What share of the adapter's update the weights moved by, and how far they moved otherwise, over the update."""
    old, new = (SourceWeights(str(folder), also_ours=True) for folder in (before, after))
    moved, size, off = 0.0, 0.0, 0.0
    for factors in read_factors(artifact, skeleton(str(before))):
        module, wanted = factors.parameter.rpartition(".")[0], factors.full()
        with old.layer(module) as one, new.layer(module) as other:
            found = other[factors.parameter].float() - one[factors.parameter].float()
        moved += float((found * wanted).sum())
        size += float(wanted.square().sum())
        off += float((found - wanted).square().sum())
    return moved / size, (off / size) ** 0.5


@pytest.mark.parametrize("name", PAIRS)
def test_only_codes_change_and_they_change_along_the_adapter(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source, _ = PAIRS[name](tmp_path)
    artifact = adapter(source, tokenizer, tmp_path / "adapter")
    made = export_adapter(artifact, source, "merged-source", tmp_path / "merged", texts=TEXTS, force=True)
    before, after = tensors(source), tensors(tmp_path / "merged")
    assert {key: (value.dtype, value.shape) for key, value in before.items()} == {
        key: (value.dtype, value.shape) for key, value in after.items()
    }
    assert (tmp_path / "merged/config.json").read_bytes() == (source / "config.json").read_bytes()
    changed = {
        key
        for key in before
        if not torch.equal(*(found[key].reshape(-1).view(torch.uint8) for found in (before, after)))
    }
    assert changed
    assert not [key for key in changed if key.endswith(("scale", "scales", "scale_inv", "zeros", "norm.weight"))]
    share, off = along(source, tmp_path / "merged", artifact)
    assert 0.9 < share < 1.05, (share, off)
    assert made.survival is not None
    assert made.survival.share > 0.5
    if name == "by expert":
        export_adapter(artifact, source, "merged-source", tmp_path / "again", texts=TEXTS, force=True)
        again = tensors(tmp_path / "again")
        assert all(torch.equal(again[key].view(torch.uint8), value.view(torch.uint8)) for key, value in after.items())


@pytest.mark.parametrize("name", ["fp8 blocks", "mxfp4 stacks", "by expert"])
def test_logits_read_layer_by_layer_are_those_of_stock_transformers(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source, exact = PAIRS[name](tmp_path)
    artifact, batch = adapter(source, tokenizer, tmp_path / "adapter"), looked_at(TEXTS)[0]
    base = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32, experts_implementation="eager").eval()

    @torch.no_grad()
    def logits(model: torch.nn.Module) -> torch.Tensor:
        return model(batch.ids).logits.flatten(0, 1)[batch.real]

    plain = logits(base)
    torch.testing.assert_close(streamed_logits(source, batch), plain, rtol=1e-5, atol=1e-5)
    adapted = logits(PeftModel.from_pretrained(base, artifact))
    factors = read_factors(artifact, skeleton(str(source)))
    torch.testing.assert_close(streamed_logits(source, batch, factors), adapted, rtol=1e-5, atol=1e-5)
    assert (adapted - plain).abs().max() > 0.01


def test_what_would_be_lost_is_refused_or_stated(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """An adapter far larger than the weights does not fit on their grid."""
    source, _ = pair(tmp_path, "by expert")
    artifact = adapter(source, tokenizer, tmp_path / "adapter", std=2.0)
    with pytest.raises(
        ModelError, match=r": \d+\.\d% of the adapter's change .*: less than 90%, not exported"
    ) as caught:
        export_adapter(artifact, source, "merged-source", tmp_path / "merged", texts=TEXTS)
    assert "\n" not in str(caught.value)
    assert "--force" in str(caught.value)
    assert not [path.name for path in tmp_path.iterdir() if "merged" in path.name]
    made = export_adapter(artifact, source, "merged-source", tmp_path / "merged", texts=TEXTS, force=True)
    assert made.survival is not None
    assert made.survival.share < 0.9
    record = json.loads((tmp_path / "merged/export.json").read_bytes())
    assert record["survival"]["share"] == made.survival.share
    assert record["survival"]["noise"] == made.survival.noise > 0
    assert record["merged_into"]["as"] == "itself, in compressed-tensors"
    assert str(made.survival) in (tmp_path / "merged/README.md").read_text()


@pytest.mark.parametrize(
    ("share", "noise", "why"),
    [
        (0.95, 0.4, None),
        (0.9, 1.0, None),
        (0.899, 0.2, "89.9% of the adapter's change of the logits is left, .*: less than 90%, not exported"),
        (float("nan"), 0.2, "less than 90%"),
        (1.05, 1.01, "further from the adapted model than its base is"),
    ],
)
def test_what_is_refused(share: float, noise: float, why: str | None) -> None:
    found = Survival(tokens=512, share=share, noise=noise, moved=0.1)
    if share == share:  # what is no number is not written whatever is asked
        _require_survival("merged-source", found, force=True)
    if why is None:
        _require_survival("merged-source", found, force=False)
        return
    with pytest.raises(ModelError, match=why):
        _require_survival("merged-source", found, force=False)


def test_the_share_is_the_part_along_the_effect() -> None:
    before, wanted = torch.randn(70, 9), torch.randn(70, 9)
    effect = wanted - before
    beside = torch.randn(70, 9)
    beside -= (beside * effect).sum() / effect.square().sum() * effect
    targets = torch.tensor([IGNORED, *range(9)] * 7)
    found = _compared(before, wanted, before + 0.3 * effect + beside, targets)
    assert found.share == pytest.approx(0.3, abs=1e-5)
    away = (0.7**2 + float(beside.square().sum() / effect.square().sum())) ** 0.5
    assert found.noise == pytest.approx(away, rel=1e-5)
    same = _compared(before, wanted, wanted, targets)
    assert (same.share, same.noise, same.moved) == (1.0, 0.0, pytest.approx(found.moved))
    assert same.losses is not None
    losses = [torch.nn.functional.cross_entropy(logits, targets).item() for logits in (before, wanted, wanted)]
    assert same.losses == Losses(63, *(pytest.approx(loss, rel=1e-5) for loss in losses))
    assert _compared(before, wanted, wanted, torch.full((70,), IGNORED)).losses is None


def test_a_loss_is_of_the_tokens_that_answers_were_trained_on() -> None:
    texts = [[5, 6, 7], list(range(600)), [8]]
    labels = [[IGNORED, 6, 7], [IGNORED] * 599 + [599], [8]]
    batch, targets = looked_at(texts, labels)
    assert batch.ids.shape == (2, 509)
    assert batch.ids[0, -1] == 508
    assert targets.tolist() == [IGNORED] * 509 + [6, 7, IGNORED]
    assert looked_at(texts)[1].tolist() == [*range(1, 509), IGNORED, 6, 7, IGNORED]


def test_int8_of_a_rounded_source_is_measured_too(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source, _ = pair(tmp_path, "by expert")
    artifact = adapter(source, tokenizer, tmp_path / "adapter")
    with pytest.raises(DataError, match=r"merged-int8: rounds weights again.* with --data FILE"):
        export_adapter(artifact, source, "merged-int8", tmp_path / "int8")
    made = export_adapter(artifact, source, "merged-int8", tmp_path / "int8", texts=TEXTS)
    assert made.survival is not None
    assert 0.9 < made.survival.share < 1.1
    assert "compressed-tensors weights multiplied out" in (tmp_path / "int8/README.md").read_text()


def refused(artifact: Path, base: Path, out: Path, format: str = "merged-source", **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        export_adapter(artifact, base, format, out, texts=TEXTS, **options)
    assert not out.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_format_without_an_encoder_is_refused_by_name(
    tokenizer: PreTrainedTokenizerBase, artifact: Path, tmp_path: Path
) -> None:
    source, _ = pair(tmp_path, "MLX")
    words = refused(adapter(source, tokenizer, tmp_path / "mlx-adapter"), source, tmp_path / "out")
    assert "is stored as int4, groups of 32 by mlx, which merged-source does not write; export it as merged" in words
    assert "its weights are floats" in refused(artifact, BASE, tmp_path / "out")


@pytest.mark.parametrize(("family", "experts"), [("qwen3_moe", "int8"), ("gpt_oss", "int4"), ("qwen3_moe", "mxfp4")])
def test_our_own_checkpoints_are_merged_into_as_well(
    family: str, experts: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    original = tiny(tmp_path / "original", family, **WIDE)
    source = tmp_path / "int8"
    quantize_checkpoint(str(original), source, experts=experts)
    artifact = adapter(source, tokenizer, tmp_path / "adapter", experts=experts)
    made = export_adapter(artifact, source, "merged-source", tmp_path / "merged", texts=TEXTS, force=True)
    assert made.survival is not None
    assert made.survival.share > 0.5
    before, after = tensors(source), tensors(tmp_path / "merged")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert {before[key].dtype for key in changed} >= {torch.int8}
    assert not [key for key in changed if key.endswith(("_scale", "_step"))]
    share, off = along(source, tmp_path / "merged", artifact)
    assert 0.9 < share < 1.05, (share, off)
    ours, _ = load_int8(str(tmp_path / "merged"), experts=experts)
    batch, _ = looked_at(TEXTS)
    with torch.no_grad():
        found = ours(batch.ids).logits.flatten(0, 1)[batch.real]
    torch.testing.assert_close(found, streamed_logits(tmp_path / "merged", batch), rtol=1e-4, atol=1e-4)
    stated = export_adapter(artifact, source, "merged", tmp_path / "in-floats", merge_base=original)
    assert stated.merged_into is not None
    assert stated.merged_into["as"] == "the original of int8"


@pytest.fixture(scope="module")
def of_nano(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """An original, what was quantised of it, and an adapter of the latter."""
    folder = tmp_path_factory.mktemp("pair")
    source, _ = pair(folder, "by expert")
    return folder / "float", source, adapter(source, tokenizer, folder / "adapter")


def test_the_original_takes_the_adapter_of_what_was_made_from_it(
    of_nano: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    original, source, artifact = of_nano
    made = export_adapter(artifact, source, "merged", tmp_path / "merged", merge_base=original)
    assert made.merged_into is not None
    assert made.merged_into["name"] == original.name
    assert made.merged_into["as"] == f"the original of {source.name}"
    assert made.merged_into["weights_sha256"] == identify_base(str(original)).weights_sha256
    before, after = load_file(original / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    assert before.keys() == after.keys()
    share, off = along(original, tmp_path / "merged", artifact)
    assert share == pytest.approx(1, abs=1e-4)
    assert off < 1e-3
    stated = export_adapter(artifact, source, "merged", tmp_path / "from-source")
    assert stated.merged_into is not None
    assert stated.merged_into["as"] == "its compressed-tensors weights multiplied out"
    assert f"merged into: {source.name}" in (tmp_path / "from-source/README.md").read_text()


def test_another_original_is_refused(of_nano: tuple[Path, Path, Path], tmp_path: Path) -> None:
    original, source, artifact = of_nano
    weights = load_file(original / "model.safetensors")

    def words(name: str, changed: dict[str, torch.Tensor]) -> str:
        other = rewrite(original, tmp_path / name, {**weights, **changed}, None)
        return refused(artifact, source, tmp_path / "out", "merged", merge_base=other)

    generator = torch.Generator().manual_seed(8)
    stacks = {
        key: 0.2 * torch.randn(value.shape, generator=generator) for key, value in weights.items() if "down_proj" in key
    }
    assert "experts.down_proj is 1.4 apart from that of" in words("experts", stacks)
    norm = "model.layers.0.input_layernorm.weight"
    assert f"{norm} is 0.048 apart" in words("norms", {norm: weights[norm] * 1.05})
    assert "lacks model.layers.0.mlp" in refused(
        artifact,
        source,
        tmp_path / "out",
        "merged",
        merge_base=rewrite(
            original, tmp_path / "less", {k: v for k, v in weights.items() if "layers.0.mlp" not in k}, None
        ),
    )
    small = tiny(tmp_path / "small", "qwen3_moe", **{**WIDE, "moe_intermediate_size": 128})
    assert "mlp.experts.gate_up_proj is 12×256×64, and 12×128×64 in" in refused(
        artifact, source, tmp_path / "out", "merged", merge_base=small
    )
    family = tiny(tmp_path / "family", "mixtral")
    assert "a mixtral, and" in refused(artifact, source, tmp_path / "out", "merged", merge_base=family)
    assert "quantised as compressed-tensors" in refused(artifact, source, tmp_path / "out", "merged", merge_base=source)
