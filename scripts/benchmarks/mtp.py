#!/usr/bin/env python3
"""Multi-token-prediction heads of one run side by side: what each is worth on held-out prompts.

    .venv/bin/python scripts/benchmarks/mtp.py RECIPE [section.key=value …] [--prompts 200] [--tokens 32] [--decoded 24]
        [--seeds 1] [--run RUN]

One adapter is trained as the recipe says. Three heads learn what the recipe's head would: one copied from the last
layer, one of random numbers, and one that sees the base model instead of the adapted one. Heads touch neither the
adapter nor each other, so one run serves all. Then, on held-out prompts at depths 1 and 3:

  base        the base model with the head that was trained on it, on the base's own answers
  stale       the adapted model with that same head: what fine-tuning does to a head that is left alone
  copied      a head trained on the adapted model's own answers to training prompts
  random      the same from random numbers
  re-aligned  the base's head trained on the adapted model's own answers

With mtp.stage=with the heads learn from the data's batches first, the re-aligned one once more on the adapted model,
and there is one more:

  data alone  a copied head trained beside the adapter, from the data's text and no other

`tau` is the tokens that a pass of the model gives, found by replaying its greedy text (mtp_replay.py); the last columns
decode some of the prompts in earnest. Greedy text must be the same with drafts and without.

With `--run` nothing is trained but the heads, on own answers alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mtp_replay import Texts
from options import recipe_parser
from peft import PeftModel
from rich.console import Console

from toolkit import run as job
from toolkit.evaluate import answer_ids
from toolkit.mtp.build import new_head
from toolkit.mtp.drafts import measure_drafts
from toolkit.mtp.head import MtpHead
from toolkit.mtp.own_answers import learn_own_answers
from toolkit.mtp.training import HeadTraining
from toolkit.plan import make_plan
from toolkit.recipe import load as load_recipe
from toolkit.training import RunContext, train_adapter

DEPTHS = (1, 3)


class Several:
    """Heads that learn from the same batches: those of `beside` from the adapted model, `apart` from its base."""

    loss_weight = 0.0

    def __init__(self, model: PeftModel, beside: Mapping[str, HeadTraining], apart: HeadTraining) -> None:
        self.model, self.beside, self.apart = model, beside, apart
        self.seen: list[tuple[dict[str, Any], torch.Tensor | int | None]] = []

    def listen(self) -> Any:
        """As one head's."""
        return self.apart.listen()

    def learn(self, hidden: torch.Tensor, inputs: dict[str, Any], count: Any, logits: torch.Tensor | None) -> None:
        """Each head's own, and what the base model makes of the same batch."""
        self.seen.append((dict(inputs), count))
        for head in self.beside.values():
            head.learn(hidden, inputs, count, logits)
        with self.model.disable_adapter():
            self.apart.learn(hidden_states(self.model, inputs), inputs, count)

    def step(self, factor: float) -> None:
        """Each head's."""
        for head in (*self.beside.values(), self.apart):
            head.step(factor)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Nothing: the run is not resumed."""
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Nothing."""


