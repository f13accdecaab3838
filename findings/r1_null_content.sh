#!/usr/bin/env bash
# A tool call in OpenAI's form has "content": null, and DeepSeek's templates (here R1-Distill's, as TRL ships it for
# recognising the model) write a call only where the content is null. But transformers 5.23's apply_chat_template takes
# keys with null out of messages before it renders: the template then fails on the missing key, and with "content": ""
# it passes over the call without an error. Through transformers no form of a call reaches such a template.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check transformers==5.23.0 jinja2==3.1.6
"$folder/venv/bin/pip" install -q --disable-pip-version-check --no-deps trl==1.16.0
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import distribution, version
from pathlib import Path

from jinja2 import UndefinedError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

print({name: version(name) for name in ("transformers", "trl", "jinja2")})
template = Path(distribution("trl").locate_file("trl/chat_templates/deepseek_r1_distill.jinja")).read_text()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")))
call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}


def rendered(**content):
    turns = [{"role": "user", "content": "Rome?"}, {"role": "assistant", **content, "tool_calls": [call]}]
    return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, bos_token="")


for content in ({"content": None}, {}):
    try:
        print(content, "->", repr(rendered(**content)))
        raise SystemExit("the call is rendered now")
    except UndefinedError as error:
        print(content, "->", type(error).__name__, error)
empty = rendered(content="")
print({"content": ""}, "->", repr(empty))
assert "weather" not in empty, "the call is no longer passed over"
PYTHON
