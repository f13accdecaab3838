#!/usr/bin/env python3
"""One expert layer, forward and backward, in fp32 on this CPU: ours against what else there is.

    .venv/bin/python scripts/benchmarks/experts.py [--shapes E128-H2048-I768-K8-T512 …] [--repeats 5] [--threads 2]
        [--rank 16] [--backend NAME] [--only ARM …] [--sgemm 4096] [--scaling [SHAPE]] [--json FILE]
        [--plot FILE.svg] [--peers .venv-peers]

Arms: ours (int8 + LoRA on both stacks) and the same in int4 and mxfp4, stock PEFT `target_parameters` on transformers'
experts in fp32 with each of its expert implementations that fits in memory, experts4bit-qlora in int8, and both layers
frozen, without an adapter. Peers run in a second environment, made once. Arms take turns; memory is that of a step,
with glibc's defaults. Exit status 1 where our output or any gradient differs from stock's on the same weights.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from expert_arms import Shape
from turns import Summary, Worker, alternate, summary

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from second_environment import python_with  # noqa: E402

SHAPES = (
    "E64-H1024-I768-K8-T2048",
    "E128-H1024-I512-K8-T512",
    "E128-H2048-I768-K8-T512",
    "E128-H2048-I768-K8-T2048",
)
MIDDLE = "E64-H1024-I512-K8-T1024"
FOUR_BITS = ("int4", "mxfp4")
OURS = ("ours", "sgemm", *FOUR_BITS)
"""Processes of this environment."""
PEERS = ("transformers", "peft", "trl", "bitsandbytes", "experts4bit-qlora==0.58.1")
ARMS = Path(__file__).with_name("expert_arms.py")
STOCK = ("grouped_mm", "eager")
"""grouped_mm is what transformers chooses by itself. batched_mm copies a matrix for each routed row: see `batched`."""
GREEDY = "stock eager"
"""Holes that stock's eager experts leave in a heap that keeps freed memory grow to 15 GB at the largest shape, so they
have a process of their own and are left out where memory runs out."""
ALWAYS = ("ours", "ours, recomputing", f"stock PEFT, {STOCK[0]}", "sgemm")
WITHIN = 1e-4
SIDE = 4096
"""Of the square product that measures the machine."""
Figures = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """A line of the table: which process it runs in, and as which variant."""

    worker: str
    variant: str


def arms(backend: str, side: int = SIDE) -> dict[str, Arm]:
    """Every line by name."""
    stock = {f"stock PEFT, {name}": Arm(GREEDY if name == "eager" else "stock", name) for name in STOCK}
    frozen = {f"frozen fp32, {name}": Arm("stock", f"frozen-{name}") for name in STOCK}
    return {
        "ours": Arm("ours", backend),
        "ours, recomputing": Arm("ours", f"recomputing-{backend}"),
        **stock,
        "experts4bit-qlora int8": Arm("experts4bit", ""),
        **{f"ours, {kind}": Arm(kind, backend) for kind in FOUR_BITS},
        "ours, frozen": Arm("ours", f"frozen-{backend}"),
        **frozen,
        "sgemm": Arm("sgemm", str(side)),
    }


def shape_of(text: str, rank: int) -> Shape:
    """`E64-H1024-I768-K8-T2048` as a shape."""
    match = re.fullmatch(r"E(\d+)-H(\d+)-I(\d+)-K(\d+)-T(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text}: not a shape; write one as {SHAPES[0]}")
    return Shape(*map(int, match.groups()), rank)


def name_of(shape: Shape) -> str:
    """The other way round."""
    return f"E{shape.experts}-H{shape.hidden}-I{shape.intermediate}-K{shape.top_k}-T{shape.tokens}"


def base_flops(shape: Shape, again: float = 0.0) -> int:
    """Operations of the frozen matrices in a step: up and down forward, both dX, and `again` in backward up's share."""
    up, down = (shape.stack(name)[0] * shape.stack(name)[1] for name in ("gate_up_proj", "down_proj"))
    return int(2 * shape.tokens * shape.top_k * (2 * (up + down) + again * up))


def lora_flops(shape: Shape, again: float = 0.0) -> int:
    """Those of the factors: x Aᵀ and (x Aᵀ) Bᵀ forward, the latter maybe again for up, then g B, dA, dB and dX."""
    H, inner = shape.hidden, shape.intermediate
    forward = (H + 2 * inner) + (inner + H)
    gradients = 2 * ((2 * inner + H) + (H + inner))
    return int(2 * shape.tokens * shape.top_k * shape.rank * (forward + again * 2 * inner + gradients))


def computed_again(shape: Shape, recomputing: bool) -> float:
    """The share of up's rows that our backward computes again: all, or those that were not kept."""
    from toolkit.ops.experts import ExpertStack, ExpertWeights
    from toolkit.ops.per_expert import kept_rows

    names = ("gate_up_proj", "down_proj")
    sizes = [(shape.experts, *shape.stack(name)) for name in names]
    up, down = (ExpertStack(torch.empty(size, dtype=torch.int8, device="meta"), None, None, False) for size in sizes)
    rows = shape.tokens * shape.top_k
    kept = kept_rows(rows, shape.stack(names[0])[0], ExpertWeights(up, down, torch.nn.Identity()), torch.float32)
    return 1.0 if recomputing else 1.0 - kept / rows


