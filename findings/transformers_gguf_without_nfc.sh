#!/usr/bin/env bash
# Tokenizers of Qwen bring text to Unicode's composed form (NFC) first: transformers' Qwen2Tokenizer does so by
# itself. A GGUF file cannot say so, but its `tokenizer.ggml.pre` ("qwen2") names the family, and by that name
# transformers 5.23.0 chooses how text is split. It returns the same class Qwen2Tokenizer, yet without the normaliser
# and without a word.
# Follows: letters whose accents are characters of their own, as macOS writes file names and as Vietnamese or Hindi
# text often comes, become other tokens than in training. Set backend_tokenizer.normalizer, or take the model's own
# tokenizer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 gguf==0.19.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version
from unicodedata import normalize

from gguf import GGUFWriter
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, Qwen2Tokenizer

print({name: version(name) for name in ("transformers", "tokenizers", "gguf")})
letters = sorted(ByteLevel.alphabet())
((accented, _),) = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("é")
tokens = [*letters, accented, "<|endoftext|>"]
writer = GGUFWriter("model.gguf", "qwen3moe")
writer.add_block_count(1)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("qwen2")
writer.add_token_list(tokens)
writer.add_token_types([1] * (len(tokens) - 1) + [3])
writer.add_token_merges([" ".join(accented)])
writer.add_eos_token_id(len(tokens) - 1)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.close()

of_file = AutoTokenizer.from_pretrained(".", gguf_file="model.gguf")
own = Qwen2Tokenizer(vocab={token: place for place, token in enumerate(tokens)}, merges=[tuple(accented)])
assert type(of_file) is type(own)
seen = {}
for form in ("NFC", "NFD"):
    text = normalize(form, "é")
    seen[form] = own(text).input_ids, of_file(text).input_ids
    print(f"é as {form} ({len(text)} characters): Qwen2Tokenizer {seen[form][0]}, of the GGUF file {seen[form][1]}")
print("normalisers:", own.backend_tokenizer.normalizer, "and", of_file.backend_tokenizer.normalizer)
assert seen["NFC"] == ([256], [256])
assert seen["NFD"][0] == [256] and len(seen["NFD"][1]) == 3, "the tokenizer of the file normalises now"
PYTHON
