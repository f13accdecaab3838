"""The sections of a recipe whose model writes answers and learns from rewards: the rewards, and two methods by TRL's
names and meanings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import gcd
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from toolkit.errors import did_you_mean
from toolkit.recipe.bounds import Misfit, NonEmpty, NonNegative, Positive, Section
from toolkit.recipe.sizes import Size, size_of

__all__ = [
    "REWARD",
    "ROLLOUTS",
    "GrpoSection",
    "RewardFunction",
    "RewardsSection",
    "RlooSection",
    "RolloutOptions",
    "keeps_start",
    "rollout_misfits",
    "rollout_options",
    "with_rollouts",
]

ROLLOUTS = ("grpo", "rloo")
"""Methods whose model writes the answers that it learns from."""
REWARD = "reward"
"""The figure of held-out prompts that an adapter is chosen by."""
_BUILT_IN: Mapping[str, str | None] = {
    "exact_match": None, "number": None, "json_valid": None, "regex": "pattern", "length": "tokens", "tests": "column",
}  # fmt: skip
"""Rewards that come with the package, and the option that each must have."""
_OPTIONS: Mapping[str, str] = {
    "pattern": "regex", "json_schema": "json_valid", "tokens": "length", "column": "tests", "seconds": "tests",
}  # fmt: skip
"""Whose an option is."""


class RewardFunction(Section):
    """A reward, as an item of `rewards.functions`."""

    function: NonEmpty
    """`exact_match`, `number` (the last one of the answer), `json_valid`, `regex`, `length`, `tests`; or a function of
    yours, as `file.py:function` or `module:function`, called as TRL calls its rewards."""
    weight: float = 1.0
    """What the reward is multiplied by in the sum."""
    name: NonEmpty | None = None
    """What it is called in the log; without it the function's name."""
    pattern: NonEmpty | None = None
    """Of `regex`: what must be found in the answer."""
    json_schema: NonEmpty | None = None
    """Of `json_valid`: a file with a JSON Schema that the answer must keep to."""
    tokens: Positive | None = None
    """Of `length`: up to so many tokens it gives 1, and from there less, down to 0 at twice as many."""
    column: NonEmpty | None = None
    """Of `tests`: the column of your data with Python, a text or a list of lines, that must run after the answer's."""
    seconds: Annotated[float, Field(gt=0)] | None = None
    """Of `tests`: what one answer may take; without it 5."""

    @property
    def label(self) -> str:
        """Its name in the log."""
        return self.name or self.function.rpartition(":")[2]

    @property
    def options(self) -> dict[str, Any]:
        """What a built-in reward is told."""
        found = {option: getattr(self, option) for option in _OPTIONS}
        return {option: value for option, value in found.items() if value is not None}

    def located(self, find: Callable[[str], str | None]) -> RewardFunction:
        """With its files as `find` finds them, where it does."""
        files = {"function": self.function if ".py:" in self.function else "", "json_schema": self.json_schema or ""}
        return self.model_copy(update={name: found for name, file in files.items() if (found := find(file))})

    @model_validator(mode="before")
    @classmethod
    def _function_alone(cls, value: Any) -> Any:
        if not isinstance(value, (str, dict, RewardFunction)):
            raise ValueError(f"a reward is a name, or an item with a function, not {value!r}"[:100])
        return {"function": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _has_its_options(self) -> RewardFunction:
        if ":" not in self.function and self.function not in _BUILT_IN:
            hint = did_you_mean(self.function, list(_BUILT_IN)) or f"; known: {', '.join(_BUILT_IN)}"
            raise ValueError(f"no reward {self.function}{hint}; one of yours is file.py:function or module:function")
        needed = _BUILT_IN.get(self.function)
        if needed and getattr(self, needed) is None:
            raise ValueError(f"{self.function} needs {needed}")
        for option in self.options:
            if self.function != _OPTIONS[option]:
                raise ValueError(f"{option} is for {_OPTIONS[option]}")
        return self


class RewardsSection(Section):
    """What a written answer is worth, for `training.method: grpo` and `rloo`."""

    functions: list[RewardFunction] = []
    """The rewards that are added up: names, or items with a `function` and the fields below."""
    columns: list[NonEmpty] = []
    """Further columns of the data that your functions are given, by their names."""
    time_limit: Annotated[float, Field(gt=0)] = 60.0
    """Seconds that one function may take for one batch; a step whose reward takes longer is left out."""
    memory_limit: Size = "4GiB"
    """Memory of the process in which rewards are computed."""

    @property
    def memory(self) -> int:
        """Bytes of `memory_limit`."""
        return size_of(self.memory_limit)

    @field_validator("functions")
    @classmethod
    def _different_names(cls, functions: list[RewardFunction]) -> list[RewardFunction]:
        labels = [function.label for function in functions]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"two rewards are called {label}; give one of them a name")
        return functions

    @model_validator(mode="after")
    def _columns_of_tests_are_kept(self) -> RewardsSection:
        wanted = [each.column for each in self.functions if each.column and each.column not in self.columns]
        self.columns.extend(dict.fromkeys(wanted))
        return self


