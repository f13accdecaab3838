"""The rivals of `experts.py`: one expert layer, built alike in every process from the same seed.

    python expert_arms.py ours|int4|mxfp4|stock|experts4bit|sgemm

A worker of `turns.py`. Stock and experts4bit-qlora run in the second environment, where onecard is not importable, so
nothing of onecard is imported but by `ours`, `int4` and `mxfp4`. Weights are made as int8 with a scale a row: ours
keeps them, stock gets the very numbers they stand for in fp32, experts4bit-qlora rounds those again to its own 8-bit
code, int4 and mxfp4 to our four bits.

    T tokens, K experts per token, E experts, H hidden, I expert intermediate, O outputs of a stack, R rank
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from turns import serve, settled, step_memory

__all__ = ["ARMS", "Arm", "Shape", "answer"]

STACKS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """One expert layer and its batch."""

    experts: int
    hidden: int
    intermediate: int
    top_k: int
    tokens: int
    rank: int = 16

    def stack(self, name: str) -> tuple[int, int]:
        """Outputs and inputs of a stack's matrices: gate and up lie in one."""
        up = (2 * self.intermediate, self.hidden)
        return up if name == STACKS[0] else (self.hidden, self.intermediate)


@dataclass(frozen=True)
class Batch:
    """What the layer is given; x and the routing weights want gradients."""

    x_TH: torch.Tensor
    index_TK: torch.Tensor
    weight_TK: torch.Tensor
    grad_TH: torch.Tensor

    @classmethod
    def of(cls, shape: Shape) -> Batch:
        """Normal activations, and a router's top-k of random scores with weights that add to one."""
        random = torch.Generator().manual_seed(1)
        x_TH, grad_TH = (torch.randn(shape.tokens, shape.hidden, generator=random) for _ in range(2))
        scores_TE = torch.randn(shape.tokens, shape.experts, generator=random).softmax(-1)
        weight_TK, index_TK = scores_TE.topk(shape.top_k)
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return cls(x_TH.requires_grad_(), index_TK, weight_TK.detach().requires_grad_(), grad_TH)


