"""Our Triton kernels, and TRL's, on the rehearsed card: a launch is replayed in plain torch over the same memory.

Triton takes our driver, which knows the card that is rehearsed. Its hooks tell of each launch with its arguments, and
keep it from compiling; with REHEARSED_CARD_COMPILE=1 kernels are compiled for the card, and what asks for more shared
memory than it has is refused as it would be there. With TRITON_INTERPRET=1 Triton's interpreter runs the kernels.

    E experts, S rows sorted by expert, N outputs, K inputs, R rank
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch.nn import functional
from triton.backends.compiler import GPUTarget

from tests.card.library import RehearsalError
from tests.card.replay import Place, queue
from toolkit.ops import four_bit
from toolkit.ops.four_bit import FourBits

__all__ = ["install", "launches"]

launches: Counter[str] = Counter()
"""Launches by kernel."""

Values = Mapping[str, Any]


def _grouped_gemm(a: Values) -> None:
    bounds, E = a["offset_ptr"].tolist(), a["E"]
    weight = a["w_ptr"].as_strided((E, a["N"], a["K"]), (a["stride_we"], a["stride_wn"], a["stride_wk"]))
    x, row, scale, unit, dtype = a["x_ptr"], a["row_ptr"], a["scale_ptr"], a["x_unit_ptr"], a["x_ptr"].dtype
    for e, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            continue
        rows = torch.arange(start, end) if row is None else row[start:end].long()
        left = x[rows].double() if unit is not None else x[rows].float()
        if unit is not None:  # two int8 digits, whose products are exact in fp64
            left = 254 * left[:, 0] + left[:, 1]
        if a["SCALE_ON_INPUT"]:
            left = (left * scale[e]).to(dtype).float()
        y = (left @ weight[e].to(left.dtype).t()).float()
        if unit is not None:
            y *= unit[rows][:, None]
        if scale is not None and not a["SCALE_ON_INPUT"]:
            y *= scale[e]
        if a["bias_ptr"] is not None:
            y += a["bias_ptr"][e].float()
        if a["low_ptr"] is not None:
            shape, strides = (E, a["N"], a["R"]), (a["stride_fe"], a["stride_fn"], a["stride_fr"])
            y += a["low_ptr"][start:end].float() @ a["factor_ptr"].as_strided(shape, strides)[e].float().t()
        if a["addend_ptr"] is not None:
            y += a["addend_ptr"][start:end].float()
        a["out_ptr"][start:end] = y.to(a["out_ptr"].dtype)


def _four_bit(is_gradient: bool) -> Callable[[Values], None]:
    """The product with weights multiplied out, in fp32: a stack lies [E, I/2, O]."""

    def replay(a: Values) -> None:
        packed, unit, scale = a["w_ptr"], a["unit_ptr"], a["scale_ptr"]
        weight = four_bit.dequantize(FourBits(packed, unit) if scale is None else FourBits(packed, scale, unit))
        e, o, i = weight.stride()
        N, K = (2 * a["half"], a["outputs"]) if is_gradient else (a["outputs"], 2 * a["half"])
        multiplied = {"w_ptr": weight, "scale_ptr": None, "SCALE_ON_INPUT": False, "N": N, "K": K, "stride_we": e}
        strides = {"stride_wn": i, "stride_wk": o} if is_gradient else {"stride_wn": o, "stride_wk": i}
        _grouped_gemm({"x_unit_ptr": None, **a, **multiplied, **strides})

    return replay


def _grouped_gram(a: Values) -> None:
    for e, (start, end) in enumerate(pairwise(a["offset_ptr"].tolist())):
        sides = []
        for side in ("left", "right"):
            row = a[f"{side}_row_ptr"]
            rows = torch.arange(start, end) if row is None else row[start:end].long()
            sides.append(a[f"{side}_ptr"][rows].float())
        a["out_ptr"][e] = sides[0].t() @ sides[1]


def _activated(x: torch.Tensor, a: Values) -> torch.Tensor:
    match a["ACTIVATION"]:
        case "silu":
            return x * torch.sigmoid(a["ALPHA"] * x)
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "relu":
            return functional.relu(x)
        case "relu_squared":
            return functional.relu(x).square()
    raise RehearsalError(f"a gate's activation {a['ACTIVATION']} is not rehearsed")


def _gated(y: torch.Tensor, a: Values) -> torch.Tensor:
    """[S, I] in fp32 of y [S, 2I] in halves or interleaved, or of [S, I]."""
    if not a["GATED"]:
        return _activated(y, a)
    left, right = (y[:, ::2], y[:, 1::2]) if a["INTERLEAVED"] else y.chunk(2, dim=1)
    if a["LIMIT"] is not None:
        left, right = left.clamp(max=a["LIMIT"]), right.clamp(-a["LIMIT"], a["LIMIT"])
    return _activated(left, a) * (right + a["OFFSET"])


def _gate_forward(a: Values) -> None:
    a["out_ptr"].copy_(_gated(a["y_ptr"].float(), a))


def _gate_backward(a: Values) -> None:
    with torch.enable_grad():
        y = a["y_ptr"].float().requires_grad_()
        value = _gated(y, a)
    grad, weight = a["grad_ptr"].float(), a["weight_ptr"].float()[:, None]
    (slope,) = torch.autograd.grad(value, y, grad * weight)
    a["dot_ptr"].copy_((value.detach() * grad).sum(1))
    a["y_ptr"].copy_(slope)
    a["grad_ptr"].copy_(weight * value.detach())


def _gather_sum(a: Values) -> None:
    place, weight = a["place_ptr"], a["weight_ptr"]
    rows = torch.where((place >= 0)[..., None], a["rows_ptr"][place.clamp(min=0).long()].float(), 0.0)
    if weight is not None:
        rows = rows * weight.float()[..., None]
    a["out_ptr"].copy_(rows.sum(1))


def _place_rows(a: Values) -> None:
    ordered, slot, place, (S, E) = a["ordered_ptr"], a["slot_ptr"], a["place_ptr"], (a["S"], a["E"])
    a["token_ptr"].copy_(slot // a["K"])
    place[slot] = torch.where(ordered < E, torch.arange(S), -1).int()
    a["offset_ptr"].copy_(torch.searchsorted(ordered, torch.arange(E + 1)))


def _split_rows(a: Values) -> None:
    x = a["x_ptr"].float()
    scale = x.abs().amax(1, keepdim=True) / 127
    scale = torch.where(scale > 1e-34, scale, 1.0)
    x = x / scale
    first = torch.floor(x.clamp(-127, 127) + 0.5)
    second = torch.floor(((x - first) * 254).clamp(-127, 127) + 0.5)
    a["out_ptr"].copy_(torch.stack((first, second), 1))
    a["unit_ptr"].copy_(scale[:, 0] / 254)


def _by_tile(function: Callable[..., None]) -> Callable[[Values], None]:
    """TRL has each of its two kernels in torch as well, with the same arguments in the same order."""
    return lambda a: function(*a.values())


Kernel = tuple[Any, Callable[[Values], None], tuple[str, ...]]


def _kernels() -> list[Kernel]:
    """Kernel, its replay, and the arguments that it writes."""
    from trl.kernels import chunked_logprob

    from toolkit.ops.triton import four_bit_kernels, kernels, routing

    folded = (
        "max_ptr",
        "sum_exp_ptr",
        "x_sum_exp_ptr",
        "sq_sum_exp_ptr",
        "z_sum_ptr",
        "max_before_target_ptr",
        "target_logit_ptr",
    )
    return [
        (kernels.grouped_gemm_kernel, _grouped_gemm, ("out_ptr",)),
        (four_bit_kernels.four_bit_forward_kernel, _four_bit(False), ("out_ptr",)),
        (four_bit_kernels.four_bit_gradient_kernel, _four_bit(True), ("out_ptr",)),
        (kernels.grouped_gram_kernel, _grouped_gram, ("out_ptr",)),
        (kernels.gate_forward_kernel, _gate_forward, ("out_ptr",)),
        (kernels.gate_backward_kernel, _gate_backward, ("y_ptr", "grad_ptr", "dot_ptr")),
        (kernels.gather_sum_kernel, _gather_sum, ("out_ptr",)),
        (kernels.split_rows_kernel, _split_rows, ("out_ptr", "unit_ptr")),
        (routing.place_rows_kernel, _place_rows, ("token_ptr", "place_ptr", "offset_ptr")),
        (chunked_logprob._forward_kernel, _by_tile(chunked_logprob._forward_tile), folded),
        (chunked_logprob._backward_kernel, _by_tile(chunked_logprob._backward_tile), ("mm_ptr",)),
    ]


class _Launcher:
    """Triton launches through this what it has compiled: the replay was queued before."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


