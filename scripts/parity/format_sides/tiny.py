"""Tiny random MoE checkpoints as their publishers lay them out, and where a package's own files of them are put.

Runs inside a package's own environment, where neither onecard nor transformers need be installed: torch, safetensors
and this file are all there is. Names are those of the published checkpoints: one tensor a linear, experts by number
(gpt-oss alone has them fused).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_families import FAMILIES, HIDDEN, WIDTH, shapes

__all__ = [
    "DOWN",
    "GATE",
    "GOLDEN",
    "HIDDEN",
    "MAIN",
    "WIDTH",
    "Source",
    "Variant",
    "Written",
    "by_expert",
    "golden_source",
    "plain_tensors",
    "renamed",
    "run",
    "save_plain",
    "tree",
    "whole_source",
    "with_routers",
]

STD = 0.2
MAIN = ("qwen3_moe", "mixtral", "deepseek_v2", "glm4_moe")
LEFT_OUT = "left out:"
GATE, DOWN = "model.layers.0.mlp.experts.0.gate_proj", "model.layers.0.mlp.experts.1.down_proj"
GOLDEN = {GATE: (12, 64), DOWN: (4, 32)}
"""Modules of a golden case, [outputs, inputs], where a variant names no others."""


@dataclass(frozen=True)
class Source:
    """What a package gets to write.

    Args:
        linears: weights [outputs, inputs] in fp32 that are to be quantised, by module name.
        left: weights of the linears that such a checkpoint leaves plain: the head and the routers.
        others: every other tensor, by its whole name.
        family: whose names these are; None for a golden case.
    """

    linears: Mapping[str, torch.Tensor]
    left: Mapping[str, torch.Tensor]
    others: Mapping[str, torch.Tensor]
    family: str | None = None


@dataclass(frozen=True)
class Written:
    """What a package made of it.

    Args:
        tensors: as stored. expected: the package's own values by plain name, e.g. `….gate_proj.weight`.
        config: the quantization_config as the package writes it; None where it writes none.
        dtype: the type that the package computed `expected` in.
        metadata: of the safetensors file. files: other JSON files by name. more: other keys of config.json.
        whole: whether `tensors` are all of the file; else what was left plain is added to them.
    """

    tensors: Mapping[str, torch.Tensor]
    expected: Mapping[str, torch.Tensor]
    config: Mapping[str, Any] | None
    dtype: str = "float32"
    metadata: Mapping[str, str] | None = None
    files: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = False


@dataclass(frozen=True)
class Variant:
    """One way of writing.

    Args:
        write: the function. families: of whole checkpoints. golden: the modules of a golden case; None for no case.
        apart: whether gpt-oss' fused experts are taken apart for it. note: for whoever reads the file.
    """

    write: Callable[[Source], Written]
    families: tuple[str, ...] = ("qwen3_moe",)
    golden: Mapping[str, tuple[int, ...]] | None = field(default_factory=lambda: GOLDEN)
    apart: bool = True
    note: str = ""


def run(package: str, variants: Mapping[str, Variant], also: tuple[str, ...] = ()) -> None:
    """The command of a side: `whole OUT [VARIANT …]` or `golden OUT [VARIANT …]`; one that fails is told and left out.

    Args:
        package: the distribution. also: others whose versions matter.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("whole", "golden"))
    parser.add_argument("out", type=Path)
    parser.add_argument("variants", nargs="*")
    options = parser.parse_args()
    facts = {"package": package, "versions": {name: version(name) for name in (package, *also, "torch")}}
    for name in options.variants or variants:
        variant = variants[name]
        for family in variant.families if options.what == "whole" else [None]:
            if family is None and variant.golden is None:
                continue
            source = whole_source(family) if family else golden_source(variant.golden or {})
            if family == "gpt_oss" and variant.apart:
                source = by_expert(source)
            try:
                written = variant.write(source)
            except Exception as error:  # a variant that the package cannot write; the others go on
                why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                print(f"\n{LEFT_OUT} {name} {family or 'golden'}: {why}")
                continue
            told = {
                **facts,
                "variant": name,
                "dtype": written.dtype,
                **({"note": variant.note} if variant.note else {}),
            }
            if family:
                _save_whole(options.out / f"{family}-{name}", family, source, written, told)
            else:
                _save_golden(options.out, f"{package}-{name}".lower().replace("_", "-"), written, told)


def golden_source(shapes: Mapping[str, tuple[int, ...]]) -> Source:
    """Random weights of these modules alone; std 0.2."""
    generator = torch.Generator().manual_seed(11)
    linears = {name: torch.randn(shape, generator=generator) * STD for name, shape in shapes.items()}
    return Source(linears, {}, {})


