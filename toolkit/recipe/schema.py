"""The typed recipe: one frozen pydantic model per section, bounds in the types, a docstring under each field.

Field names are those of transformers, PEFT and TRL, word for word, so that what users know and what the libraries'
own documentation says carries over. The docstrings become the JSON Schema that `onecard schema` prints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from toolkit.recipe.bounds import Fraction, NonEmpty, NonNegative, Positive, Section
from toolkit.recipe.elsewhere import HubSection, TrackingSection
from toolkit.recipe.methods import DpoSection, Optimizer, Schedule, misfits, with_method
from toolkit.recipe.preference import KtoSection, OrpoSection, SimpoSection
from toolkit.recipe.rollouts import GrpoSection, RewardsSection, RlooSection
from toolkit.recipe.weights import PlacementSection, QuantizationSection

__all__ = [
    "DataSection",
    "DpoSection",
    "EvalSection",
    "GrpoSection",
    "HubSection",
    "LoraSection",
    "ModelSection",
    "MtpSection",
    "PlacementSection",
    "QuantizationSection",
    "Recipe",
    "RewardsSection",
    "RlooSection",
    "TrackingSection",
    "TrainSource",
    "TrainingSection",
]


class ModelSection(Section):
    """Which checkpoint is fine-tuned, and how its attention is computed."""

    model_name_or_path: NonEmpty
    """A folder with a transformers checkpoint (safetensors), a Hub repository `owner/name`, or a GGUF file."""
    revision: NonEmpty = "main"
    """Hub branch, tag or commit; the commit it resolves to is recorded in the run."""
    tokenizer_name_or_path: NonEmpty | None = None
    """A folder or a Hub repository with another tokenizer than the checkpoint's; the artifact carries it."""
    merge_base: NonEmpty | None = None
    """The 16-bit checkpoint that a quantised one was made from, folder or Hub repository: `export` merges into it."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype of what is not int8; `auto` is bfloat16 on a card and float32 on a CPU."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "auto"
    """transformers' attention backend; `auto` is its own choice for the family, and SDPA where that is eager because of
    attention sinks (gpt-oss). Packing is exact on every one."""
    new_tokens: list[NonEmpty] = []
    """Tokens to add to the tokenizer, such as `["<call>", "</call>"]`. Of embedding and head their rows alone are
    trained (PEFT's trainable tokens); each starts as the mean of the pieces that the tokenizer made of it."""
    trained_tokens: list[NonEmpty] = []
    """Tokens that the tokenizer has and the base never learnt, such as `["<|im_end|>"]` of a base without chat: of
    embedding and head their rows are trained as well, from what they are."""

    @property
    def row_tokens(self) -> list[str]:
        """All tokens whose rows are trained, new ones first."""
        return [*self.new_tokens, *self.trained_tokens]

    @model_validator(mode="after")
    def _each_token_once(self) -> ModelSection:
        for field, tokens in (("new_tokens", self.new_tokens), ("trained_tokens", self.trained_tokens)):
            for token in tokens:
                if self.row_tokens.count(token) > 1:
                    raise ValueError(f"{field}: {token!r} is there twice; keep one")
                if not token.strip():
                    raise ValueError(f"{field}: {token!r} is white space; give a token that can be seen")
        return self


class LoraSection(Section):
    """The adapter. Experts and router are adapted by default; PEFT's names and meanings."""

    r: Positive | Literal["auto"] = 16
    """Rank; `auto` is the largest of 8, 16, 32 and 64 that fits the device."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    """Scale of the update: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with rsLoRA."""
    lora_dropout: Fraction = 0.0
    """Dropout before A. PEFT cannot apply it to expert stacks or routers, so it must be 0 where those are adapted."""
    use_rslora: bool = False
    """Rank-stabilised scaling."""
    use_dora: bool = False
    """Weight-decomposed LoRA (DoRA), which PEFT has for linears alone: `target_modules` without experts and router."""
    experts: bool = True
    """Adapt every expert stack."""
    router: bool = True
    """Adapt every router."""
    target_modules: Literal["attention", "all-linear", "none"] | Annotated[list[NonEmpty], Field(min_length=1)] = (
        "attention"
    )
    """Other linear layers to adapt: those of the attention (or state-space) block, all of them (shared
    experts and dense layers too), none, or a list of names as PEFT matches them."""
    rank_pattern: dict[NonEmpty, Positive] = {}
    """Ranks per part: `experts`, `router`, or a module name as PEFT matches it."""
    alpha_pattern: dict[NonEmpty, Annotated[float, Field(gt=0)]] = {}
    """Alphas per part, with the same keys."""
    adapter_name_or_path: NonEmpty | None = None
    """Start from this adapter (a folder in PEFT's layout) instead of a fresh one."""

    @model_validator(mode="after")
    def _something_to_train(self) -> LoraSection:
        if not self.experts and not self.router and self.target_modules == "none":
            raise ValueError("nothing would be trained: set experts, router or target_modules")
        if self.lora_dropout and (self.experts or self.router):
            raise ValueError("lora_dropout must be 0 where experts or router are adapted (PEFT refuses it there)")
        if self.use_dora and (self.experts or self.router):
            raise ValueError("use_dora: PEFT has DoRA for linears alone; set experts: false and router: false")
        return self


class MtpSection(Section):
    """The multi-token-prediction head: it drafts tokens that the model then checks, several in one pass."""

    enabled: bool = False
    """Train a multi-token-prediction head beside the adapter: the checkpoint's own where it has one, else a new one."""
    num_mtp_layers: Positive = 1
    """Layers of a new head; a checkpoint's own head keeps its own."""
    depth: Positive = 1
    """Tokens ahead that are trained, and drafted by default; beyond the head's layers its last one is applied again."""
    head_learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate of the head, which has an optimizer of its own; it follows the adapter's schedule."""
    loss: Literal["kl", "ce"] = "kl"
    """What the head learns: the adapted model's distribution at that position, or the token there."""
    loss_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the head's loss in the adapter's. At 0 the head is detached: the adapter is the same, bit for bit, as
    without a head."""
    stage: Literal["with", "after"] = "after"
    """When the head learns: `after` the adapter is finished, from the model's own answers, or `with` it in the same
    steps, from the data, and then from own answers as well. `after` with no own answers is a pass over the data."""
    own_answers: NonNegative | None = None
    """Training prompts that the finished model answers itself, in at most `eval.max_new_tokens`, for the head to learn
    from: drafts are judged by the model's text, not by the data's. With `loss: kl` it learns there what lies halfway
    between the model's distribution and its choice. Unset: one for each six examples that the steps read, 256 at most.
    """

    @property
    def reads_data(self) -> bool:
        """Whether a head learns from the training data."""
        return self.enabled and (self.stage == "with" or self.own_answers == 0)


_Format = Literal[
    "auto", "messages", "prompt-completion", "alpaca", "sharegpt", "text", "preference", "unpaired", "prompt",
]  # fmt: skip


class TrainSource(Section):
    """One of several data sets to train on, as an item of `data.train`."""

    path: NonEmpty
    """A file, a folder or a Hub dataset, as `data.train` is otherwise."""
    weight: Annotated[float, Field(gt=0.0, le=1000.0)] = 1.0
    """How often an epoch sees each example: 2 is twice; 0.5 is a half of them, drawn with the seed, the same in each
    epoch."""
    format: _Format | None = None
    """Shape of a row; without it, `data.format`."""
    max_samples: Positive | None = None
    """Use only this many of its examples, drawn with the seed; the weight counts from there."""
    name: NonEmpty | None = None
    """Configuration name of a Hub dataset; without it, `data.name`."""
    split: NonEmpty | None = None
    """Split of a Hub dataset or folder; without it, `data.train_split`."""
    columns: dict[NonEmpty, NonEmpty] | None = None
    """Our column name to this set's; without it, `data.columns`."""

    def located(self, find: Callable[[str], str | None]) -> TrainSource:
        """With its path as `find` finds it, where it does."""
        return self.model_copy(update={"path": find(self.path) or self.path})

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        if not isinstance(value, (str, dict, TrainSource)):
            raise ValueError(f"a data set is a name, or an item with a path, not {value!r}"[:100])
        return {"path": value} if isinstance(value, str) else value


class DataSection(Section):
    """Where the examples come from, what they look like, and which of their tokens are trained."""

    train: NonEmpty | Annotated[list[TrainSource], Field(min_length=1)]
    """A file such as `.jsonl`, `.csv`, `.parquet` or `.jsonl.gz`, a folder of them, or a Hub dataset
    `owner/name`; or a list of several, each a name or an item with a `path` and the fields below."""
    validation: NonEmpty | None = None
    """Held-out examples, given like `train`."""
    validation_size: Annotated[float, Field(gt=0.0, lt=1.0)] | Positive | None = None
    """Without `validation`: hold out this share, or this many, of the training examples."""
    name: NonEmpty | None = None
    """Configuration name of a Hub dataset."""
    train_split: NonEmpty = "train"
    """Split of a Hub dataset, or of a folder whose file names carry split names."""
    validation_split: NonEmpty | None = None
    """Split of the Hub dataset or folder `train` to hold out, where it has one; of each, where `train` is a list."""
    group_by: NonEmpty | None = None
    """A column of yours: rows with the same value of it are never both trained on and held out."""
    format: _Format = "auto"
    """Shape of a row; `auto` reads it off the columns."""
    columns: dict[NonEmpty, NonEmpty] = {}
    """Our column name to yours, e.g. `{prompt: question, completion: answer}`."""
    remove_columns: list[NonEmpty] = []
    """Columns of yours to ignore."""
    dedupe: bool = False
    """Leave out training examples that are copies of others, or whose prompt is held out."""
    system_prompt: NonEmpty | None = None
    """Put before every conversation that has no system turn."""
    chat_template_path: NonEmpty | None = None
    """A Jinja file to use instead of the tokenizer's chat template; it is saved with the adapter."""
    chat_template_kwargs: dict[NonEmpty, Any] = {}
    """Options of the chat template, such as `{enable_thinking: false}`; training and inference use them. A
    row's own column of that name overrides them."""
    thoughts: Literal["keep", "drop"] = "keep"
    """Train thoughts (`reasoning_content`, `thinking`, `reasoning`, `<think>…</think>`), or leave them out."""
    train_on: Literal["all", "last"] = "all"
    """Train every assistant turn of a conversation, or its last one. A turn with `train: false`, `weight: 0` or
    `loss: false` never is."""
    assistant_only_loss: bool = True
    """Train on assistant turns only (conversations)."""
    completion_only_loss: bool = True
    """Train on completions only (prompt and completion)."""
    truncation: Literal["drop", "keep_start"] = "drop"
    """What happens to an example longer than `training.max_length`: dropped and counted, or cut at the end."""
    on_invalid: Literal["error", "drop"] = "error"
    """An example that cannot be used (no role, empty answer, …): refuse the data set, or drop and count it."""
    max_samples: Positive | None = None
    """Use only this many training examples, drawn with the seed."""
    shuffle: bool = True
    """Shuffle the training examples with the seed."""

    @model_validator(mode="after")
    def _one_validation(self) -> DataSection:
        given = [k for k in ("validation", "validation_size", "validation_split") if getattr(self, k) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: keep one")
        return self


class TrainingSection(Section):
    """TRL's and transformers' training arguments."""

    output_dir: NonEmpty = "runs/run"
    """The run's folder: recipe, metrics, checkpoints, adapter."""
    method: Literal["sft", "dpo", "kto", "orpo", "simpo", "grpo", "rloo"] = "sft"
    """What is learnt from: single answers (supervised fine-tuning), preferences, or rewards. `dpo`, `orpo` and `simpo`
    take pairs of a better and a worse answer, `kto` also answers that are called good or bad one by one; `grpo` and
    `rloo` reward answers that the model writes."""
    loss_type: Literal["nll", "dft"] = "nll"
    """Of single answers: cross entropy, or dynamic fine-tuning (DFT), which weighs each token by its probability."""
    label_smoothing_factor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each label that is spread over the vocabulary. Held-out losses are neither smoothed nor weighed."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training examples."""
    max_steps: Positive | None = None
    """Optimizer steps; overrides `num_train_epochs`."""
    per_device_train_batch_size: Positive = 1
    """Sequences (packed ones, with packing) in one forward pass; with `dpo`, `orpo` and `simpo` pairs, of two
    sequences each; with `grpo` and `rloo` written answers."""
    gradient_accumulation_steps: Positive = 1
    """Forward passes per optimizer step; the loss is normalised over all their trained tokens."""
    max_length: Positive | Literal["auto"] = 1024
    """Tokens in a sequence, packed or not. `auto` is the longest that fits the device and data or model can use."""
    packing: bool = True
    """Pack several examples into one sequence by a block-diagonal mask: none sees another. Off with preferences and
    rewards, and, if not asked for, where layers with a running state lack the package that keeps examples apart."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = None
    """LoRA+: how many times the learning rate the Bs learn with, those of experts too; the same rate without it."""
    lr_scheduler_type: Schedule = "cosine"
    """Schedule after the warm-up, by transformers' name."""
    lr_scheduler_kwargs: dict[str, Any] = {}
    """Its options by transformers' names: `{min_lr_rate: 0.1}`; `warmup_stable_decay` needs `num_decay_steps`."""
    warmup_steps: Annotated[float, Field(ge=0)] = 0.03
    """Steps of warm-up; below 1 it is a share of all steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradient clipping."""
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    """NEFTune: how much noise is added to embeddings in training; its paper takes 5 to 15."""
    max_nonfinite_steps: Positive = 3
    """Non-finite steps (loss or gradient) in a row that end the run; fewer are skipped and reported."""
    optim: Optimizer = "adamw_torch"
    """The optimizer, by transformers' name; `schedule_free_adamw` averages its steps in place of a schedule."""
    adam_beta1: Fraction = 0.9
    """AdamW's first decay."""
    adam_beta2: Fraction = 0.999
    """AdamW's second decay."""
    gradient_checkpointing: bool = True
    """Recompute activations in backward instead of keeping them."""
    activation_offloading: bool = False
    """Keep activations in host memory between forward and backward; on a card only."""
    router_aux_loss_coef: Annotated[float, Field(ge=0)] | None = None
    """Weight of the load-balancing loss; without it the model's own coefficient, where the router is trained."""
    logging_steps: Positive = 1
    """Steps between two lines of metrics."""
    eval_steps: Annotated[float, Field(gt=0)] | None = None
    """Steps (below 1: share of all steps) between two evaluations; without it, once an epoch."""
    per_device_eval_batch_size: Positive = 8
    """Sequences in one evaluation pass."""
    save_steps: Annotated[float, Field(gt=0)] = 500
    """Steps (below 1: share of all steps) between two checkpoints."""
    save_total_limit: Positive = 2
    """Checkpoints kept, two at least; the one of the best held-out loss stays beside them."""
    load_best_model_at_end: bool = False
    """End with the adapter of the best evaluation by `eval.metric` instead of the last one."""
    early_stopping_patience: Positive | None = None
    """Stop after this many evaluations in a row that were not better by `eval.metric`."""
    seed: NonNegative = 42
    """Seed of initialisation, shuffling and sampling."""
    dataloader_num_workers: NonNegative = 0
    """Worker processes that collate batches."""
    use_cpu: bool = False
    """Use the CPU even where there is a card."""

    @property
    def sides(self) -> int:
        """Sequences that one example of a batch becomes: a pair's two, else one."""
        return 2 if self.method in ("dpo", "orpo", "simpo") else 1


class EvalSection(Section):
    """What is measured on held-out examples, before and after training."""

    enabled: bool = True
    """Compare base and adapted model after training, where there are held-out examples."""
    metric: NonEmpty = "loss"
    """What is best: `loss`, `exact_match`, `token_f1`, `rouge_l`, `json_valid`, or a function of yours, as
    `file.py:function` or `module:function`, from answer and wanted answer to a number; higher is better. With
    preferences also `rewards/margins` of the held-out answers, and `rewards/accuracies` of pairs; with `grpo` and
    `rloo` it is `reward` by default, of the answers that the model writes to held-out prompts."""
    regression: NonEmpty | None = None
    """A UTF-8 file of general text; its perplexity before and after shows forgetting."""
    max_samples: Positive | None = 200
    """Held-out examples looked at, for the loss (during training too) and for generation; `null` for all."""
    max_new_tokens: Positive = 32
    """Longest generated answer."""
    batch_size: Positive = 32
    """Prompts generated together."""
    num_samples: NonNegative = 2
    """Answers shown."""


class Recipe(Section):
    """A whole recipe. Frozen; `load` builds it from YAML and overrides."""

    model: ModelSection
    """Which checkpoint is fine-tuned."""
    quantization: QuantizationSection = QuantizationSection()
    """What is stored in 8 bit."""
    placement: PlacementSection = PlacementSection()
    """Where expert stacks and embedding live."""
    lora: LoraSection = LoraSection()
    """The adapter."""
    mtp: MtpSection = MtpSection()
    """The multi-token-prediction head."""
    data: DataSection
    """The examples."""
    training: TrainingSection = TrainingSection()
    """The training run."""
    dpo: DpoSection = DpoSection()
    """Learning from pairs, against a reference."""
    kto: KtoSection = KtoSection()
    """Learning from good and bad answers, against a reference."""
    orpo: OrpoSection = OrpoSection()
    """Learning from pairs and from the better answers at once."""
    simpo: SimpoSection = SimpoSection()
    """Learning from pairs by mean log-probabilities, without a reference."""
    rewards: RewardsSection = RewardsSection()
    """What written answers are worth."""
    grpo: GrpoSection = GrpoSection()
    """Learning from rewards, compared within a prompt's answers."""
    rloo: RlooSection = RlooSection()
    """The same, each answer against the mean of the others."""
    eval: EvalSection = EvalSection()
    """What is measured."""
    tracking: TrackingSection = TrackingSection()
    """Metric trackers."""
    hub: HubSection = HubSection()
    """Upload."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, values: Any) -> Any:
        return with_method(values)

    @model_validator(mode="after")
    def _fits_the_method(self) -> Recipe:
        for misfit in misfits(self):
            raise misfit
        return self
