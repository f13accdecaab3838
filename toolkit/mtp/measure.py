"""What a multi-token-prediction head is worth on held-out prompts: accepted drafts, tokens a pass, tokens a second."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from peft import PeftModel

from toolkit.mtp.decode import Speculator
from toolkit.mtp.drafts import HeadDrafter, LookupDrafter
from toolkit.mtp.head import MtpHead, Trunk

__all__ = ["Drafting", "draft_table", "measure_drafts", "speculator"]

_WHO = ("base", "stale", "trained")
_FIGURES = (
    ("tokens a pass", "tau", "{:.2f}"),
    ("tokens a second", "tokens_per_second", "{:.1f}"),
    ("without drafts", "plain_tokens_per_second", "{:.1f}"),
)


@dataclass(frozen=True)
class Drafting:
    """Greedy decoding with drafts against plain, the same prompts.

    tau: tokens a checked pass gives, 1 where no draft is ever right. acceptance: share of drafts accepted, by place.
    speeds: tokens a second. identical: whether every text came out the same.
    """

    prompts: int
    tokens: int
    tau: float
    acceptance: dict[int, float]
    tokens_per_second: float
    plain_tokens_per_second: float
    identical: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "prompts": self.prompts,
            "tokens": self.tokens,
            "tau": round(self.tau, 4),
            "acceptance": {str(place): round(share, 4) for place, share in self.acceptance.items()},
            "tokens_per_second": round(self.tokens_per_second, 2),
            "plain_tokens_per_second": round(self.plain_tokens_per_second, 2),
            "identical": self.identical,
        }


def draft_table(figures: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A run's `mtp` figures as a table: columns, and rows of text; none where nothing was drafted.

    `base` is the checkpoint's own head on its own model, `stale` the same head once the adapter is on, `trained` the
    head that was trained along.
    """
    measured = {name: found for name in _WHO if (found := figures.get(name))}
    if not measured:
        return [], []
    rows = [[what, *(form.format(found[key]) for found in measured.values())] for what, key, form in _FIGURES[:1]]
    places = sorted({place for found in measured.values() for place in found["acceptance"]}, key=int)
    for place in places:
        shares = [found["acceptance"].get(place) for found in measured.values()]
        rows.append([f"draft {place} accepted", *("" if share is None else f"{share:.1%}" for share in shares)])
    rows += [[what, *(form.format(found[key]) for found in measured.values())] for what, key, form in _FIGURES[1:]]
    pays = ["yes" if f["tokens_per_second"] > f["plain_tokens_per_second"] else "no" for f in measured.values()]
    return ["drafts on held-out prompts", *measured], [*rows, ["worth their time here", *pays]]


def measure_drafts(
    model: PeftModel,
    head: MtpHead | None,
    prompts: Sequence[Sequence[int]],
    *,
    count: int,
    max_new_tokens: int,
    adapted: bool = True,
) -> Drafting:
    """Decode all prompts greedily with and without drafts.

    Args:
        head: None drafts by prompt lookup. adapted: False switches the adapter off, to see a head with its own base.
    """
    with nullcontext() if adapted else model.disable_adapter():
        plain = speculator(model, head, count=0, max_new_tokens=max_new_tokens)
        expected = plain.generate(prompts)
        drafted = speculator(model, head, count=count, max_new_tokens=max_new_tokens, measured=False)
        got = drafted.generate(prompts)
    counts, before = drafted.counts, plain.counts
    return Drafting(
        prompts=len(prompts),
        tokens=sum(map(len, got)),
        tau=counts.tokens_per_pass,
        acceptance=counts.rates(),
        tokens_per_second=(counts.tokens + counts.plain_tokens)
        / max(1e-9, counts.drafted_seconds + counts.plain_seconds),
        plain_tokens_per_second=before.plain_tokens / max(1e-9, before.plain_seconds),
        identical=got == expected,
    )


def speculator(
    model: PeftModel,
    head: MtpHead | None,
    *,
    count: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    measured: bool = True,
) -> Speculator:
    """What decodes with this head's drafts, or with those of prompt lookup where there is none."""
    base = model.get_base_model()
    make: Callable[[], Any] = LookupDrafter
    if head is not None:
        head.follow_attention(base.config._attn_implementation)
        make = partial(HeadDrafter, head, Trunk.of(base))
    return Speculator(
        model, make, count=count, max_new_tokens=max_new_tokens, temperature=temperature, measured=measured
    )
