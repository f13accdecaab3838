"""Every MoE family of the installed transformers, one tiny checkpoint each, through the whole way of an adapter.

The families are enumerated (`families.py`), so a new one is tested on the day transformers ships it. What is expected
to fail is data here and in `families.py`, and fails the test when it starts to work.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from tests.harness.families import STOCK_LOSES_KEYS, Family, build, families, marked_folders, tiny_config
from toolkit.adapters import AdapterCoverage, adapter_coverage, attach_lora, load_adapter
from toolkit.architecture import auto_class, describe
from toolkit.checkpoint.config import skeleton
from toolkit.errors import ModelError
from toolkit.families import SEE_EACH_OTHER_PACKED
from toolkit.plan import audit
from toolkit.quant import Coverage, dequantize_state, load_int8
from toolkit.training.packing import isolate_documents

IDS = torch.randint(3, 80, (3, 24), generator=torch.Generator().manual_seed(5))
REFUSED = {
    "diffusion_gemma": "denoises blocks of text",
    "qwen3_omni_moe": "no forward pass",
}
"""Families that cannot be trained, and what the user is told."""

SWEPT = [family for family in families() if family.model_type not in REFUSED]


@dataclass(frozen=True)
class Evidence:
    """What one family gave on its way: counts, logits and gradients."""

    family: Family
    stored: Coverage
    stored_again: Coverage
    fresh: AdapterCoverage
    stepped: AdapterCoverage
    int8_logits: torch.Tensor
    stock_logits: torch.Tensor
    adapted_logits: torch.Tensor
    reloaded_logits: torch.Tensor
    gradients: dict[str, torch.Tensor]
    experts_hit: dict[str, set[int]]
    folder: Path
    stock: PreTrainedModel
    packed: str
    """What is said of packed examples; nothing where they are kept apart."""


@pytest.fixture(scope="module", params=SWEPT, ids=lambda family: family.model_type)
def evidence(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    return travel(request.param, tmp_path_factory.mktemp(request.param.model_type))


def travel(family: Family, folder: Path) -> Evidence:
    """Build, load in int8, attach, step, save the int8 model and the adapter, reload both."""
    build(tiny_config(family.model_type)).save_pretrained(folder)
    model, stored = load_int8(str(folder))
    model.save_pretrained(folder / "int8")
    stock = auto_class(model.config).from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    stock.load_state_dict(dequantize_state(model))
    int8_logits, stock_logits = logits(model), logits(stock)
    adapted = attach_lora(model, r=2, target_modules="all-linear")
    fresh = adapter_coverage(adapted)
    step(adapted)
    stepped = adapter_coverage(adapted)
    randomize(adapted)
    gradients, experts_hit = gradients_of(adapted)
    adapted_logits = logits(adapted.eval())
    adapted.save_pretrained(folder / "adapter")
    # Trainable like the first: torch multiplies a weight that needs a gradient by another kernel.
    mapped, mapped_again = load_int8(str(folder / "int8"))
    reloaded = load_adapter(mapped, folder / "adapter", is_trainable=True).eval()
    reloaded_logits = logits(reloaded)
    return Evidence(
        family=family,
        stored=stored,
        stored_again=mapped_again,
        fresh=fresh,
        stepped=stepped,
        int8_logits=int8_logits,
        stock_logits=stock_logits,
        adapted_logits=adapted_logits,
        reloaded_logits=reloaded_logits,
        gradients=gradients,
        experts_hit=experts_hit,
        folder=folder,
        stock=stock,
        packed=on_packing(adapted),
    )


def on_packing(model: PeftModel) -> str:
    """Why packed examples of this family cannot be trained on."""
    try:
        isolate_documents(model)
    except ModelError as error:
        return str(error)
    return ""


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


def step(model: PeftModel) -> None:
    """One optimizer step from the fresh adapter, as training takes it."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


@torch.no_grad()
def randomize(model: PeftModel) -> None:
    """No B is zero any more, not even of experts that the step did not see: through a zero B no gradient gets to A."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def gradients_of(model: PeftModel) -> tuple[dict[str, torch.Tensor], dict[str, set[int]]]:
    """The gradient of every trainable parameter, and which experts of each layer had a token."""
    hit: dict[str, set[int]] = {}
    base = model.get_base_model()
    names = {f"base_model.model.{layer.name}" for layer in describe(base).layers}
    handles = []
    for name, module in model.named_modules():
        if name in names:
            handles.append(module.register_forward_pre_hook(lambda _, args, name=name: hit.update({name: seen(args)})))
    # At every position: the loss of a language model leaves the last token out, and with it an expert only it chose.
    functional.cross_entropy(model(input_ids=IDS).logits.flatten(0, 1), IDS.flatten()).backward()
    for handle in handles:
        handle.remove()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}, hit


def seen(arguments: tuple[torch.Tensor, ...]) -> set[int]:
    return set(arguments[1].unique().tolist())


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Within 1e-4 of the largest logit: fp32 sums in another order, over a few layers."""
    return bool((ours - theirs).abs().max() <= 1e-4 * theirs.abs().max().clamp(min=1))