class RolloutOptions(Section):
    """What both methods have."""

    num_generations: Annotated[int, Field(ge=2)] = 8
    """Answers written to each prompt, which are compared with each other."""
    num_generations_eval: Positive = 1
    """The same of held-out prompts."""
    max_completion_length: Positive = 256
    """Most tokens of a written answer."""
    steps_per_generation: Positive | None = None
    """Forward passes that learn from answers written at once; without it, those of one optimizer step."""
    num_iterations: Positive = 1
    """How often the same answers are learnt from."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """How close the model stays to its reference: the base or, with grpo, the adapter it starts from; 0 for none."""
    epsilon: Annotated[float, Field(gt=0)] = 0.2
    """How far the probability of an answer may move before it is clipped."""
    epsilon_high: Annotated[float, Field(gt=0)] | None = None
    """The same upwards, where it is another."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the answers: higher is more varied."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Write only tokens among the likeliest that have this probability together."""
    top_k: NonNegative = 0
    """Write only tokens among so many likeliest; 0 for all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Write only tokens at least this share as likely as the likeliest."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Above 1, tokens that stand there already are less likely."""
    mask_truncated_completions: bool = False
    """Learn nothing from answers that were cut at `max_completion_length`."""

    def at_once(self, training: Any) -> int:
        """Answers that are written together."""
        steps = self.steps_per_generation or training.gradient_accumulation_steps
        return int(training.per_device_train_batch_size * steps)

    def sharing(self, training: Any) -> int:
        """Answers of a forward pass that surely have one prompt: those of an optimizer step are dealt out by it."""
        whole_steps = training.gradient_accumulation_steps % (self.steps_per_generation or 1) == 0
        return gcd(training.per_device_train_batch_size, self.num_generations) if whole_steps else 1


class GrpoSection(RolloutOptions):
    """Group relative policy optimisation, for `training.method: grpo`; TRL's names and meanings."""

    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"] = "dapo"
    """How the tokens' losses become one."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What differences of rewards are divided by: the deviation within a prompt's answers, within all, or nothing."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Whether several rewards are added before or after they are scaled."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Whether probabilities are compared token by token, or of whole answers (GSPO)."""
    delta: Annotated[float, Field(gt=0)] | None = None
    """A second bound on how far probabilities may move, above `1 + epsilon`."""
    top_entropy_quantile: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learn only from this share of tokens, those that the model was least sure of."""


class RlooSection(RolloutOptions):
    """REINFORCE leave-one-out, for `training.method: rloo`; TRL's names and meanings."""

    normalize_advantages: bool = False
    """Scale differences of rewards by their deviation in the batch."""
    reward_clip_range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    """Bounds that a reward is cut to."""


def rollout_options(recipe: Any) -> RolloutOptions | None:
    """The options of a recipe's method, where its model writes the answers that it learns from."""
    if recipe.training.method not in ROLLOUTS:
        return None
    found: RolloutOptions = getattr(recipe, recipe.training.method)
    return found


def keeps_start(recipe: Any) -> bool:
    """Whether the reference is the adapter that training starts from, which is then held beside what it becomes."""
    return bool(recipe.training.method == "grpo" and recipe.grpo.beta and recipe.lora.adapter_name_or_path)