def whole_source(family: str) -> Source:
    """A whole tiny model, as it is published: values that bf16 can hold, held in fp32."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * STD).bfloat16().float()

    linears, left, others = {}, {}, {}
    for name, shape in shapes(family).items():
        module, _, kind = name.rpartition(".")
        if kind != "weight" or len(shape) != 2 or name == "model.embed_tokens.weight":
            others[name] = normal(*shape) if len(shape) > 1 or kind != "weight" else 1 + normal(*shape)
        elif module == "lm_head" or module.endswith((".gate", ".router")):
            left[module] = normal(*shape)
        else:
            linears[module] = normal(*shape)
    return Source(linears, left, others, family)


def by_expert(source: Source) -> Source:
    """gpt-oss with one linear a projection and expert, as quantisers take it apart: even rows gate, odd rows up."""
    linears, others = dict(source.linears), {}
    for name, tensor in source.others.items():
        at, _, kind = name.rpartition(".")
        if not at.endswith(".experts"):
            others[name] = tensor
            continue
        for expert, part in enumerate(tensor):
            rows = part if kind.endswith("_bias") else part.T
            pieces = {"gate_proj": rows[::2], "up_proj": rows[1::2]} if "gate_up" in kind else {"down_proj": rows}
            for projection, piece in pieces.items():
                if kind.endswith("_bias"):
                    others[f"{at}.{expert}.{projection}.bias"] = piece
                else:
                    linears[f"{at}.{expert}.{projection}"] = piece.contiguous()
    return Source(linears, source.left, others, source.family)


def with_routers(source: Source) -> Source:
    """Routers among what is quantised, as in files of the time when every router was a linear."""
    linears = {**source.linears, **{name: weight for name, weight in source.left.items() if name != "lm_head"}}
    left = {name: weight for name, weight in source.left.items() if name == "lm_head"}
    return Source(linears, left, source.others, source.family)


def tree(source: Source, make: Callable[[str, torch.Tensor], torch.nn.Module]) -> torch.nn.Module:
    """Modules under their names, each made by `make` from its name and weight; nothing else of a model."""
    root = torch.nn.Module()
    for name, weight in {**source.linears, **source.left}.items():
        *path, last = name.split(".")
        at = root
        for word in path:
            if not hasattr(at, word):
                at.add_module(word, torch.nn.Module())
            at = getattr(at, word)
        at.add_module(last, make(name, weight))
    return root


def renamed(source: Source, names: Mapping[str, str]) -> Source:
    """The same with the last word of some linears' names changed, e.g. w1 to gate_proj."""

    def name(old: str) -> str:
        at, _, last = old.rpartition(".")
        return f"{at}.{names.get(last, last)}"

    return Source({name(old): weight for old, weight in source.linears.items()}, source.left, source.others)


def plain_tensors(source: Source) -> dict[str, torch.Tensor]:
    """What a package leaves alone, by its whole name."""
    return {**source.others, **{f"{name}.weight": weight for name, weight in source.left.items()}}


def save_plain(folder: Path, source: Source) -> None:
    """The checkpoint before it is quantised, in bf16, for packages that read one from a folder."""
    linears = {f"{name}.weight": weight for name, weight in source.linears.items()}
    tensors = {name: tensor.bfloat16() for name, tensor in {**linears, **plain_tensors(source)}.items()}
    save_file(_own(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    config = {**FAMILIES[source.family or ""], "model_type": source.family}
    (folder / "config.json").write_text(json.dumps(config))


def _save_whole(folder: Path, family: str, source: Source, written: Written, told: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    plain = {} if written.whole else plain_tensors(source)
    config = {**FAMILIES[family], "model_type": family, **written.more}
    if written.config is not None:
        config["quantization_config"] = written.config
    kept = {name: tensor.bfloat16() for name, tensor in plain.items() if name not in written.tensors}
    metadata = {"format": "pt", **(written.metadata or {})}
    save_file({**kept, **_own(written.tensors)}, folder / "model.safetensors", metadata=metadata)
    save_file(_own(written.expected), folder / "expected.safetensors")
    for name, value in {"config.json": config, "expected.json": told, **written.files}.items():
        (folder / name).write_text(json.dumps(value, indent=1) + "\n")


def _save_golden(out: Path, case: str, written: Written, told: Mapping[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    expected = {f"expected.{name}": tensor for name, tensor in written.expected.items()}
    save_file({**_own(written.tensors), **_own(expected)}, out / f"{case}.safetensors")
    path = out / "cases.json"
    cases = json.loads(path.read_text()) if path.is_file() else {}
    cases[case] = {**told, "quantization_config": written.config}
    cases[case] |= {"metadata": written.metadata} if written.metadata else {}
    cases[case] |= {"files": written.files} if written.files else {}
    cases[case] |= {"config": written.more} if written.more else {}
    path.write_text(json.dumps(dict(sorted(cases.items())), indent=1) + "\n")


def _own(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors that share no memory, as safetensors wants them."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