def test_every_marked_family_writes_text_or_is_known_not_to() -> None:
    assert marked_folders() - {family.folder for family in families()} == {"openai_privacy_filter"}  # labels tokens


def test_every_stack_and_linear_is_int8_and_computes_what_its_multiplied_out_weights_say(evidence: Evidence) -> None:
    assert evidence.stored.stacks_int8 == evidence.stored.stacks > 0
    assert evidence.stored.linears_8bit == evidence.stored.linears > 0
    assert close(evidence.int8_logits, evidence.stock_logits)


def test_every_stack_and_router_is_adapted_and_moves_in_one_step(evidence: Evidence) -> None:
    fresh, stepped = evidence.fresh, evidence.stepped
    assert fresh.stacks == fresh.stacks_all > 0
    assert fresh.routers == fresh.routers_all > 0
    assert fresh.moved == 0
    assert stepped.moved == stepped.adapters == fresh.adapters
    assert (evidence.adapted_logits - evidence.int8_logits).abs().max() > 1e-2 * evidence.int8_logits.abs().max()


def test_gradients_reach_every_adapter_and_exactly_the_experts_that_had_a_token(evidence: Evidence) -> None:
    adapters = [name for name in evidence.gradients if ".lora_" in name]
    assert len(adapters) == 2 * evidence.fresh.adapters
    for name in adapters:
        gradient = evidence.gradients[name]
        layer = name.partition(".base_layer.lora_")[0].partition(".lora_")[0]
        if layer not in evidence.experts_hit:
            assert gradient.count_nonzero(), name
            continue
        by_expert = per_expert(gradient, "lora_A" in name, rank=2)
        assert set(by_expert.count_nonzero((1, 2)).nonzero().flatten().tolist()) == evidence.experts_hit[layer], name


def per_expert(gradient: torch.Tensor, is_A: bool, rank: int) -> torch.Tensor:
    """PEFT's A (R·E, I), expert slowest, or B (O, R·E), expert fastest, as [E, ., .]."""
    if is_A:
        return gradient.reshape(-1, rank, gradient.shape[1])
    return gradient.reshape(gradient.shape[0], rank, -1).permute(2, 0, 1)


def test_a_saved_model_and_adapter_give_the_same_logits_bit_for_bit_here(evidence: Evidence) -> None:
    assert evidence.stored_again == evidence.stored
    assert torch.equal(evidence.reloaded_logits, evidence.adapted_logits)


def test_headers_of_what_was_saved_agree_with_the_config(evidence: Evidence) -> None:
    folder = str(evidence.folder)
    model = skeleton(folder)
    found = audit(folder)
    assert sum(part.tensors for part in found.parts) == len(dict(model.named_parameters()))


def test_a_plan_knows_where_packed_examples_would_see_each_other(evidence: Evidence) -> None:
    assert ("see each other" in evidence.packed) == (evidence.family.model_type in SEE_EACH_OTHER_PACKED)


def test_a_saved_adapter_gives_the_same_logits_in_stock_peft(evidence: Evidence) -> None:
    if evidence.family.model_type in STOCK_LOSES_KEYS:
        with pytest.warns(UserWarning, match="missing adapter keys"):
            stock = PeftModel.from_pretrained(evidence.stock, evidence.folder / "adapter").eval()
        assert not close(evidence.adapted_logits, logits(stock))
    else:
        stock = PeftModel.from_pretrained(evidence.stock, evidence.folder / "adapter").eval()
        assert close(evidence.adapted_logits, logits(stock))
    assert any(isinstance(module, LoraLayer) for module in stock.modules())


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_work_is_refused_with_the_reason(model_type: str) -> None:
    config = tiny_config(model_type)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    with pytest.raises(ModelError, match=REFUSED[model_type]):
        describe(model)


@pytest.mark.parametrize(("model_type", "name"), [("jamba", "dt_proj"), ("deepseek_v32", "wq_b")])
def test_linears_that_no_adapter_can_train_are_left_alone_even_where_they_are_named(model_type: str, name: str) -> None:
    model = build(tiny_config(model_type))
    with pytest.raises(ModelError, match=f"{name} matches no linear"):
        attach_lora(model, target_modules=[name])


def test_experts_that_text_never_reaches_are_int8_and_not_adapted(tmp_path: Path) -> None:
    build(tiny_config("ernie4_5_vl_moe")).save_pretrained(tmp_path)
    model, stored = load_int8(str(tmp_path))
    unseen = [layer for layer in describe(model).layers if not layer.sees_text]
    assert len(unseen) == stored.stacks / 4  # as many layers see images as see text, two stacks in each
    assert adapter_coverage(attach_lora(model, r=2)).stacks_all == stored.stacks / 2