@torch.no_grad()
def hidden_states(model: PeftModel, inputs: Mapping[str, Any]) -> torch.Tensor:
    """After the final norm, as the model stands."""
    from toolkit.mtp.head import capture_hidden

    with capture_hidden(model.get_base_model()) as hidden:
        model(**{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False, logits_to_keep=1)
    return hidden()


def train(plan: Any, run: Path | None) -> tuple[PeftModel, Any, Any, Several, float]:
    """The recipe's adapter and the heads beside it: model, tokenizer, batches, heads, and the seconds it took.

    A finished run's adapter is opened instead, and the heads have learned nothing.
    """
    recipe = plan.recipe
    if run:
        model, tokenizer = job.reopen(plan, run / "adapter")
        base = model.get_base_model()
    else:
        base, tokenizer = job.load(plan)
        model = job.attach(base, plan)
    batches = job.build_batches(tokenizer, plan)

    def head(made: MtpHead) -> HeadTraining:
        return head_training(made, model, recipe.mtp)

    made = partial(new_head, base, seed=recipe.training.seed)
    heads = Several(model, {"copied": head(made()), "random": head(made(copied=False))}, head(made()))
    if run:
        return model, tokenizer, batches, heads, 0.0
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train_adapter(
            model,
            tokenizer,
            batches.train,
            None,
            RunContext(
                folder=Path(folder) / "checkpoints",
                metrics=Path(folder) / "metrics.jsonl",
                arguments={**recipe.training.model_dump(exclude={"output_dir"}), "report_to": [], "save_steps": 10**6},
                device=plan.device,
                dtype=plan.dtype,
                train_router=recipe.lora.router,
                console=Console(quiet=True),
                head=heads if recipe.mtp.reads_data else None,
            ),  # type: ignore[arg-type]
        )
    return model, tokenizer, batches, heads, time.perf_counter() - started


def head_training(head: MtpHead, model: PeftModel, mtp: Any) -> HeadTraining:
    """A head's, as the recipe says but for its depth."""
    return HeadTraining(head, model, depth=max(DEPTHS), kind=mtp.loss, learning_rate=mtp.head_learning_rate)


def realigned(heads: Several, plan: Any) -> HeadTraining:
    """The base's head after one more pass over what was trained on, with the adapter as it has become."""
    model = heads.model.eval()
    again = head_training(copy.deepcopy(heads.apart.head), model, plan.recipe.mtp)
    for done, (inputs, count) in enumerate(heads.seen):
        again.learn(hidden_states(model, inputs), inputs, count)
        again.step(1.0 - done / len(heads.seen))
    return again


def main() -> None:
    """Train, measure, print."""
    given = _arguments()
    seeds = [_of_one_seed(given, seed) for seed in range(given.seeds)]
    rows = seeds[0]["rows"]
    if given.seeds > 1:
        print(f"mean of {given.seeds} seeds ± standard deviation")
        for index, row in enumerate(rows):
            for count in DEPTHS:
                taus = [each["rows"][index][str(count)]["tau"] for each in seeds]
                print(f"{row['head']:12}{count:6}{statistics.mean(taus):8.2f} ± {statistics.stdev(taus):.2f}")
    if given.json:
        given.json.write_text(json.dumps(seeds if given.seeds > 1 else seeds[0], indent=1) + "\n")


def _of_one_seed(given: argparse.Namespace, seed: int) -> dict[str, Any]:
    """All heads of one run: printed, and as figures."""
    changes = [*given.overrides, "mtp.enabled=true", *([f"training.seed={seed}"] if given.seeds > 1 else [])]
    recipe = load_recipe(given.recipe, changes, note=lambda line: print(line))
    plan = make_plan(recipe)
    model, tokenizer, batches, heads, seconds = train(plan, given.run)
    finished, own = _finished(model, tokenizer, batches, plan, heads)
    prompts = [list(question.prompt_ids) for question in batches.held_out[: given.prompts]]
    write = partial(answer_ids, model, tokenizer, prompts, max_new_tokens=given.tokens, batch_size=50)
    answers = write()
    adapted = Texts(model, prompts, answers, given.tokens)
    with model.disable_adapter():
        rows = [_row("base", Texts(model, prompts, write(), given.tokens), heads.apart.head.eval())]
    rows += [_row(name, adapted, head.eval()) for name, head in finished.items()]
    parameters, length = sum(p.numel() for p in heads.apart.head.parameters()), sum(map(len, answers)) / len(answers)
    print(
        f"{recipe.model.model_name_or_path}: {len(heads.seen)} batches in {seconds:.0f} s, head of {parameters:,} "
        f"parameters, {own} own answers; {len(prompts)} held-out prompts, answers of {length:.1f} tokens"
    )
    print(f"{'head':12}{'depth':>6}{'tau':>8}  accepted by place")
    for row in rows:
        for count in DEPTHS:
            found = row[str(count)]
            print(f"{row['head']:12}{count:6}{found['tau']:8.2f}  {' '.join(f'{r:.1%}' for r in found['accepted'])}")
    decoded = [
        _decoded(model, finished["copied"], prompts[: given.decoded], given.tokens, n) for n in DEPTHS if given.decoded
    ]
    return {"rows": rows, "decoded": decoded, "seconds": seconds, "seed": recipe.training.seed}


def _finished(
    model: PeftModel, tokenizer: Any, batches: Any, plan: Any, heads: Several
) -> tuple[dict[str, MtpHead], int]:
    """The heads beside the adapter once they have learned from the own answers; and how many of these there were."""
    seed, tokens = plan.recipe.training.seed, job.step_tokens(plan)
    model.eval()
    with model.disable_adapter():
        asked, said, hidden = job.own_answers(model, tokenizer, batches, plan)
        learn_own_answers(heads.apart, asked, said, tokens=tokens, seed=seed, source=hidden)
    trained = {**heads.beside, "re-aligned": realigned(heads, plan)}
    finished = {"stale": heads.apart.head}
    if heads.seen:
        finished["data alone"] = copy.deepcopy(heads.beside["copied"].head)
    asked, own, hidden = job.own_answers(model, tokenizer, batches, plan)
    for training in trained.values():
        learn_own_answers(training, asked, own, tokens=tokens, seed=seed, source=hidden)
    return finished | {name: training.head for name, training in trained.items()}, len(own)


def _row(name: str, texts: Texts, head: MtpHead) -> dict[str, Any]:
    found = texts.replay(head, DEPTHS)
    return {"head": name, **{str(count): {"tau": r.tau, "accepted": r.rates} for count, r in found.items()}}


def _decoded(model: PeftModel, head: MtpHead, prompts: Any, tokens: int, count: int) -> dict[str, Any]:
    found = measure_drafts(model, head, prompts, count=count, max_new_tokens=tokens).to_dict()
    print(
        f"decoded {found['prompts']} prompts, {count} drafts: tau {found['tau']:.2f}, {found['tokens_per_second']:.1f} "
        f"tokens/s with drafts, {found['plain_tokens_per_second']:.1f} without, same text: {found['identical']}",
        flush=True,
    )
    return found


def _arguments() -> argparse.Namespace:
    parser = recipe_parser(__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--decoded", type=int, default=24)
    parser.add_argument("--run", type=Path, help="A finished run of the recipe, whose adapter is taken.")
    parser.add_argument("--seeds", type=int, default=1, help="Runs with training.seed 0, 1, … and their mean.")
    parser.add_argument("--json", type=Path)
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    main()
