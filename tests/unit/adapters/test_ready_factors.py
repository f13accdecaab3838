"""What an adapter's factors are made into: once where it is frozen, anew after any change, in fp32 for a few rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper as StockParamWrapper
from transformers import AutoConfig, AutoModelForCausalLM

from toolkit.adapters import ParamWrapper, attach_lora, load_adapter
from toolkit.ops import adapted_linear


def adapted() -> PeftModel:
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="onecard_per_expert")
    model = attach_lora(model.requires_grad_(False), r=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model.eval()


def logits(model: PeftModel, *, grad: bool = False) -> torch.Tensor:
    with torch.set_grad_enabled(grad):
        output: torch.Tensor = model(input_ids=torch.arange(8)[None]).logits
    return output.detach()


def kept(model: PeftModel) -> int:
    return sum("_made" in vars(module) for module in model.modules())


def test_a_frozen_adapters_factors_are_made_once_and_anew_after_a_change() -> None:
    model = adapted()
    trains = logits(model)
    assert kept(model) == 0
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    (router,) = (wrapper for wrapper in wrappers if wrapper.parameter_name == "weight")
    for wrapper in wrappers:
        wrapper.keeps_factors = True
    assert torch.equal(logits(model), trains)
    assert kept(model) == len(wrappers) == 3, "two stacks and the router"
    for change in (
        lambda: wrappers[0].lora_B["default"].weight.mul_(2),
        lambda: wrappers[1].set_scale("default", 3.0),
        lambda: wrappers[0].lora_A["default"].weight.copy_(torch.randn(8, 32)),
        lambda: router.lora_B["default"].weight.mul_(-5),
        lambda: router.get_base_layer().weight.copy_(50 * torch.randn(4, 32)),
    ):
        before = logits(model)
        with torch.no_grad():
            change()
        assert (logits(model) - before).abs().max() > 1e-4
        torch.testing.assert_close(logits(model), logits(model, grad=True), rtol=1e-5, atol=1e-6)
    with model.disable_adapter():
        assert (logits(model) - before).abs().max() > 1e-4


def test_a_loaded_adapter_keeps_them_and_one_that_trains_does_not(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    for trains in (False, True):
        base = adapted().unload()
        loaded = load_adapter(base, tmp_path, is_trainable=trains)
        torch.testing.assert_close(logits(loaded.eval()), logits(model))
        assert kept(loaded) == (0 if trains else 3)


def test_a_routers_update_is_what_peft_makes_of_it_and_leaves_nothing_behind() -> None:
    model = adapted()
    (router,) = (each for each in model.modules() if isinstance(each, ParamWrapper) and each.parameter_name == "weight")
    states, base = torch.randn(5, 32), router.get_base_layer()
    found = router(states)
    wanted = StockParamWrapper.forward(router, states)
    factors = [router.lora_A["default"].weight, router.lora_B["default"].weight]
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)
    gradients = [torch.autograd.grad(output[0].square().sum(), factors) for output in (found, wanted)]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert "weight" not in vars(base), "the parameter is found again"
    with pytest.raises(RuntimeError):
        router(torch.randn(5, 31))
    assert "weight" not in vars(base)
    weight, update = base.weight.clone(), router.get_delta_weight("default")
    router.merge()
    assert torch.equal(base.weight, weight + update)
    assert torch.equal(router(states)[0], found[0])


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_few_bf16_rows_meet_their_adapter_in_fp32(rows: int) -> None:
    """And so come nearer to the truth than an adapter that is rounded first."""
    stored, scale = torch.zeros(48, 64, dtype=torch.int8), torch.ones(48)
    A, B = torch.randn(4, 64) / 8, torch.randn(48, 4)
    x = torch.randn(rows, 1, 64, dtype=torch.bfloat16)
    truth = 0.5 * (x.double() @ A.double().t()) @ B.double().t()
    with torch.no_grad():
        found = adapted_linear(x, stored, scale, None, A, B, 0.5)
        shifted = adapted_linear(x, stored, scale, torch.full((48,), 64.0), A, B, 0.5)
        rounded = adapted_linear(x, stored, scale, None, A.bfloat16(), B.bfloat16(), 0.5)
    assert found.dtype == shifted.dtype == torch.bfloat16
    assert found.shape == (rows, 1, 48)
    assert ((found - truth).abs() <= 2**-8 * truth.abs() + 1e-6).all()
    assert not ((rounded - truth).abs() <= 2**-8 * truth.abs() + 1e-6).all()
    assert (shifted - truth - 64).abs().max() <= 0.5