def with_rollouts(values: Any) -> Any:
    """A recipe's values before they are checked: written answers are not packed, they are judged by their reward, and
    held-out ones may be as long."""
    training = values.get("training") if isinstance(values, Mapping) else None
    if not isinstance(training, Mapping) or training.get("method") not in ROLLOUTS:
        return values
    method, judged = training["method"], values.get("eval") or {}
    changed: dict[str, Any] = {"training": {"packing": False, **training}}
    if isinstance(judged, Mapping):
        options = values.get(method)
        room = options.get("max_completion_length") if isinstance(options, Mapping) else None
        room = RolloutOptions.model_fields["max_completion_length"].default if room is None else room
        changed["eval"] = {"metric": REWARD, "max_new_tokens": room, **judged}
    return {**values, **changed}


def rollout_misfits(recipe: Any) -> Iterator[Misfit]:
    """What the sections say that these methods cannot do, or what is said for them and another method is chosen."""
    method = recipe.training.method
    sections = {"grpo": GrpoSection(), "rloo": RlooSection(), "rewards": RewardsSection()}
    for section, default in sections.items():
        own = section == method or (section == "rewards" and method in ROLLOUTS)
        if not own and getattr(recipe, section) != default:
            wanted = "grpo or rloo" if section == "rewards" else section
            yield Misfit(section, f"is for training.method: {wanted}; remove it, or set that")
    if method not in ROLLOUTS:
        if recipe.eval.metric == REWARD:
            yield Misfit("eval.metric", "reward is for training.method: grpo or rloo")
        return
    yield from _of_data(recipe, method)
    yield from _of_training(recipe, method, getattr(recipe, method))


def _of_data(recipe: Any, method: str) -> Iterator[Misfit]:
    data = recipe.data
    if not recipe.rewards.functions:
        yield Misfit("rewards.functions", f"{method} learns from rewards; name one, such as exact_match")
    if data.format in ("text", "preference"):
        yield Misfit("data.format", f"{data.format} has no prompt with one answer; {method} reads rows as sft does")
    if data.truncation != "drop":
        yield Misfit("data.truncation", "a prompt is never cut; remove the line")
    for field, only in (("train_on", "all"), ("assistant_only_loss", True), ("completion_only_loss", True)):
        if getattr(data, field) != only:
            yield Misfit(f"data.{field}", "the model writes the last answer itself and learns from it; remove the line")


def _of_training(recipe: Any, method: str, options: RolloutOptions) -> Iterator[Misfit]:
    training = recipe.training
    if training.packing:
        yield Misfit("training.packing", "written answers are padded, never packed; remove the line")
    if training.activation_offloading:
        yield Misfit("training.activation_offloading", f"{method} has none; remove the line")
    if recipe.mtp.reads_data:
        field = "mtp.stage" if recipe.mtp.stage == "with" else "mtp.own_answers"
        yield Misfit(field, "no answers are given that a head could learn from, but its own; remove the line")
    if recipe.lora.lora_dropout:
        yield Misfit("lora.lora_dropout", "answers are written and scored without dropout; remove the line")
    if training.max_length == "auto" or training.max_length <= options.max_completion_length:
        more = f"more than {method}.max_completion_length={options.max_completion_length}"
        yield Misfit("training.max_length", f"tokens of the longest prompt and its answer together, {more}")
    if (written := options.at_once(training)) % options.num_generations:
        yield Misfit(
            f"{method}.num_generations",
            f"{written} answers are written at once (training.per_device_train_batch_size times "
            f"{method}.steps_per_generation or training.gradient_accumulation_steps), no multiple of "
            f"{options.num_generations}",
        )
    if training.per_device_eval_batch_size % options.num_generations_eval:
        yield Misfit("training.per_device_eval_batch_size", f"must be a multiple of {method}.num_generations_eval")
    if recipe.eval.metric == "loss":
        yield Misfit("eval.metric", f"the loss of {method} does not say how good answers are; set reward")
    if recipe.eval.metric.startswith("rewards/"):
        yield Misfit("eval.metric", f"{recipe.eval.metric} is for pairs; set reward")