@contextmanager
def workers(names: set[str], options: argparse.Namespace, tuned: bool, shape: Shape) -> Iterator[dict[str, Worker]]:
    """One process for each name, its layer built."""
    with ExitStack() as stack:
        running = {}
        for name in sorted(names):
            python = sys.executable if name in OURS else options.python
            worker = Worker(
                python,
                ARMS,
                threads=options.threads,
                tuned=tuned,
                arguments=name.split()[:1],
                own=name in ("ours", *FOUR_BITS),
                greedy=name == GREEDY,
            )
            running[name] = stack.enter_context(worker)
            running[name].ask(do="build", shape=asdict(shape))
        yield running


def speed(lines: Mapping[str, Arm], running: Mapping[str, Worker], repeats: int) -> dict[str, list[float]]:
    """Seconds of each line's steps, in turns."""

    def run(arm: Arm) -> Callable[[], float]:
        return lambda: float(running[arm.worker].ask(do="step", variant=arm.variant)["seconds"])

    greedy = [name for name, arm in lines.items() if arm.worker == GREEDY]
    return alternate({name: run(arm) for name, arm in lines.items()}, repeats, may_end=greedy)


def agreement(lines: Mapping[str, Arm], running: Mapping[str, Worker]) -> dict[str, dict[str, float]]:
    """Largest difference from stock as a share of its largest number, for the output and every gradient."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:

        def results(name: str) -> dict[str, torch.Tensor]:
            file = Path(folder) / name.replace("/", "-")
            running[lines[name].worker].ask(do="results", variant=lines[name].variant, to=str(file))
            read: dict[str, torch.Tensor] = torch.load(file)
            file.unlink()
            return read

        wanted = results(f"stock PEFT, {STOCK[0]}")
        for name in (*ALWAYS[:2], "experts4bit-qlora int8"):
            if name not in lines:
                continue
            got = results(name)
            found[name] = {key: float((got[key] - want).abs().max() / want.abs().max()) for key, want in wanted.items()}
    return found


def memory(lines: Mapping[str, Arm], options: argparse.Namespace, shape: Shape) -> dict[str, dict[str, int]]:
    """Resident bytes and those a step adds, a process a line."""
    found = {}
    for name, arm in lines.items():
        if name != "sgemm":
            with workers({arm.worker}, options, False, shape) as running:
                found[name] = running[arm.worker].ask(do="memory", variant=arm.variant)
    return found


def batched(shape: Shape) -> int:
    """Bytes of the weights that stock's third implementation, batched_mm, gathers for the first product alone."""
    outputs, inputs = shape.stack("gate_up_proj")
    return 4 * shape.tokens * shape.top_k * outputs * inputs


def measure(shape: Shape, options: argparse.Namespace) -> Figures:
    """All figures of one shape."""
    every = arms(options.backend, options.sgemm)
    wanted = options.only or list(every)
    lines = {name: arm for name, arm in every.items() if name in wanted or name in ALWAYS}
    with workers({arm.worker for arm in lines.values()}, options, True, shape) as running:
        differences = agreement(lines, running)
        seconds = speed(lines, running, options.repeats)
    steps = {name: summary(figures) for name, figures in seconds.items()}
    rate = 2 * options.sgemm**3 / steps["sgemm"]["median"]
    best = min(_stock(steps), key=lambda name: steps[name]["median"])
    return {
        "shape": {**asdict(shape), "name": name_of(shape)},
        "sgemm_gflops": rate / 1e9,
        "work": {name: _work(shape, rate, steps[name]["median"], "recomputing" in name) for name in ALWAYS[:2]},
        "batched_mm_bytes": batched(shape),
        "stock_best": best,
        "seconds": steps,
        "every_run": seconds,
        "times_faster": {name: steps[name]["median"] / steps["ours"]["median"] for name in steps if name != "sgemm"},
        "differences": differences,
        "memory": memory(lines, options, shape) if options.memory else {},
    }


def _work(shape: Shape, rate: float, seconds: float, recomputing: bool) -> Figures:
    again = computed_again(shape, recomputing)
    base, lora = base_flops(shape, again), lora_flops(shape, again)
    shares = {"share_of_sgemm": base / seconds / rate, "share_with_lora": (base + lora) / seconds / rate}
    return {"computed_again": again, "base_gflop": base / 1e9, "lora_gflop": lora / 1e9, **shares}


