"""Which way a product takes on this card: timed once for a kind of shape, then read from a file.

Triton's own autotuner keeps its choices for one process and knows tiles only; here one of the ways is torch's product
on dequantised experts, and a resumed run takes the ways it took before. Never yet run on a card.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import torch
import triton
from triton.errors import TritonError

from toolkit.errors import card_failed
from toolkit.ops import four_bit
from toolkit.ops.four_bit import FourBits
from toolkit.ops.triton.launch import Product, chunked, compile_tiles, fused, tiles_of
from toolkit.ops.triton.tiles import Tile, power_of_two
from toolkit.steps import part

__all__ = ["CHUNKED", "Choices", "choose", "kind_of", "milliseconds", "run", "ways", "without_timing"]

CHUNKED = "chunked"
_FEWEST_ROWS, _MOST_ROWS = 16, 256
"""Rows an expert beyond which no other tile is worth it: the smallest tile has 16, the largest 128."""


class Choices:
    """Names of ways by kind of product, in a JSON file that several processes may share."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = self._read()

    def get(self, kind: str) -> str | None:
        """The way chosen for this kind, if one was."""
        return self._known.get(kind)

    def put(self, kind: str, way: str) -> None:
        """Remember, and write the file anew beside itself: a kill leaves the old one or the new one."""
        self._known = {**self._read(), **self._known, kind: way}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as file:
                json.dump(self._known, file, indent=1, sort_keys=True)
            os.replace(file.name, self.path)
        except OSError:
            pass  # a home that cannot be written costs the next process its timing, nothing else

    def _read(self) -> dict[str, str]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there yet, or damaged: time again
            return {}
        return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


@cache
def _choices() -> Choices:
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Choices(Path(cache_home) / "onecard" / f"kernels-triton-{triton.__version__}-torch-{torch.__version__}.json")


def run(product: Product) -> torch.Tensor:
    """The product by the way that was fastest on this card; in the interpreter by the kernel.

    Only products with quantised weights are worth the timing: the low-rank ones beside them are small.
    """
    if product.x.device.type != "cuda" or not _is_quantised(product):
        return fused(product)
    if (number := _untimed.get()) is not None:
        known = tiles_of(product)
        return fused(product, known[min(number, len(known) - 1)])
    if torch.cuda.is_current_stream_capturing():  # a graph cannot wait, so nothing is timed and the kernel it is
        return fused(product)
    kind, options = kind_of(product, _card(product.x.device.index)), ways(product)
    way = _choices().get(kind)
    if way not in options:
        with part("choose kernels"):
            compile_tiles(product, tiles_of(product))
            way = choose(kind, options, _choices(), milliseconds)
    return options[way]()


@contextmanager
def without_timing(number: int = 0) -> Iterator[None]:
    """Within the block every product takes its tile of this number, the default one first, and nothing is timed."""
    token = _untimed.set(number)
    try:
        yield
    finally:
        _untimed.reset(token)


_untimed: ContextVar[int | None] = ContextVar("untimed", default=None)


def ways(product: Product) -> dict[str, Callable[[], torch.Tensor]]:
    """All ways by name, the default first."""
    options = {str(tile): _by_tile(product, tile) for tile in tiles_of(product)}
    if product.x_unit is None and _is_quantised(product):
        options[CHUNKED] = lambda: chunked(product)
    return options


def _is_quantised(product: Product) -> bool:
    return product.weight.dtype == torch.int8 or product.four_bits is not None


def _by_tile(product: Product, tile: Tile) -> Callable[[], torch.Tensor]:
    return lambda: fused(product, tile)


def choose(
    kind: str,
    options: Mapping[str, Callable[[], torch.Tensor]],
    choices: Choices,
    timer: Callable[[Callable[[], torch.Tensor]], float],
) -> str:
    """The way remembered for this kind, or the fastest now, which is remembered. Ways that do not run are left out."""
    known = choices.get(kind)
    if known is not None and known in options:
        return known
    times: dict[str, float] = {}
    for name, option in options.items():
        try:
            times[name] = timer(option)
        except (RuntimeError, TritonError) as error:
            # Too large for this card, not to be compiled for it, or a shape that torch's product does not take.
            if card_failed(error):
                raise
    if not times:
        return next(iter(options))  # which then says itself why it fails
    best = min(times, key=times.__getitem__)
    choices.put(kind, best)
    return best


def kind_of(product: Product, card: str) -> str:
    """What decides speed: card, types, sizes, how the weight lies, what is fused; rows an expert in powers of two."""
    p = product
    rows = power_of_two(p.rows // p.experts, least=_FEWEST_ROWS, most=_MOST_ROWS)
    weight = p.weight.dtype if p.four_bits is None else _named(p.four_bits)
    parts = (
        card, p.x.dtype, weight, f"rows {rows}", f"E {p.experts}", f"N {p.outputs}", f"K {p.x.shape[-1]}",
        f"R {p.rank}", "input scale" if p.is_scale_on_input else "", "swapped" if p.is_swapped else "",
        "gathered" if p.row is not None else "",
    )  # fmt: skip
    return ", ".join(str(part).removeprefix("torch.") for part in parts if part)


def _named(stored: FourBits) -> str:
    kind = four_bit.kind_of(stored.packed, stored.scale, stored.step)
    scale = "" if stored.step is not None else f" {stored.scale.dtype}".replace("torch.", "")
    return f"{kind}{scale} G {four_bit.group_of(stored)}"


@cache
def _card(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name} sm_{properties.major}{properties.minor}"


def milliseconds(option: Callable[[], torch.Tensor]) -> float:
    """Median of five on the card, after two that compile and warm up."""
    times: list[float] = []
    for number in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        option()
        end.record()
        end.synchronize()
        if number >= 2:
            times.append(start.elapsed_time(end))
    return statistics.median(times)
