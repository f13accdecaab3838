"""Families by their names: what other programs call them, and take for granted of them. Rows of data, with sources.

How a model is computed is never read off its name (`toolkit.architecture`); a file of another program's is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = [
    "DRAFT_CARRIER",
    "GGUF_NAMES",
    "GGUF_NEEDS_CONFIG",
    "GGUF_NORMALISED",
    "GGUF_NORMS_FROM_ONE",
    "GGUF_READ",
    "GGUF_ROTATED_IN_PAIRS",
    "GGUF_SIGMOID",
    "GGUF_SPLITS",
    "GGUF_TAKES_FOR_GRANTED",
    "GGUF_TILED_VALUE_HEADS",
    "GGUF_WITH_EXPERTS",
    "GGUF_WRITTEN",
    "MLX_ADDS_ONE",
    "MLX_EXPERTS",
    "MLX_TAKES_FOR_GRANTED",
    "MTP_LAYOUTS",
    "MTP_WITHOUT_END_NORM",
    "SEE_EACH_OTHER_PACKED",
    "VLLM_WANTS_EXPERTS",
]

MTP_LAYOUTS: tuple[tuple[str, str], ...] = (
    (r"^model\.mtp_block\.(\d+)\.", r"layers.\1.mtp_block."),
    (r"^model\.mtp_emb_norm\.(\d+)\.", r"layers.\1.enorm."),
    (r"^model\.mtp_hidden_norm\.(\d+)\.", r"layers.\1.hnorm."),
    (r"^model\.mtp_linear_proj\.(\d+)\.", r"layers.\1.eh_proj."),
    (r"^model\.mtp\.layers\.(\d+)\.final_layernorm\.", r"layers.\1.post_norm."),
    (r"^model\.mtp\.layers\.(\d+)\.pre_mlp_layernorm\.", r"layers.\1.mtp_block.post_attention_layernorm."),
)
"""Key names of multi-token-prediction heads that transformers' own mapping lacks: patterns and what they become in its
`MtpModel`. Sources: the weight maps of ERNIE-4.5-21B-A3B-PT (rows 1 to 4) and MiMo-V2-Flash (5 and 6)."""

DRAFT_CARRIER = "glm4_moe"
"""The family in whose clothes servers can take a head of ours for a model of another: DeepSeek-V3's module around a
block of grouped-query attention (biases, and norms of queries and keys, optional) and experts, some always at work.
Source: vLLM's glm4_moe_mtp.py, which `--speculative-config` gets at with a draft folder of its own."""

MTP_WITHOUT_END_NORM = re.compile(r"^model\.mtp_linear_proj\.")
"""Key names of heads that go from their block straight to the output head. Source: the same weight map of ERNIE-4.5."""

SEE_EACH_OTHER_PACKED = frozenset({"deepseek_v4", "inkling2_text", "inkling_text", "jamba", "minimax", "zaya"})
"""Model types of transformers whose layers see over the bounds of packed examples, whatever they are told of these.
Every family is asked (tests/parity/test_every_family.py), and every model before its first step."""

GGUF_NAMES: Mapping[str, str] = {
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "deepseek_v32": "deepseek32",
    "deepseek_v4": "deepseek4",
    "glm4_moe_lite": "deepseek2",
    "glm4v_moe": "glm4moe",
    "glm_moe_dsa": "glm-dsa",
    "granitemoehybrid": "granitehybrid",
    "granitemoeshared": "granitemoe",
    "hunyuan_v1_moe": "hunyuan-moe",
    "mimo_v2_flash": "mimo2",
    "mixtral": "llama",
    "solar_open": "glm4moe",
}
"""llama.cpp's name of an architecture, by model type, where more than hyphens differ from transformers'. Source: the
classes that its `conversion` package registers (llama.cpp of llama-cpp-python 0.3.36)."""

GGUF_ROTATED_IN_PAIRS = frozenset({"granitemoe", "granitemoehybrid", "granitemoeshared", "mixtral", "nemotron_h"})
"""Model types whose rows of query and key llama.cpp's converter reorders from halves to pairs (`LlamaModel.permute`,
for classes with `undo_permute`), since its rotary embedding of these architectures turns neighbours."""

GGUF_READ = frozenset(
    {
        *("afmoe", "gemma4", "kimi-linear", "mimo2", "mistral4"),
        *("deepseek2", "dots1", "ernie4_5-moe", "exaone-moe", "glm-dsa", "glm4moe", "gpt-oss"),
        *("granitehybrid", "granitemoe", "hunyuan-moe", "jamba", "lfm2moe", "llama", "minimax-m2"),
        *("nemotron_h_moe", "olmoe", "phimoe", "qwen2moe", "qwen35moe", "qwen3moe", "qwen3next"),
    }
)
"""llama.cpp's architectures of which a tiny model, written by its converter, came back here as it was, config and every
parameter. `scripts/parity/gguf_source.py` shows it."""

GGUF_NEEDS_CONFIG = frozenset({"gemma4", "kimi-linear", "mimo2", "mistral4"})
"""Those of `GGUF_READ` whose metadata does not say enough for a config, such as how each kind of layer rotates."""

