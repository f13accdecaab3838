"""The multi-token-prediction head of a run: made, opened again, and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolkit.artifact import fetch_adapter
from toolkit.data import Batches
from toolkit.data.storage import sequence_lengths
from toolkit.errors import ModelError, RecipeError
from toolkit.evaluate import answer_ids
from toolkit.labels import IGNORED
from toolkit.mtp.build import new_head
from toolkit.mtp.cost import MOST_ANSWERS
from toolkit.mtp.decode import can_speculate
from toolkit.mtp.drafts import measure_drafts
from toolkit.mtp.head import MtpHead
from toolkit.mtp.head_file import HEAD_FILE, NativeKeys, load_native, native_keys, read_head
from toolkit.mtp.own_answers import OwnHidden, learn_own_answers
from toolkit.mtp.training import HeadTraining
from toolkit.plan import Plan
from toolkit.processes import processes
from toolkit.recipe import rollout_options
from toolkit.steps import part

__all__ = [
    "as_it_was",
    "drafting_head",
    "evaluate_head",
    "make_head",
    "own_answers",
    "own_prompts",
    "reopen_head",
    "step_tokens",
    "teach_own_answers",
]


_DRAFTED, _DRAFTED_TOKENS = 24, 32
"""Held-out prompts that drafting is measured on, and the shortest text written after each."""
_OPENING = 16
"""Tokens of a text without a prompt that are given."""
_EXAMPLES_AN_ANSWER = 6
"""Examples that the steps have read for each of the model's own answers, where the recipe does not say how many: these
are to cost little beside the steps."""


def make_head(model: PeftModel, plan: Plan) -> HeadTraining | None:
    """The multi-token-prediction head that the recipe asks for, the checkpoint's own or a new one, and its training."""
    wanted, training = plan.recipe.mtp, plan.recipe.training
    if not wanted.enabled:
        return None
    if processes() > 1:
        raise RecipeError(
            "mtp.enabled: a head is trained in one process; start one, or train the head in a run of its own"
        )
    base = model.get_base_model()
    native = native_keys(plan.model, base.config, revision=plan.recipe.model.revision)
    if start := _start_with_head(plan):
        head = read_head(start, base, native).float()
    elif native:
        head = load_native(base, native)
    else:
        head = new_head(base, num_mtp_layers=wanted.num_mtp_layers, seed=training.seed)
    return HeadTraining(
        head,
        model,
        depth=max(wanted.depth, len(head.layers)),
        kind=wanted.loss,
        loss_weight=wanted.loss_weight,
        learning_rate=wanted.head_learning_rate,
        max_grad_norm=training.max_grad_norm,
    )


def _start_with_head(plan: Plan) -> Path | None:
    """The adapter that a run of written answers starts from, where it has a head: it drafts the answers."""
    start = plan.recipe.lora.adapter_name_or_path
    if start is None or rollout_options(plan.recipe) is None:
        return None
    folder = fetch_adapter(start)
    return folder if (folder / HEAD_FILE).is_file() else None


def drafting_head(training: HeadTraining | None, plan: Plan, note: Callable[[str], None]) -> MtpHead | None:
    """The head that drafts the answers which a run learns from: one that has learned before, the start's or the
    checkpoint's own. It stays as it is until the steps are over."""
    if training is None or rollout_options(plan.recipe) is None:
        return None
    native = native_keys(plan.model, training.base.config, revision=plan.recipe.model.revision)
    if native is None and _start_with_head(plan) is None:
        note("multi-token-prediction head: it is new, so it drafts no answers; it learns when the steps are over")
        return None
    return training.head


@part("teach the head")
def teach_own_answers(
    head: HeadTraining, tokenizer: PreTrainedTokenizerBase, batches: Batches, plan: Plan, console: Console
) -> None:
    """The finished model answers some of the training prompts, and the head learns from that."""
    prompts, answers, hidden = own_answers(head.model, tokenizer, batches, plan)
    seed = plan.recipe.training.seed
    steps = learn_own_answers(head, prompts, answers, tokens=step_tokens(plan), seed=seed, source=hidden)
    console.print(f"multi-token-prediction head: {steps} steps on the model's own answers to {len(prompts)} prompts")
    if head.steps == 0:
        console.print(
            "warning: the multi-token-prediction head has learned nothing: none of these answers has two tokens; with "
            "mtp.stage=with it learns from the data too"
        )


