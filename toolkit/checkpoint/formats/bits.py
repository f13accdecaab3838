"""Codes out of packed words, and what small floats are worth: the arithmetic that formats share.

Sources: the Open Compute Project's "Microscaling Formats (MX) Specification" 1.0 for E2M1, E2M3 and E8M0; the
rest was measured on files that each format's own package wrote (`scripts/parity/format_writers.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolkit.parts import E2M1

__all__ = [
    "FP4_LEVELS",
    "as_bytes",
    "fields",
    "fp4",
    "fp4_codes",
    "fp6",
    "fp8_levels",
    "grid",
    "nibbles",
    "pairs",
    "planes",
    "powers",
    "words",
]

_SIGNED = torch.tensor((*E2M1, *(-value for value in E2M1)))
_PAIRS = torch.stack((_SIGNED.repeat(16), _SIGNED.repeat_interleave(16)), -1)
"""Of each byte, [256, 2]: the low nibble comes first."""
_BYTES = torch.arange(256, dtype=torch.uint8)
_CODES = {bits: (_BYTES[:, None] >> torch.arange(0, 8, bits, dtype=torch.uint8)) & (2**bits - 1) for bits in (1, 2, 4)}
"""By width: the codes in each byte, uint8 [256, 8 / bits], lowest bits first."""
_AS_ONE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
FP4_LEVELS = tuple(sorted({-value for value in E2M1} | set(E2M1)))
"""All values of E2M1, ascending."""


def as_bytes(words: Tensor) -> Tensor:
    """Elements of any dtype as the bytes that they lie in, [..., n] to [..., n · size]."""
    words = words.contiguous()
    if words.dim() and words.stride(-1) != 1:  # which PyTorch calls contiguous where there is one element a row
        words = words.clone(memory_format=torch.contiguous_format)
    return words.view(torch.uint8)


def nibbles(packed: Tensor, *, high_first: bool = False) -> Tensor:
    """4-bit codes, uint8 [..., 2n], of bytes [..., n]."""
    return _looked_up(packed, _CODES[4].flip(-1) if high_first else _CODES[4])


def _looked_up(words: Tensor, table: Tensor) -> Tensor:
    """What `table` [256, n] has for each byte of words [..., m], one after the other: [..., size · m · n].

    Its rows are taken as one number each, which is three times as fast as arithmetic or rows are.
    """
    stream = as_bytes(words)
    rows = table.contiguous().view(_AS_ONE[table.shape[1] * table.itemsize]).flatten().to(stream.device)
    found: Tensor = rows.index_select(0, stream.flatten().int()).view(table.dtype)
    return found.view(*stream.shape[:-1], stream.shape[-1] * table.shape[1])


def fp4(packed: Tensor) -> Tensor:
    """E2M1 values in fp32, [..., 2n], of bytes [..., n] or of words; low nibbles first."""
    return _looked_up(packed, _PAIRS)


def pairs(codes: Tensor) -> Tensor:
    """The inverse of `nibbles`: bytes [..., n] of 4-bit codes, uint8 [..., 2n], the first in the low half."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def fp4_codes(values: Tensor) -> Tensor:
    """The codes, uint8, of values that are E2M1's: sign, two bits of exponent and one of mantissa."""
    magnitude = torch.bucketize(values.abs().contiguous(), torch.tensor(E2M1, device=values.device))
    return (magnitude | (values < 0).long() << 3).to(torch.uint8)


def fp8_levels(dtype: torch.dtype) -> tuple[float, ...]:
    """All finite values of an 8-bit float, ascending."""
    found = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return tuple(sorted(set(found[found.isfinite()].tolist())))


