#!/usr/bin/env bash
# inspect-ai 0.3.285's scorer match(numeric=True) rounds both numbers to five significant digits before it compares them
# as texts. So whole numbers of six digits and more are equal to their neighbours: 123,456 is scored as the right answer to
# a question whose answer is 123,457, and 1,234,599 for 1,234,567. location="exact" does so too. Its documentation tells
# which signs are taken away and why "60%" is not 60, but of this it tells nothing, and the answer that the log shows,
# "1.2346e+05", hides the digits. Numbers of five digits are compared whole. Other scorers (gsm8k of lm-eval) compare all.
# Follows: sums with money, populations or products of numbers score too high, and arithmetic is where the last digits are
# what is asked. Use match() without numeric, or exact(), for whole numbers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check inspect-ai==0.3.285
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import asyncio
from importlib.metadata import version

from inspect_ai.model import ModelOutput
from inspect_ai.scorer import Target, match
from inspect_ai.solver import TaskState

print({name: version(name) for name in ("inspect_ai",)})


def scored(answer, truth, **ways):
    """The score and the answer for the log, as inspect's own scorer gives them for a model that says `answer`."""
    output = ModelOutput.from_content("model", answer)
    state = TaskState(model="model", sample_id=1, epoch=1, input="How many?", messages=[], output=output)
    score = asyncio.run(match(numeric=True, **ways)(state, Target(truth)))
    return score.value == "C", score.answer


found = {}
for answer, truth in (
    ("99998", "99999"), ("123456", "123457"), ("123,456", "123457"), ("There are 1234599.", "1234567"),
    ("121932631", "121932999"), ("123456", "123556"),
):
    found[answer, truth] = scored(answer, truth)
    print(f"the answer is {truth}, the model says {answer!r}: right: {found[answer, truth][0]}, logged {found[answer, truth][1]!r}")
exact = scored("123456", "123457", location="exact")[0]
print(f'location="exact", 123456 for 123457: right: {exact}')
assert not found["99998", "99999"][0] and not found["123456", "123556"][0]
wrong = [("123456", "123457"), ("123,456", "123457"), ("There are 1234599.", "1234567"), ("121932631", "121932999")]
assert all(found[pair][0] for pair in wrong) and exact
print("seen: only five digits are compared")
PYTHON