def own_answers(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, batches: Batches, plan: Plan
) -> tuple[list[list[int]], list[list[int]], OwnHidden]:
    """Prompts, what the model as it stands answers, and its hidden states meanwhile."""
    limits, hidden, prompts = plan.recipe.eval, OwnHidden(model), own_prompts(batches, plan)
    model.eval()
    with hidden.writing(prompts) as written:
        answers = answer_ids(
            model,
            tokenizer,
            prompts,
            max_new_tokens=limits.max_new_tokens,
            batch_size=limits.batch_size,
            written=written,
        )
    return prompts, answers, hidden


def own_prompts(batches: Batches, plan: Plan) -> list[list[int]]:
    """The first training prompts, as many as the model answers for its head."""
    wanted = _wanted_answers(batches, plan) if plan.recipe.mtp.enabled else 0
    return [_prompt(row) for row in batches.train.select(range(min(wanted, len(batches.train))))]


def _wanted_answers(batches: Batches, plan: Plan) -> int:
    """As the recipe says; else one for each `_EXAMPLES_AN_ANSWER` examples that the steps have read, within bounds."""
    if (wanted := plan.recipe.mtp.own_answers) is not None:
        return wanted
    training, lengths = plan.recipe.training, sequence_lengths(batches.train)
    read = len(lengths) * training.num_train_epochs
    if training.max_steps:
        packed = step_tokens(plan) / lengths.mean()
        batch = packed if training.packing else training.per_device_train_batch_size
        read = training.max_steps * training.gradient_accumulation_steps * batch
    return max(1, min(MOST_ANSWERS, int(read / _EXAMPLES_AN_ANSWER)))


def step_tokens(plan: Plan) -> int:
    """Tokens of one batch of the run, padding included."""
    training = plan.recipe.training
    return plan.max_length * training.per_device_train_batch_size


def _prompt(row: Mapping[str, list[int]]) -> list[int]:
    """What stands before the first trained token, all where none is; of text without a prompt, its first tokens."""
    first = next((place for place, label in enumerate(row["labels"]) if label != IGNORED), len(row["labels"]))
    return row["input_ids"][: first or _OPENING]


def reopen_head(model: PeftModel, plan: Plan, artifact: str | Path) -> MtpHead:
    """The head of a finished artifact, for decoding.

    Raises:
        ModelError: it has none, the file is damaged, or it is the head of another base.
    """
    base = model.get_base_model()
    native = native_keys(plan.model, base.config, revision=plan.recipe.model.revision)
    return read_head(artifact, base, native)


def evaluate_head(
    model: PeftModel, head: MtpHead | None, batches: Batches, plan: Plan, console: Console | None = None
) -> dict[str, Any] | None:
    """Drafts of the head on held-out prompts, and of the checkpoint's own head as it was, before and after training.

    A native head that was not trained is measured too, and its loss of acceptance is said on the console.
    """
    base, recipe = model.get_base_model(), plan.recipe
    prompts = [question.prompt_ids for question in batches.held_out[: recipe.eval.max_samples][:_DRAFTED]]
    native = native_keys(plan.model, base.config, revision=recipe.model.revision)
    if not prompts or not recipe.eval.enabled or (head is None and native is None) or can_speculate(base):
        return None
    length = max(_DRAFTED_TOKENS, recipe.eval.max_new_tokens)
    count = max(recipe.mtp.depth, len(head.layers) if head else 1)
    measured: dict[str, Any] = {}
    if native is not None and (stale := as_it_was(base, native, is_needed=head is not None, console=console)):
        for name, adapted in (("base", False), ("stale", True)):
            found = measure_drafts(model, stale, prompts, count=count, max_new_tokens=length, adapted=adapted)
            measured[name] = found.to_dict()
    if head is not None:
        measured["trained"] = measure_drafts(model, head, prompts, count=count, max_new_tokens=length).to_dict()
    elif console is not None and measured:
        before, after = measured["base"], measured["stale"]
        console.print(
            "warning: this checkpoint's multi-token-prediction head no longer fits the adapted model: "
            f"{after['tau']:.2f} tokens/pass, {before['tau']:.2f} before; of first drafts "
            f"{after['acceptance'].get('1', 0):.0%} accepted, {before['acceptance'].get('1', 0):.0%} before; "
            "mtp.enabled=true trains it along"
        )
    return measured or None


def as_it_was(base: PreTrainedModel, native: NativeKeys, *, is_needed: bool, console: Console | None) -> MtpHead | None:
    """The checkpoint's own head; None, with a line, where nobody asked for one and it cannot be built."""
    try:
        return load_native(base, native).to(base.dtype).eval()
    except ModelError as error:
        if is_needed:
            raise
        if console is not None:
            console.print(f"note: the checkpoint's own head is not measured: {error}", markup=False)
    return None