def int8_stack(shape: Shape, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random int8 [E, O, I] and fp32 scales [E, O], of about the size that trained weights have."""
    random = torch.Generator().manual_seed(2 + STACKS.index(name))
    outputs, inputs = shape.stack(name)
    weight_EOI = torch.empty(shape.experts, outputs, inputs, dtype=torch.int8)
    for matrix in weight_EOI:
        matrix.copy_(torch.randn(outputs, inputs, generator=random).mul_(36).round_().clamp_(-127, 127))
    return weight_EOI, torch.rand(shape.experts, outputs, generator=random).add_(0.5).div_(36 * inputs**0.5)


def float_stack(shape: Shape, name: str) -> torch.Tensor:
    """The same weights in fp32, [E, O, I]."""
    weight_EOI, scale_EO = int8_stack(shape, name)
    result = torch.empty(weight_EOI.shape)
    for target, weight, scale in zip(result, weight_EOI, scale_EO, strict=True):
        torch.mul(weight, scale[:, None], out=target)
    return result


def factors(shape: Shape, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """LoRA A [E, R, I] and B [E, O, R], both away from zero, so that the adapter counts."""
    random = torch.Generator().manual_seed(4 + STACKS.index(name))
    outputs, inputs = shape.stack(name)
    A_ERI = torch.randn(shape.experts, shape.rank, inputs, generator=random) / inputs**0.5
    return A_ERI, torch.randn(shape.experts, outputs, shape.rank, generator=random) / shape.rank**0.5


class Arm:
    """A built layer: variants by name, its trainable factors, and the batch."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.batch = Batch.of(shape)

    def forward(self, variant: str) -> torch.Tensor:
        """The layer's output [T, H] on the batch."""
        raise NotImplementedError

    def factor_gradients(self) -> dict[str, torch.Tensor]:
        """Gradients of all factors as A [E, R, I] and B [E, O, R]."""
        raise NotImplementedError

    def leaves(self) -> list[torch.Tensor]:
        """Everything a step gives a gradient to."""
        raise NotImplementedError

    def step(self, variant: str) -> torch.Tensor:
        """Forward and backward with fresh gradients; returns the output."""
        for leaf in (self.batch.x_TH, self.batch.weight_TK, *self.leaves()):
            leaf.grad = None
        output = self.forward(variant)
        output.backward(self.batch.grad_TH)
        return output

    def results(self, variant: str) -> dict[str, torch.Tensor]:
        """What the arms are compared by."""
        output = self.step(variant).detach()
        batch = self.batch
        assert batch.x_TH.grad is not None
        assert batch.weight_TK.grad is not None
        return {"output": output, "dx": batch.x_TH.grad, "droute": batch.weight_TK.grad, **self.factor_gradients()}


class PeftArm(Arm):
    """transformers' experts module with an adapter in PEFT's layout on both stacks.

    Variants: an expert implementation of transformers' registry, `frozen-…`, the same without the adapter, and (ours)
    `recomputing-…`, which computes the first projection again in backward instead of keeping its output.
    """

    def __init__(
        self,
        shape: Shape,
        stored: Callable[[nn.Module, str], None],
        register: Callable[[Any], Any] = lambda config: config,
        keep: Callable[[nn.Module, bool], None] = lambda model, keep: None,
    ) -> None:
        super().__init__(shape)
        self.keep = keep
        from peft import LoraConfig, get_peft_model

        experts = experts_module(shape)
        for name in STACKS:
            stored(experts, name)
        self.experts_config = experts.config
        config = LoraConfig(
            r=shape.rank, lora_alpha=2 * shape.rank, target_parameters=[f"experts.{name}" for name in STACKS]
        )
        holder = nn.Module()
        holder.experts = experts
        self.model = get_peft_model(holder, register(config))
        self.layers = {m.parameter_name: m for m in self.model.modules() if hasattr(m, "parameter_name")}
        for name, layer in self.layers.items():
            A_ERI, B_EOR = factors(shape, name)
            with torch.no_grad():
                layer.lora_A["default"].weight.copy_(A_ERI.flatten(0, 1))
                layer.lora_B["default"].weight.copy_(B_EOR.permute(1, 2, 0).flatten(1))

    def forward(self, variant: str) -> torch.Tensor:
        how, _, name = variant.rpartition("-")
        self.experts_config._experts_implementation = name
        batch, layer = self.batch, self.model.base_model.model.experts
        self.keep(self.model, how != "recomputing")
        if how == "frozen":
            with self.model.disable_adapter():
                return layer(batch.x_TH, batch.index_TK, batch.weight_TK)
        return layer(batch.x_TH, batch.index_TK, batch.weight_TK)

    def leaves(self) -> list[torch.Tensor]:
        return [part["default"].weight for m in self.layers.values() for part in (m.lora_A, m.lora_B)]

    def factor_gradients(self) -> dict[str, torch.Tensor]:
        found, experts = {}, self.shape.experts
        for name, layer in self.layers.items():
            A, B = layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
            found[f"dA {name}"] = A.view(experts, -1, A.shape[1])
            found[f"dB {name}"] = B.view(B.shape[0], -1, experts).permute(2, 0, 1)
        return found


def experts_module(shape: Shape) -> nn.Module:
    """The experts of Qwen3-MoE as transformers has them, without memory for weights."""
    from transformers import AutoConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = AutoConfig.for_model(
        "qwen3_moe",
        num_experts=shape.experts,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        num_experts_per_tok=shape.top_k,
    )
    with torch.device("meta"):
        return Qwen3MoeExperts(config)


def ours(shape: Shape) -> Arm:
    """int8 with our adapter layer; the variant is a backend of `toolkit.ops`."""
    from toolkit.adapters.layer import register
    from toolkit.ops import keep_up_outputs

    def stored(experts: nn.Module, name: str) -> None:
        weight_EOI, scale_EO = int8_stack(shape, name)
        setattr(experts, name, nn.Parameter(weight_EOI, requires_grad=False))
        setattr(experts, f"{name}_scale", nn.Parameter(scale_EO, requires_grad=False))

    return PeftArm(shape, stored, register, keep_up_outputs)


def four_bits(kind: str, shape: Shape) -> Arm:
    """The same layer with both stacks in int4 or mxfp4."""
    from toolkit.adapters.layer import register
    from toolkit.ops import four_bit, keep_up_outputs

    rounded = {"int4": four_bit.quantize_int4, "mxfp4": four_bit.quantize_mxfp4}[kind]

    def stored(experts: nn.Module, name: str) -> None:
        columns = zip(*map(rounded, float_stack(shape, name)), strict=True)
        for ending, column in zip(("", "_scale", "_step"), columns, strict=True):
            if column[0] is not None:
                setattr(experts, f"{name}{ending}", nn.Parameter(torch.stack(column), requires_grad=False))

    return PeftArm(shape, stored, register, keep_up_outputs)


def stock(shape: Shape) -> Arm:
    """fp32 with stock PEFT's `target_parameters`."""

    def stored(experts: nn.Module, name: str) -> None:
        setattr(experts, name, nn.Parameter(float_stack(shape, name), requires_grad=False))

    return PeftArm(shape, stored)


class Experts4bitArm(Arm):
    """experts4bit-qlora: its int8 store and its LoRA loop, which has one variant."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        from experts4bit_qlora import ExpertsLoRA, ExpertsNbit

        stacks = [float_stack(shape, name) for name in STACKS]
        base = ExpertsNbit.from_float(*stacks, compute_dtype=torch.float32, quant_type="int8")
        self.layer = ExpertsLoRA(base, r=shape.rank, alpha=2 * shape.rank, dtype=torch.float32)
        self.names = {f"{kind} {name}": f"{name[:-5]}_lora_{kind}" for name in STACKS for kind in "AB"}
        for name in STACKS:
            for kind, factor in zip("AB", factors(shape, name), strict=True):
                getattr(self.layer, self.names[f"{kind} {name}"]).data.copy_(factor)

    def forward(self, variant: str) -> torch.Tensor:
        output: torch.Tensor = self.layer(self.batch.x_TH, self.batch.index_TK, self.batch.weight_TK)
        return output

    def leaves(self) -> list[torch.Tensor]:
        return [getattr(self.layer, name) for name in self.names.values()]

    def factor_gradients(self) -> dict[str, torch.Tensor]:
        return {f"d{key}": getattr(self.layer, name).grad for key, name in self.names.items()}


class Sgemm(Arm):
    """This machine's own rate: one large square product in fp32; the variant is its side."""

    def __init__(self, shape: Shape) -> None:
        self.sides: dict[str, list[torch.Tensor]] = {}

    def step(self, variant: str) -> torch.Tensor:
        if variant not in self.sides:
            self.sides[variant] = [torch.randn(int(variant), int(variant)) for _ in range(3)]
        a, b, out = self.sides[variant]
        return torch.mm(a, b, out=out)


ARMS: dict[str, Callable[[Shape], Arm]] = {
    "ours": ours,
    "int4": partial(four_bits, "int4"),
    "mxfp4": partial(four_bits, "mxfp4"),
    "stock": stock,
    "experts4bit": Experts4bitArm,
    "sgemm": Sgemm,
}


def answer(arm: str) -> Callable[..., dict[str, Any]]:
    """What a worker of this arm does: `build`, `step`, `results` or `memory`."""
    built: list[Arm] = []

    def respond(do: str, **given: Any) -> dict[str, Any]:
        if do == "build":
            built[:] = []
            built.append(ARMS[arm](Shape(**given["shape"])))
            return {"threads": torch.get_num_threads(), "torch": torch.__version__}
        (layer,) = built
        if do == "step":
            started = time.perf_counter()
            layer.step(given["variant"])
            return {"seconds": time.perf_counter() - started}
        if do == "results":
            torch.save(layer.results(given["variant"]), given["to"])
            return {}
        return {"resident": settled(), "step": step_memory(lambda: layer.step(given["variant"]))}

    return respond


if __name__ == "__main__":
    serve(answer(sys.argv[1]))
