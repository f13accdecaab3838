#!/usr/bin/env bash
# mlx-lm 0.32.2: `mlx_lm.fuse --export-gguf` takes Mixtral, and its table of names has Mixtral's experts as they were in the
# checkpoint, one by one (experts.0.w1). When it loads a model mlx-lm stacks them, so that no line of the table fits:
# the experts are written as blk.0.block_sparse_moe.switch_ffn_gate.weight, where the format has blk.0.ffn_gate_exps.weight.
# The command says that the model was converted and saved; the metadata count the experts rightly; no reader of the
# format finds them.
# Follows: make such a file with llama.cpp's converter from the fused model, or rename the tensors.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    "mlx[cpu]==0.32.4" mlx-lm==0.32.2 transformers==5.24.0 gguf==0.19.0 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version
from pathlib import Path

from gguf import MODEL_ARCH, MODEL_TENSOR, MODEL_TENSORS, TENSOR_NAMES, GGUFReader
from mlx.utils import tree_flatten
from mlx_lm.gguf import convert_to_gguf
from mlx_lm.models import mixtral
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

print({name: version(name) for name in ("mlx", "mlx-lm", "gguf")})
words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a"]
raw = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained("model")
config = {
    "model_type": "mixtral", "vocab_size": len(words), "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2,
    "num_local_experts": 4, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 64,
}
model = mixtral.Model(mixtral.ModelArgs.from_dict(config))
convert_to_gguf(Path("model"), dict(tree_flatten(model.parameters())), config, "model.gguf")
reader = GGUFReader("model.gguf")
known = {TENSOR_NAMES[kind].format(bid=0) + ".weight" for kind in MODEL_TENSORS[MODEL_ARCH.LLAMA]}
written = {tensor.name for tensor in reader.tensors}
print("experts by the metadata:", reader.get_field("llama.expert_count").contents())
print("tensors that the format does not know:", sorted(written - known))
wanted = {TENSOR_NAMES[kind].format(bid=0) + ".weight"
          for kind in (MODEL_TENSOR.FFN_GATE_EXP, MODEL_TENSOR.FFN_DOWN_EXP, MODEL_TENSOR.FFN_UP_EXP)}
print("tensors that it has experts in, and the file has not:", sorted(wanted - written))
assert wanted <= known and not wanted & written
assert written - known == {f"blk.0.block_sparse_moe.switch_ffn_{part}.weight" for part in ("gate", "down", "up")}
print("seen: an exported Mixtral has no experts under the names of the format")
PYTHON
