"""Every format of others: worth what its own package says, whole and in parts; a part that is not whole is named.

The golden cases were written and read back by the packages themselves (`scripts/parity/format_writers.py --golden`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.harness.formats import CASES, FOLDER, Case, as_slice
from toolkit.checkpoint import weights
from toolkit.checkpoint.files import SOURCES
from toolkit.checkpoint.formats import _READERS, packed_weights
from toolkit.errors import ModelError

BY_ITS_FAKE_QUANTISER = "nvidia-modelopt-int4"
"""Whose values the package cannot read back: they come from its training code, which multiplies in another order."""


def agrees(case: Case, ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """To the last bit of the dtype that the package computes in."""
    if case.name == BY_ITS_FAKE_QUANTISER:
        return torch.allclose(ours, theirs, rtol=2**-22, atol=0)
    return torch.equal(ours.to(case.dtype), theirs.to(case.dtype))


def test_every_case_is_there() -> None:
    assert len(CASES) == 102
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == CASES.keys()
    assert {told["package"] for told in CASES.values()} == {
        *("compressed-tensors", "GPTQModel", "autoawq", "auto-round", "bitsandbytes", "nvidia-modelopt"),
        *("mlx", "hqq", "torchao", "transformers", "amd-quark"),
    }


def test_every_format_that_is_named_has_a_reader() -> None:
    assert set(SOURCES) - {"gguf"} == _READERS.keys()  # a file of another kind, with a reader of its own


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_package(name: str) -> None:
    case = Case(name)
    found = packed_weights(case.files())
    assert case.expected
    for key, theirs in case.expected.items():
        ours = as_slice(found[key], case.tensors).read()
        assert ours.dtype == torch.float32
        assert tuple(ours.shape) == found[key].shape
        assert agrees(case, ours, theirs), key


@pytest.mark.parametrize("name", CASES)
def test_rows_by_themselves_are_the_rows_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, chance = Case(name), random.Random(name)
    for key, packed in packed_weights(case.files()).items():
        unread = as_slice(packed, case.tensors)
        whole, rows = unread.read(), packed.shape[0]
        with monkeypatch.context() as patch:
            patch.setattr(weights, "_BLOCK", 1)  # as few rows as the format allows
            assert torch.equal(unread.read(), whole), key
            for number in range(rows) if len(packed.shape) == 3 else ():
                assert torch.equal(unread[number : number + 1].read(), whole[number : number + 1]), key
            for _ in range(6):
                first = chance.randrange(rows)
                last = chance.randint(first + 1, rows)
                part = unread[first:last]
                assert part.get_shape() == [last - first, *packed.shape[1:]]
                assert torch.equal(part.read(), whole[first:last]), (key, first, last)
                begin = chance.randrange(last - first)
                assert torch.equal(part[begin:].read(), whole[first + begin : last]), (key, first, last)


def encoded(case: Case, chance: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[str]:
    """Every weight that can be written in its own format, written again and read back: the same bits; their formats."""
    for key, packed in packed_weights(case.files()).items():
        if packed.encoder is None:
            continue
        for _, _, parts in as_slice(packed, case.tensors).blocks():
            values = packed.unpack(parts)
            made = packed.encoder.encode(values, parts, chance(values))
            for name, part in made.items():
                assert (part.shape, part.dtype) == (parts[name].shape, parts[name].dtype), (key, name)
            assert torch.equal(packed.unpack({**parts, **made}), values), key
            # Codes that stand for other values take the place of those that were there.
            moved = packed.unpack({**parts, **packed.encoder.encode(values.flip(0), parts)})
            assert not torch.equal(moved, values), key
        yield packed.stored.partition(",")[0]


def test_what_is_written_in_its_own_format_reads_back_as_it_was() -> None:
    nearest, drawn = (lambda values: None), (lambda values: torch.rand(values.shape))
    torch.manual_seed(0)
    for chance in (nearest, drawn):
        kinds = {name: list(encoded(Case(name), chance)) for name in CASES}
        by_package: dict[str, set[str]] = {}
        for name, found in kinds.items():
            by_package.setdefault(CASES[name]["package"], set()).update(found)
        assert by_package == {
            "compressed-tensors": {*(f"int{bits}" for bits in range(2, 9)), "FP8", "NVFP4", "MXFP4", "MXFP8"},
            "GPTQModel": {"int2", "int3", "int4", "int8", "FP8"},
            "autoawq": {"int4"},
            "auto-round": {"int4", "int6"},
            "nvidia-modelopt": {"FP8", "NVFP4", "int4"},
            "amd-quark": {"FP8", "int8", "MXFP4"},
            "transformers": {"FP8", "MXFP4", "MXFP8"},
            "torchao": {"FP8", "int8"},
            **{package: set() for package in ("bitsandbytes", "mlx", "hqq")},
        }


ODD_WIDTHS = ("old-int3", "old-int5", "old-int7")
"""Of compressed-tensors up to 0.17: one word less is exactly what later versions take for as many codes."""


def faults(case: Case) -> Iterator[tuple[str, str]]:
    """Makes one fault of the case's tensors after the other and undoes it: (tensor, what is wrong with it)."""
    whole = dict(case.tensors)
    for key, tensor in whole.items():
        del case.tensors[key]
        yield key, "missing"
        is_other = any(width in case.name for width in ODD_WIDTHS) and key.endswith("weight_packed")
        for axis, size in enumerate(tensor.shape[: 1 if is_other else None]):
            case.tensors[key] = tensor.narrow(axis, 0, size - 1).clone()
            yield key, f"one short along {axis}"
        case.tensors.clear()
        case.tensors.update(whole)


