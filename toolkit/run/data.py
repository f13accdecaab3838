"""The data of a run: its tokenizer, its masked examples and the longest of them, what is held out; and how it is asked.

How a model is asked was recorded when the run began; what ends an answer, its checkpoint says, too.
"""

from __future__ import annotations

import datetime
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from toolkit.artifact import read_manifest
from toolkit.checkpoint.config import read_config, read_generation_config
from toolkit.checkpoint.files import gguf_at
from toolkit.data import Batches, ChatForm, Dialogue, read_chat_template
from toolkit.data import build_batches as build_from_rows
from toolkit.data.storage import count_trained, first_trained, prompts_and_answers, sequence_lengths
from toolkit.durable import write_text
from toolkit.errors import DataError, ModelError, first_line
from toolkit.evaluate import LOSS, find_metric, read_windows
from toolkit.plan import Plan, StepShape
from toolkit.recipe import PAIR_METRICS, PREFERENCE_METHODS, REWARD, Recipe, rollout_options
from toolkit.recipe.schema import ModelSection
from toolkit.run.mtp import own_prompts
from toolkit.run.rewards import require_answers, require_rewards
from toolkit.run.vocabulary import add_tokens, require_known_tokens, require_trainable
from toolkit.run_folder import RunFolder
from toolkit.steps import part

__all__ = [
    "build_batches",
    "check_tokens",
    "dialogue",
    "general_text",
    "held_out",
    "load_tokenizer",
    "record_form",
    "step_shape",
    "stop_as_trained",
    "texts_to_compare",
]


def load_tokenizer(plan: Plan) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer, or else the checkpoint's, with the recipe's new tokens and chat template, if it has any.

    Raises:
        ModelError: there is none, or that of a GGUF file must be given.
    """
    return _tokenizer_of(plan.recipe)


def check_tokens(plan: Plan) -> None:
    """Raise unless the rows of the recipe's tokens can be trained; no weights are read (`require_trainable`)."""
    if plan.recipe.model.row_tokens:
        require_trainable(_tokenizer(plan.recipe.model), plan)


def _tokenizer_of(recipe: Recipe) -> PreTrainedTokenizerBase:
    tokenizer = _tokenizer(recipe.model)
    add_tokens(tokenizer, recipe.model.new_tokens)
    if recipe.data.chat_template_path:
        tokenizer.chat_template = read_chat_template(Path(recipe.data.chat_template_path))
    result: PreTrainedTokenizerBase = tokenizer
    return result


def _tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    given = model.tokenizer_name_or_path
    if given is None and (path := gguf_at(model.model_name_or_path)):
        from toolkit.checkpoint.gguf_source import tokenizer_of

        found: PreTrainedTokenizerBase = tokenizer_of(path)
        return found
    name, revision = (given, "main") if given else (model.model_name_or_path, model.revision)
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        field = "" if given else "; set model.tokenizer_name_or_path"
        raise ModelError(f"{name}: no usable tokenizer: {first_line(error)}{field}") from None


@part("tokenise")
def build_batches(tokenizer: PreTrainedTokenizerBase, plan: Plan) -> Batches:
    """The recipe's examples, validated and masked; TRL packs them. What evaluation needs is tried, too.

    Raises:
        DataError: the examples or the general text cannot be used, or the model has no row for a token.
        RecipeError: there is no such metric, or the rows have no answers that it, or a reward, could compare with.
    """
    general = general_text(tokenizer, plan)
    if plan.recipe.eval.metric not in (LOSS, REWARD, *PAIR_METRICS):
        find_metric(plan.recipe.eval.metric)
    require_rewards(plan.recipe)
    batches = _batches_of(plan.recipe, tokenizer, plan.max_length, _recorded_form(plan.folder))
    require_answers(plan.recipe, batches)
    require_known_tokens(tokenizer, batches, general, plan)
    return batches


def _batches_of(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_length: int, recorded: ChatForm | None
) -> Batches:
    return build_from_rows(
        tokenizer,
        **recipe.data.model_dump(exclude={"chat_template_path"}),
        max_length=max_length,
        pairs=recipe.training.method in PREFERENCE_METHODS,
        unpaired=recipe.training.method == "kto",
        room=options.max_completion_length if (options := rollout_options(recipe)) else None,
        kept=recipe.rewards.columns,
        seed=recipe.training.seed,
        stop_token_ids=_declared_stops(recipe),
        date=datetime.date.fromisoformat(recorded.date) if recorded and recorded.date else None,
    )


