"""What is used of other libraries beyond their documented interface, as data: one place to look when one moves it.

Each is a seam where transformers, TRL, PEFT, Accelerate or torch offers nothing public for the purpose. The pinned
versions have all of them; `check` says of a newer one what is gone, before a run fails somewhere inside.
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version

__all__ = ["SEAMS", "Seam"]


@dataclass(frozen=True)
class Seam:
    """A name inside `library`: a module's, a class's, or one that its code gives to instances.

    `used_by` are the rooms of ours that use it, `why` is what for.
    """

    library: str
    name: str
    used_by: tuple[str, ...]
    why: str

    def check(self) -> str | None:
        """One line about what moved, None where all is as it was. Imports the library.

        None too where a part of it that is not installed here (an extra) stands in the way.
        """
        try:
            if _is_there(self.library, self.name.split(".")):
                return None
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != self.library:
                return None
        rooms = ", ".join(f"toolkit/{room}" for room in self.used_by)
        return (
            f"{self.library} {version(self.library)}: {self.name} is gone, used in {rooms} {self.why}; install the "
            f"{self.library} that pyproject.toml names"
        )


def _is_there(library: str, parts: list[str]) -> bool:
    found = import_module(library)
    for number, part in enumerate(parts):
        try:
            found = import_module(".".join([library, *parts[: number + 1]])) if inspect.ismodule(found) else found
            is_module = inspect.ismodule(found) and found.__name__.endswith(f".{part}")
        except ModuleNotFoundError as error:
            if error.name != ".".join([library, *parts[: number + 1]]):
                raise
            is_module = False
        if not is_module:
            if not hasattr(found, part):
                return number == len(parts) - 1 and _is_given_to_instances(found, part)
            found = getattr(found, part)
    return True


def _is_given_to_instances(owner: object, name: str) -> bool:
    """Whether the code that `owner` stands in names it."""
    module = owner if inspect.ismodule(owner) else sys.modules[str(getattr(owner, "__module__", "sys"))]
    try:
        return re.search(rf"\b{name}\b", inspect.getsource(module)) is not None
    except (OSError, TypeError):  # an empty file, or a compiled one
        return False


def _at(place: str, rooms: str, why: str, *names: str) -> tuple[Seam, ...]:
    """A row of the table: names at one place of a library, for one purpose."""
    library, _, inside = place.partition(".")
    return tuple(Seam(library, f"{inside}.{name}".lstrip("."), tuple(rooms.split()), why) for name in names)


SEAMS = (
    # transformers: loading
    *_at(
        "transformers.conversion_mapping",
        "checkpoint export mtp plan quant",
        "to convert keys as the loader does",
        "get_model_conversion_mapping",
    ),
    *_at(
        "transformers.core_model_loading",
        "quant",
        "to put rounding into the loader's conversions",
        "Concatenate",
        "ConversionOps",
        "MergeModulelist",
    ),
    *_at(
        "transformers.core_model_loading",
        "checkpoint mtp quant",
        "to convert keys as the loader does",
        "WeightConverter",
        "convert_and_load_state_dict_in_model",
    ),
    *_at(
        "transformers.core_model_loading.WeightConverter",
        "quant",
        "to copy a conversion with rounding at its end",
        "_original_source_patterns",
        "_original_target_patterns",
    ),
    *_at(
        "transformers.core_model_loading",
        "checkpoint mtp",
        "to convert keys as the loader does",
        "WeightRenaming",
        "rename_source_key",
    ),
    *_at("transformers.core_model_loading", "mtp", "to convert keys as the loader does", "dot_natural_key"),
    *_at(
        "transformers.core_model_loading",
        "adapters checkpoint export",
        "to know a family's own keys",
        "revert_weight_conversion",
    ),
    *_at(
        "transformers.modeling_utils",
        "checkpoint mtp quant",
        "to convert keys as the loader does",
        "LoadStateDictConfig",
    ),
    *_at(
        "transformers.modeling_utils.PreTrainedModel",
        "architecture",
        "to find the routers that are recorded",
        "_can_record_outputs",
    ),
    *_at(
        "transformers.modeling_utils.PreTrainedModel",
        "architecture",
        "to know layers that keep a running state",
        "_is_stateful",
    ),
    *_at(
        "transformers.modeling_utils.PreTrainedModel",
        "checkpoint",
        "to know which keys a checkpoint may lack",
        "_keys_to_ignore_on_load_missing",
        "all_tied_weights_keys",
    ),
    *_at(
        "transformers.integrations.gguf.dequant",
        "checkpoint",
        "to multiply blocks of GGUF files out on a card",
        "GGML_NAME",
        "dequantize",
    ),
    *_at(
        "transformers.integrations.gguf.gguf_tokenizer_mapping",
        "checkpoint",
        "to know which tokenizers of GGUF files it builds right",
        "GGUF_PRE_TOKENIZER_SPLITS",
    ),
    *_at("transformers.core_model_loading", "quant", "to save int8 weights under their names", "_weight_conversions"),
    *_at(
        "transformers.core_model_loading",
        "quant",
        "to keep int8 parameters from random values, and see which were read",
        "_is_hf_initialized",
    ),
    *_at(
        "transformers.modeling_utils",
        "checkpoint quant",
        "to have int8 checkpoints refused where we are missing",
        "transformers_weights",
    ),
    *_at(
        "transformers.configuration_utils.PreTrainedConfig",
        "architecture mtp ops",
        "to mask and attend as the loaded model does, and to build no mask",
        "_attn_implementation",
    ),
    *_at("transformers.modeling_utils.PreTrainedModel", "architecture", "to know who masks", "_supports_flash_attn"),
    *_at(
        "transformers.configuration_utils.PreTrainedConfig",
        "adapters mtp quant",
        "to see and set which backend experts compute with",
        "_experts_implementation",
    ),
    *_at("transformers.configuration_utils.PreTrainedConfig", "offload", "to name a streamed model", "_name_or_path"),
    *_at(
        "transformers.configuration_utils.PreTrainedConfig",
        "checkpoint",
        "to look beside the config that was read for what modelopt says",
        "_commit_hash",
    ),
    *_at(
        "transformers.models.auto.modeling_auto.AutoModelForCausalLM",
        "architecture mtp",
        "to ask for a config's class",
        "_model_mapping",
    ),
    # transformers: quantisers
    *_at(
        "transformers.quantizers.auto", "quant", "to register the int8 format once", "AUTO_QUANTIZATION_CONFIG_MAPPING"
    ),
    *_at(
        "transformers.quantizers.base.HfQuantizer",
        "quant rehearsal",
        "to declare int8 parameters",
        "_process_model_before_weight_loading",
    ),
    *_at(
        "transformers.quantizers.base.HfQuantizer",
        "quant",
        "to refuse what was not read",
        "_process_model_after_weight_loading",
    ),
    *_at("transformers.quantizers.base.HfQuantizer", "quant", "to see the config first", "update_attn_implementation"),
    *_at("transformers.utils.quantization_config", "quant", "to declare the int8 format", "QuantizationConfigMixin"),
    *_at(
        "transformers.integrations.bitsandbytes",
        "quant",
        "to round linears with bitsandbytes",
        "Bnb8bitQuantize",
        "replace_with_bnb_linear",
    ),
    # transformers: experts, attention, heads
    *_at("transformers.integrations.moe", "ops", "to register the expert backends", "ALL_EXPERTS_FUNCTIONS"),
    *_at("transformers.integrations.moe", "architecture", "to know an experts module", "_is_expert_parallel"),
    *_at("transformers.integrations.moe", "architecture ops", "to know an experts module, and to gate", "_apply_gate"),
    *_at("transformers.integrations.sdpa_attention", "ops rehearsal", "to attend apart", "sdpa_attention_forward"),
    *_at(
        "transformers.masking_utils",
        "training",
        "to see whether masks keep documents apart",
        "create_masks_for_generate",
    ),
    *_at("transformers.masking_utils", "ops rehearsal", "to attend to documents apart", "sdpa_mask"),
    *_at("transformers.masking_utils", "ops", "to add masks", "ALL_MASK_ATTENTION_FUNCTIONS", "eager_mask"),
    *_at(
        "trl.trainer.sft_trainer",
        "evaluate ops training",
        "to ask for the load-balancing loss, or not",
        "output_router_logits",
    ),
    *_at("transformers.modeling_layers", "architecture mtp", "to build a head, and to see names", "MtpLayer"),
    *_at("transformers.modeling_layers", "mtp", "to load the head that a checkpoint carries", "MtpModel"),
    # transformers: generation, chat, serving
    *_at(
        "transformers.generation.candidate_generator",
        "mtp",
        "to draft from the prompt",
        "PromptLookupCandidateGenerator",
    ),
    *_at("transformers.generation.streamers", "serving", "to print an answer while it grows", "BaseStreamer"),
    *_at(
        "transformers.generation.utils.GenerationMixin",
        "mtp",
        "to draw as `generate` does",
        "_get_logits_processor",
        "_prepare_generation_config",
    ),
    *_at("transformers.utils.chat_template_utils", "data", "to compile chat templates", "_compile_jinja_template"),
    *_at("transformers.cli.serving.chat_completion", "serving", "to serve one loaded model", "ChatCompletionHandler"),
    *_at("transformers.cli.serving.completion", "serving", "to serve one loaded model", "CompletionHandler"),
    *_at("transformers.cli.serving.model_manager", "serving", "to serve one loaded model", "ModelManager"),
    *_at(
        "transformers.cli.serving.model_manager.ModelManager",
        "serving",
        "to serve one loaded model",
        "_load_model",
        "_load_processor",
    ),
    *_at("transformers.cli.serving.response", "serving", "to serve one loaded model", "ResponseHandler"),
    *_at("transformers.cli.serving.server", "serving", "to serve one loaded model", "build_server"),
    *_at("transformers.cli.serving.systemone", "serving", "to serve one loaded model", "SystemOneHandler"),
    *_at("transformers.cli.serving.transcription", "serving", "to serve one loaded model", "TranscriptionHandler"),
    *_at(
        "transformers.cli.serving.utils", "serving", "to serve one loaded model", "GenerateManager", "GenerationState"
    ),
    # transformers and TRL: the trainer
    *_at("transformers.trainer_callback", "training", "to take the trainer's own printing away", "PrinterCallback"),
    *_at("transformers.training_args.TrainingArguments", "training", "to use one card of several", "_n_gpu"),
    *_at("transformers.trainer.Trainer", "training", "to see gradients before the optimizer does", "_clip_grad_norm"),
    *_at(
        "transformers.trainer.Trainer",
        "training",
        "to go on with the mean loss of the whole run",
        "_globalstep_last_logged",
        "_initial_global_step",
        "_total_loss_scalar",
        "_tr_loss",
    ),
    *_at(
        "transformers.trainer.Trainer",
        "training",
        "to save and resume as sealed checkpoints do",
        "_init_training_state",
        "_load_from_checkpoint",
        "_load_optimizer_and_scheduler",
        "_load_rng_state",
        "_load_scaler",
        "_run_epoch",
        "_save_checkpoint",
    ),
    *_at(
        "transformers.trainer.Trainer", "mtp training", "to put batches where the trainer puts them", "_prepare_inputs"
    ),
    *_at(
        "transformers.trainer.Trainer",
        "training",
        "to probe a batch as the trainer would see it",
        "_remove_unused_columns",
    ),
    *_at(
        "trl.SFTTrainer",
        "training",
        "to add our metrics to TRL's, and to restore them",
        "_metrics",
        "_total_train_tokens",
    ),
    *_at("trl.chat_template_utils", "data", "to name TRL's template for training", "get_training_chat_template"),
    *_at("trl.DPOTrainer", "training", "to give it pairs that are tokenised", "_prepare_dataset"),
    *_at("trl.KTOTrainer", "training", "to give it answers that are tokenised", "_prepare_dataset"),
    *_at("trl.KTOTrainer", "training", "to compute mismatched answers once", "_compute_kl_logps"),
    *_at("trl.experimental.cpo", "training", "to have TRL's loss of SimPO", "CPOTrainer"),
    *_at("trl.experimental.orpo", "training", "to have TRL's loss of ORPO", "ORPOTrainer"),
    *_at(
        "trl.trainer.grpo_trainer.GRPOTrainer",
        "training",
        "to write and judge answers before a step, score them, and save those that wait",
        "_buffered_inputs",
        "_calculate_rewards",
        "_compute_loss",
        "_generate_and_score_completions",
        "_generate_single_turn",
        "_get_per_token_logps_and_entropies",
        "_pending_metrics",
        "_prepare_inputs",
        "_step",
        "_tokenize_prompts",
    ),
    *_at(
        "trl.trainer.rloo_trainer.RLOOTrainer",
        "training",
        "likewise",
        "_calculate_rewards",
        "_generate_and_score_completions",
        "_generate_single_turn",
        "_get_per_token_logps_and_entropies",
        "_tokenize_prompts",
    ),
    *_at(
        "trl.trainer.base_trainer._BaseTrainer",
        "training",
        "to send the Hub nothing that nobody asked for",
        "_send_telemetry",
    ),
    *_at("trl.trainer.utils", "rehearsal", "to ask whose logits TRL's head computes", "add_fused_lm_head"),
    *_at("trl.trainer.utils", "training", "to deal answers out to passes", "split_tensor_dict"),
    *_at("trl.kernels.chunked_logprob", "training", "to score labels without waiting", "ChunkedLogProbFunction"),
    *_at("trl.SFTTrainer", "training", "to ask for router logits where the balancing loss is on", "aux_loss_enabled"),
    *_at("trl.chat_template_utils", "data", "to know how a family writes calls", "add_response_schema"),
    *_at("trl.trainer.utils", "architecture", "to balance load as each family does", "load_balancing_loss_func"),
    # PEFT
    *_at("peft.LoraConfig", "adapters", "to put LoRA on int8 experts and linears", "_register_custom_module"),
    *_at("peft.tuners.trainable_tokens", "adapters", "to find the rows that an adapter holds", "TrainableTokensLayer"),
    *_at("peft.tuners.lora", "adapters", "to find the layers that an adapter holds", "LoraLayer"),
    *_at("peft.tuners.lora.layer", "adapters", "to adapt int8 linears", "Linear"),
    *_at("peft.tuners.lora.layer.LoraLayer", "adapters", "to refuse mixed batches as PEFT does", "_check_forward_args"),
    *_at("peft.tuners.lora.layer", "adapters", "to adapt expert stacks in PEFT's own layout", "ParamWrapper"),
    *_at("peft.tuners.lora.layer.ParamWrapper", "adapters", "to know which stack a wrapper adapts", "parameter_name"),
    *_at(
        "peft.tuners.lora.layer.ParamWrapper",
        "adapters",
        "to say the sizes of a stack whose bytes hold two numbers",
        "_get_in_out_features",
    ),
    *_at("peft.optimizers", "training", "to give the Bs a rate of their own", "create_loraplus_optimizer"),
    *_at("peft.tuners.tuners_utils", "adapters", "to hand PEFT a layer of ours", "BaseTunerLayer"),
    *_at(
        "peft.utils.other", "artifact", "to read patterns as PEFT does", "get_pattern_key", "match_target_against_key"
    ),
    *_at(
        "peft.utils.transformers_weight_conversion",
        "adapters",
        "to open adapters with a family's older names",
        "convert_peft_config_for_transformers",
    ),
    # torch
    *_at("torch.UntypedStorage", "rehearsal", "to count a storage once in a rehearsal", "_cdata"),
    *_at("torch.Tensor", "adapters", "to see that a frozen adapter was written to", "_version"),
    *_at("torch.nn.Module", "quant", "to empty a skeleton's buffers again", "_buffers"),
    *_at("torch", "ops", "to multiply int8 by int8", "_int_mm"),
    *_at("torch", "ops", "to multiply a few bf16 rows by int8", "_weight_int8pack_mm"),
    *_at("torch.cpu", "ops", "to know whether a CPU multiplies int8 by int8", "_is_vnni_supported"),
)