def show(figures: Figures) -> None:
    """One shape's table."""
    rate = figures["sgemm_gflops"]
    print(f"\n{figures['shape']['name']} R={figures['shape']['rank']}, sgemm {rate:.0f} GFLOP/s here")
    for name, work in figures["work"].items():
        print(f"{name}: {work['base_gflop']:.1f} GFLOP of base, {work['lora_gflop']:.1f} of LoRA; "
              f"{work['share_of_sgemm']:.0%} of sgemm over the base products alone, "
              f"{work['share_with_lora']:.0%} with LoRA's")  # fmt: skip
    print(f"{'':24} {'s (least–most)':>22} {'ours is':>9} {'step MB':>9} {'resident MB':>12}")
    for name, step in figures["seconds"].items():
        if name != "sgemm":
            spread = f"{step['median']:.3f} ({step['min']:.3f}–{step['max']:.3f})"
            print(f"{name:24} {spread:>22} {figures['times_faster'][name]:>8.2f}× {_memory_cells(figures, name)}")
    for name, found in figures["differences"].items():
        print(f"  {name} against stock: " + ", ".join(f"{key} {value:.1e}" for key, value in found.items()))
    print(f"  stock's batched_mm would gather {figures['batched_mm_bytes'] / 1e9:.0f} GB of weights: not run")
    if figures["memory"]:
        print(f"  step memory, ours of stock's: {memory_ratio(figures):.3f}")


def memory_ratio(figures: Figures) -> float:
    """Our step's bytes as a share of the leanest stock's."""
    stock = min(figures["memory"][name]["step"] for name in _stock(figures["memory"]))
    return float(figures["memory"]["ours"]["step"] / stock)


def _stock(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith("stock PEFT")]


def _memory_cells(figures: Figures, name: str) -> str:
    found = figures["memory"].get(name)
    return "" if found is None else f"{found['step'] / 1e6:>9.0f} {found['resident'] / 1e6:>12.0f}"


def scaling(options: argparse.Namespace) -> Figures:
    """Ours and stock as one of T, E and R grows around a shape, the rest held."""
    lines = arms(options.backend)
    few = {name: lines[name] for name in ("ours", f"stock PEFT, {STOCK[0]}")}
    middle = replace(options.scaling, rank=options.rank)
    around = {"tokens": (-2, 2, middle.tokens), "experts": (-3, 1, middle.experts), "rank": (-2, 2, middle.rank)}
    least = {"tokens": 1, "experts": middle.top_k, "rank": 1}
    axes = {
        axis: sorted({max(least[axis], int(value * 2.0**power)) for power in range(low, high + 1)})
        for axis, (low, high, value) in around.items()
    }
    found: Figures = {"middle": name_of(middle)}
    with workers({arm.worker for arm in few.values()}, options, True, middle) as running:
        for axis, values in axes.items():
            found[axis] = {}
            for value in values:
                for worker in running.values():
                    worker.ask(do="build", shape=asdict(replace(middle, **{axis: value})))
                figures = speed(few, running, options.repeats)
                found[axis][value] = {name: summary(each) for name, each in figures.items()}
                said = (_said(name, each) for name, each in found[axis][value].items())
                print(f"{axis} {value}: " + ", ".join(said), flush=True)
    return found


def _said(name: str, step: Summary) -> str:
    return f"{name} {step['median']:.3f} s ({step['min']:.3f}–{step['max']:.3f})"


def main() -> int:
    """See the module's docstring."""
    options = _options()
    options.python = python_with(options.peers, PEERS)
    if options.scaling:
        result: Figures = {"scaling": scaling(options)}
    else:
        result = {"shapes": []}
        for shape in options.shapes:
            result["shapes"].append(measure(replace(shape, rank=options.rank), options))
            show(result["shapes"][-1])
    if options.json:
        options.json.write_text(
            json.dumps({"threads": options.threads, "backend": options.backend, **result}, indent=1)
        )
    if options.plot:
        import charts

        (charts.scaling if options.scaling else charts.layers)(result, options.plot)
    ours = (each["differences"][name] for each in result.get("shapes", ()) for name in ALWAYS[:2])
    worst = max((max(found.values()) for found in ours), default=0.0)
    if not worst <= WITHIN:
        print(f"experts.py: ours differs from stock by {worst:.1e}, more than {WITHIN:.0e}", file=sys.stderr)
        return 1
    return 0


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """With what all comparisons with peers can be asked."""
    from toolkit.plan import PER_EXPERT

    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", default=PER_EXPERT, help="ours, by its name in toolkit.ops")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave the memory runs out")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers", help="the second environment")
    return parser.parse_args()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=lambda text: shape_of(text, 16), metavar="SHAPE",
                        default=[shape_of(text, 16) for text in SHAPES])  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each arm")
    parser.add_argument("--only", nargs="+", metavar="ARM", help=f"these lines, and {', '.join(ALWAYS)}")
    parser.add_argument("--sgemm", type=int, default=SIDE, metavar="SIDE", help="of the product that rates the machine")
    parser.add_argument("--scaling", nargs="?", type=lambda text: shape_of(text, 16), const=shape_of(MIDDLE, 16),
                        metavar="SHAPE", help="time against tokens, experts and rank around it instead")  # fmt: skip
    return parse(parser)


if __name__ == "__main__":
    sys.exit(main())