GGUF_WITH_EXPERTS: Mapping[str, str] = {"nemotron_h_moe": "nemotron_h"}
"""Model type of an architecture that has a name of its own over there where it has experts."""

GGUF_TAKES_FOR_GRANTED: Mapping[str, Mapping[str, Any]] = {
    "afmoe": {"mup_enabled": True},
    "deepseek_v2": {"norm_topk_prob": False},
    "deepseek_v3": {"norm_topk_prob": False},
    "qwen3_moe": {"norm_topk_prob": True},
}
"""By model type: fields of which a GGUF file says nothing, because llama.cpp computes so whatever the file says
(`src/models/`), or because the converter writes no other value than the other one."""

GGUF_NORMS_FROM_ONE = frozenset({"qwen3next", "qwen35moe"})
"""llama.cpp's architectures whose norms are stored as one more than the weight. Source: `data_torch + 1` in its
`conversion/qwen.py`."""

GGUF_TILED_VALUE_HEADS = frozenset({"qwen35moe"})
"""Those whose value heads of linear attention are stored tiled. Source: `_LinearAttentionVReorderBase` there."""

_GGUF_GROUPS = (
    "leading_dense_block_count expert_feed_forward_length expert_shared_count expert_weights_scale expert_weights_norm "
    "expert_group_count expert_group_used_count expert_gating_func"
)
GGUF_WRITTEN: Mapping[str, str] = {
    "deepseek2": f"{_GGUF_GROUPS} attention.kv_lora_rank attention.q_lora_rank",
    "dots1": _GGUF_GROUPS,
    "ernie4_5-moe": (
        "leading_dense_block_count expert_feed_forward_length expert_shared_count expert_shared_feed_forward_length "
        "interleave_moe_layer_step"
    ),
    "glm4moe": _GGUF_GROUPS,
    "gpt-oss": "expert_feed_forward_length attention.sliding_window",
    "granitemoe": "attention.scale embedding_scale residual_scale logit_scale expert_shared_feed_forward_length",
    "llama": "",
    "minimax-m2": "expert_feed_forward_length expert_gating_func",
    "olmoe": "",
    "qwen2moe": "expert_feed_forward_length expert_shared_feed_forward_length",
    "qwen3moe": "expert_feed_forward_length",
}
"""llama.cpp's architectures whose files are written here without one to start from, and the keys that its converter
writes for them beside those that all have. `scripts/parity/merged_gguf.py` shows that its own library computes the
same of them."""

GGUF_SIGMOID = frozenset({"deepseek_v3", "dots1", "glm4_moe", "glm4_moe_lite", "minimax_m2", "solar_open"})
"""Model types whose experts are chosen by sigmoids, which a file says (`expert_gating_func`)."""

MLX_ADDS_ONE = ("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text")
"""Model types of whose norms mlx-lm's converter stores one more, since they are held as a distance from one."""
MLX_EXPERTS: Mapping[str, str] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe", "granitemoe", "mixtral", "olmoe"), "switch_mlp"),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe"), "switch_mlp"),
    **dict.fromkeys(("dots1", "gpt_oss"), "experts"),
}
"""Model types that mlx-lm computes alike (`scripts/parity/merged_checkpoints.py`), and its name of their experts."""
MLX_TAKES_FOR_GRANTED: Mapping[str, Mapping[str, Any]] = {
    **{name: {"norm_topk_prob": False} for name in ("deepseek_v2", "qwen2_moe")},
    "mixtral": {"sliding_window": None},
}

VLLM_WANTS_EXPERTS: Mapping[str, str] = {
    "gpt_oss": "vLLM 0.33 loads them in floats, in MXFP4, and packed under names that nothing else reads "
    "(experts.N.w13_weight_packed), in no FP8: export as merged, or of a base in MXFP4 as merged-source",
    **dict.fromkeys(
        ("granitemoe", "granitemoeshared"),
        "vLLM 0.33 wants rounded ones by a key each (experts.N.gate_proj), which transformers does not read of this "
        "family: export as merged",
    ),
    "granitemoehybrid": "vLLM 0.33 takes rounded ones in one tensor in FP8 alone, which transformers does not read: "
    "export as merged",
}
"""Why experts that lie in one tensor cannot be rounded for vLLM and read back: its `models/gpt_oss.py` and
`granitemoehybrid.py`, and `RoutedExperts.load_weights`."""

GGUF_SPLITS: Mapping[str, bool] = {
    "gpt-2": False,
    "qwen2": False,
    "qwen35": False,
    "gpt-4o": False,
    "llama-bpe": True,
    "tekken": True,
}
"""Ways to split text that have a name in GGUF files, one of each that transformers tells apart, and whether llama.cpp
takes a word that the vocabulary has without merging it together (`ignore_merges` in its `llama-vocab.cpp`)."""

GGUF_NORMALISED = frozenset({"deepseek-r1-qwen", "qwen2", "qwen35"})
"""llama.cpp's names of ways to split text whose tokenizers normalise it to NFC. Source: `tokenizer.json` of Qwen2.5."""
