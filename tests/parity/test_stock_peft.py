"""Whole models against stock transformers + PEFT: the same logits and gradients, both ways, family by family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from toolkit.adapters import adapter_coverage, attach_lora, load_adapter
from toolkit.errors import ModelError
from toolkit.quant import dequantize_state, load_int8, measure

Randomize = Callable[[torch.nn.Module], None]
IDS = torch.randint(3, 97, (3, 19), generator=torch.Generator().manual_seed(5))


def stock_twin(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Plain transformers on the same, multiplied-out weights."""
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    twin.load_state_dict(dequantize_state(model))
    return twin.eval()


def loss_and_gradients(model: PeftModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradient of every LoRA tensor and of the embedded input."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits).sin()).sum().backward()
    assert embedded.grad is not None
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), {**gradients, "input": embedded.grad}


def test_int8_model_computes_what_its_multiplied_out_weights_say(checkpoint: Path) -> None:
    model, coverage = load_int8(str(checkpoint))
    assert coverage.stacks_int8 == coverage.stacks > 0
    assert coverage.linears_8bit == coverage.linears > 0
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, stock_twin(model, checkpoint)(IDS).logits, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
def test_adapter_written_by_us_gives_the_same_logits_and_gradients_in_stock_peft(
    checkpoint: Path, tmp_path: Path, randomize: Randomize
) -> None:
    model, _ = load_int8(str(checkpoint))
    twin = stock_twin(model, checkpoint)
    with torch.no_grad():
        bare = model(IDS).logits
    ours = attach_lora(model, r=3, target_modules="all-linear", rank_pattern={"experts": 2, "router": 1})
    coverage = adapter_coverage(ours)
    assert coverage.stacks == coverage.stacks_all
    assert coverage.routers == coverage.routers_all
    assert coverage.moved == 0
    randomize(ours)
    assert adapter_coverage(ours).moved == coverage.adapters
    ours.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(twin, tmp_path).eval()
    written = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert written == {
        name.replace(".default", "") for name in stock.state_dict() if ".lora_A." in name or ".lora_B." in name
    }
    our_logits, our_gradients = loss_and_gradients(ours.eval())
    stock_logits, stock_gradients = loss_and_gradients(stock)
    torch.testing.assert_close(our_logits, stock_logits, rtol=0, atol=1e-4)
    assert (our_logits - bare).abs().max() > 0.1
    assert our_gradients.keys() == stock_gradients.keys()
    for name, gradient in stock_gradients.items():
        difference = (our_gradients[name] - gradient).norm()
        assert difference <= 1e-5 * gradient.norm() + 1e-7, name


def test_adapter_written_by_stock_peft_gives_the_same_logits_here(
    checkpoint: Path, tmp_path: Path, randomize: Randomize
) -> None:
    model, _ = load_int8(str(checkpoint))
    twin = stock_twin(model, checkpoint)
    names = [name for name, _ in twin.named_parameters()]
    stacks = sorted({n.split(".", 3)[-1] for n in names if n.endswith(("experts.gate_up_proj", "experts.down_proj"))})
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], target_parameters=stacks, use_rslora=True)
    if "q_lora_rank" in twin.config.to_dict() and twin.config.q_lora_rank:
        config.target_modules = {"o_proj"}
    stock = get_peft_model(twin, config)
    randomize(stock)
    stock.save_pretrained(tmp_path)
    ours = load_adapter(model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, stock(IDS).logits, rtol=0, atol=1e-4)
        assert not any(p.requires_grad for p in ours.parameters())


def test_switching_the_adapter_off_gives_the_base_back(checkpoint: Path, randomize: Randomize) -> None:
    model, _ = load_int8(str(checkpoint))
    with torch.no_grad():
        before = model(IDS).logits
        adapted = attach_lora(model, r=2)
        randomize(adapted)
        assert not torch.equal(adapted(IDS).logits, before)
        with adapted.disable_adapter():
            assert torch.equal(adapted(IDS).logits, before)
    assert measure(adapted.get_base_model()) == measure(load_int8(str(checkpoint))[0])


def test_merging_into_int8_is_refused(checkpoint: Path) -> None:
    model, _ = load_int8(str(checkpoint))
    with pytest.raises(ModelError, match="cannot be merged into int8"):
        attach_lora(model, r=2, target_modules="none").merge_adapter()


def test_a_name_that_matches_nothing_is_refused_with_the_nearest(checkpoint: Path) -> None:
    model, _ = load_int8(str(checkpoint))
    with pytest.raises(ModelError, match=r"o_pro matches no linear.*did you mean.*o_proj"):
        attach_lora(model, target_modules=["o_pro"])
    with pytest.raises(ModelError, match=r"expert is not adapted.*did you mean.*experts"):
        attach_lora(model, rank_pattern={"expert": 4})


def test_an_adapter_for_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    model, _ = load_int8(str(checkpoint))
    adapted = attach_lora(model, r=2)
    adapted.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    fresh, _ = load_int8(str(checkpoint))
    with pytest.raises(ModelError, match="damaged"):
        load_adapter(fresh, tmp_path)
    with pytest.raises(ModelError, match=r"adapter_config\.json: missing"):
        load_adapter(fresh, tmp_path / "nowhere")
