"""Damages checkpoint files in every way a disk does, and counts what is seen.

    python -m scripts.faults.corruptions [--count N]

A damage that leaves the bytes as they were is none and not counted. After each, the whole checkpoint is put back and
must be found valid: nothing is to be seen falsely.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from toolkit.errors import ModelError
from toolkit.training.checkpoint import open_checkpoint

__all__ = ["corruptions"]


def corruptions(path: Path, other: Path, chance: random.Random, count: int) -> Iterator[Callable[[], None]]:
    """`count` ways to damage the checkpoint at `path`: bits, cuts, zeros, growth, deletion, and swaps with `other`."""
    given = 0
    while given < count:
        file = chance.choice(sorted(path.iterdir()))
        before = file.read_bytes()
        after = _damaged(before, file, other, chance)
        if after != before:
            given += 1
            yield partial(_put, file, after)


def _put(file: Path, content: bytes | None) -> None:
    file.unlink()
    if content is not None:
        file.write_bytes(content)


def _damaged(content: bytes, file: Path, other: Path, chance: random.Random) -> bytes | None:
    data = bytearray(content)
    at = chance.randrange(len(data)) if data else 0
    match chance.randrange(8):
        case 0 | 1 | 2 if data:
            data[at] ^= 1 << chance.randrange(8)
        case 3:
            del data[at:]
        case 4 if data:
            data[at : at + 512] = bytes(len(data[at : at + 512]))
        case 5:
            return None
        case 6:
            return (other / file.name).read_bytes() if (other / file.name).exists() else None
        case _:
            data += chance.randbytes(chance.randint(1, 64))
    return bytes(data)


def main() -> int:
    """1 where a damage went unseen or a whole checkpoint was refused."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=2500)
    options = parser.parse_args()
    from scripts.faults.resume_matrix import Case, train

    with tempfile.TemporaryDirectory() as folder:
        train(Case("small", {"packing": False}), Path(folder) / "run")
        two = sorted((Path(folder) / "run" / "checkpoints").iterdir())[:2]
        seen, false = _count(two[0], two[1], options.count)
        print(f"{seen} of {options.count} corruptions seen, {false} whole checkpoints refused")
    return int(seen < options.count or false > 0)


def _count(path: Path, other: Path, count: int) -> tuple[int, int]:
    whole = {file.name: file.read_bytes() for file in path.iterdir()}
    seen = false = 0
    for damage in corruptions(path, other, random.Random(1), count):
        names = {file.name: file.read_bytes() for file in path.iterdir()}
        damage()
        seen += not _valid(path)
        for name, content in whole.items():
            if not (path / name).exists() or (path / name).read_bytes() != content:
                (path / name).write_bytes(content)
        assert names == whole
        false += not _valid(path)
    return seen, false


def _valid(path: Path) -> bool:
    try:
        open_checkpoint(path)
    except ModelError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
