"""What happened to the experts: who was routed to, how evenly, and how far each one's adapter moved.

Counted through hooks on the routers and experts modules that `architecture` enumerates, adapter off and on, over the
same examples. transformers' own recorder gives router logits only, of some families, and none of the routed tokens.

    T tokens, E experts, K experts a token, R rank, I inputs, O outputs of a projection
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from toolkit.adapters import ParamWrapper, factors_from_layout
from toolkit.architecture import Architecture, ExpertLayer, describe
from toolkit.quant.gptq.calibrate import make_batches
from toolkit.steps import advance

__all__ = ["adapter_norms", "expert_statistics", "router_entropy"]


def expert_statistics(model: PeftModel, examples: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Load by expert, router entropy and adapter size of every MoE layer, base against adapted; JSON-able.

    Args:
        examples: token ids; two passes are made over them, without the language-model head.

    `before` and `after` count the tokens sent to each expert. The entropies are means over tokens of the router's
    softmax in nats, at most ln E, and None where the router gives no logits. `moved` is the Frobenius norm of each
    expert's update, both stacks together, and None where experts are not adapted.
    """
    base = model.get_base_model()
    architecture = describe(base)
    model.eval()
    with model.disable_adapter():
        before = _count(base, architecture, examples)
    after = _count(base, architecture, examples)
    norms = adapter_norms(base, architecture)
    layers = []
    for layer in architecture.layers:
        seen, now = before[layer.name], after[layer.name]
        if not int(seen.load.sum() + now.load.sum()):
            continue  # text does not reach these
        layers.append(
            {
                "name": layer.name,
                "experts": layer.num_experts,
                "before": seen.load.tolist(),
                "after": now.load.tolist(),
                "entropy_before": seen.entropy,
                "entropy_after": now.entropy,
                "moved": norms.get(layer.name),
            }
        )
    return {"examples": len(examples), "tokens": sum(map(len, examples)), "layers": layers}


@torch.no_grad()
def adapter_norms(model: nn.Module, architecture: Architecture) -> dict[str, list[float]]:
    """Frobenius norm of every expert's update by MoE layer, [E]; layers without an expert adapter are left out.

    |BA|² is the sum over R × R of (BᵀB) ∘ (AAᵀ): two small Gram matrices, and never the update itself.
    """
    squares: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, ParamWrapper):
            continue
        layer = name.replace(".base_layer", "")
        for adapter in (adapter for adapter in module.active_adapters if adapter in module.lora_A):
            factors = factors_from_layout(
                module.lora_A[adapter].weight, module.lora_B[adapter].weight, module.num_experts,
                module.scaling[adapter],
            )  # fmt: skip
            A_ERI, B_EOR = factors.A.double(), factors.B.double()
            gram_ERR = (A_ERI @ A_ERI.transpose(1, 2)) * (B_EOR.transpose(1, 2) @ B_EOR)
            found_E = factors.scaling**2 * gram_ERR.sum((1, 2)).clamp(min=0)
            squares[layer] = squares.get(layer, torch.zeros_like(found_E)) + found_E
    wanted = {layer.name for layer in architecture.layers}
    return {name: total.sqrt().tolist() for name, total in squares.items() if name in wanted}


def router_entropy(output: Any, width: int, real: torch.Tensor | None = None) -> torch.Tensor | None:
    """Sum over tokens of the entropy of a router's softmax, in nats, or None where its output holds no logits.

    Args:
        output: what the router's module returned: a tensor or a tuple of them.
        width: how many it scores, E or a few more. real: which of its T rows count.
    """
    parts = output if isinstance(output, (tuple, list)) else (output,)
    scores = [part for part in parts if isinstance(part, torch.Tensor) and part.is_floating_point()]
    for score in (score for score in scores if score.dim() >= 2 and score.shape[-1] == width):
        logits_TE = score.reshape(-1, width).float()
        if real is not None and real.shape[0] == logits_TE.shape[0]:
            logits_TE = logits_TE[real]
        sums = logits_TE.sum(-1)
        is_share = bool((logits_TE >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-2)
        shares_TE = logits_TE if is_share else logits_TE.softmax(-1)
        entropy: torch.Tensor = torch.special.entr(shares_TE).sum()
        return entropy
    return None


class _Seen:
    """One layer's counts over a pass."""

    def __init__(self, num_experts: int) -> None:
        self.load = torch.zeros(num_experts, dtype=torch.long)
        self.real: torch.Tensor | None = None
        self._entropy, self._tokens, self._has_logits = 0.0, 0, True

    @property
    def entropy(self) -> float | None:
        """Mean over tokens, in nats."""
        return self._entropy / self._tokens if self._has_logits and self._tokens else None

    def add_rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call of the experts module: (hidden_states, top_k_index, top_k_weights)."""
        index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
        index_TK = index.reshape(-1, index.shape[-1])
        if self.real is not None and self.real.shape[0] == index_TK.shape[0]:
            index_TK = index_TK[self.real]
        counts = index_TK.flatten().cpu().bincount(minlength=len(self.load))
        self.load += counts[: len(self.load)]  # some families send tokens to an expert that is not there

    def add_scores(self, width: int) -> Callable[..., None]:
        """A hook on the router that adds up its entropy."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found = router_entropy(output, width, self.real)
            self._has_logits &= found is not None
            if found is not None:
                self._entropy += float(found)
                self._tokens += int(self.real.sum()) if self.real is not None else 0

        return hook


@torch.no_grad()
def _count(model: PreTrainedModel, architecture: Architecture, examples: Sequence[Sequence[int]]) -> dict[str, _Seen]:
    """One pass over the examples with the model as it stands."""
    seen = {layer.name: _Seen(layer.num_experts) for layer in architecture.layers}
    batches = make_batches(examples, model.device)
    with _hooked(model, architecture.layers, seen):
        for number, batch in enumerate(batches, 1):
            for layer in seen.values():
                layer.real = batch.real
            model.base_model(input_ids=batch.ids, use_cache=False)
            advance(number, len(batches), "batches")
    return seen


@contextmanager
def _hooked(model: nn.Module, layers: Sequence[ExpertLayer], seen: dict[str, _Seen]) -> Iterator[None]:
    """Experts are watched below their adapters, where the rows arrive; routers above them, where scores leave."""
    inner, outer = dict[str, Any](), dict[str, Any]()
    for name, module in model.named_modules():
        if ".lora_" not in name:
            bare = name.replace(".base_layer", "")
            inner[bare] = module
            outer.setdefault(bare, module)
    with ExitStack() as hooks:
        for layer in layers:
            experts, router = inner[layer.name], outer[layer.router]
            width = int(inner[layer.router].weight.shape[0])
            watch = experts.register_forward_pre_hook(seen[layer.name].add_rows, with_kwargs=True)
            hooks.callback(watch.remove)
            hooks.callback(router.register_forward_hook(seen[layer.name].add_scores(width)).remove)
        yield
