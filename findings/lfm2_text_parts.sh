#!/usr/bin/env bash
# Content in parts, [{"type": "text", "text": …}], is what OpenAI's clients and servers send. The chat templates of LFM2
# (as TRL ships them for recognising the model) write such a content out as JSON, brackets and keys included, and
# transformers says nothing: the model is asked `[{"type": "text", "text": "Rome?"}]` instead of `Rome?`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check transformers==5.23.0 jinja2==3.1.6
"$folder/venv/bin/pip" install -q --disable-pip-version-check --no-deps trl==1.16.0
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import distribution, version
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

print({name: version(name) for name in ("transformers", "trl", "jinja2")})
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")))
folder = Path(distribution("trl").locate_file("trl/chat_templates"))
for name in ("lfm2", "lfm2_v2"):
    template = (folder / f"{name}.jinja").read_text()
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=template, tokenize=False, bos_token=""
        )
        for content in ("Rome?", [{"type": "text", "text": "Rome?"}])
    ]
    print(name, *map(repr, texts), sep="\n  ")
    assert texts[0] != texts[1], "parts are no longer written as JSON"
    assert '[{"type": "text", "text": "Rome?"}]' in texts[1]
PYTHON
