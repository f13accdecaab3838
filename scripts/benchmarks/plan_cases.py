"""Whose memory `plan_memory.py` measures: families of 60 to 400 MB in int8, and what differs from case to case."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["CASES", "FAMILIES", "SIZES", "Case"]

SIZES = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8192,
         "num_hidden_layers": 4, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 512},
    "qwen2_moe": {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 512,
                  "intermediate_size": 1024, "shared_expert_intermediate_size": 1024},
    "qwen3_moe": {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 512, "head_dim": 64},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 1536},
    "deepseek_v2": {"n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4,
                    "moe_intermediate_size": 512, "intermediate_size": 1024, "first_k_dense_replace": 1,
                    "kv_lora_rank": 64, "q_lora_rank": None, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
                    "v_head_dim": 64, "num_key_value_heads": 8},
    "gpt_oss": {"num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 512, "head_dim": 64},
    "granitemoe": {"num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 512},
    "glm4_moe": {"n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4, "head_dim": 64,
                 "moe_intermediate_size": 512, "intermediate_size": 1024, "first_k_dense_replace": 1},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One row: a family and what differs from the defaults."""

    family: str
    length: int = 1024
    r: int = 16
    checkpointing: bool = True
    optim: str = "adamw_torch"
    router: bool = True
    packing: bool = True
    batch: int = 1
    accumulation: int = 1
    target_modules: str = "attention"
    share: float = 0.0
    """Of the MoE layers, streamed from the disk."""
    drafts: int = 0
    """Depth of a multi-token-prediction head that is trained beside, 0 for none."""
    answers: int = 0
    """Of the model's own, that the head learns from when the steps are over, instead of beside them."""
    method: str = "sft"
    """As `training.method`; the second half of each sequence is then the answer."""
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def answered(self) -> int:
        """Tokens of a sequence's answer; without preferences all count."""
        return self.length - 1 if self.method == "sft" else self.length // 2

    @property
    def text(self) -> str:
        """What differs, in words."""
        parts = ["" if self.method == "sft" else self.method, f"r {self.r}", self.optim]
        parts += ["recomputed" if self.checkpointing else "kept"]
        parts += ["" if self.router else "no router", "" if self.packing else f"padded, batch {self.batch}"]
        parts += [f"{self.accumulation} micro-batches" if self.accumulation > 1 else ""]
        parts += ["" if self.target_modules == "attention" else self.target_modules]
        parts += [f"{self.share:.0%} streamed" if self.share else ""]
        parts += [f"head, {self.drafts} drafts" if self.drafts else ""]
        parts += [f"{self.answers} own answers" if self.answers else ""]
        return ", ".join(part for part in [*parts, *(f"{k} {v}" for k, v in self.config.items())] if part)


CASES = [
    Case("qwen3_moe", length=512, share=1.0, accumulation=4),
    *(Case(family, share=1.0) for family in ("qwen3_moe", "mixtral", "gpt_oss")),
    Case("qwen3_moe", share=0.5, config={"num_hidden_layers": 8}),
    Case("olmoe", share=0.5, checkpointing=False),
    *(Case(family) for family in FAMILIES),
    *(Case(family, checkpointing=False) for family in FAMILIES),
    *(Case("qwen3_moe", length=length) for length in (256, 512, 2048)),
    *(Case("olmoe", length=length, checkpointing=False) for length in (512, 2048)),
    *(Case("qwen3_moe", r=r) for r in (4, 64)),
    *(Case("mixtral", r=r, checkpointing=False) for r in (8, 32)),
    *(Case(family, optim="adamw_bnb_8bit") for family in ("qwen3_moe", "olmoe", "deepseek_v2")),
    Case("qwen2_moe", router=False),
    Case("deepseek_v2", target_modules="all-linear"),
    Case("granitemoe", packing=False, batch=2, length=512),
    Case("qwen3_moe", packing=False, batch=4, length=512, checkpointing=False),
    Case("olmoe", accumulation=3),
    Case("qwen3_moe", config={"num_hidden_layers": 8}),
    Case("mixtral", config={"num_hidden_layers": 6}, checkpointing=False),
    Case("qwen3_moe", config={"vocab_size": 32768}),
    *(Case(family, drafts=1) for family in ("qwen3_moe", "mixtral")),
    *(Case(family, drafts=1, checkpointing=False) for family in ("qwen3_moe", "olmoe")),
    Case("qwen3_moe", drafts=3),
    Case("qwen3_moe", drafts=3, length=512, checkpointing=False),
    Case("mixtral", drafts=1, packing=False, batch=2, length=512),
    Case("qwen3_moe", drafts=1, config={"vocab_size": 32768}),
    *(Case("qwen3_moe", length=512, share=1.0, accumulation=count) for count in (2, 8)),
    Case("qwen3_moe", share=1.0, accumulation=4),
    Case("mixtral", share=1.0, accumulation=3),
    Case("gpt_oss", length=256, share=0.5, accumulation=4),
    *(Case(family, drafts=1, answers=64) for family in ("qwen3_moe", "mixtral")),
    *(Case("qwen3_moe", drafts=drafts, answers=64, checkpointing=False) for drafts in (1, 3)),
    Case("olmoe", drafts=3, answers=64, length=256),
    Case("qwen3_moe", method="dpo", packing=False),
    Case("olmoe", method="dpo", packing=False, checkpointing=False, length=512),
    Case("mixtral", method="dpo", packing=False, batch=2, length=512, config={"vocab_size": 32768}),
    Case("gpt_oss", method="dpo", packing=False, batch=2, length=256, checkpointing=False),
    Case("qwen3_moe", method="dpo", packing=False, length=512, share=1.0, accumulation=3),
    Case("qwen3_moe", method="kto", packing=False, batch=4, length=512),
    Case("olmoe", method="kto", packing=False, batch=2, length=512, checkpointing=False),
    Case("qwen3_moe", method="simpo", packing=False, batch=2, length=512, config={"vocab_size": 32768}),
]