def texts_to_compare(
    recipe: Recipe, artifact: Path, *, held_out: bool = True
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids and labels of the recipe's held-out examples, or of its training examples; no plan is made, and no
    model loaded.

    Args:
        artifact: the adapter, which says how its run's conversations were written.

    Raises:
        DataError: there are none, or they cannot be used. ModelError: no tokenizer.
    """
    longest = recipe.training.max_length
    few = recipe.data.model_copy(update={"max_samples": _BESIDE if held_out else _COMPARED})
    recipe = recipe.model_copy(update={"data": few})
    tokenizer, recorded = _tokenizer_of(recipe), _recorded_form(artifact.parent, artifact)
    batches = _batches_of(recipe, tokenizer, _LONGEST_WINDOW if longest == "auto" else longest, recorded)
    rows = batches.validation if held_out else batches.train
    if rows is None:
        raise DataError("the recipe holds out no examples")
    found = rows[:_COMPARED]
    return found["input_ids"], found["labels"]


def step_shape(batches: Batches, plan: Plan) -> StepShape:
    """The longest training sequence and its labels, packed or not; of packed ones a bound, since TRL packs later.

    Of what is held out, the longest sequence that is looked at, the most labels of one, and the longest prompt, or that
    of the prompts which the model answers for its head.
    """
    training = plan.recipe.training
    lengths, labels = sequence_lengths(batches.train), count_trained(batches.train)
    looked_at = held_out(batches, plan)
    others = [] if looked_at is None else [int(f(looked_at).max()) for f in (sequence_lengths, count_trained)]
    questions = batches.held_out[: plan.recipe.eval.max_samples] if plan.recipe.eval.enabled and others else ()
    prompts = [len(question.prompt_ids) for question in questions] + list(map(len, own_prompts(batches, plan)))
    beside = (*(others or (0, 0)), max(prompts, default=0))
    longest = int(lengths.max())
    if options := rollout_options(plan.recipe):
        return _written(batches, plan, options.max_completion_length, beside)
    if batches.judged:  # answers begin where the prompt ends; positions between their turns are in the union, too
        labels = lengths - first_trained(batches.train)
    if not training.packing:
        one = training.per_device_train_batch_size == 1
        shape = StepShape(longest, int(labels.max()) if one else longest, *beside)
        return replace(shape, **_behind_one_prompt(batches.train)) if training.sides == 2 else shape
    length = min(plan.max_length, int(lengths.sum()))
    return StepShape(length, _most_labels(lengths, labels, length), *beside)


def _behind_one_prompt(pairs: Dataset) -> dict[str, int]:
    """Most tokens that pairs have with their prompt once, each answer after the prompt's last token, and most labels:
    in a batch of the longest of each."""
    prompts, answers = (int(tokens.max()) for tokens in prompts_and_answers(pairs))
    return {"pair": prompts - 1 + answers + 2, "pair_labelled": answers}


def _written(batches: Batches, plan: Plan, room: int, beside: tuple[int, ...]) -> StepShape:
    """The longest prompts with answers of full length; of held-out ones too, or the given answer where it is longer."""
    asked = [batches.questions, batches.held_out_questions[: plan.recipe.eval.max_samples]]
    prompts = [max((len(question.prompt_ids) for question in each), default=0) for each in asked]
    held_out = (max(beside[0], prompts[1] + room), max(beside[1], room)) if prompts[1] else (0, 0)
    return StepShape(prompts[0] + room, room, *held_out, max(beside[2], prompts[1]))


def _most_labels(lengths: NDArray[np.int64], labels: NDArray[np.int64], room: int) -> int:
    """A bound on the labels in one packed sequence of `room` tokens: of the rows that are labelled most densely."""
    share = labels / lengths
    order = np.lexsort((lengths, share))[::-1]
    taken = np.diff(np.minimum(np.cumsum(lengths[order]), room), prepend=0)
    return max(1, math.ceil(float((share[order] * taken).sum())))


def general_text(tokenizer: PreTrainedTokenizerBase, plan: Plan) -> Dataset | None:
    """The recipe's general text in windows."""
    path, longest = plan.recipe.eval.regression, plan.recipe.training.max_length
    length = _LONGEST_WINDOW if longest == "auto" else min(longest, _LONGEST_WINDOW)
    return read_windows(tokenizer, Path(path), length) if path else None


def held_out(batches: Batches, plan: Plan) -> Dataset | None:
    """The held-out sequences that the recipe wants looked at; of pairs both answers, one after the other."""
    if batches.validation is None:
        return None
    most = (2 if batches.pairs else 1) * (plan.recipe.eval.max_samples or 1 << 40)
    return batches.validation.select(range(min(len(batches.validation), most)))


_LONGEST_WINDOW = 512
"""Tokens of general text that are looked at together."""
_COMPARED = 256
"""Examples whose logits an export may compare; it takes a few hundred tokens of them."""
_BESIDE = 4
"""Training examples that are read for the sake of the held-out ones beside them."""


def _declared_stops(recipe: Recipe) -> list[int]:
    """Token ids at which the checkpoint's own generation stops."""
    place = (recipe.model.model_name_or_path, recipe.model.revision)
    ends = getattr(read_generation_config(*place), "eos_token_id", None)
    if ends is None:
        ends = getattr(read_config(*place).get_text_config(), "eos_token_id", None)
    return [int(end) for end in (ends if isinstance(ends, list) else [ends]) if end is not None]


def record_form(run: RunFolder, form: ChatForm) -> None:
    """Write down how the run's model is asked, unless that was done when the run began."""
    if not run.chat.is_file():
        write_text(run.chat, json.dumps(form.to_dict(), indent=2))


def _recorded_form(folder: Path, artifact: Path | None = None) -> ChatForm | None:
    """What a run folder, or else its artifact, says of how its model is asked."""
    run = RunFolder(folder)
    if run.chat.is_file():
        return ChatForm.from_dict(json.loads(run.chat.read_text(encoding="utf-8")))
    if artifact is None:
        return None
    return ChatForm.from_dict(read_manifest(artifact).get("chat") or {})


def dialogue(tokenizer: PreTrainedTokenizerBase, plan: Plan, artifact: Path) -> Dialogue:
    """Prompts and answers as in the run that `artifact` came from, under the plan's template options."""
    recorded = _recorded_form(artifact.parent, artifact) or ChatForm()
    data = plan.recipe.data
    stops = sorted({*recorded.stop_token_ids, *_declared_stops(plan.recipe)})
    form = replace(
        recorded,
        stop_token_ids=tuple(stops),
        chat_template_kwargs=data.chat_template_kwargs,
        system_prompt=data.system_prompt,
    )
    return Dialogue(tokenizer, form)


def stop_as_trained(model: PreTrainedModel, form: ChatForm) -> None:
    """Let every generation of `model` end at the tokens that ended answers in training."""
    config: Any = model.generation_config
    config.eos_token_id = list(form.stop_token_ids)
