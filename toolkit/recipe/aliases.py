"""Names that users of other toolkits type, as data."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["ALIASES", "NEGATED", "NOT_HERE"]

ALIASES: Mapping[str, str] = {
    "base_model": "model.model_name_or_path",
    "model_name": "model.model_name_or_path",
    "model_id": "model.model_name_or_path",
    "model_revision": "model.revision",
    "torch_dtype": "model.dtype",
    "lora_r": "lora.r",
    "rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "dora": "lora.use_dora",
    "lora_target_modules": "lora.target_modules",
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_path": "data.train",
    "dataset_name": "data.train",
    "train_file": "data.train",
    "validation_file": "data.validation",
    "val_set_size": "data.validation_size",
    "test_size": "data.validation_size",
    "chat_template": "data.chat_template_path",
    "train_on_inputs": "data.assistant_only_loss",
    "sequence_len": "training.max_length",
    "max_seq_length": "training.max_length",
    "max_seq_len": "training.max_length",
    "cutoff_len": "training.max_length",
    "micro_batch_size": "training.per_device_train_batch_size",
    "batch_size": "training.per_device_train_batch_size",
    "eval_batch_size": "training.per_device_eval_batch_size",
    "num_epochs": "training.num_train_epochs",
    "epochs": "training.num_train_epochs",
    "lr": "training.learning_rate",
    "lr_scheduler": "training.lr_scheduler_type",
    "warmup_ratio": "training.warmup_steps",
    "optimizer": "training.optim",
    "label_smoothing": "training.label_smoothing_factor",
    "sample_packing": "training.packing",
    "aux_loss_coef": "training.router_aux_loss_coef",
    "wandb_name": "tracking.run_name",
    "push_dataset_to_hub": "hub.push_to_hub",
    "hf_token": "hub.hub_token",
}
"""Names that other toolkits use, and ours."""

NEGATED = frozenset({"train_on_inputs"})
"""Aliases that say the opposite of ours."""

NOT_HERE: Mapping[str, str] = {
    "trust_remote_code": "it is always off: no code from a checkpoint is run",
    "init_lora_weights": (
        "B begins as zero; PiSSA, OLoRA and their like move a part of the base's weights into the adapter, and the "
        "base that it is compared with, and that others have, would be another than the one it is trained on"
    ),
}
"""Names that have no field, and why."""
