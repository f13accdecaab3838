#!/usr/bin/env bash
# lm-eval 0.4.13's MGSM (mgsm_direct, mgsm_cot_native, mgsm_en_cot; sums from school in eleven languages, and AfriMGSM)
# compares the number that a model gave after taking out all punctuation (ignore_punctuation: true). Minus signs and
# decimal points are punctuation: -18 and 1.8 are taken for 18 and score as right; 18.0 becomes 180 and $18.00 1800,
# which score as wrong. The English original, gsm8k, takes out commas, dollars and a full stop at the end alone, and
# takes neither -18 nor 1.8 for right (18.0 is wrong there too). Nothing is said.
# Follows: MGSM counts errors of sign and of a factor of ten as right, and its scores are not those of gsm8k. Score the
# logged samples again, as numbers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check lm_eval==0.4.13 datasets==5.2.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import yaml
from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.filters.extraction import RegexFilter

print({name: version(name) for name in ("lm_eval", "datasets")})
tasks = Path(find_spec("lm_eval").submodule_search_locations[0]) / "tasks"
files = {"mgsm": tasks / "mgsm/en_cot/cot_yaml", "gsm8k": tasks / "gsm8k/gsm8k.yaml"}


def scored(task, response):
    """The number that the task's own filter finds in a response, and the score of its own metric; 18 is the truth."""
    told = yaml.safe_load(files[task].read_text())
    step = next(entry for entry in told["filter_list"] if entry["name"] == "flexible-extract")["filter"][0]
    found = RegexFilter(step["regex_pattern"], step["group_select"]).apply([[response]], [{}])[0][0]
    metric = next(entry for entry in told["metric_list"] if entry["metric"] == "exact_match")
    ways = {name: metric[name] for name in ("ignore_case", "ignore_punctuation", "regexes_to_ignore") if name in metric}
    return found, float(exact_match_hf_evaluate(predictions=[found], references=["18"], **ways)["exact_match"])


results = {}
for number in ("18", "17", "-18", "1.8", "0.18", "18.0", "$18.00"):
    for task in files:
        found, results[task, number] = scored(task, f"The answer is {number}")
        print(f"{task:5}: the answer is 18, the model says {number:6}: found {found!r}, score {results[task, number]:g}")
assert [results["mgsm", number] for number in ("18", "17")] == [1, 0]
assert all(results["mgsm", number] == 1 for number in ("-18", "1.8")), "wrong answers that score"
assert all(results["mgsm", number] == 0 for number in ("18.0", "$18.00")), "right answers that do not"
assert all(results["gsm8k", number] == 0 for number in ("-18", "1.8", "0.18")) and results["gsm8k", "18"] == 1
print("seen: MGSM takes -18 and 1.8 for 18, and 18.0 for 180")
PYTHON
