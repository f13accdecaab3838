#!/usr/bin/env bash
# TRL 1.16 describes how answers under DeepSeek-R1-Distill's chat template are parsed (add_response_schema), and
# transformers' parse_response wants the prompt beside the answer. After a tool's result that template asks for the answer
# without opening a thought, and then the parsed content is not the answer: it begins with the user's question, the call
# and the tool's result out of the prompt.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    "torch>=2.10,<2.14" transformers==5.23.0 trl==1.16.0 datasets==5.2.0 accelerate==1.15.0 jinja2==3.1.6
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import distribution, version
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import add_response_schema

print({name: version(name) for name in ("transformers", "trl")})
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")),
    bos_token="<｜begin▁of▁sentence｜>",
    eos_token="<｜end▁of▁sentence｜>",
)
folder = Path(distribution("trl").locate_file("trl/chat_templates"))
tokenizer.chat_template = (folder / "deepseek_r1_distill.jinja").read_text()
add_response_schema(tokenizer)
call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
turns = [
    {"role": "user", "content": "Is it sunny in Rome?"},
    {"role": "assistant", "content": None, "tool_calls": [call]},
    {"role": "tool", "content": "Clouds all day."},
]
# apply_chat_template would take the null content out, which this template asks for.
(prompt,), _ = render_jinja_template(
    [turns], chat_template=tokenizer.chat_template, add_generation_prompt=True, **tokenizer.special_tokens_map
)
answer = "No, it is cloudy.<｜end▁of▁sentence｜>"
content = tokenizer.parse_response(answer, prefix=prompt)["content"]
print("prompt ", repr(prompt))
print("answer ", repr(answer))
print("content", repr(content))
assert content != "No, it is cloudy.", "the content is the answer now"
assert "Clouds all day." in content
PYTHON
