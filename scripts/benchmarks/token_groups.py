#!/usr/bin/env python3
"""Fine-tuning on groups of tokens against plain fine-tuning, at equal compute: held-out loss of each, several seeds.

    .venv/bin/python scripts/benchmarks/token_groups.py RECIPE [section.key=value …] [--positions 40000] [--seeds 3]

A group is the mean of the embeddings of two tokens that follow each other, and takes one position; each group predicts
both tokens of the next ("Beyond Next Token Prediction: Patch-Level Training for Large Language Models", Shao et al.).
A position costs the same in both arms, so that half of them spent on groups show the adapter half as many examples
again. Learning rate, batch and schedule are the recipe's and the same; the last part is plain in every arm, as there.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from options import recipe_parser
from peft import PeftModel
from torch.nn.functional import cross_entropy

from toolkit import run as job
from toolkit.evaluate import held_out_loss
from toolkit.plan import make_plan
from toolkit.recipe import load as load_recipe

GROUP = 2
SHARES = (0.0, 1 / 3, 2 / 3)


def main() -> None:
    """Train each arm from the same start, and print."""
    parser = recipe_parser(__doc__)
    parser.add_argument("--positions", type=int, default=40000)
    parser.add_argument("--batch", type=int, default=1024, help="Positions in a step.")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_intermixed_args()
    plan = make_plan(load_recipe(given.recipe, given.overrides, note=lambda line: print(line)))
    base, tokenizer = job.load(plan)
    batches = job.build_batches(tokenizer, plan)
    model = job.attach(base, plan)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    rows = [(row["input_ids"], row["labels"]) for row in batches.train]
    held_out = batches.validation
    assert held_out is not None
    model.eval()
    print(f"before: held-out loss {held_out_loss(model, held_out, 32):.4f}; {given.positions} positions an arm")
    for share in SHARES:
        losses = []
        for seed in range(given.seeds):
            examples = train(model, start, rows, share, given, plan.recipe.training.learning_rate, seed)
            losses.append(held_out_loss(model, held_out, 32))
            print(f"  seed {seed}: loss {losses[-1]:.4f}, {examples} examples", flush=True)
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        print(f"{share:.0%} of the positions on groups: held-out loss {statistics.mean(losses):.4f} ± {spread:.4f}")


def train(
    model: PeftModel,
    start: dict[str, torch.Tensor],
    rows: list[Any],
    share: float,
    given: argparse.Namespace,
    learning_rate: float,
    seed: int,
) -> int:
    """The adapter from its start, the first `share` of the positions on groups; gives the examples it has seen."""
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in start.items():
            named[name].copy_(value)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    stream = itertools.cycle(rows[index] for index in order)
    trained = [named[name] for name in start]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    used, examples = 0, 0
    model.train()
    while used < given.positions:
        group = GROUP if used < share * given.positions else 1
        batch = list(_take(stream, given.batch, group))
        _loss(model, batch, group).backward()
        optimizer.param_groups[0]["lr"] = learning_rate * (1.0 - used / given.positions)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        examples += len(batch)
        used += sum(-(-len(ids) // group) for ids, _ in batch)
    model.eval()
    return examples


def _take(stream: Iterator[Any], positions: int, group: int) -> Iterator[Any]:
    taken = 0
    while taken < positions:
        row = next(stream)
        taken += -(-len(row[0]) // group)
        yield row


def _loss(model: PeftModel, batch: list[Any], group: int) -> torch.Tensor:
    """Nats per trained token. Rows are padded to a whole number of groups."""
    length = max(len(ids) for ids, _ in batch)
    length += -length % group
    ids = torch.zeros((len(batch), length), dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for number, (row, targets) in enumerate(batch):
        ids[number, : len(row)], labels[number, : len(row)] = torch.tensor(row), torch.tensor(targets)
        mask[number, : len(row)] = 1
    if group == 1:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    embedded = model.get_input_embeddings()(ids).unflatten(1, (-1, group))
    seen = mask.unflatten(1, (-1, group))
    means = (embedded * seen[..., None]).sum(2) / seen.sum(2).clamp(min=1)[..., None]
    logits = model(inputs_embeds=means, attention_mask=seen.amax(2), use_cache=False).logits[:, :-1]
    targets = labels.unflatten(1, (-1, group))[:, 1:]
    return cross_entropy(logits[:, :, None].expand(-1, -1, group, -1).flatten(0, 2), targets.flatten())


if __name__ == "__main__":
    main()