class _Utilities:
    """What Triton asks the driver of a card."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        card = torch.cuda.get_device_properties(device)
        return {
            "max_shared_mem": card.shared_memory_per_block_optin,
            "max_num_regs": 65536,
            "multiprocessor_count": card.multi_processor_count,
            "warpSize": 32,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 0, 0, 64, 0, 1024


class _Driver:
    """The rehearsed card as Triton sees it."""

    launcher_cls = _Launcher
    utils = _Utilities()

    def get_current_target(self) -> GPUTarget:
        major, minor = torch.cuda.get_device_capability()
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_device(self) -> int:
        return torch.cuda.current_device()

    def get_current_stream(self, device: int) -> int:
        return torch.cuda.current_stream(device).cuda_stream

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", self.get_current_device())

    def set_current_device(self, device: int) -> None:
        torch.cuda.set_device(device)


def _hook(kernel: Any, replay: Callable[[Values], None], written: tuple[str, ...], watch: Any) -> Callable[..., None]:
    def launched(*args: Any, **kwargs: Any) -> None:
        launches[kernel.__name__] += 1
        _refuse_tile(kwargs)
        given = dict(zip(kernel.arg_names, args, strict=False))
        values = {name: kwargs[name] if name in kwargs else given[name] for name in kernel.arg_names}
        places = {name: Place(value) if isinstance(value, torch.Tensor) else value for name, value in values.items()}
        queue(lambda: replay({n: v.view() if isinstance(v, Place) else v for n, v in places.items()}))
        if watch is not None:
            watch(kernel.__name__, values, written)

    return launched


def _refuse_tile(kwargs: dict[str, Any]) -> None:
    """REHEARSED_CARD_REFUSED_STAGES=4: tiles with so many pipeline stages do not compile."""
    refused = os.environ.get("REHEARSED_CARD_REFUSED_STAGES")
    if refused and kwargs.get("num_stages") == int(refused) and "GROUP_N" in kwargs:
        raise triton.runtime.errors.PTXASError("rehearsed: ptxas fails on this tile")


def install(replays: bool = True, watch: Callable[[str, Values, tuple[str, ...]], None] | None = None) -> None:
    """Give Triton the card. `watch` is told of each launch, with the names of what it writes.

    Without `replays` only indices are computed: what is found by them must be there.
    """
    if triton.knobs.runtime.interpret:
        return
    triton.runtime.driver.set_active(_Driver())
    known = _kernels()
    for kernel, replay, written in known:
        computes = replays or replay is _place_rows
        kernel.add_pre_run_hook(_hook(kernel, replay if computes else lambda values: None, written, watch))
    compiles, names = os.environ.get("REHEARSED_CARD_COMPILE") == "1", {kernel for kernel, *_ in known}

    def keep_from_compiling(*, fn: SimpleNamespace, **ignored: Any) -> bool:
        if fn.jit_function not in names:
            raise RehearsalError(f"the kernel {fn.name} of {fn.module} is not rehearsed")
        return not compiles

    triton.knobs.runtime.jit_cache_hook = keep_from_compiling
