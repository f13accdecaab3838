"""What a frozen adapter's factors are made into once, and made anew after any change."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from toolkit.adapters import ParamWrapper, attach_lora, load_adapter


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
    for wrapper in wrappers:
        wrapper.keeps_factors = True
    assert torch.equal(logits(model), trains)
    assert kept(model) == len(wrappers) == 2
    for change in (
        lambda: wrappers[0].lora_B["default"].weight.mul_(2),
        lambda: wrappers[1].set_scale("default", 3.0),
        lambda: wrappers[0].lora_A["default"].weight.copy_(torch.randn(8, 32)),
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
        assert kept(loaded) == (0 if trains else 2)