@pytest.mark.parametrize("name", CASES)
def test_no_part_can_be_missing_or_misshapen_unseen(name: str) -> None:
    case, refused = Case(name), 0
    for key, fault in faults(case):
        try:
            found = packed_weights(case.files())
        except ModelError as error:
            refused += 1
            assert key.partition(".weight.")[0].rpartition(".")[0] in str(error), (key, fault)
            assert "\n" not in str(error), (key, fault)
            continue
        for weight, theirs in case.expected.items():
            if weight not in found or found[weight].shape != theirs.shape:  # as the model's own shapes tell
                continue
            ours = as_slice(found[weight], case.tensors).read()
            assert agrees(case, ours, theirs), (key, fault)
    assert refused > 1


def as_text(word: str) -> torch.Tensor:
    return torch.tensor(list(word.encode()), dtype=torch.uint8)


def of_gate(case: Case, leaf: str) -> str:
    return next(key for key in case.tensors if key.endswith(f"gate_proj.{leaf}"))


def another_scheme(case: Case, **weights: object) -> None:
    for group in case.declared["config_groups"].values():
        group["weights"] |= weights


UNKNOWN: dict[str, tuple[Callable[[Case], object], str]] = {
    "compressed-tensors-int4-group": (lambda case: another_scheme(case, num_bits=9), "says 9 bits"),
    "compressed-tensors-fp8-block": (lambda case: another_scheme(case, block_structure="all"), "blocks of 'all'"),
    "compressed-tensors-int8-channel": (lambda case: case.declared.update(config_groups={}), "no group of the"),
    "compressed-tensors-int4-tensor": (
        lambda case: [group.update(format="marlin-24") for group in case.declared["config_groups"].values()],
        "stored as marlin-24",
    ),
    "compressed-tensors-mxfp6": (
        lambda case: [group.update(targets=-1) for group in case.declared["config_groups"].values()],
        "no group of the",
    ),
    "gptqmodel-v1-8-asym": (lambda case: case.declared.update(bits=4), "no weight of the 4 bits"),
    "autoawq-gemv": (lambda case: case.declared.update(group_size="all"), "a group_size of 'all'"),
    "hqq-4-axis-1": (
        lambda case: case.tensors.update({of_gate(case, "packing"): as_text("5bit_u8")}),
        "packed as '5bit_u8', which is not read",
    ),
    "mlx-mxfp4": (lambda case: case.declared.update(mode="nvfp8"), "mode 'nvfp8'"),
    "torchao-int8": (
        lambda case: case.metadata.update(dict.fromkeys(case.expected, '{"_type": "Int4Tensor"}')),
        "stored as Int4Tensor in I8, which is not read",
    ),
    "torchao-nvfp4": (lambda case: case.metadata.clear(), "does not say in which order its scales lie"),
    "bitsandbytes-nf4": (
        lambda case: case.tensors.update({of_gate(case, "weight.quant_state.bitsandbytes__nf4"): as_text("[")}),
        "not a state of bitsandbytes",
    ),
    "nvidia-modelopt-nvfp4": (lambda case: case.declared.update(quant_method=None), "nothing says what they are worth"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_scheme_that_is_not_known_is_refused_by_name(name: str) -> None:
    case, (spoil, words) = Case(name), UNKNOWN[name]
    spoil(case)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.experts\.[01]\.\w+_proj") as caught:
        packed_weights(case.files())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scales_of_inputs_are_multiplied_into_a_weight() -> None:
    case = Case("nvidia-modelopt-fp8")
    key = of_gate(case, "weight")
    before = as_slice(packed_weights(case.files())[key], case.tensors).read()
    scale = torch.rand(before.shape[1]).bfloat16()
    case.tensors[f"{key.removesuffix('.weight')}.pre_quant_scale"] = scale
    after = as_slice(packed_weights(case.files())[key], case.tensors).read()
    assert torch.equal(after, before * scale.float())
    assert not torch.equal(after, before)
    case.tensors[f"{key.removesuffix('.weight')}.pre_quant_scale"] = scale[1:].clone()
    with pytest.raises(ModelError, match=r"gate_proj\.pre_quant_scale: does not fit a weight"):
        packed_weights(case.files())


def test_a_group_that_no_integer_holds_is_one_of_all_inputs() -> None:
    case = Case("gptqmodel-v1-4-channel")
    case.declared["group_size"] = 10**40
    found = packed_weights(case.files())
    assert all(agrees(case, as_slice(found[key], case.tensors).read(), theirs) for key, theirs in case.expected.items())


def test_a_single_scale_without_a_side_is_named() -> None:
    case = Case("bitsandbytes-int8")
    key = of_gate(case, "weight")
    case.tensors[key] = case.tensors[key][:1].contiguous()
    case.tensors[f"{key.removesuffix('weight')}SCB"] = torch.tensor(1.0)
    with pytest.raises(ModelError, match="do not fit their scales"):
        packed_weights(case.files())