def fields(words: Tensor, bits: int, count: int, *, across: bool = True) -> Tensor:
    """The first `count` codes of `bits` bits, uint8 [..., count], of integer words [..., n], lowest bits first.

    Args:
        across: a code may begin in one 32-bit word and end in the next; otherwise each word holds whole codes alone.
    """
    if not across and 32 % bits:
        whole = fields(words[..., None], bits, 32 // bits)
        return whole.flatten(-2)[..., :count]
    stream = as_bytes(words)
    if bits == 8:
        return stream[..., :count]
    if 8 % bits == 0:
        return _looked_up(stream, _CODES[bits])[..., :count]
    # Eight codes lie in `bits` bytes.
    groups = -(-count // 8)
    stream = torch.nn.functional.pad(stream, (0, max(0, groups * bits - stream.shape[-1])))
    stream = stream[..., : groups * bits].unflatten(-1, (groups, bits)).to(torch.int16)
    eight = []
    for number in range(8):
        byte, shift = divmod(number * bits, 8)
        code = stream[..., byte] >> shift
        if shift + bits > 8:
            code = code | (stream[..., byte + 1] << (8 - shift))
        eight.append((code & (2**bits - 1)).to(torch.uint8))
    return torch.stack(eight, -1).flatten(-2)[..., :count]


def words(codes: Tensor, bits: int, count: int, *, across: bool = True) -> Tensor:
    """The inverse of `fields`: `count` int32 words [..., count] of codes, uint8 [..., n]; what is left over is zero."""
    if not across and 32 % bits:
        whole = 32 // bits
        codes = torch.nn.functional.pad(codes, (0, count * whole - codes.shape[-1]))
        return words(codes.unflatten(-1, (count, whole)), bits, 1)[..., 0]
    if 8 % bits:
        codes, bits = ((codes[..., None] >> torch.arange(bits, dtype=torch.uint8)) & 1).flatten(-2), 1
    each = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, 4 * count * each - codes.shape[-1]))
    shifted = codes.unflatten(-1, (-1, each)) << torch.arange(0, 8, bits, dtype=torch.uint8)
    stream: Tensor = shifted.sum(-1, dtype=torch.uint8)
    return stream.view(torch.int32)


def planes(words: Tensor, bits: int) -> Tensor:
    """Codes stored by planes, uint8 [..., n · 32 / bits], of 32-bit words [..., n].

    Each 32 codes take `bits` words: first the lowest 4 (or 2, or 1) bits of all of them, then the next ones.
    """
    blocks = words.unflatten(-1, (-1, bits))
    found, word, shift = None, 0, 0
    for width in (4, 2, 1):
        if bits & width:
            plane = fields(blocks[..., word : word + width], width, 32) << shift
            found = plane if found is None else found | plane
            word, shift = word + width, shift + width
    assert found is not None
    return found.flatten(-2)


def fp6(codes: Tensor) -> Tensor:
    """E2M3 values in fp32 of codes in uint8: a sign, two bits of exponent and three of mantissa."""
    table = []
    for code in range(32):
        power, fraction = code >> 3, code & 7
        table.append((fraction / 8 + (power > 0)) * 2.0 ** (max(power, 1) - 1))
    values = torch.tensor([*table, *(-value for value in table)], device=codes.device)
    return values[codes.long()]


def powers(scale: Tensor) -> Tensor:
    """E8M0 scales, stored as such or as bytes, in fp32: 2 to the (byte − 127)."""
    return torch.exp2(scale.view(torch.uint8).float() - 127)


def grid(scale: Tensor, rows: int, columns: int, block: tuple[int, int] | None = None) -> Tensor:
    """Scales of blocks as they apply to each value, fp32 and broadcast to [..., rows, columns].

    Args:
        scale: one number, one a row [rows] or [rows, 1], or one a block [..., row blocks, column blocks].
        block: rows and columns of a block; by default as many as divide the weight evenly. The last may be cut off.
    """
    scale = scale.float()
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.dim() == 1:
        scale = scale[:, None]
    down, across = scale.shape[-2:]
    high, wide = block or (-(-rows // down), -(-columns // across))
    if down not in (1, rows):
        scale = scale.repeat_interleave(high, -2)[..., :rows, :]
    return scale if across in (1, columns) else scale.repeat_interleave(wide, -1)[..., :columns]
