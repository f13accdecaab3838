"""New tokens over every MoE family: rows made and trained, and the same logits in stock PEFT and in a merge.

    .venv/bin/python scripts/parity/token_families.py [MODEL_TYPE ...]

Builds a tiny random checkpoint of each family in the installed transformers, gives its embedding (and a head of its
own) rows for three new tokens, trains one step, saves the adapter, and opens it with stock transformers and PEFT after
`resize_token_embeddings`. The merge is opened by stock transformers alone. A family whose rows PEFT would compute
otherwise is refused by name, with what stands against it. Where stock PEFT loses the keys of any adapter, or
transformers has no way back to the checkpoint's names, that side is left out, and said.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from scripts.parity.family_sweep import REFUSED

__all__ = ["Judged", "judge", "main"]

_NEAR = 1e-4
"""Of the largest logit: fp32 sums in another order, over a few layers."""
_NEW = 3


@dataclass(frozen=True)
class Judged:
    """One family: rows that moved of those added, how far stock PEFT, the merge and TRL's fused head are off; or why it
    is refused, or what went wrong."""

    family: str
    moved: int = 0
    rows: int = 0
    stock: float = float("nan")
    merged: float = float("nan")
    fused: float = float("nan")
    lacks: str = ""
    """The side that cannot be compared, and why."""
    refused: str = ""
    failed: str = ""

    @property
    def passes(self) -> bool:
        """Whether it is refused by name, or every row moved and all logits are the same."""
        sides = {"stock PEFT": self.stock, "merge": self.merged}
        near = all(off <= _NEAR for side, off in sides.items() if not self.lacks.startswith(side))
        near &= self.moved == self.rows > 0
        return bool(self.refused) or (not self.failed and near)

    def __str__(self) -> str:
        if self.refused or self.failed:
            return self.failed or f"refused: {self.refused}"
        off = f"stock PEFT off by {self.stock:.1e}, merge by {self.merged:.1e}, TRL's head by {self.fused:.1e}"
        return f"{self.moved}/{self.rows} rows moved; {off}{'; ' if self.lacks else ''}{self.lacks}"


def judge(family: str, folder: Path) -> Judged:
    """Build the family in `folder` and judge it; a failure is told."""
    from tests.harness.families import build, tiny_config
    from toolkit.adapters.tokens import refuse_tokens
    from toolkit.checkpoint.config import skeleton
    from toolkit.errors import ModelError, OnecardError

    build(tiny_config(family)).save_pretrained(folder / "model")
    try:
        refuse_tokens(skeleton(str(folder / "model")))
    except ModelError as error:
        return Judged(family, refused=str(error).removeprefix("model.new_tokens: "))
    try:
        return _judged(family, folder)
    except (OnecardError, RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        return Judged(family, failed=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:140]}")


def _judged(family: str, folder: Path) -> Judged:
    import torch
    from peft import PeftModel

    from tests.harness.families import STOCK_LOSES_KEYS
    from toolkit.adapters import TokenRows, adapter_coverage, add_rows, attach_lora
    from toolkit.adapters.tokens import rows_of
    from toolkit.architecture import auto_class
    from toolkit.errors import ModelError
    from toolkit.quant import load_int8

    model, _ = load_int8(str(folder / "model"), experts="none", linears="none")
    old = rows_of(model)
    new = tuple(range(old, old + _NEW))
    tokens = TokenRows(new, tuple((5 + number, 7) for number in range(_NEW)))
    add_rows(model, tokens)
    adapted = attach_lora(model, r=2, new_token_ids=new)
    ids = torch.randint(3, min(80, old), (2, 16), generator=torch.Generator().manual_seed(5))
    ids[:, 4:7] = torch.tensor(new)
    _step(adapted, ids)
    with torch.no_grad():
        ours = adapted.eval()(input_ids=ids).logits
    reached = adapter_coverage(adapted)
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    kind = auto_class(model.config)
    stock = kind.from_pretrained(folder / "model", dtype=torch.float32, experts_implementation="eager")
    stock.resize_token_embeddings(old + _NEW, mean_resizing=False)
    off = _off(PeftModel.from_pretrained(stock, folder / "adapter").eval(), ids, ours)
    lacks = "stock PEFT loses the keys of any adapter" if family in STOCK_LOSES_KEYS and off > _NEAR else ""
    try:
        merged = _off(kind.from_pretrained(_merge(folder), dtype=torch.float32).eval(), ids, ours)
    except ModelError as error:
        lacks, merged = f"merge: {str(error).partition(': ')[2]}", float("nan")
    return Judged(family, reached.tokens_moved, reached.tokens, off, merged, _fused(adapted, ids), lacks)


def _step(adapted: Any, ids: Any) -> None:
    """One step from which every B and every row has moved."""
    import torch

    adapted.train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    adapted(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def _merge(folder: Path) -> Path:
    """As `onecard export --format merged` does."""
    from toolkit.adapters.layouts import read_factors
    from toolkit.checkpoint.config import skeleton
    from toolkit.export.merge import merge_checkpoint
    from toolkit.export.tokens import put_rows

    base, out = skeleton(str(folder / "model")), folder / "merged"
    out.mkdir()
    merge_checkpoint(folder / "model", read_factors(folder / "adapter", base), base, out)
    put_rows(folder / "adapter", base, out)
    return out


def _fused(adapted: Any, ids: Any) -> float:
    """How far TRL's fused head is from the log-probabilities of the model's own logits, in nats."""
    import torch
    from trl.trainer.utils import add_fused_lm_head

    with torch.no_grad():
        own = adapted(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        add_fused_lm_head(adapted.get_base_model())
        found = adapted(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    return float((own - found).abs().max())


def _off(model: Any, ids: Any, ours: Any) -> float:
    """Largest difference over the largest logit."""
    import torch

    with torch.no_grad():
        theirs = model(input_ids=ids).logits
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a family fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="only these families")
    from transformers.utils import logging as transformers_logging

    from tests.harness.families import families

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    asked = parser.parse_args(arguments).model_types
    every = asked or [family.model_type for family in families() if family.model_type not in REFUSED]
    rows = []
    for family in every:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(judge(family, Path(folder)))
        print(f"{'ok    ' if rows[-1].passes else 'FAILED'}  {family:24} {rows[-1]}", flush=True)
    right, refused = sum(row.passes and not row.refused for row in rows), sum(bool(row.refused) for row in rows)
    print(f"{right} of {len(rows)} families take new tokens, {refused} refused by name")
    return int(right + refused < len(rows))


if __name__ == "__main__":
    sys.exit(main())
